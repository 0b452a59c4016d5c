"""The Low-Res LoRA of Stage I."""
