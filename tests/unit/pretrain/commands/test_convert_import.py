"""`bd3 convert import` of a reference model: its special tokens, and a run folder that is whole or absent."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from pretrain.config.resolve import load_saved
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


def test_nothing_is_left_of_an_import_that_fails(tmp_path):
    run, full = tmp_path / "a" / "run", functools.partial(limit_files, 10_000)
    done = bd3("convert", "import", GOLDEN, run, log=tmp_path / "log", before=full)
    assert done.code == 2
    assert done.err.startswith(f"{run}: cannot be written (")
    assert done.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"log.out", "log.err"}
