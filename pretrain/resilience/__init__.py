"""Resilience: stop signals, hang watchdog, heartbeat, and the supervisor that restarts a run."""
