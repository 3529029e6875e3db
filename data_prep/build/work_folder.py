"""Work folder of an unfinished data set, beside it: finished parts and shards are kept and never repeated.

::

    .<name>.partial/  recipe.json  tokenizer.json  tokenizer.inputs (digest of its training inputs)  lock
        parts/<key>/  token streams of one part of the input; done.json once they are complete
        notes/        records of finished shards, and a digest of their inputs
        data/         becomes the data set by one rename
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bd3_common import schema
from bd3_common.atomic import no_follow, publish_folder, refuse_link, sync, write_text
from bd3_common.errors import UserError
from data_prep.build.encode import RESULT
from data_prep.errors import DataError
from data_prep.format.files import lies_at
from data_prep.format.manifest import FORMAT, MANIFEST, REJECTS, SPLITS, TOKENIZER, Recipe
from data_prep.sources import Part


class Work:
    """Paths of an unfinished data set, and its lock.

    Args:
        out: place of the finished data set: an absolute path, or a URL.
        folder: the work folder; None: beside the path ``out``.
    """

    def __init__(self, out: Path | str, folder: Path | None = None):
        self.out = out
        self.private = folder is not None  # beside the data set, its own rights decide
        self.folder = folder or Path(out).with_name(f".{Path(out).name}.partial")
        if not self.private:  # else _check_private does
            refuse_link(self.folder, "work folder", DataError)
        self.tokenizer = self.folder / TOKENIZER
        self._trained_on = self.folder / "tokenizer.inputs"
        self.notes = self.folder / "notes"
        self.data = self.folder / "data"

    def part(self, part: Part) -> Path:
        """Folder of a part; a changed source gets other folders."""
        source = part.source
        key = f"{source.path}\n{source.bytes}\n{source.stamp}\n{part.begin}\n{part.end}"
        return self.folder / "parts" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:20]

    def tokenizer_is_of(self, parts: Sequence[Part]) -> bool:
        """True if the tokenizer here was, or will be, trained on exactly these parts."""
        return _text(self._trained_on) == _digest(self, parts)

    def begin_tokenizer(self, parts: Sequence[Part]) -> None:
        """Record these parts as the tokenizer's; remove an earlier tokenizer and its streams."""
        self.tokenizer.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        write_text(self._trained_on, _digest(self, parts))

    def keep_shards_of(self, parts: Sequence[Part]) -> None:
        """Remove finished shards unless they come from these parts in this order."""
        path = self.notes / "inputs"
        if _text(path) == _digest(self, parts):
            return
        for folder in (self.notes, self.data):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._shard_folders():
            folder.mkdir(parents=True)
        write_text(path, _digest(self, parts))

    def _shard_folders(self) -> list[Path]:
        return [self.notes, *(self.data / split for split in SPLITS)]

    @contextmanager
    def opened(self, recipe: Recipe, discard: bool, shared: bool = False) -> Iterator[None]:
        """Create the folder or continue in an existing one, under its lock.

        A failure before any part was finished leaves nothing behind.

        Args:
            discard: start again if unfinished work has another recipe.
            shared: other processes may work in the folder at the same time.

        Raises:
            DataError: unfinished work has another recipe, another process works there, or the disk refuses.
        """
        created = [parent for parent in self.folder.parents if not parent.exists()]
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(shared) as lock:
                try:
                    self._check_recipe(recipe, discard)
                    for folder in (self.folder / "parts", *self._shard_folders()):
                        folder.mkdir(parents=True, exist_ok=True)
                    yield
                except BaseException as error:
                    # Under the lock: without it, or after publishing, the folder may belong to another process.
                    mine = not shared and not isinstance(error, _Busy) and lies_at(lock, self.folder / "lock")
                    if mine and not any(self.folder.glob(f"parts/*/{RESULT}")):
                        self.remove()
                    raise
        except BaseException as error:
            for folder in (self.folder, *created):  # only empty ones
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise DataError(
                    f"{self.out}: cannot be written ({error.strerror or error}); make room, check the rights, or "
                    "choose another folder; what is finished is kept"
                ) from None
            raise

    @contextmanager
    def exclusively(self, name: str) -> Iterator[bool]:
        """Wait until no other process is in a block of this name; yields False if the work was published meanwhile."""
        path = self.folder / f"{name}.lock"
        with ExitStack() as stack:
            try:
                handle = stack.enter_context(open(path, "a", opener=no_follow))
            except FileNotFoundError:
                yield False
                return
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield lies_at(handle.fileno(), path)

    def publish(self, replace: bool) -> None:
        """Move the finished data set to its place and remove the rest.

        Raises:
            OSError: another data set was published there meanwhile.
        """
        for split in SPLITS:
            sync(self.data / split)
        publish_folder(self.data, Path(self.out), replace, aside=self.folder / "replaced")
        self.remove()

    def sweep(self) -> None:
        """Remove temporary files of killed processes; no other process may be writing."""
        for path in self.data.glob("*/.*.tmp"):
            path.unlink()

    def tidy(self) -> None:
        """Remove the work folder of a prep that was killed after publishing."""
        if self.folder.exists() and not self.data.exists():
            self.remove_if_idle()

    def remove_if_idle(self, before: Callable[[], None] = lambda: None) -> None:
        """Call ``before`` and remove the folder, unless another process works there."""
        with suppress(_Busy), self._locked(shared=False):
            before()
            self.remove()

    def recipe(self) -> Recipe | None:
        """The recipe of the unfinished work; None if there is none, or one of another version."""
        with suppress(FileNotFoundError, UserError):
            return schema.read(self.folder / "recipe.json", Recipe)
        return None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _locked(self, shared: bool) -> Iterator[int]:
        """Lock the folder and yield the lock's descriptor. The system releases the lock when the process dies."""
        while True:
            self.folder.mkdir(exist_ok=True, mode=0o700 if self.private else 0o777)
            if self.private:
                _check_private(self.folder)
            with open(self.folder / "lock", "a", opener=no_follow) as handle:
                try:
                    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _Busy(
                        f"{self.out}: another bd3 prep is writing it; wait for it, or choose another --out"
                    ) from None
                if lies_at(handle.fileno(), self.folder / "lock"):
                    yield handle.fileno()
                    return

    def _check_recipe(self, recipe: Recipe, discard: bool) -> None:
        path = self.folder / "recipe.json"
        if path.exists():
            made = self.recipe()
            difference = "a recipe of another version" if made is None else recipe_difference(made, recipe)
            if difference is None:
                return
            if not discard:
                raise _Busy(
                    f"{self.folder}: holds unfinished work with {difference}; finish it with the same options, or "
                    "discard it with --overwrite"
                )
            for entry in self.folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()
        write_text(path, recipe.model_dump_json(indent=1))


