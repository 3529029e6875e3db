"""The configuration: its keys, the layers its values come from, command lines and help pages."""

CONFIG_FILE = "config.yaml"
"""name of the resolved configuration in a run folder"""
