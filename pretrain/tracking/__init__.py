"""Metrics of a run: sinks, console, curves and histograms."""
