"""Rendezvous store whose values are signed: what a process without the job's key writes is refused.

Anybody who reaches the port of a store may read and write it. A process without the key cannot give the ranks another
address to connect to, nor a message; it can still delete values, or change counters, and so end the job.
"""

from __future__ import annotations

import datetime
import hmac
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from bd3_common.errors import ConfigError

_MAC = 32  # bytes
_SHORTEST_POLL, _LONGEST_POLL = 0.001, 0.05  # seconds


class NotSigned(ConfigError):
    """A value in the store that no rank of the job wrote."""


def sign(key: bytes, name: str, value: bytes) -> bytes:
    """The value behind its HMAC; the name is signed, too."""
    return _mac(key, name, value) + value


def verify(key: bytes, name: str, signed: bytes) -> bytes:
    """The value of :func:`sign`.

    Raises:
        NotSigned: somebody without the key wrote it.
    """
    value = signed[_MAC:]
    if not hmac.compare_digest(signed[:_MAC], _mac(key, name, value)):
        raise NotSigned(
            f"the rendezvous store holds a value ({name}) that no rank of this job wrote: another process takes part; "
            "start the job again with another port"
        )
    return value


def _mac(key: bytes, name: str, value: bytes) -> bytes:
    return hmac.digest(key, b"%d %s %s" % (len(name.encode()), name.encode(), value), "sha256")


def wait_for(
    there: Callable[[], bool], seconds: float, check: Callable[[], None] = lambda: None, longest: float = _LONGEST_POLL
) -> bool:
    """Poll until ``there()``; False after ``seconds``. ``check`` is called at every poll, and may raise."""
    end, pause = time.monotonic() + seconds, _SHORTEST_POLL
    while not there():
        check()
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True


class SignedStore(dist.Store):
    """A store with signed values over another one; counters are not signed.

    Args:
        check: called while a key is waited for; raises if the job ends.
    """

    def __init__(self, store: dist.Store, key: bytes, check: Callable[[], None] = lambda: None):
        super().__init__()
        self._inner, self.key, self._check = store, key, check
        self._timeout = datetime.timedelta(seconds=300)

    def set(self, key: str, value: str | bytes) -> None:
        self._inner.set(key, sign(self.key, key, _bytes(value)))  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        self.wait([key])
        return verify(self.key, key, self._inner.get(key))

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:  # type: ignore[override]
        seconds = (timeout or self._timeout).total_seconds()
        if not wait_for(lambda: self._inner.check(list(keys)), seconds, self._check):
            raise dist.DistStoreError(f"Timed out waiting {1000 * seconds:.0f}ms for keys {', '.join(keys)[:200]}")

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.wait(keys)
        return [verify(self.key, key, value) for key, value in zip(keys, self._inner.multi_get(list(keys)))]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        signed = [sign(self.key, key, _bytes(value)) for key, value in zip(keys, values)]
        self._inner.multi_set(list(keys), signed)  # type: ignore[attr-defined]

    def add(self, key: str, value: int) -> int:
        return self._inner.add(key, value)

    def check(self, keys: Sequence[str]) -> bool:
        return self._inner.check(list(keys))

    def delete_key(self, key: str) -> bool:
        return self._inner.delete_key(key)

    def num_keys(self) -> int:
        return self._inner.num_keys()

    def has_extended_api(self) -> bool:
        return False  # append and queues cannot be signed

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._timeout = timeout

    @property
    def timeout(self) -> datetime.timedelta:
        return self._timeout

    def clone(self) -> Any:
        return SignedStore(self._inner.clone(), self.key, self._check)  # type: ignore[attr-defined]


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
