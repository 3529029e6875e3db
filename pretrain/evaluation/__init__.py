"""Likelihoods of validation rows: estimates with their errors, comparisons, and the search for a clip interval."""
