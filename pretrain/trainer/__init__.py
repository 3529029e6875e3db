"""The training loop and what it is made of: batches, resume, loss spikes, evaluation, profiles."""
