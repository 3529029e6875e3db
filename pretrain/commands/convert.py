"""`bd3 convert`: checkpoints to and from Hugging Face folders, and from an earlier format to the present one."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from bd3_common.atomic import refuse_link
from bd3_common.errors import ConfigError
from bd3_common.registry import Choice
from bd3_common.text import show
from bd3_megatron.config import Section
from bd3_megatron.hf.formats import FORMATS, TokenIds
from pretrain.config.checkpoint_options import CheckpointOptions
from pretrain.config.command_line import Positional, parse_options
from pretrain.config.subcommands import run_subcommand
from pretrain.run_folder import layout

if TYPE_CHECKING:
    from bd3_megatron.hf.files import Loaded

Format = Annotated[str, Choice(FORMATS, summaries=True)]


class ExportOptions(CheckpointOptions):
    """Write a run's checkpoint as a Hugging Face folder."""

    out: Positional[str] = Field(description="folder to write; must not exist")
    format: Format = Field(default="bd3", description="format of the folder")


class ImportOptions(Section):
    """Make a run folder from a Hugging Face folder. Its config.json tells the format."""

    source: Positional[str] = Field(description="Hugging Face folder, or a golden file")
    run: Positional[str] = Field(description="run folder to write; must not exist")
    format: Format | None = Field(default=None, description="format of SOURCE; null: config.json tells it")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the run's weights and activations")
    tokenizer: str | None = Field(
        default=None, description="tokenizer.json of the model; null takes SOURCE's, if it has one"
    )
    bos: str | None = Field(default=None, description="token that begins a row; null looks for the usual names")
    eos: str | None = Field(default=None, description="token that ends a document; null looks for the usual names")
    mask_id: int | None = Field(
        default=None, ge=0, description="id of the mask; null: the tokenizer's mask, else the vocabulary's last id"
    )


class UpgradeOptions(Section):
    """Rewrite a run's checkpoints that an earlier version wrote, in place, in the present format."""

    run: Positional[str] = Field(description="run folder")
    dry_run: bool = Field(default=False, description="print what would be done, and change nothing")


def main(args: list[str]) -> int:
    """`bd3 convert export RUN OUT`, `bd3 convert import SOURCE RUN` and `bd3 convert upgrade RUN`; the exit code."""
    usage = (
        "usage: bd3 convert export RUN OUT | bd3 convert import SOURCE RUN | bd3 convert upgrade RUN"
        "   (--help after each for options)"
    )
    commands = {"export": export_run, "import": import_run, "upgrade": upgrade_run}
    return run_subcommand("bd3 convert", "direction", commands, lambda: usage, args)


def export_run(args: list[str]) -> None:
    """Write the exported folder, and check that the same weights are read back if the format is exact."""
    options = parse_options(ExportOptions, args, "bd3 convert export")
    # Not for --help, nor for a mistyped flag.
    import torch

    from bd3_megatron.hf.convert import export, read_checkpoint
    from pretrain.checkpoint.loaded_run import load_chosen
    from pretrain.run_folder.identity import META_KEY

    out, tokenizer = Path(options.out), Path(options.run) / layout.TOKENIZER
    loaded = load_chosen(options)
    model, diffusion = loaded.config.model, loaded.config.diffusion
    tokens = TokenIds(model.bos_id, model.eos_id, model.mask_id, model.pad_id)
    tokenizer_file = tokenizer if tokenizer.is_file() else None
    run_id = loaded.checkpoint.meta.get(META_KEY)
    export(loaded.weights, model, diffusion, tokens, tokenizer_file, out, options.format, run_id)
    if FORMATS.load(options.format).exact:
        _, _, back = read_checkpoint(out, options.format, tokens)
        if any(not torch.equal(tensor, back[name]) for name, tensor in loaded.weights.items()):
            raise ConfigError(f"{out}: does not read back as the weights written; check the disk and export again")
    count = sum(tensor.numel() for tensor in loaded.weights.values())
    show(f"{out}: step {loaded.checkpoint.step}, {options.weights} weights, {count:,} parameters")