def _digest(work: Work, parts: Sequence[Part]) -> str:
    """Digest of the inputs and their order."""
    return hashlib.sha256("".join(work.part(part).name for part in parts).encode()).hexdigest()


def _text(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return path.read_text(errors="replace")
    return None


def _check_private(folder: Path) -> None:
    """Refuse a folder that somebody else may have put there, and close it to others."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise _Busy(f"{folder}: is a link or belongs to another user; remove it, or choose another --work")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


class _Busy(DataError):
    """The folder belongs to other work and stays as it is."""


def recipe_difference(made: Recipe, wanted: Recipe) -> str | None:
    """``"length=128, not 256"`` for the first difference; None for equal recipes."""
    for key in Recipe.model_fields:
        if getattr(wanted, key) != getattr(made, key):
            return f"{key}={getattr(made, key)}, not {getattr(wanted, key)}"
    return None


def check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that ``bd3 prep`` has not written.

    Raises:
        DataError: ``out`` is not a data set or has other files.
    """
    foreign = None
    if out.is_symlink() or not out.is_dir():
        foreign = "not a folder"
    elif not (out / MANIFEST).is_file() or FORMAT.encode() not in (out / MANIFEST).read_bytes():
        foreign = f"it has no {MANIFEST} of ours"
    elif extra := {p.name for p in out.iterdir()} - {MANIFEST, TOKENIZER, REJECTS, *SPLITS}:
        foreign = f"it also holds {min(extra)}"
    if foreign:
        raise DataError(f"{out}: --overwrite replaces data sets only ({foreign}); choose another --out or remove it")
