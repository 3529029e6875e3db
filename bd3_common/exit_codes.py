"""Exit codes of `bd3`. Batch scripts and the supervisor read them."""

from __future__ import annotations

FAILED = 1
"""a bug, a lost rank, or a failing machine: another start may help"""
USAGE_ERROR = 2
"""a user's mistake: another start ends the same way"""
STOPPED = 75
"""stopped by a signal with a checkpoint; the same command continues the run (EX_TEMPFAIL of sysexits.h)"""
BAD_NODE = 76
"""the preflight found nodes that should be excluded"""
HUNG = 124
"""a rank made no progress for ``parallel.timeout_minutes`` (the code of timeout(1))"""
INTERRUPTED = 130
"""Ctrl-C (128 + SIGINT)"""
PIPE_CLOSED = 141
"""the reader of a pipe went away (128 + SIGPIPE)"""
