"""Measures of video quality, and the reports made of them."""
