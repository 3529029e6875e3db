"""Atomic writers: whole files or none, nothing through links, and nothing left of killed writers."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_common import atomic
from bd3_common.atomic import atomic_file, atomic_folder, open_append, refuse_link, write_all, write_bytes, write_text
from bd3_common.errors import ConfigError, user_line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(folder: Path, lines: str) -> None:
    """Run lines of Python that end with a kill -9; ``folder`` is ``d``."""
    code = "import os, sys\nfrom pathlib import Path\nfrom bd3_common import atomic\nd = Path(sys.argv[1])\n" + lines
    done = subprocess.run([sys.executable, "-c", code, folder], check=False)
    assert done.returncode == -signal.SIGKILL


DIE = "os.kill(os.getpid(), 9)\n"


def test_a_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    os.chmod(tmp_path / "a", 0o640)

    def fail() -> None:
        with atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    write_text(tmp_path / "b", "", mode=0o600)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600
    assert names(tmp_path) == ["a", "b"]


def test_writes_go_on_until_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:3]))
    write_bytes(tmp_path / "a", b"ten  bytes")
    handle = open_append(tmp_path / "a")
    write_all(handle, b", and more")
    os.close(handle)
    assert (tmp_path / "a").read_bytes() == b"ten  bytes, and more"
    monkeypatch.setattr(os, "write", lambda handle, content: 0)
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(tmp_path / "a", b"x")
    assert user_line(caught.value) == f"{tmp_path / 'a'}: cannot write: No space left on device"
    assert names(tmp_path) == ["a"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_text(tmp_path / "a", "new")
    assert not (tmp_path / "a").is_symlink()
    with pytest.raises(OSError, match="symbolic links") as caught:
        open_append(tmp_path / "b")
    assert user_line(caught.value) == f"{tmp_path / 'b'}: is a link that is not followed; remove it"

    def swap() -> None:
        with atomic_file(tmp_path / "c") as temporary:
            temporary.unlink()
            temporary.symlink_to(tmp_path / "mine")

    with pytest.raises(OSError, match="symbolic links"):
        swap()
    assert (tmp_path / "mine").read_text() == "mine"
    assert not os.path.lexists(tmp_path / "c")


def test_a_linked_folder_is_refused_and_one_below_a_link_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refuse_link(tmp_path / "link" / "run", "run", ConfigError)
    with pytest.raises(
        ConfigError, match=f"^run={tmp_path}/link: is a link to {tmp_path}/real; give the folder itself"
    ):
        refuse_link(tmp_path / "link", "run", ConfigError)


MOMENTS = {
    "made, not locked": "import fcntl\nfcntl.flock = lambda *_: "
    + DIE
    + "with atomic.atomic_folder(d / 'out'): pass\n",
    "written": "with atomic.atomic_folder(d / 'out') as new:\n    (new / 'x').mkdir()\n    " + DIE,
    "before the rename": "atomic.publish_folder = lambda *_: " + DIE + "with atomic.atomic_folder(d / 'out'): pass\n",
    "a file": "with atomic.atomic_file(d / 'out.json') as new:\n    new.write_text('half')\n    " + DIE,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_killed_writer_leaves_the_next_one_removes(tmp_path: Path, moment: str) -> None:
    killed(tmp_path, MOMENTS[moment])
    assert len(names(tmp_path)) == 1
    with atomic_folder(tmp_path / "out") as new:
        (new / "y").touch()
    write_text(tmp_path / "out.json", "{}")
    assert names(tmp_path) == ["out", "out.json"]


def test_names_of_others_and_living_writers_are_left_alone(tmp_path: Path) -> None:
    gone = 2**22 + 1  # above the largest process id
    host, random = "0" * 8, "0123456789abcdef"
    other_host = [f".out.partial-{gone}-{host}-{random}", f".out.partial-{gone}@elsewhere"]
    not_ours = [".out.partial", ".out.partial-mine", ".out.backup-1", ".other.partial-1-2", ".e24.tmp", "out.partial-1"]
    for name in [*other_host, *not_ours]:
        (tmp_path / name).mkdir()
    (tmp_path / f".out.partial-{gone}").symlink_to(tmp_path / "out.partial-1")
    (tmp_path / f".out.partial-{gone}@{socket.gethostname()}").mkdir()  # of an earlier version
    (tmp_path / f".out.partial-{os.getppid()}@{socket.gethostname()}").mkdir()  # its process lives
    before = names(tmp_path)
    with atomic_folder(tmp_path / "out") as mine, atomic_folder(tmp_path / "out") as second:
        assert mine.is_dir()
        assert second.is_dir()
        os.rmdir(mine)  # so that the second one may be renamed
        os.mkdir(tmp_path / "out")
        os.rename(tmp_path / "out", mine)
    removed = f".out.partial-{gone}@{socket.gethostname()}"
    assert names(tmp_path) == sorted({*before, "out"} - {removed})


def test_files_of_living_writers_are_left_alone(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as first:
        atomic._swept.clear()
        write_text(tmp_path / "b", "b")
        assert first.exists()
        first.write_text("a")
    (tmp_path / ".a.tmp").touch()
    (tmp_path / f".a.1-{'0' * 8}-0123456789abcdef.tmp").touch()  # of another host
    atomic._swept.clear()
    write_text(tmp_path / "b", "c")
    assert names(tmp_path) == [f".a.1-{'0' * 8}-0123456789abcdef.tmp", ".a.tmp", "a", "b"]
