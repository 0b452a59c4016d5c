"""Networks of the two stages and what they need around them: codec, text, adapters, checkpoints, condition."""
