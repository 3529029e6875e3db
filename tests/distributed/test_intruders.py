"""Processes of another user that take a rank's place, replay its messages, or write into the store of a job."""

from __future__ import annotations

import contextlib
import datetime
import functools
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain import cli
from pretrain.distributed import job_secret, proof, rendezvous
from pretrain.distributed.signed_store import SignedStore, sign, wait_for
from pretrain.distributed.spawn import FORKS, run_world
from tests.distributed import launch
from tests.unit import commands
from tests.unit.commands import Done

NOBODY = 65534
SECRET = "a text that is long enough for a secret"
COULD_READ = 99  # exit code of an intruder that has read the secret


class Code:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepare(rank: int, port: int, secret: str | None = None) -> None:
    """This process is a rank of two; rank 0 serves the store."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    if secret is not None:
        os.environ[job_secret.VARIABLE] = secret
    rendezvous._STALE, rendezvous._JOIN, rendezvous._LINGER, cli.RANK_0_PRINTS = 0.5, 60.0, 0.3, 0.1


def start(folder: Path, port: int, rank: int, secret: str | None = None, prepare=prepare):
    args = ("preflight", "--model.length", 32, "--run", folder / "run")
    return commands.start(*args, log=folder / f"rank{rank}", before=functools.partial(prepare, rank, port, secret))


def prepare_late(payload: bytes, rank: int, port: int, secret: str | None) -> None:
    """This rank reads a value only when it has been overwritten with the ``payload``."""
    prepare(rank, port, secret)
    get = SignedStore.get

    def late(store: SignedStore, key: str) -> bytes:
        store.wait([key])
        assert wait_for(lambda: store._inner.get(key) == payload, launch.TIMEOUT)
        return get(store, key)

    SignedStore.get = late


def end(folder: Path, processes: list) -> list[Done]:
    for process in processes:
        finish(process)
    logs = [folder / f"rank{rank}" for rank in range(len(processes))]
    return [
        Done(process.exitcode, *(log.with_suffix(x).read_text(errors="replace") for x in (".out", ".err")))
        for process, log in zip(processes, logs)
    ]


def finish(process) -> None:
    process.join(launch.TIMEOUT)
    process.kill()  # a job that hangs has another exit code
    process.join()


def intruder(port: int, attack: Callable[[dist.Store], None]):
    """Start ``attack`` as user nobody."""
    process = FORKS.Process(target=as_nobody, args=(port, attack), daemon=True)
    process.start()
    return process


def as_nobody(port: int, attack: Callable[[dist.Store], None]) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    seconds = datetime.timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=seconds)
    attack(dist.PrefixStore("start 0", store))


def send_pickles(folder: Path, store: dist.Store) -> None:
    """Read the secret, and without it take rank 1's place as a rank that sends objects."""
    store.wait(["greeting"])
    for path in (folder / "run").iterdir():
        with contextlib.suppress(PermissionError):
            path.read_bytes()
            os._exit(COULD_READ)
    payload = pickle.dumps(Code(folder / "ran"))
    store.set("answer 1", payload)
    with contextlib.suppress(RuntimeError):
        dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=datetime.timedelta(seconds=5))
        dist.all_gather_object([None, None], Code(folder / "ran"))


def guess(store: dist.Store) -> None:
    """Answer with another secret."""
    store.wait(["greeting"])
    store.set("answer 1", sign(b"guess", "answer 1", os.urandom(32)).hex())


def replay(messages: dict[str, bytes], store: dist.Store) -> None:
    """Send what rank 1 sent in another start of the job."""
    store.wait(["greeting"])
    for key, value in messages.items():
        if key != "greeting":
            store.set(key, value)


def overwrite(payload: bytes, store: dist.Store) -> None:
    """Overwrite everything that a rank has written with the ``payload``, until the store is gone."""
    everything = store.underlying_store
    with contextlib.suppress(RuntimeError):  # the store is gone
        while True:
            for key in everything.list_keys():
                if not re.search(r"/(greeting|answer|welcome)", key):  # written after the ranks have met
                    everything.set(key, payload)


