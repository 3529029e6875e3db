"""Building of data sets: tokenize, pack, write shards, publish."""
