"""Documents of a data set: evaluation by document, runs that mask them, and what `bd3 eval` prints of them."""

from __future__ import annotations

import functools
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.diffusion.estimators import likelihood_objective
from bd3_megatron.diffusion.noise import Purpose, SampleKeys
from data_prep.build.prep import PrepConfig, prep
from data_prep.read.reader import RowReader
from pretrain.config.data_fit import resolve_model
from pretrain.config.schema import EvalConfig
from pretrain.evaluation.document_likelihood import Documents, cut_documents, ratio
from pretrain.evaluation.likelihood import evaluate
from pretrain.evaluation.rows import make_batch
from pretrain.tracking.metrics import read_metrics
from tests.unit import tiny
from tests.unit.commands import bd3, die_at
from tests.unit.pretrain.trainer.test_loop import Recipe

OBJECTIVES = {
    "blocks": DiffusionConfig(block_size=4),
    "two draws": DiffusionConfig(block_size=4, draws=2),
    "causal": DiffusionConfig(objective="causal", block_size=1),
}


@pytest.fixture(scope="module", params=["wrap", "stream"])
def short(request, tmp_path_factory) -> Path:
    """Rows of 32 tokens with documents of a few tokens up to several rows."""
    folder, chance = tmp_path_factory.mktemp(request.param), random.Random(1)
    words = [f"{a}{b}" for a in ("mer", "lan", "to", "wi") for b in ("ra", "den", "s", "")]
    with (folder / "texts.jsonl").open("w") as out:
        for n in range(120):
            text = " ".join(chance.choices(words, k=chance.choice([1, 2, 5, 10, 60])))
            out.write(json.dumps({"id": str(n), "text": text}) + "\n")
    options = {"length": 32, "tokenizer": "bpe:290", "validation_fraction": 0.4, "packing": request.param}
    prep(PrepConfig(inputs=(str(folder / "texts.jsonl"),), out=str(folder / "data"), **options))
    return folder / "data"


@pytest.fixture(scope="module")
def reader(short) -> RowReader:
    return RowReader(short, "validation")


def of_data(reader: RowReader) -> ModelConfig:
    ids = {"vocab_size": None, "mask_id": None, "bos_id": None, "eos_id": None}
    return resolve_model(tiny.shape(length=reader.length, **ids), reader.manifest, "data")


def by_document(world, reader: RowReader, diffusion: DiffusionConfig, masked: bool, micro: int = 8, **options):
    """The evaluation of a small model, and its documents."""
    model = of_data(reader)
    engine = tiny.engine(world, model, diffusion)
    settings = EvalConfig(**options)
    found = evaluate(
        engine, reader, model, diffusion, settings, micro, document_mask=masked, by_document=True, whole_documents=True
    )
    return found.summarize(), found.documents.only_whole(), found.documents.cut


# ---- sums ----


def one_by_one(world, reader: RowReader, trained: DiffusionConfig, masked: bool, rows: int, draws: int):
    """{document: (nats, tokens)} of documents that lie in the rows, every token added by itself."""
    model, diffusion = of_data(reader), likelihood_objective(trained)
    engine = tiny.engine(world, model, diffusion)
    chosen = np.arange(rows)  # the first ones, which hold whole documents
    lies_in, nats, tokens = defaultdict(set), defaultdict(float), defaultdict(int)
    for row in range(len(reader)):
        for number in reader.documents(np.array([row]))[0, 1:]:
            lies_in[number].add(row)
    for slot, row in enumerate(chosen):
        numbers = reader.documents(np.array([row]))[0]
        for draw in range(draws):
            keys = SampleKeys(*(np.array([x]) for x in (draw, row, slot)), batch=draw, batch_rows=rows)
            batch = make_batch(reader, model, diffusion, keys, 0, Purpose.EVALUATE, masked)
            (weighted,) = engine.forward([batch])
            for position in range(1, len(numbers)):
                number = numbers[position]
                at = position - 1 if diffusion.objective == "causal" else position
                nats[number] += weighted[:, at].double().mean().item() / draws
                starts = masked and diffusion.objective == "causal" and numbers[at] != number
                tokens[number] += draw == 0 and not starts
    here = {number for number in nats if lies_in[number] <= set(chosen.tolist()) and tokens[number]}
    whole = here - set(reader.unfinished.tolist())
    return {number: (nats[number], tokens[number]) for number in sorted(whole)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("rows", "draws"), [(None, 1), (9, 2)])
def test_sums_are_those_of_every_token_by_itself(world, reader, objective, masked, rows, draws):
    diffusion = OBJECTIVES[objective]
    draws = 1 if objective == "causal" else draws
    result, found, cut = by_document(world, reader, diffusion, masked, rows=rows, draws=draws)
    expected = one_by_one(world, reader, diffusion, masked, rows or len(reader), draws)
    assert found.numbers.tolist() == list(expected)
    assert found.tokens.tolist() == [tokens for _, tokens in expected.values()]
    assert found.nats == pytest.approx([nats for nats, _ in expected.values()], rel=1e-5)
    if rows is None:
        # All but the last document, which may go on in the tokens that filled no row.
        assert cut == len(reader.unfinished) == 1
        last = (reader.documents(np.arange(len(reader)))[:, 1:] == reader.unfinished).sum()
        assert result.tokens - found.tokens.sum() in (last, last - (objective == "causal" and masked))
    else:
        assert cut > 0
        assert 0 < len(found.numbers) < reader.manifest.splits["validation"].documents


