"""`bd3 convert import` of a reference model: its special tokens, and a run folder that is whole or absent."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from pretrain.checkpoint.reader import find_checkpoint, read_weights
from pretrain.config.resolve import load_saved
from pretrain.run_folder.identity import read_identity
from tests.unit.commands import bd3, limit_files

GOLDEN = Path(__file__).parents[3] / "data" / "bd3lm_block8.safetensors"


def bert_like(path: Path) -> Path:
    """A tokenizer whose special tokens have BERT's names, the mask not being the last."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(36))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(path))
    return path


def test_an_imported_model_takes_its_special_tokens_from_its_tokenizer(tmp_path):
    path, run, log = bert_like(tmp_path / "bert.json"), tmp_path / "run", tmp_path / "log"

    def ids(*options: object) -> tuple[int | None, ...]:
        shutil.rmtree(run, ignore_errors=True)
        done = bd3("convert", "import", GOLDEN, run, *options, log=log)
        assert done.code == 0, done.err
        model = load_saved(run / "config.yaml").model
        return model.bos_id, model.eos_id, model.mask_id

    assert ids() == (None, None, 256)
    told = bd3("sample", run, log=log)
    assert told.err == f"{run}: has no tokenizer.json; copy the one the model was trained with into it\n"
    assert ids("--mask-id", 7) == (None, None, 7)
    assert ids("--tokenizer", path, "--mask-id", 7, "--bos", "w0", "--eos", "w1") == (4, 5, 7)
    assert ids("--tokenizer", path) == (1, 2, 3)
    assert (run / "tokenizer.json").read_bytes() == path.read_bytes()
    sampled = bd3("sample", run, "--prompt", "w5 w6", "--tokens", 8, log=log)
    assert sampled.code == 0, sampled.err
    assert sampled.out.startswith("w5 w6")
    found = read_identity(run)
    assert found.parents == [f"sha256:{hashlib.sha256(GOLDEN.read_bytes()).hexdigest()}"]
    assert find_checkpoint(run).meta["run"] == found.id
    assert bd3("convert", "export", run, tmp_path / "out", log=log).code == 0
    assert bd3("convert", "import", tmp_path / "out", tmp_path / "child", log=log).code == 0
    assert read_identity(tmp_path / "child").parents == [f"run:{found.id}"]


DECODER = """
from bd3_megatron.config import Section
from bd3_megatron.sampling.algorithms import DECODING_ALGORITHMS, DecodingAlgorithm

class LeftToRight(DecodingAlgorithm):
    '''Leftmost masked position first.'''

    class Options(Section):
        per_step: int = 1

    def step(self, block):
        chosen = block.masked & (block.masked.cumsum(1) <= self.options.per_step)
        block.reveal(chosen, block.draw(block.logits(chosen)))

DECODING_ALGORITHMS.add("left_to_right", LeftToRight)
"""


def test_a_decoding_algorithm_of_a_plugin_is_sampled_with(tmp_path):
    tokenizer, run, log = bert_like(tmp_path / "bert.json"), tmp_path / "run", tmp_path / "log"
    assert bd3("convert", "import", GOLDEN, run, "--tokenizer", tokenizer, log=log).code == 0
    plugin = tmp_path / "left_decoder.py"
    plugin.write_text(DECODER)
    line = ("sample", run, "--plugin", plugin, "--method", "left_to_right", "--tokens", 15, "--no-stop", "--json")
    calls = {}
    for per_step in (1, 4):
        done = bd3(*line, "--options", "per_step", per_step, log=log)
        assert done.code == 0, done.err
        calls[per_step] = json.loads(done.out)["nfe"]
    assert calls == {1: 15, 4: 4}  # blocks of 8, the first without its BOS
    done = bd3(*line, "--options", "per_step", "few", log=log)
    assert (done.code, done.err) == (2, "per_step=few: not an integer\n")
    page = bd3("sample", "--plugin", plugin, "--help", log=log)
    assert "left_to_right: Leftmost masked position first" in " ".join(page.out.replace("│", "").split())


FORMAT = """
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.files import write_json
from bd3_megatron.hf.formats import FORMATS, CheckpointFormat
from safetensors.torch import save_file

class Plain(CheckpointFormat):
    '''Megatron names as they are.'''

    model_type = "plain"

    def read(self, source, tokens):
        model, diffusion = ModelConfig(**source.config["model"]), DiffusionConfig(**source.config["diffusion"])
        return model, diffusion, source.tensors()

    def write(self, folder, contents):
        sections = {"model": contents.model.model_dump(), "diffusion": contents.diffusion.model_dump()}
        write_json(folder / "config.json", {"model_type": "plain"} | sections)
        save_file(dict(contents.weights), folder / "model.safetensors")

FORMATS.add("plain", Plain)
"""


def test_a_format_of_a_plugin_is_written_and_read(tmp_path):
    first, out, second, log = (tmp_path / name for name in ("first", "out", "second", "log"))
    plugin = tmp_path / "plain_format.py"
    plugin.write_text(FORMAT)
    assert bd3("convert", "import", GOLDEN, first, log=log).code == 0
    done = bd3("convert", "export", first, out, "--format", "plain", "--plugin", plugin, log=log)
    assert done.code == 0, done.err
    told = bd3("convert", "import", out, second, log=log)
    assert told.err.startswith(f"{out}/config.json: model_type='plain': no format has it; known are bd3, bd3lm")
    done = bd3("convert", "import", out, second, "--plugin", plugin, log=log)
    assert done.code == 0, done.err
    assert "format plain" in done.out
    weights = [read_weights(find_checkpoint(run)) for run in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    line = ("convert", "import", out, tmp_path / "third", "--format")
    told = bd3(*line, "plane", "--plugin", plugin, log=log)
    assert told.err.startswith("format=plane: unknown checkpoint format; did you mean plain? use bd3, bd3lm, llama, ")
    told = bd3(*line, "bd3", log=log)
    assert told.err == f"{out}: model_type='plain', not 'bd3_megatron'\n"


def test_nothing_is_left_of_an_import_that_fails(tmp_path):
    run, full = tmp_path / "a" / "run", functools.partial(limit_files, 10_000)
    done = bd3("convert", "import", GOLDEN, run, log=tmp_path / "log", before=full)
    assert done.code == 2
    assert done.err.startswith(f"{run}: cannot be written (")
    assert done.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"log.out", "log.err"}
