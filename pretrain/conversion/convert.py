"""Conversion of checkpoints: exports, imports, averages, and the way there and back."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.formats.tokenizer_file import read_tokenizer
from bd3_common.text import counted
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.convert import export, find_format, format_of, read_checkpoint
from bd3_megatron.hf.files import LazyTensors, Source, open_source, shapes_of
from bd3_megatron.hf.formats import FORMATS, TokenIds
from bd3_megatron.hf.formats.bd3 import RUN
from bd3_megatron.hf.origin import Origin, read_origin
from data_prep.format.files import sha256_file
from pretrain.checkpoint.loaded_run import OpenRun, open_run
from pretrain.config.schema import RunConfig, TrainConfig
from pretrain.config.source_tokens import ImportChoices, tokenizer_of, tokens_of
from pretrain.conversion.new_run import Beginning, write_run
from pretrain.run_folder import layout
from pretrain.run_folder.identity import META_KEY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """An export that has been written, and read back if its format gives the same weights."""

    parameters: int
    bytes: int
    seconds: float
    notes: list[str]


def export_run(
    run: OpenRun, out: Path, format_name: str, dtype: str = "fp32", shard_bytes: int | None = None
) -> Exported:
    """Write a checkpoint folder from a run, tensor by tensor, and check that it reads back.

    Args:
        dtype: of the files: ``fp32`` or ``bf16``.
        shard_bytes: most bytes of one weight file; None: one file.

    Raises:
        ConfigError: as :func:`bd3_megatron.hf.convert.export`; or the folder reads back as other weights.
    """
    begin, kind, config = time.perf_counter(), DTYPES[dtype], run.config
    notes = export(
        run.weights,
        config.model,
        config.diffusion,
        run.tokens,
        run.tokenizer,
        out,
        format_name,
        run.checkpoint.meta.get(META_KEY),
        kind,
        shard_bytes,
        read_origin(run.path / layout.ORIGIN),
    )
    seconds = time.perf_counter() - begin
    if FORMATS.load(format_name).exact:
        back = read_checkpoint(out, format_name, run.tokens)[2]
        if any(not torch.equal(run.weights[name].to(kind), back[name]) for name in run.weights):
            raise ConfigError(f"{out}: does not read back as the weights written; check the disk and export again")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    count = sum(torch.Size(shape).numel() for shape in run.weights.shapes.values())
    return Exported(count, size, seconds, notes)


@dataclass(frozen=True)
class Imported:
    """A checkpoint that has been opened: its format, sections, weights, and what a run keeps of it."""

    source: Source
    format: str
    model: ModelConfig
    diffusion: DiffusionConfig
    weights: Mapping[str, Tensor]
    tokenizer: Path | None
    tokens: TokenIds
    origin: Origin | None = None
    parents: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(shape).numel() for shape in shapes_of(self.weights).values())


def open_import(path: Path, choices: ImportChoices) -> Imported:
    """Open a checkpoint for an import. Special tokens are the format's own or the tokenizer's.

    Raises:
        ConfigError: it cannot be read, is of no known format, or does not fit the tokenizer.
    """
    source = open_source(path)
    name = find_format(source) if choices.format is None else choices.format
    form = format_of(source, name)
    tokenizer = tokenizer_of(source, choices)
    tokens, size = tokens_of(source, tokenizer, choices, form.states_tokens)
    loaded = form.read(source, tokens)
    model, diffusion, weights = loaded
    if not form.own_vocabulary and model.vocab_size is not None and size > model.vocab_size:
        raise ConfigError(
            f"{tokenizer}: has {size} tokens, the model {model.vocab_size}; give the tokenizer it was trained with"
        )
    origin = form.origin(source, loaded, tokens)
    if choices.length is not None:
        model = ModelConfig(**model.model_dump() | {"length": choices.length})
    return Imported(source, name, model, diffusion, weights, tokenizer, tokens, origin, [_parent(source)])


def _parent(source: Source) -> str:
    """The run that an export names, or the digest of the files of weights, of other programs' folders."""
    found, path = source.config.get(RUN), source.path
    if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{32}", found):
        return f"run:{found}"
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digests = [sha256_file(file) for file in files]
    return f"sha256:{digests[0] if len(digests) == 1 else hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


