"""Two-stream attention: one mask predicate, and backends that compute it."""
