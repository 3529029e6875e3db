"""Rendezvous: the ranks of a job find each other at one store and prove to each other that they know its secret.

Rank 0 signs a greeting with the secret, every other rank answers, and rank 0 welcomes each with a fresh salt; all
messages are bound to job, world size, rank and the nonces of both sides. The key of the session comes from secret and
salt. Whoever finds that another process takes part, or cannot go on, leaves a note in the store that ends all ranks.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bd3_common.errors import ConfigError, user_line
from bd3_common.text import shorten
from pretrain.distributed import job_secret
from pretrain.distributed.collectives import LostRank
from pretrain.distributed.ranks import Ranks
from pretrain.distributed.signed_store import NotSigned, SignedStore, sign, verify, wait_for

_LOG = logging.getLogger(__name__)

_NONCE = 32  # bytes
_JOIN = 300.0  # seconds until all ranks must be there: nodes do not start at the same moment
_NEWS = 10.0  # seconds until rank 0 says for whom it waits
_STALE = 10.0  # seconds in which values of an earlier start, and files that NFS still shows, must have gone
_LINGER = 1.0  # seconds that the rank which serves the store leaves the others to read its note
_RESOLVE = 8.0  # seconds to resolve the host name
_NOTE = "ends"
_LONGEST_NOTE = 300


@dataclass(frozen=True)
class Meeting:
    """Place at which the ranks of a job have met.

    Attributes:
        store: unsigned; what :func:`bd3_megatron.parallel.start` needs where torch's own threads use the store.
        signed: the same keys, with signed values.
        leave_note: tells the ranks that still wait for a key that this one ends, and why.
    """

    store: dist.Store
    signed: SignedStore
    leave_note: Callable[[BaseException], None]

    @property
    def key(self) -> bytes:
        """Key of the session, which only the ranks of this start know."""
        return self.signed.key


def rendezvous(ranks: Ranks, secret_file: Path, stop: Callable[[], None] = lambda: None) -> Meeting | None:
    """Meet all ranks of the job; None for a world of 1.

    Args:
        secret_file: file that all ranks can read; it holds the secret while they meet, unless the environment does.
        stop: called now and then during a long wait; raises if a signal asks to stop.

    Raises:
        ConfigError: no secret can be had, the address is wrong, or a process without the secret takes part.
        OSError: the secret cannot be written.
        LostRank: a rank does not come, or another rank ended.
    """
    if ranks.world_size == 1:
        return None
    secret = job_secret.from_environment()
    _keep_gloo_local(ranks)
    return _Rendezvous(ranks, _serve(ranks) if ranks.serves_store else _connect(ranks), stop).meet(secret, secret_file)


class _Rendezvous:
    def __init__(self, ranks: Ranks, store: dist.Store, stop: Callable[[], None]):
        # torchrun restarts ranks with the same store, which still has the values of those before.
        self.ranks, self.store = ranks, dist.PrefixStore(f"start {ranks.restart}", store)
        self._stop, self._late = stop, time.monotonic() + _NEWS / 2
        self._refused: dict[str, float] = {}

    def meet(self, secret: bytes | None, path: Path) -> Meeting:
        try:
            key = self._welcome(secret, path) if self.ranks.rank == 0 else self._answer(secret, path)
        except (ConfigError, OSError, LostRank) as error:
            self.leave_note(error)
            raise
        self._late = math.inf  # from now on a signal stops the run after a step
        # A name of its own: the store of a restarted job may hold values of an earlier start.
        store = dist.PrefixStore(hmac.digest(key, b"name", "sha256").hex()[:16], self.store)
        return Meeting(store, SignedStore(store, key, self._check), self.leave_note)

    def _welcome(self, secret: bytes | None, path: Path) -> bytes:
        """Rank 0's part: let every rank answer the greeting, and give it the salt."""
        with contextlib.ExitStack() as stack:
            if secret is None:
                secret = stack.enter_context(job_secret.SecretFile(path)).secret
            greeting, salt = os.urandom(_NONCE), os.urandom(_NONCE)
            self._put("greeting", secret, greeting)
            others = set(range(1, self.ranks.world_size))
            news, told = time.monotonic() + _NEWS, False

            def all_are_there() -> bool:
                nonlocal told
                for rank in sorted(others):
                    nonce = self._receive(f"answer {rank}", secret, greeting)
                    if nonce is not None:
                        self._put(f"welcome {rank}", secret, salt, greeting + nonce)
                        others.remove(rank)
                if others and not told and time.monotonic() > news:
                    told = True
                    _LOG.info(f"waiting at {self._where()} for {_named(others)} of {self.ranks.world_size}")
                return not others

            if not wait_for(all_are_there, _JOIN, self._check):
                raise LostRank(
                    f"rank 0: {_named(others)} of {self.ranks.world_size} did not come to {self._where()} "
                    f"within {_JOIN:.0f} s; look at how they ended, and start the job again"
                )
        # The file is gone: no rank needs it any more.
        return _session(secret, salt)

    def _answer(self, secret: bytes | None, path: Path) -> bytes:
        """Another rank's part."""
        rank = self.ranks.rank
        self._wait(lambda: self.store.check(["greeting"]))
        secret, greeting = self._secret_of(secret, path)
        nonce = os.urandom(_NONCE)
        self._put(f"answer {rank}", secret, nonce, greeting)
        salts: list[bytes] = []

        def welcome() -> bool:
            salt = self._receive(f"welcome {rank}", secret, greeting + nonce)
            salts.extend([] if salt is None else [salt])
            return bool(salts)

        self._wait(welcome)
        return _session(secret, salts[0])

    def _secret_of(self, secret: bytes | None, path: Path) -> tuple[bytes, bytes]:
        """The secret with which rank 0 signed its greeting, and the greeting."""
        found: list[tuple[bytes, bytes]] = []
        problem = ""

        def reads() -> bool:
            nonlocal problem
            try:
                known = secret if secret is not None else job_secret.read(path)
                greeting = self._receive("greeting", known)
                if greeting is not None:
                    found.append((known, greeting))
                problem = f"{job_secret.VARIABLE if secret is not None else path}: is not the secret of rank 0"
            except job_secret.Unreadable as error:
                problem = str(error)
                with contextlib.suppress(OSError):
                    os.listdir(path.parent)  # makes NFS look at the server again
            return bool(found)

        if not wait_for(reads, _STALE, self._check, longest=0.5):
            raise NotSigned(
                f"{problem}; all ranks must be of one user and see the same run folder, or have the same "
                f"{job_secret.VARIABLE}"
            )
        return found[0]

    # ---- messages ----

    def _name(self, name: str, nonces: bytes) -> str:
        return f"{self.ranks.name}: {name} {nonces.hex()}"

    def _put(self, name: str, secret: bytes, value: bytes, nonces: bytes = b"") -> None:
        self.store.set(name, sign(secret, self._name(name, nonces), value).hex())

    def _receive(self, name: str, secret: bytes, nonces: bytes = b"") -> bytes | None:
        """A value with the right signature; None while there is none.

        Raises:
            NotSigned: it has been a wrong one for too long. At first it may be one of an earlier start.
        """
        if not self.store.check([name]):
            return None
        with contextlib.suppress(ValueError):  # NotSigned is one
            return verify(secret, self._name(name, nonces), bytes.fromhex(self.store.get(name).decode("ascii")))
        since = self._refused.setdefault(name, time.monotonic())
        if name != "greeting" and time.monotonic() - since > _STALE:
            who = f"rank {name.split()[1]}" if name.startswith("answer") else "rank 0"
            raise NotSigned(
                f"{who} does not know the job's secret: another process takes part at {self._where()}; "
                "start the job again, with another port if it is another user's"
            )
        return None

    def _wait(self, there: Callable[[], bool]) -> None:
        if not wait_for(there, _JOIN, self._check):
            raise LostRank(
                f"rank {self.ranks.rank}: rank 0 gave no sign at {self._where()} within {_JOIN:.0f} s; "
                "look at how it ended, and start the job again"
            )

    def _check(self) -> None:
        """Raise if another rank has left a note. Anybody can write one: it ends the job, and is only quoted."""
        if time.monotonic() > self._late:
            self._stop()
        if self.store.check([_NOTE]):
            note = self.store.get(_NOTE)[:_LONGEST_NOTE].decode("utf-8", "replace")
            raise ConfigError(f"the job ends; a process at {self._where()} says: {shorten(note, _LONGEST_NOTE)}")

    def leave_note(self, error: BaseException) -> None:
        """Write why this rank ends, and leave the others a moment to read it from a store that ends with this rank."""
        text = (user_line(error) if isinstance(error, Exception) else None) or str(error)
        with contextlib.suppress(RuntimeError):
            if not self.store.check([_NOTE]):
                self.store.set(_NOTE, f"rank {self.ranks.rank} on {socket.gethostname()}: {text}"[:_LONGEST_NOTE])
            if self.ranks.serves_store:
                time.sleep(_LINGER)

    def _where(self) -> str:
        return f"{shorten(self.ranks.master_addr)}:{self.ranks.master_port}"


