"""Preflight: start-up of ranks, and checks of nodes, links, clocks, folders and data before the first step."""
