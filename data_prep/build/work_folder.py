"""The folder in which a data set is built, beside its place: what is finished there is never done again.

::

    .<name>.partial/  recipe.json  tokenizer.json  tokenizer.inputs (what it was trained on)  lock
        parts/<key>/  token streams of one part of the input; done.json once they are complete
        notes/        what is known of finished shards, and of which inputs they are
        data/         becomes the data set by one rename
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from bd3_common.atomic import sync, write_text
from data_prep.build.encode import RESULT
from data_prep.errors import DataError
from data_prep.format.files import lies_at
from data_prep.format.manifest import FORMAT, MANIFEST, REJECTS, SPLITS, TOKENIZER, Recipe
from data_prep.sources import Part


class Work:
    """Paths of the unfinished data set ``out`` (absolute), and its lock."""

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.tokenizer = self.folder / TOKENIZER
        self._trained_on = self.folder / "tokenizer.inputs"
        self.notes = self.folder / "notes"
        self.data = self.folder / "data"

    def part(self, part: Part) -> Path:
        """Folder of a part; a source that has changed has other parts."""
        source = part.source
        key = f"{source.path}\n{source.bytes}\n{source.stamp}\n{part.begin}\n{part.end}"
        return self.folder / "parts" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:20]

    def tokenizer_is_of(self, parts: Sequence[Part]) -> bool:
        """Whether the tokenizer here was, or is to be, trained on these parts and no others."""
        return _text(self._trained_on) == _digest(self, parts)

    def begin_tokenizer(self, parts: Sequence[Part]) -> None:
        """Make place for a tokenizer trained on these parts; streams of another are removed with it."""
        self.tokenizer.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        write_text(self._trained_on, _digest(self, parts))

    def keep_shards_of(self, parts: Sequence[Part]) -> None:
        """Remove finished shards unless they were cut from the streams of these parts, in this order."""
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
        """Make the folder, or go on in the one that is there, holding its lock.

        A failure before any part was finished leaves nothing behind.

        Args:
            discard: begin anew where unfinished work has another recipe.
            shared: whether others may work in the folder at the same time.

        Raises:
            DataError: unfinished work has another recipe, another process works there, or the disk refuses.
        """
        created = [parent for parent in self.out.parents if not parent.exists()]
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(shared) as lock:
                try:
                    self._check_recipe(recipe, discard)
                    for folder in (self.folder / "parts", *self._shard_folders()):
                        folder.mkdir(parents=True, exist_ok=True)
                    yield
                except BaseException as error:
                    # Under the lock: once it is free, the folder may be another's, as it may be after a publication.
                    mine = not shared and not isinstance(error, _Busy) and lies_at(lock, self.folder / "lock")
                    if mine and not any(self.folder.glob(f"parts/*/{RESULT}")):
                        self.remove()
                    raise
        except BaseException as error:
            for folder in (self.folder, *created):  # if they are empty
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
        """Wait until no other process is in a block of this name; false where the work was published meanwhile."""
        path = self.folder / f"{name}.lock"
        with ExitStack() as stack:
            try:
                handle = stack.enter_context(path.open("a"))
            except FileNotFoundError:
                yield False
                return
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield lies_at(handle.fileno(), path)

    def publish(self, replace: bool) -> None:
        """Move the finished data set to its place and remove the rest.

        Raises:
            OSError: something else is there by now.
        """
        for folder in (*(self.data / split for split in SPLITS), self.data):
            sync(folder)
        aside = None
        if replace and self.out.exists():
            aside = self.folder / "replaced"
            shutil.rmtree(aside, ignore_errors=True)  # of a prep that was killed after it had published
            self.out.rename(aside)
        try:
            self.data.rename(self.out)  # fails if another process has put a data set there meanwhile
        except OSError:
            if aside:
                aside.rename(self.out)
            raise
        sync(self.out.parent)
        self.remove()

    def sweep(self) -> None:
        """Remove what killed processes have left in the data set; nobody else may be writing to it."""
        for path in self.data.glob("*/.*.tmp"):
            path.unlink()

    def tidy(self) -> None:
        """Remove what is left of work that was published and then killed."""
        if self.folder.exists() and not self.data.exists():
            with suppress(_Busy), self._locked(shared=False):
                self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _locked(self, shared: bool) -> Iterator[int]:
        """Hold the lock of the folder, which the system releases when the process ends, however it does.

        Gives the descriptor of the lock.
        """
        while True:
            self.folder.mkdir(exist_ok=True)
            with (self.folder / "lock").open("a") as handle:
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
            try:
                difference = recipe_difference(Recipe.model_validate_json(path.read_bytes()), recipe)
            except ValidationError:
                difference = "a recipe of another version"
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
    """Of the inputs, their order included."""
    return hashlib.sha256("".join(work.part(part).name for part in parts).encode()).hexdigest()


def _text(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return path.read_text()
    return None


class _Busy(DataError):
    """The folder is somebody else's and stays as it is."""


def recipe_difference(made: Recipe, asked: Recipe) -> str | None:
    """``"length=128, not 256"`` for the first difference, None where the recipes are the same."""
    for key in Recipe.model_fields:
        if getattr(asked, key) != getattr(made, key):
            return f"{key}={getattr(made, key)}, not {getattr(asked, key)}"
    return None


def check_replaceable(out: Path) -> None:
    """Refuse to delete what ``bd3 prep`` has not written.

    Raises:
        DataError: ``out`` is not a data set or holds other files too.
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