def test_the_size_of_micro_batches_does_not_matter(world, reader):
    _, whole, _ = by_document(world, reader, OBJECTIVES["two draws"], True, micro=64, draws=2)
    _, split, _ = by_document(world, reader, OBJECTIVES["two draws"], True, micro=5, draws=2)
    assert (split.numbers.tolist(), split.tokens.tolist()) == (whole.numbers.tolist(), whole.tokens.tolist())
    assert split.nats == pytest.approx(whole.nats, rel=1e-5)


@dataclass
class Numbers:
    """Documents ``[n, L]`` of rows, as a reader gives them."""

    whole: np.ndarray
    unfinished: np.ndarray

    def __len__(self) -> int:
        return len(self.whole)

    def documents(self, indices: np.ndarray) -> np.ndarray:
        return self.whole[indices]


@settings(max_examples=200, deadline=None)
@given(
    starts=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=8),
    chosen=st.sets(st.integers(0, 7), min_size=1),
    unfinished=st.booleans(),
)
def test_a_document_is_cut_where_a_row_with_tokens_of_it_is_missing(starts, chosen, unfinished):
    numbers = np.cumsum(starts).reshape(-1, 4)
    rows = [row for row in chosen if row < len(numbers)] or [0]
    last = numbers[-1, -1:] if unfinished else numbers[-1, :0]
    found = cut_documents(Numbers(numbers, last), np.array(rows))
    seen, missing = (
        {d for row in some for d in numbers[row, 1:]} for some in (rows, set(range(len(numbers))) - set(rows))
    )
    assert set(found) & seen == seen & (missing | set(last))


class Elsewhere(RowReader):
    """The data set with other texts in the place of all documents but one."""

    def __init__(self, reader: RowReader, kept: int):
        super().__init__(reader.folder, reader.split)
        self.kept = kept

    def rows(self, indices: np.ndarray) -> np.ndarray:
        rows = super().rows(indices)
        return np.where(self.documents(indices) == self.kept, rows, rows[:, ::-1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_a_document_is_worth_does_not_depend_on_its_neighbours(world, reader, objective):
    diffusion = OBJECTIVES[objective]
    numbers, counts = np.unique(reader.documents(np.arange(len(reader))), return_counts=True)
    some = numbers[(counts > 4) & (counts < 24)][1:4]  # each in a row with others
    for masked in (True, False):
        _, before, _ = by_document(world, reader, diffusion, masked)
        for number in some:
            _, after, _ = by_document(world, Elsewhere(reader, number), diffusion, masked)
            here = before.numbers == number
            assert np.array_equal(before.nats[here], after.nats[here]) == masked
            assert not np.allclose(before.nats[~here], after.nats[~here], rtol=1e-3)


# ---- statistics ----

PAIRS = st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 3000)), min_size=2, max_size=30)


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS)
def test_means_and_standard_errors_over_documents(pairs):
    nats, tokens = (np.array(x) for x in zip(*pairs))
    result = Documents(np.arange(len(pairs)), nats.astype(float), tokens, np.ones(len(pairs), bool)).summarize()
    n, total = len(pairs), int(tokens.sum())
    nelbo = math.fsum(nats) / total
    variance = math.fsum((x - nelbo * t) ** 2 for x, t in pairs) / (n - 1)
    assert (result.documents, result.documents_cut, result.document_tokens) == (n, 0, total)
    assert result.document_nelbo == pytest.approx(nelbo, rel=1e-9)
    assert result.document_nelbo_stderr == pytest.approx(math.sqrt(n * variance) / total, rel=1e-6, abs=1e-9 * nelbo)
    assert result.document_perplexity == math.exp(min(result.document_nelbo, 700))
    assert result.document_perplexity_stderr == result.document_perplexity * result.document_nelbo_stderr
    each = [x / t for x, t in pairs]
    mean = math.fsum(each) / n
    assert result.document_mean == pytest.approx(mean, rel=1e-9)
    error = np.std(each, ddof=1) / math.sqrt(n)
    assert result.document_mean_stderr == pytest.approx(error, rel=1e-6, abs=1e-9 * mean)


