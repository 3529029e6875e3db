"""What the project knows about Slurm."""
