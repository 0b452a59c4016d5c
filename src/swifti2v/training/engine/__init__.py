"""What every recipe shares: the loop, its checkpoints, its processes, its logs."""
