"""Ranks of a job: who they are, how they meet, and collectives that propagate exceptions."""
