"""The format of a data set: manifest, shards, rows, tokenizer, and files here or elsewhere."""
