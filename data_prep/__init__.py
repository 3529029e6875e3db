"""Text to WebDataset shards to rows."""
