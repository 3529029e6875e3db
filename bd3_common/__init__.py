"""The lowest package: errors and exit codes, atomic writes, registries, plugins and log messages."""

from pathlib import Path

PACKAGES = ("bd3_common", "bd3_megatron", "data_prep", "pretrain", "slurm")
"""top packages of the project, for what copies or compares the code"""
ROOT = Path(__file__).parents[1]
"""folder that holds them"""
