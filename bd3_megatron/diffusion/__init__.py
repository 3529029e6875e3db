"""The objective: noise schedules, noise draws keyed by sample, and the NELBO."""
