"""Data: procedural clips, manifests, latent caches."""
