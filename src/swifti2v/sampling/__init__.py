"""Samplers as functions of a callable `denoise(x, sigma)`; no network is imported here."""
