"""The two stages as users call them."""
