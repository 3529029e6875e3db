"""The configuration: its keys, the layers its values come from, command lines and help pages."""
