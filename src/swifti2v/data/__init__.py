"""Data: manifests, clips, latent caches, batches."""
