"""Reading a data set: rows by number, the order of rows, mixes, and a cache for remote shards."""
