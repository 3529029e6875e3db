"""The training loop and its parts: batches, resume, loss spikes, evaluation, profiles."""
