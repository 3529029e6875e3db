"""The configuration: its keys, the layers its values come from, command lines and help pages."""

CONFIG_FILE = "config.yaml"
"""name of the resolved configuration in a run folder"""
TOKENIZER_FILE = "tokenizer.json"
"""name of the tokenizer in a run folder, and in Hugging Face folders"""
