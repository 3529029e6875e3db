"""Ranks of a job: environment, rendezvous, and collectives that propagate exceptions."""
