"""Slurm jobs: submit runs, sweeps and data preparations, and report the status of a run."""