def _session(secret: bytes, salt: bytes) -> bytes:
    return hmac.digest(secret, b"session " + salt, "sha256")


def _named(ranks: set[int]) -> str:
    some = ", ".join(map(str, sorted(ranks)[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {some}"


# ---- the store's address ----


def _serve(ranks: Ranks) -> dist.Store:
    """Rank 0's store, which listens on the address that the others use, where this machine has it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(_listener(ranks)))
        address = listener.getsockname()[0]
        host = ranks.master_addr if ipaddress.ip_address(address.partition("%")[0]).is_unspecified else address
        store = dist.TCPStore(
            host,
            ranks.master_port,
            ranks.world_size,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
        )
        listener.detach()  # the store closes it
    return store


def _connect(ranks: Ranks) -> dist.Store:
    _addresses(ranks)
    return dist.TCPStore(
        ranks.master_addr, ranks.master_port, ranks.world_size, is_master=False, wait_for_workers=False
    )


def _listener(ranks: Ranks) -> socket.socket:
    problem: OSError | None = None
    for family, address in _bind_to(ranks):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((address, ranks.master_port))
            return listener
        except OSError as error:
            listener.close()
            problem = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
    reason = problem.strerror if problem is not None else "no address"
    raise LostRank(
        f"rank 0: cannot listen on {shorten(ranks.master_addr)}:{ranks.master_port} ({reason}); "
        "use another MASTER_PORT, or start the job again when the other process has ended"
    )


def _bind_to(ranks: Ranks) -> Iterator[tuple[int, str]]:
    """Addresses to listen on, the best first."""
    found = _addresses(ranks)
    loopback = [(family, address) for family, address in found if ipaddress.ip_address(address).is_loopback]
    if loopback and not ranks.one_machine:
        # /etc/hosts maps a machine's own name to 127.0.1.1; the other machines know another address of it.
        found = []
    yield from found
    if not loopback or not ranks.one_machine:  # behind address translation this machine lacks the address
        yield from [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]


def _addresses(ranks: Ranks) -> list[tuple[int, str]]:
    """(family, address) of the rendezvous host.

    Raises:
        ConfigError: its name cannot be resolved.
    """
    host, port = ranks.master_addr, ranks.master_port
    found: list[Any] = []
    problem = f"no answer within {_RESOLVE:.0f} s"

    def resolve() -> None:
        nonlocal problem
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:  # UnicodeError is a ValueError
            problem = getattr(error, "strerror", None) or "not a host name"

    # A thread, because an unreachable name server is asked for minutes.
    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_RESOLVE)
    if not found:
        raise ConfigError(
            f"MASTER_ADDR={shorten(host)}: cannot be resolved ({problem}); give the host name or address of rank 0"
        )
    return list(dict.fromkeys((info[0], str(info[4][0]).partition("%")[0]) for info in found))


def _keep_gloo_local(ranks: Ranks) -> None:
    """Let gloo listen on the loopback interface alone, if all ranks are on this machine."""
    if ranks.one_machine and "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
