"""Two-stream attention: one mask predicate and the backends that must agree with it."""
