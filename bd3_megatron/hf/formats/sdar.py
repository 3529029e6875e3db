"""SDAR: block diffusion models with Qwen3's layers, which SGLang, LMDeploy, JetEngine and Diffulex serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bd3_common import schema
from bd3_common.errors import ConfigError
from bd3_common.formats.tensor_writer import write_tensors
from bd3_common.formats.tokenizer_file import TokenizerFile
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import (
    LazyTensors,
    Loaded,
    Source,
    bytes_of,
    read_safetensors,
    section,
    tensor_entry,
)
from bd3_megatron.hf.formats import Contents, TokenIds, check_keys
from bd3_megatron.hf.formats._causal import EMBEDDING, HEAD, CausalFormat, with_rows, without_mask
from bd3_megatron.hf.mapping import lazy_from_hf, lazy_to_hf
from bd3_megatron.hf.origin import Origin
from bd3_megatron.hf.tokenizer import without_token

MASK_ID = 151669
"""id of the mask that SGLang and LMDeploy have in their source"""
MASK_TOKEN = "<|MASK|>"
SIDECAR = "bd3_megatron.sidecar"
"""what the format has no place for, under a name that other programs do not load: the mask's row, our configuration"""
_KEY = "sections"
_CODE = ("configuration_sdar.py", "modeling_sdar.py")


