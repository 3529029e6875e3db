"""Slurm: commands, environment variables, job options and batch scripts."""
