"""`bd3 convert`: checkpoints to and from Hugging Face folders, and from an earlier format to the present one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bd3_common.atomic import refuse_link
from bd3_common.errors import ConfigError
from bd3_common.registry import Choice
from bd3_common.text import counted, show
from bd3_megatron.config import MAX_LENGTH, Section
from bd3_megatron.hf.formats import FORMATS
from pretrain.config.checkpoint_options import CheckpointOptions
from pretrain.config.command_line import Positional, parse_options
from pretrain.config.subcommands import run_subcommand
from pretrain.run_folder import layout

Format = Annotated[str, Choice(FORMATS, summaries=True)]


class ExportOptions(CheckpointOptions):
    """Write a run's checkpoint as a Hugging Face folder."""

    out: Positional[str] = Field(description="folder to write; must not exist")
    format: Format = Field(default="bd3", description="format of the folder")
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="type of the weights in the files")
    shard_size: float = Field(default=5.0, gt=0, description="most gigabytes of one weight file")


class TokenOptions(Section):
    """Options that say what a checkpoint's files do not."""

    format: Format | None = Field(default=None, description="format of SOURCE; null: config.json tells it")
    tokenizer: str | None = Field(
        default=None, description="tokenizer.json of the model; null takes SOURCE's, if it has one"
    )
    bos: str | None = Field(
        default=None, description="token that begins a row; null: that of config.json, else one of the usual names"
    )
    eos: str | None = Field(
        default=None, description="token that ends a document; null: that of config.json, else one of the usual names"
    )
    mask_id: int | None = Field(
        default=None,
        ge=0,
        description="id of the mask; null: the tokenizer's mask, else the next id behind its tokens (bd3lm: the last)",
    )
    mask_init: Literal["mean", "noise", "eos"] = Field(
        default="mean",
        description="embedding of a mask that the model lacks: mean of all tokens', normal noise about it, or EOS's",
    )


class ImportOptions(TokenOptions):
    """Make a run folder from a Hugging Face folder. Its config.json tells the format."""

    source: Positional[str] = Field(description="Hugging Face folder, or a golden file")
    run: Positional[str] = Field(description="run folder to write; must not exist")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the run's weights and activations")
    length: int | None = Field(
        default=None, ge=2, le=MAX_LENGTH, description="tokens per row of the run; null: as many as SOURCE states"
    )


class InspectOptions(TokenOptions):
    """Print what a Hugging Face folder holds, and whether it can be imported."""

    source: Positional[str] = Field(description="Hugging Face folder, or a golden file")


class RoundtripOptions(TokenOptions):
    """Convert a checkpoint there and back in temporary folders, and print the largest difference."""

    source: Positional[str] = Field(description="run folder, or Hugging Face folder")


class AverageOptions(Section):
    """Make a run folder with the mean of the weights of several checkpoints of a run."""

    run: Positional[str] = Field(description="run folder")
    out: Positional[str] = Field(description="run folder to write; must not exist")
    steps: list[Annotated[int, Field(ge=0)]] = Field(description="steps of the checkpoints, two or more")
    weights: Literal["raw", "ema"] = Field(default="raw", description="the steps' own weights, or their EMA weights")


class UpgradeOptions(Section):
    """Rewrite a run's checkpoints that an earlier version wrote, in place, in the present format."""

    run: Positional[str] = Field(description="run folder")
    dry_run: bool = Field(default=False, description="print what would be done, and change nothing")


def main(args: list[str]) -> int:
    """`bd3 convert export|import|inspect|roundtrip|average|upgrade`; the exit code."""
    usage = (
        "usage: bd3 convert export RUN OUT | import SOURCE RUN | inspect SOURCE | roundtrip SOURCE | "
        "average RUN OUT --steps N N | upgrade RUN   (--help after each for options)"
    )
    commands = {
        "export": export,
        "import": import_,
        "inspect": inspect,
        "roundtrip": roundtrip,
        "average": average,
        "upgrade": upgrade,
    }
    return run_subcommand("bd3 convert", "direction", commands, lambda: usage, args)


