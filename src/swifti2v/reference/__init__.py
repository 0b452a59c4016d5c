"""Construction of the hybrid reference from a motion reference and the input image."""
