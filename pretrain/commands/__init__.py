"""The commands of `bd3`, one module each, named as typed: options and main."""
