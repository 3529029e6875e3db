"""`bd3 sample`: text from a run's checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from bd3_common.errors import ConfigError
from bd3_common.machine import installed_memory
from bd3_common.registry import Choice
from bd3_common.schema import MAX_COUNT
from bd3_common.text import counted, is_unicode, json_line, shorten, show
from bd3_megatron.config import ModelConfig, Seed
from bd3_megatron.sampling.algorithms import DECODING_ALGORITHMS
from pretrain.config.checkpoint_options import CheckpointOptions
from pretrain.config.command_line import parse_options
from pretrain.config.values import validate
from pretrain.run_folder import layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class SampleOptions(CheckpointOptions):
    """Sample text from a run's checkpoint, block by block."""

    prompt: str = Field(default="", description="text to continue; empty starts from BOS alone")
    tokens: int | None = Field(
        default=None, ge=1, le=MAX_COUNT, description="tokens to add; null fills the model's row"
    )
    count: int = Field(default=1, ge=1, le=100_000, description="samples")
    method: Annotated[str, Choice(DECODING_ALGORITHMS, summaries=True)] = Field(
        default="first_hitting", description="decoding algorithm of a block"
    )
    steps: int | None = Field(
        default=None, ge=1, le=10_000, description="steps per block for --method steps; null means one per token"
    )
    options: dict[str, str] = Field(default={}, description="the decoding algorithm's own options, NAME VALUE ...")
    top_p: float = Field(default=0.9, gt=0, le=1, description="nucleus")
    temperature: float = Field(default=1.0, ge=0, description="0 takes the most likely token")
    seed: Seed = Field(default=0, description="seed of the samples")
    stop: bool = Field(default=True, description="stop at EOS and at low entropy")
    json_: bool = Field(default=False, description="print one line of JSON per sample")


def main(args: list[str]) -> None:
    """`bd3 sample RUN`."""
    options = parse_options(SampleOptions, args, "bd3 sample")
    if not is_unicode(options.prompt):
        raise ConfigError(f"--prompt={shorten(options.prompt)}: is not UTF-8; write it in UTF-8")
    own = validate(DECODING_ALGORITHMS.load(options.method).Options, options.options)
    # Not for --help, nor for a mistyped flag.
    import torch

    from bd3_common.formats.tokenizer_file import read_tokenizer
    from bd3_megatron.sampling.block import Sampling
    from bd3_megatron.sampling.sampler import sample
    from pretrain.checkpoint.loaded_run import load_chosen

    run = Path(options.run)
    loaded = load_chosen(options)
    model = loaded.config.model
    if not (run / layout.TOKENIZER).is_file():
        raise ConfigError(f"{run}: has no {layout.TOKENIZER}; copy the one the model was trained with into it")
    if model.bos_id is None:
        raise ConfigError(f"{run / layout.CONFIG}: model.bos_id=null: set it to the id that begins a row")
    file = read_tokenizer(run / layout.TOKENIZER, ConfigError)
    tokenizer = file.load()
    for line in file.remarks:
        show(line, sys.stderr)
    prompt = [model.bos_id, *_prompt_ids(options.prompt, tokenizer, model, run / layout.TOKENIZER)]
    space = model.length - len(prompt)
    if space < 1 or (options.tokens or 0) > space:
        raise ConfigError(
            f"--tokens {options.tokens or 1}: the prompt has {len(prompt)} tokens with BOS and a row of this model "
            f"{model.length}; use {max(space, 0)} or fewer, or a shorter prompt"
        )
    check_memory(options.count, model, loaded.config.diffusion.block_size)
    sampling = Sampling(options.method, options.steps, options.top_p, options.temperature, options.stop, own)
    with loaded.engine() as engine:
        device = engine.world.device
        result = sample(
            engine.module,
            torch.tensor([prompt] * options.count, device=device),
            options.tokens or space,
            sampling,
            model.eos_id if options.stop else None,
            torch.Generator(device).manual_seed(options.seed),
        )
    for number, (ids, end) in enumerate(zip(result.ids.tolist(), result.ends)):
        text = tokenizer.decode(ids[1:end], skip_special_tokens=True)
        if options.json_:
            record = {"sample": number, "text": text, "tokens": end - len(prompt), "nfe": result.nfe}
            print(json_line(record))
        else:
            show(text if options.count == 1 else f"--- sample {number + 1}\n{text}")
    new = sum(end - len(prompt) for end in result.ends)
    passes = counted(result.nfe, "forward pass", "forward passes")
    print(f"{new} new tokens in {passes} (step {loaded.checkpoint.step})", file=sys.stderr)


def _prompt_ids(text: str, tokenizer: Tokenizer, model: ModelConfig, file: Path) -> list[int]:
    """Ids of the prompt, without BOS.

    Raises:
        ConfigError: the tokenizer cannot encode it, or gives the mask or an id that the model does not have.
    """
    from bd3_common.formats.tokenizer_file import LibraryError, library_errors

    try:
        with library_errors():
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except LibraryError as error:
        raise ConfigError(f"--prompt: {file} cannot encode it ({error}); use other text") from None
    if model.vocab_size is not None and max(ids, default=0) >= model.vocab_size:
        raise ConfigError(
            f"{file}: gives the id {max(ids)}, and model.vocab_size={model.vocab_size}; "
            "copy the one the model was trained with into the run folder"
        )
    if model.mask_id in ids:
        raise ConfigError(
            f"--prompt: holds the mask token (id {model.mask_id}); leave it out, a prompt has real tokens only"
        )
    return ids


def check_memory(count: int, model: ModelConfig, block_size: int) -> None:
    """Check that ``count`` rows can be sampled at once in this machine's memory.

    Counted are keys and values of all layers in fp32, and what the tokens of a block make of the vocabulary.

    Raises:
        ConfigError: names the count that fits.
    """
    vocabulary = model.vocab_size or 0
    row = 8 * model.length * model.layers * model.hidden + block_size * (16 * model.hidden + 40 * vocabulary)
    memory = installed_memory()
    if count > 1 and count * row > memory:
        raise ConfigError(
            f"--count {count}: takes about {count * row / 1e9:.0f} GB, this machine has {memory / 1e9:.0f}; "
            f"use {max(1, memory // row)} or fewer"
        )
