"""Formats of other programs that several packages read: safetensors headers, tokenizer files."""