def listen(port: int) -> dist.Store:
    """The store of a job, for a process that takes no part, once rank 0 is there."""
    store = dist.PrefixStore("start 0", dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
    store.wait(["greeting"])
    return store


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="starts processes of another user")


@needs_root
def test_another_user_does_not_become_a_rank(folder):
    for attack in (functools.partial(send_pickles, folder), guess):
        port = free_port()
        rank_0 = start(folder, port, 0)
        other = intruder(port, attack)
        (done,) = end(folder, [rank_0])
        assert done.code == 2, done.err
        (line,) = done.messages
        assert line.startswith("rank 1 does not know the job's secret: another process takes part at 127.0.0.1:"), line
        finish(other)
        assert other.exitcode != COULD_READ
        assert list(folder.iterdir()) == [*folder.glob("rank*")], "a refused job leaves no run folder"


@needs_root
def test_messages_of_another_start_are_refused(folder):
    port = free_port()
    ranks = [start(folder, port, 0, SECRET)]
    store = listen(port)
    ranks.append(start(folder, port, 1, SECRET))
    store.wait(["welcome 1"])
    messages = {key: store.get(key) for key in ("greeting", "answer 1", "welcome 1")}
    assert [done.code for done in end(folder, ranks)] == [0, 0]
    again = start(folder, port, 0, SECRET)
    intruder(port, functools.partial(replay, messages)).join(launch.TIMEOUT)
    (done,) = end(folder, [again])
    assert done.code == 2, done.err
    assert "rank 1 does not know the job's secret" in done.err


@needs_root
def test_another_user_in_the_store_of_a_job_ends_it_at_most(folder):
    port, payload = free_port(), pickle.dumps(Code(folder / "ran"))
    ranks = [start(folder, port, 0)]
    other = intruder(port, functools.partial(overwrite, payload))
    ranks.append(start(folder, port, 1, prepare=functools.partial(prepare_late, payload)))
    multiprocessing.connection.wait([rank.sentinel for rank in ranks], launch.TIMEOUT)
    time.sleep(cli.RANK_0_PRINTS)
    for rank in ranks:
        rank.kill()  # as a launcher does when one rank has ended
    found = [done for done in end(folder, ranks) if done.code != -signal.SIGKILL]
    assert found
    for done in found:
        assert done.code in (1, 2), done.err
        assert done.err
        assert "Traceback" not in done.err
    finish(other)
    assert not (folder / "ran").exists()


def test_ranks_with_different_secrets_end_with_a_line_each(folder):
    port = free_port()
    ranks = [start(folder, port, rank, SECRET + str(rank)) for rank in range(2)]
    first, second = end(folder, ranks)
    assert (first.code, second.code) == (2, 2)
    assert "BD3_JOB_KEY: is not the secret of rank 0" in first.err
    assert second.err.startswith("rank 1: BD3_JOB_KEY: is not the secret of rank 0; ")


def prove(rank: int, size: int, store: dist.Store, keys: list[bytes]) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store)
    try:
        proof.prove_membership(keys[rank])
    except ValueError as error:
        return str(error)
    return ""


def test_proof_on_the_connections():
    good, bad = b"k" * 32, b"x" * 32
    assert run_world(2, prove, [good, good]) == ["", ""]
    first, _ = run_world(2, prove, [good, bad])
    assert first.startswith("rank 1: did not prove the job's secret on the connections of ")


def test_secret_file_is_this_users_alone(tmp_path):
    path = tmp_path / "run" / "secret"
    with job_secret.SecretFile(path) as made:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert job_secret.read(path) == made.secret
        path.chmod(0o640)
        with pytest.raises(job_secret.Unreadable, match="others may read or write it"):
            job_secret.read(path)
        link = tmp_path / "link"
        link.symlink_to(path)
        with pytest.raises(job_secret.Unreadable):
            job_secret.read(link)
    assert list(tmp_path.iterdir()) == [link]
    (tmp_path / "run").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with job_secret.SecretFile(path):
        assert not path.is_symlink()
    assert not (tmp_path / "elsewhere").exists()
