"""Hugging Face formats: the single-device model, weight maps, import and export."""
