"""`bd3 convert`: checkpoints to and from Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from bd3_megatron.config import ParallelConfig, Section
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.hf.convert import MODEL_TYPE, TokenIds, export, load_exported
from bd3_megatron.hf.files import Loaded, read_json
from bd3_megatron.hf.reference import load_reference
from data_prep.format.tokenizer import load_tokenizer, special_ids
from pretrain.checkpoint import reader as checkpoint
from pretrain.checkpoint.loaded_run import load_run
from pretrain.config.command_line import Positional, parse_options
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig, TrainConfig
from pretrain.config.values import did_you_mean
from pretrain.run_folder import layout
from pretrain.run_folder.staging import staged


class ExportOptions(Section):
    """Write a run's checkpoint as a Hugging Face folder (AutoModelForMaskedLM, trust_remote_code)."""

    run: Positional[str] = Field(description="run folder")
    out: Positional[str] = Field(description="folder to write; must not exist")
    step: int | None = Field(None, ge=0, description="checkpoint to take; null means the newest")
    weights: Literal["ema", "raw"] = Field("ema", description="averaged or last weights")


class ImportOptions(Section):
    """Make a run folder from a Hugging Face folder: the reference's bd3lm format or our own export."""

    source: Positional[str] = Field(description="Hugging Face folder, or a golden file")
    run: Positional[str] = Field(description="run folder to write; must not exist")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the run's weights and activations")
    tokenizer: str | None = Field(None, description="tokenizer.json of the model; null takes SOURCE's, if it has one")
    bos: str | None = Field(None, description="token that begins a row; null looks for the usual names")
    eos: str | None = Field(None, description="token that ends a document; null looks for the usual names")
    mask_id: int | None = Field(None, ge=0, description="null: the tokenizer's mask, else the vocabulary's last id")


def main(args: list[str]) -> int:
    """`bd3 convert export RUN OUT` and `bd3 convert import SOURCE RUN`; the exit code."""
    commands = {"export": export_run, "import": import_run}
    if not args or args[0] in ("-h", "--help"):
        print("usage: bd3 convert export RUN OUT | bd3 convert import SOURCE RUN   (--help after either for options)")
        return 0 if args else 2
    if args[0] not in commands:
        raise ConfigError(f"bd3 convert {args[0]}: unknown direction{did_you_mean(args[0], commands)}")
    commands[args[0]](args[1:])
    return 0


def export_run(args: list[str]) -> None:
    """Write the exported folder and check that it reads back as the same weights."""
    options = parse_options(ExportOptions, args, "bd3 convert export")
    run, out = Path(options.run), Path(options.out)
    loaded = load_run(run, options.step, averaged=options.weights == "ema")
    model = loaded.config.model
    tokenizer = run / layout.TOKENIZER
    tokens = TokenIds(model.bos_id, model.eos_id, model.mask_id)
    export(
        loaded.weights,
        model,
        loaded.config.diffusion,
        tokens,
        tokenizer if tokenizer.is_file() else None,
        out,
    )
    _, _, back = load_exported(out)
    if any(not torch.equal(tensor, back[name]) for name, tensor in loaded.weights.items()):
        raise ConfigError(f"{out}: does not read back as the weights written; check the disk and export again")
    count = sum(tensor.numel() for tensor in back.values())
    print(f"{out}: step {loaded.checkpoint.step}, {options.weights} weights, {count:,} parameters")


def import_run(args: list[str]) -> None:
    """Write a run folder whose checkpoint of step 0 holds the imported weights; all of it or nothing."""
    options = parse_options(ImportOptions, args, "bd3 convert import")
    source, run = Path(options.source), Path(options.run)
    if run.exists():
        raise ConfigError(f"{run}: exists already; give a folder that does not")
    beside = source / layout.TOKENIZER
    tokenizer = Path(options.tokenizer) if options.tokenizer else beside if beside.is_file() else None
    model, diffusion, weights = _read_source(source, tokenizer, options)
    config = RunConfig(run=str(run), model=model, diffusion=diffusion, train=TrainConfig(precision=options.precision))
    world = parallel.start(ParallelConfig())
    try:
        engine = MegatronEngine(config.engine(), world)
        engine.set_weights(weights)
        with staged(run.absolute(), overwrite=False) as folder:
            checkpoint.save(folder, engine, 0, {"tokens": 0, "imported_from": source.name}, keep=1)
            if tokenizer is not None:
                (folder / layout.TOKENIZER).write_bytes(tokenizer.read_bytes())
            save_config(config, folder / layout.CONFIG)
    finally:
        parallel.stop()
    print(f"{run}: {sum(t.numel() for t in weights.values()):,} parameters as the checkpoint of step 0")


def _read_source(source: Path, tokenizer_file: Path | None, options: ImportOptions) -> Loaded:
    """Model, objective and weights. An export states its special tokens; a reference model's are its tokenizer's."""
    named = {"--bos": options.bos, "--eos": options.eos, "--mask-id": options.mask_id}
    stated = [flag for flag, value in named.items() if value is not None]
    tokenizer = None if tokenizer_file is None else load_tokenizer(tokenizer_file)
    if source.is_dir() and read_json(source / "config.json").get("model_type") == MODEL_TYPE:
        if stated:
            raise ConfigError(f"{stated[0]}: {source} states its own special tokens; leave it out")
        model, diffusion, weights = load_exported(source)
    elif tokenizer is None:
        if options.bos or options.eos:
            raise ConfigError(f"{stated[0]}: names a token of a tokenizer; give that with --tokenizer")
        model, diffusion, weights = load_reference(source, options.mask_id)
    else:
        special = special_ids(tokenizer, options.bos, options.eos)
        own_mask = special.mask if tokenizer.id_to_token(special.mask) is not None else None
        mask_id = own_mask if options.mask_id is None else options.mask_id
        model, diffusion, weights = load_reference(source, mask_id)
        model = model.model_copy(update={"bos_id": special.bos, "eos_id": special.eos})
    if tokenizer is not None and tokenizer.get_vocab_size() > model.vocab_size:
        raise ConfigError(
            f"{tokenizer_file}: has {tokenizer.get_vocab_size()} tokens, the model {model.vocab_size}; "
            f"give the tokenizer it was trained with"
        )
    return model, diffusion, weights
