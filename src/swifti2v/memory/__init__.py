"""What a run costs, and where its weights stand."""