class SDAR(CausalFormat):
    """SDAR's folders. The clean stream is block-causal, and logits are not shifted: exactly this objective."""

    model_type: ClassVar[str] = "sdar"
    exact: ClassVar[bool] = True  # by the sidecar
    backbone: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "SDARForCausalLM"
    mask: ClassVar[tuple[str, int] | None] = (MASK_TOKEN, MASK_ID)
    default_head_dim: ClassVar[int | None] = 128

    def read(self, source: Source, tokens: TokenIds) -> Loaded:
        """See the base class; a folder that :meth:`write` made gives the run's own sections and rows back."""
        sidecar = source.path / SIDECAR
        if sidecar.is_file():
            return self._read_own(source)
        if tokens.mask is None or not tokens.size:
            check_keys(source, ("mask_token_id",))
            stated = schema.check(
                source.config["mask_token_id"], int, f"{source.config_file}: mask_token_id", error=ConfigError
            )
            tokens = TokenIds(tokens.bos, tokens.eos, stated, tokens.pad, max(tokens.size or 0, stated + 1))
        return super().read(source, tokens)

    def objective(self, source: Source, model: ModelConfig) -> DiffusionConfig:
        """Blocks of ``block_size``, trained at all noise levels."""
        return section(DiffusionConfig, {"block_size": source.config.get("block_size", 4)}, str(source.config_file))

    def origin(self, source: Source, loaded: Loaded, tokens: TokenIds) -> Origin | None:
        """None: the sidecar has what a run lacks, and other folders are written anew."""
        return None

    def run_tokenizer(self, source: Source, file: TokenizerFile) -> bytes:
        """See the base class: without the mask that :meth:`write` added, whose id the run does not have."""
        sidecar = source.path / SIDECAR
        if not sidecar.is_file() or self._read_own(source)[0].mask_id == MASK_ID:
            return file.data
        return without_token(file.content, MASK_ID)

    def write(self, folder: Path, contents: Contents) -> None:
        """See the base class; with its own code, and a sidecar for the way back."""
        model = contents.model
        self.check_writable(model, contents.diffusion)
        written = lazy_to_hf(contents.weights, model)
        weights = served(written, model)
        rows = {name: written[name][model.mask_id :][:1].clone() for name in (HEAD,) if name in written}
        sections = {"model": model.model_dump(), "diffusion": contents.diffusion.model_dump()}
        self.write_files(folder, contents, weights, None)
        entries = [tensor_entry(name, row) for name, row in rows.items()]
        write_tensors(folder / SIDECAR, entries, map(bytes_of, rows.values()), {_KEY: json.dumps(sections)})
        for name in _CODE:
            shutil.copyfile(Path(__file__).parents[1] / name, folder / name)

    def config(self, contents: Contents, weights: LazyTensors, origin: Origin | None) -> dict[str, Any]:
        """See the base class."""
        auto = {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        }
        own: dict[str, Any] = {"auto_map": auto, "block_size": contents.diffusion.block_size, "mask_token_id": MASK_ID}
        size, mask = contents.model.vocab_size, contents.model.mask_id
        assert mask is not None
        if mask != MASK_ID:
            own["unused_ids"] = [[mask, mask + 1], [size, MASK_ID]]
        return super().config(contents, weights, origin) | own

    def notes(self, contents: Contents) -> list[str]:
        """What engines have to be told."""
        size, model = contents.diffusion.block_size, contents.model
        lines = [
            f"blocks of {size}: SGLang takes it as block_size in --dllm-algorithm-config, LMDeploy as "
            f"dllm_block_length, JetEngine as block_length"
        ]
        if model.mask_id != MASK_ID:
            assert model.vocab_size is not None
            lines.append(
                f"the mask {model.mask_id} is {MASK_ID} here, the id in the source of SGLang and LMDeploy, with "
                f"{MASK_ID - model.vocab_size} unused ids before it: greedy decoding never writes one, but they take a "
                f"share of every probability in engines. JetEngine and Diffulex take the mask as an argument: "
                f"for them, use --format bd3, or a Qwen3 tokenizer from the start"
            )
        return lines

    def check_writable(self, model: ModelConfig, diffusion: DiffusionConfig) -> None:
        """See the base class."""
        if diffusion.objective == "causal":
            raise ConfigError(
                "format=sdar: its tokens see their whole block, those of diffusion.objective=causal do not; use qwen3"
            )
        if not model.traits.qk_norm or model.backbone != self.backbone:
            raise ConfigError(
                f"format=sdar: its layers normalize queries and keys as model.backbone=qwen3 does; "
                f"{model.backbone} does not. Use bd3"
            )
        assert model.vocab_size is not None
        if model.vocab_size > MASK_ID and model.mask_id != MASK_ID:
            raise ConfigError(
                f"format=sdar: engines have {MASK_ID} for the mask, which is another token of this vocabulary of "
                f"{model.vocab_size}; use bd3"
            )

    def _read_own(self, source: Source) -> Loaded:
        where = source.path / SIDECAR
        rows, metadata = read_safetensors(where)
        content = schema.parse(metadata.get(_KEY, "").encode(), dict[str, Any], where, error=ConfigError)
        model = section(ModelConfig, content.get("model") or {}, f"{where}: model")
        diffusion = section(DiffusionConfig, content.get("diffusion") or {}, f"{where}: diffusion")
        size, mask = model.vocab_size, model.mask_id
        if size is None or mask is None or not 0 <= mask < size:
            raise ConfigError(f"{where}: model.mask_id={mask}: not below model.vocab_size={size}; export the run again")
        stored = source.tensors()
        kept = {name: name for name in stored if not (model.tie_embeddings and name == HEAD)}

        def back(name: str, table: Tensor) -> Tensor:
            if len(table) <= MASK_ID:
                raise ConfigError(
                    f"{source.path}: {name} has {len(table)} rows, the mask is {MASK_ID}; export it again"
                )
            own = table[:size].clone()
            own[mask] = table[MASK_ID] if name == EMBEDDING else rows[name][0].to(own)
            return own

        if not model.tie_embeddings and HEAD not in rows:
            raise ConfigError(f"{where}: has no row of {HEAD}; export the run again")
        return model, diffusion, lazy_from_hf(with_rows(stored.renamed(kept), back), model)


def served(weights: LazyTensors, model: ModelConfig) -> LazyTensors:
    """Weights with the mask at :data:`MASK_ID`, and an untied head in which no id but a token's own can win."""
    size, mask = model.vocab_size, model.mask_id
    assert size is not None
    assert mask is not None
    safe = without_mask(weights, model)
    if mask == MASK_ID:
        return safe

    def spread(name: str, table: Tensor) -> Tensor:
        # Ids that no tokenizer gives: in the head a mean row like the mask's, which cannot be the highest.
        row = table[mask]
        filling = row if name == HEAD else torch.zeros_like(row)
        return torch.cat([table, filling.expand(MASK_ID - size, -1), row[None]])

    return with_rows(safe, spread)
