"""Predictions of memory, traffic and time, and the devices they are made for."""