def import_run(found: Imported, run: Path, precision: Literal["fp32", "bf16"] = "fp32") -> None:
    """Write a run folder whose checkpoint of step 0 has the imported weights; all of it or nothing.

    Raises:
        ConfigError: it cannot be written, or a tensor cannot be read.
    """
    config = RunConfig(
        run=str(run), model=found.model, diffusion=found.diffusion, train=TrainConfig(precision=precision)
    )
    meta = {"imported_from": found.source.path.name}
    tokenizer = None
    if found.tokenizer is not None:
        form = FORMATS.load(found.format)()
        tokenizer = form.run_tokenizer(found.source, read_tokenizer(found.tokenizer, ConfigError))
    write_run(run, Beginning(config, found.weights, found.parents, 0, meta, tokenizer, found.origin))


def average_run(runs: Sequence[OpenRun], out: Path) -> None:
    """Write a run folder with the mean of several checkpoints' weights as the checkpoint of the last one's step.

    Args:
        runs: the same run with several checkpoints.

    Raises:
        ConfigError: fewer than two checkpoints, or the folder cannot be written.
    """
    if len(runs) < 2:
        raise ConfigError(f"--steps: {counted(len(runs), 'checkpoint')}; give two or more")
    first = runs[0]

    def mean(name: str) -> Tensor:
        total = torch.zeros(first.weights.shapes[name], dtype=torch.float64)
        for run in runs:
            total += run.weights[name]
        return (total / len(runs)).float()

    weights = LazyTensors(first.weights.shapes, mean)
    run_id = first.checkpoint.meta.get(META_KEY)
    last = max(run.checkpoint.step for run in runs)
    write_run(
        out,
        Beginning(
            first.config.model_copy(update={"run": str(out)}),
            weights,
            [f"run:{run_id}"] if run_id else [],
            last,
            {"averaged_steps": sorted(run.checkpoint.step for run in runs)},
            None if first.tokenizer is None else first.tokenizer.read_bytes(),
            read_origin(first.path / layout.ORIGIN),
        ),
    )


@dataclass(frozen=True)
class Difference:
    """The largest difference of a tensor to itself after the way there and back."""

    tensors: int
    name: str
    largest: float


def roundtrip(path: Path, choices: ImportChoices, format_name: str | None = None) -> list[tuple[str, Difference]]:
    """Convert a checkpoint there and back, in temporary folders, and compare.

    A run folder goes out in the format and in again; a Hugging Face folder in and out again in its own.

    Returns:
        for each comparison its name and the largest difference, 0 where all tensors are bitwise equal.

    Raises:
        ConfigError: a step of the way fails, or a tensor is missing at its end.
    """
    with tempfile.TemporaryDirectory(prefix="bd3-roundtrip-") as temporary:
        folder = Path(temporary)
        if (path / layout.CONFIG).is_file():
            return [run_roundtrip(open_run(path), folder, format_name or "bd3")]
        found = open_import(path, replace(choices, format=format_name))
        import_run(found, folder / "run")
        export_run(open_run(folder / "run"), folder / "out", found.format)
        there, back = found.source.tensors(), open_source(folder / "out").tensors()
        return [(f"{found.format} -> run -> {found.format}", _compare(there, back))]


def run_roundtrip(run: OpenRun, folder: Path, name: str) -> tuple[str, Difference]:
    """Export a run into an empty folder and read it back; result and errors as of :func:`roundtrip`."""
    export_run(run, folder / "out", name)
    back = open_import(folder / "out", ImportChoices(name))
    return f"run -> {name} -> run", _compare(run.weights, back.weights)


def _compare(there: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> Difference:
    missing = sorted(set(shapes_of(there)) ^ set(shapes_of(back)))
    if missing:
        raise ConfigError(f"{missing[0]}: on one side only after the way there and back")
    worst = Difference(len(there), "", 0.0)
    for name in there:
        a, b = there[name].float(), back[name].float()
        if a.shape != b.shape:
            raise ConfigError(f"{name}: has shape {list(a.shape)}, after the way there and back {list(b.shape)}")
        off = 0.0 if torch.equal(a, b) else float((a - b).abs().max())
        if off > worst.largest:
            worst = Difference(len(there), name, off)
    return worst
