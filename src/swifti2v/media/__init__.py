"""Image and video files at the edges of the system: what comes in, what goes out, what waits on disk."""