def test_the_error_of_a_ratio_is_what_repeated_samples_show():
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 100, (2000, 50))
    nats = tokens * (3 + generator.normal(size=tokens.shape)) + generator.normal(size=tokens.shape)
    found = np.array([ratio(x, t) for x, t in zip(nats, tokens)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.05)


def test_a_single_document_has_no_standard_error():
    result = Documents(np.array([4]), np.array([6.0]), np.array([3]), np.array([True])).summarize()
    assert (result.document_nelbo, result.document_mean) == (2.0, 2.0)
    record = result.record()
    assert record["document_nelbo_stderr"] is record["document_mean_stderr"] is None
    json.dumps(record, allow_nan=False)


def test_rows_without_a_whole_document_are_refused():
    with pytest.raises(ConfigError, match="no document lies wholly in the rows evaluated"):
        Documents(*(np.arange(1, 5),) * 3, np.zeros(4, bool)).summarize()


# ---- runs and commands ----


class Masked(Recipe):
    """A run that keeps attention to documents."""

    def __init__(self, folder: Path, data_set: Path):
        super().__init__(folder, data_set)
        self.args = (*self.args, "--data.document-mask")


@pytest.fixture(scope="module")
def masked(tmp_path_factory, short) -> Masked:
    """Not interrupted."""
    recipe = Masked(tmp_path_factory.mktemp("masked"), short)
    done = recipe.finish()
    assert done.code == 0, done.err
    return recipe


def test_a_run_that_is_killed_goes_on_with_its_documents(masked, short, tmp_path):
    recipe = Masked(tmp_path, short)
    process = recipe.start(before=functools.partial(die_at, "pretrain.trainer.loop", "Trainer._train_step", 4))
    process.join()
    assert process.exitcode == -9
    done = recipe.finish()
    assert done.code == 0, done.err
    assert recipe.metrics == masked.metrics
    expected = masked.weights()
    assert all(torch.equal(x, expected[name]) for name, x in recipe.weights().items())


def test_the_mask_changes_what_is_trained_and_may_not_change_on_the_way(masked, short, tmp_path):
    plain = Recipe(tmp_path, short)
    assert plain.finish().code == 0
    losses = [
        [record["loss"] for record in read_metrics(recipe.run) if record["split"] == "train"]
        for recipe in (plain, masked)
    ]
    assert len(losses[0]) == len(losses[1]) == 6
    assert all(one != other for one, other in zip(*losses))
    done = plain.finish("--data.document-mask")
    line = f"data.document_mask=True: the run in {plain.run} was started with False; use that, or another --run\n"
    assert (done.code, done.out, done.err) == (2, "", line)


def test_eval_masks_as_the_run_did_and_reports_by_document(masked, tmp_path):
    last = [record for record in read_metrics(masked.run) if record["split"] == "validation"][-1]
    plain = json.loads(bd3("eval", masked.run, "--rows", 8, "--json", log=tmp_path / "log").out)
    assert plain["nelbo"] == last["nelbo"]
    assert "documents" not in plain

    file = tmp_path / "documents.jsonl"
    args = ("eval", masked.run, "--documents-file", file, "--per-document")
    done = bd3(*args, "--json", log=tmp_path / "log")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    found, lines = json.loads(done.out), [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line.keys() == {"document", "tokens", "nats"} for line in lines)
    assert [line["document"] for line in lines] == sorted({line["document"] for line in lines})
    assert (found["documents"], found["documents_cut"]) == (len(lines), 1)  # the last may go on in dropped tokens
    assert found["document_tokens"] == sum(line["tokens"] for line in lines) < found["tokens"]
    nelbo = sum(line["nats"] for line in lines) / found["document_tokens"]
    assert found["document_nelbo"] == pytest.approx(nelbo, rel=1e-9)

    printed = bd3(*args, "--rows", 8, log=tmp_path / "log").out.splitlines()
    assert [line.split("  ")[0] for line in printed[-4:]] == [
        "whole documents",
        "NELBO of documents",
        "perplexity",
        "mean of documents",
    ]


def test_a_folder_that_is_not_there_is_named_before_anything_is_computed(masked, tmp_path):
    done = bd3("eval", masked.run, "--documents-file", tmp_path / "no" / "file", log=tmp_path / "log")
    line = f"documents_file={tmp_path}/no/file: there is no folder {tmp_path}/no; make it first\n"
    assert (done.code, done.out, done.err) == (2, "", line)


def without_starts() -> None:
    """Let every data set of this process be one whose recipe says that it has no document starts."""

    class Bare:
        documents = False

    opened = RowReader.__init__

    def bare(self: RowReader, *args) -> None:
        opened(self, *args)
        self.manifest = self.manifest.model_copy(update={"recipe": Bare()})

    RowReader.__init__ = bare


@pytest.mark.long
def test_a_data_set_without_document_starts_is_refused(masked, short, tmp_path):
    again = "was written without document starts; run bd3 prep with --documents\n"
    new, log = tmp_path / "new", tmp_path / "log"
    for args in ((*masked.args, "--run", new), ("eval", masked.run)):
        done = bd3(*args, log=log, before=without_starts)
        assert (done.code, done.out, done.err) == (2, "", f"data.document_mask=true: {short} {again}")
    assert not new.exists()
    plain = Recipe(tmp_path, short)
    assert plain.finish("--train.steps", 1, before=without_starts).code == 0
    done = bd3("eval", plain.run, "--per-document", log=log, before=without_starts)
    assert (done.code, done.out, done.err) == (2, "", f"--per-document: {short} {again}")