def import_run(args: list[str]) -> None:
    """Write a run folder whose checkpoint of step 0 has the imported weights; all of it or nothing."""
    options = parse_options(ImportOptions, args, "bd3 convert import")
    source, run = Path(options.source), Path(options.run)
    if run.exists():
        raise ConfigError(f"{run}: exists already; give a folder that does not")
    from bd3_common.atomic import atomic_folder
    from bd3_common.formats.tokenizer_file import read_tokenizer
    from bd3_megatron import parallel
    from bd3_megatron.config import ParallelConfig
    from bd3_megatron.engine.megatron import MegatronEngine
    from pretrain.checkpoint.writer import save_checkpoint
    from pretrain.config.resolve import save_config
    from pretrain.config.schema import RunConfig, TrainConfig
    from pretrain.run_folder.identity import META_KEY, Identity, write_identity

    beside = source / layout.TOKENIZER
    tokenizer = Path(options.tokenizer) if options.tokenizer else beside if beside.is_file() else None
    name, (model, diffusion, weights) = _read_source(source, tokenizer, options)
    config = RunConfig(run=str(run), model=model, diffusion=diffusion, train=TrainConfig(precision=options.precision))
    world = parallel.start(ParallelConfig())
    try:
        engine = MegatronEngine(config.engine(), world)
        engine.set_weights(weights)
        with atomic_folder(run.absolute()) as folder:
            identity = Identity(parents=[_parent(source)])
            write_identity(folder, identity)
            meta = {META_KEY: identity.id, "tokens": 0, "imported_from": source.name}
            save_checkpoint(folder, engine, 0, meta, keep=1)
            if tokenizer is not None:
                (folder / layout.TOKENIZER).write_bytes(read_tokenizer(tokenizer, ConfigError).data)
            save_config(config, folder / layout.CONFIG)
    except OSError as error:
        raise ConfigError(
            f"{run}: cannot be written ({error.strerror or error}); "
            "make room, check the rights, or choose another folder"
        ) from None
    finally:
        parallel.stop()
    count = sum(t.numel() for t in weights.values())
    show(f"{run}: {count:,} parameters of a checkpoint in format {name} as the checkpoint of step 0")


def upgrade_run(args: list[str]) -> None:
    """Upgrade every checkpoint of a run, and print what was done; damaged ones stay and are named at the end."""
    options = parse_options(UpgradeOptions, args, "bd3 convert upgrade")
    from pretrain.checkpoint.upgrade import upgrade_checkpoints
    from pretrain.run_folder.prepare import lock

    run = Path(options.run)
    if not (run / layout.CHECKPOINTS).is_dir():
        raise ConfigError(f"{run}: has no checkpoints; give the folder of a run that bd3 pretrain wrote")
    refuse_link(run, "run", ConfigError)
    damaged = []
    locked = lock(run)
    try:
        for done in upgrade_checkpoints(run, options.dry_run):
            if done.problem is None:
                show(f"{done.path}: {done.action}")
            else:
                damaged.append(f"{done.path}: {done.problem}")
    finally:
        os.close(locked)
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if damaged[1:] else ""
        raise ConfigError(f"{damaged[0]}{more}; a damaged checkpoint stays as it is: remove it")


def _parent(source: Path) -> str:
    """The run that an export names, or the digest of the files of weights, of other programs' folders."""
    from bd3_megatron.hf.files import open_source
    from bd3_megatron.hf.formats.bd3 import RUN
    from data_prep.format.files import sha256_file

    found = open_source(source).config.get(RUN)
    if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{32}", found):
        return f"run:{found}"
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    digests = [sha256_file(path) for path in files]
    return f"sha256:{digests[0] if len(digests) == 1 else hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


def _read_source(source: Path, tokenizer_file: Path | None, options: ImportOptions) -> tuple[str, Loaded]:
    """The format's name, and model, objective and weights. Special tokens are the format's or the tokenizer's."""
    from bd3_megatron.hf.convert import find_format, read_checkpoint
    from bd3_megatron.hf.files import open_source
    from data_prep.format.tokenizer import load_tokenizer, special_ids

    named = {"--bos": options.bos, "--eos": options.eos, "--mask-id": options.mask_id}
    stated = [flag for flag, value in named.items() if value is not None]
    tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
    opened = open_source(source)
    name = find_format(opened) if options.format is None else options.format
    tokens = TokenIds(mask=options.mask_id)
    if FORMATS.load(name).states_tokens:
        if stated:
            raise ConfigError(f"{stated[0]}: {source} states its own special tokens; leave it out")
    elif tokenizer is None:
        if options.bos or options.eos:
            raise ConfigError(f"{stated[0]}: names a token of a tokenizer; give that with --tokenizer")
    else:
        special = special_ids(tokenizer, options.bos, options.eos)
        own_mask = special.mask if tokenizer.id_to_token(special.mask) is not None else None
        tokens = TokenIds(special.bos, special.eos, own_mask if options.mask_id is None else options.mask_id)
    model, diffusion, weights = read_checkpoint(opened, name, tokens)
    size = 0 if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > model.vocab_size:
        raise ConfigError(
            f"{tokenizer_file}: has {size} tokens, the model {model.vocab_size}; give the tokenizer it was trained with"
        )
    return name, (model, diffusion, weights)