def export(args: list[str]) -> None:
    """Write the exported folder, and check that the same weights are read back if the format is exact."""
    options = parse_options(ExportOptions, args, "bd3 convert export")
    # Not for --help, nor for a mistyped flag.
    from pretrain.conversion.convert import export_run, open_run

    run = open_run(Path(options.run), options.step, options.weights == "ema")
    done = export_run(run, Path(options.out), options.format, options.dtype, round(options.shard_size * 1e9))
    show(
        f"{options.out}: step {run.checkpoint.step}, {options.weights} weights, {done.parameters:,} parameters, "
        f"{done.bytes / 1e6:.1f} MB in {done.seconds:.1f} s ({done.bytes / 1e6 / done.seconds:.0f} MB/s)"
    )
    for line in done.notes:
        show(line)


def import_(args: list[str]) -> None:
    """Write a run folder whose checkpoint of step 0 has the imported weights; all of it or nothing."""
    options = parse_options(ImportOptions, args, "bd3 convert import")
    run = Path(options.run)
    _refuse_existing(run)
    from pretrain.conversion.convert import import_run, open_import

    found = open_import(Path(options.source), _choices(options, options.length))
    import_run(found, run, options.precision)
    show(f"{run}: {found.parameters:,} parameters of a checkpoint in format {found.format} as the checkpoint of step 0")


def inspect(args: list[str]) -> None:
    """Print format, shape, tokens and size; a checkpoint that cannot be imported is told in the usual line."""
    options = parse_options(InspectOptions, args, "bd3 convert inspect")
    from pretrain.conversion.convert import open_import

    found = open_import(Path(options.source), _choices(options))
    model, tokens = found.model, found.tokens
    lines = {
        "format": found.format,
        "backbone": f"{model.backbone}, {counted(model.layers, 'layer')} of {model.hidden}, {model.heads} heads of "
        f"{model.width_per_head}, {model.groups} of keys and values, MLP of {model.ffn}",
        "rows": f"up to {model.length} tokens, rope_theta {model.rope_theta:g}, scaling {model.rope_scaling.kind}",
        "objective": f"{found.diffusion.objective}, blocks of {found.diffusion.block_size}",
        "vocabulary": f"{model.vocab_size} with the mask {model.mask_id}; BOS {model.bos_id}, EOS {model.eos_id}"
        + ("" if tokens.size is None else f"; the tokenizer has {tokens.size} ids"),
        "head": "tied to the embedding" if model.tie_embeddings else "a weight of its own",
        "parameters": f"{found.parameters:,}",
    }
    for name, text in lines.items():
        show(f"{name:<12}{text}")


def roundtrip(args: list[str]) -> None:
    """Print the largest difference after the way there and back."""
    options = parse_options(RoundtripOptions, args, "bd3 convert roundtrip")
    from pretrain.conversion.convert import roundtrip as there_and_back

    for name, found in there_and_back(Path(options.source), _choices(options), options.format):
        equal = "all bitwise equal" if found.largest == 0 else f"largest difference {found.largest:.3g} in {found.name}"
        show(f"{name}: {counted(found.tensors, 'tensor')}, {equal}")


def average(args: list[str]) -> None:
    """Write the run folder of the averaged weights."""
    options = parse_options(AverageOptions, args, "bd3 convert average")
    out = Path(options.out)
    _refuse_existing(out)
    from pretrain.conversion.convert import average_run, open_run

    runs = [open_run(Path(options.run), step, options.weights == "ema") for step in sorted(set(options.steps))]
    average_run(runs, out)
    steps = ", ".join(str(run.checkpoint.step) for run in runs)
    show(f"{out}: mean of the {options.weights} weights of steps {steps}")


def upgrade(args: list[str]) -> None:
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


def _refuse_existing(run: Path) -> None:
    if run.exists():
        raise ConfigError(f"{run}: exists already; give a folder that does not")


def _choices(options: TokenOptions, length: int | None = None) -> Any:
    from pretrain.config.source_tokens import ImportChoices

    tokenizer = None if options.tokenizer is None else Path(options.tokenizer)
    return ImportChoices(
        options.format, tokenizer, options.bos, options.eos, options.mask_id, options.mask_init, length
    )
