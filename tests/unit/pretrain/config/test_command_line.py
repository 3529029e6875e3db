"""Options: every mistake is one line with the path, the value and the remedy."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from bd3_common.errors import ConfigError
from bd3_megatron.config import Section
from pretrain.config.command_line import Positional, parse_options
from pretrain.config.schema import RunConfig
from pretrain.config.values import Layer, build, did_you_mean, validate
from slurm.options import JobOptions


class Inner(Section):
    low: int = Field(default=1, ge=0, description="lower end")
    high: int = Field(default=3, description="upper end")
    rate: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Inner:
        if self.low > self.high:
            raise ValueError(f"inner.low={self.low}: above inner.high={self.high}; exchange them")
        return self


class Example(Section):
    """An example."""

    inputs: Positional[tuple[str, ...]] = Field(min_length=1, description="files")
    out: str = Field(description="100% of the output")
    kind: Literal["wrap", "stream"] = "wrap"
    switch: bool = True
    steps: tuple[int, ...] = (1,)
    shares: dict[str, float] = Field(default={})
    inner: Inner = Inner()


def parse(*args: str) -> Example:
    return parse_options(Example, list(args), "bd3 example")


def mistake(*args: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_of_field() -> None:
    got = parse(
        *[
            "a",
            "b",
            "--out",
            "o",
            "--kind=stream",
            "--no-switch",
            "--steps",
            "3",
            "-4",
            "--inner.low",
            "2",
            "--inner.rate",
            "3e-4",
        ],
        *["--shares", "web", "0.5", "code", "0.25"],
    )
    assert got == Example(
        inputs=("a", "b"),
        out="o",
        kind="stream",
        switch=False,
        steps=(3, -4),
        shares={"web": 0.5, "code": 0.25},
        inner=Inner(low=2, rate=3e-4),
    )


@pytest.mark.parametrize(
    ("words", "value"),
    [("--switch", True), ("--no-switch", False), ("--switch=false", False), ("--switch true", True)],
)
def test_switches(words: str, value: bool) -> None:
    assert parse("a", "--out", "o", *words.split()).switch is value


@pytest.mark.parametrize("null", ["null", "None", "none"])
def test_null_is_spelled_as_in_yaml_or_as_in_python(null: str) -> None:
    below = [Layer({"inputs": ["a"], "out": "o", "inner": {"rate": 1.0}}, "a file")]
    got = parse_options(Example, ["b", "--inner.rate", null], "x", lambda flags: below)
    assert got.inner.rate is None
    assert got.out == "o"


def test_flags_may_stand_between_positionals_and_the_last_mention_wins() -> None:
    got = parse("--out", "o", "a", "--kind", "stream", "b", "--kind", "wrap")
    assert (got.inputs, got.kind) == (("a", "b"), "wrap")


def test_hyphens_and_underscores_are_the_same() -> None:
    args = ["--model.kv_heads", "4", "--train.global-batch=64"]
    got = parse_options(RunConfig, args, "x")
    assert (got.model.kv_heads, got.train.global_batch) == (4, 64)


def test_values_that_fit_only_together() -> None:
    got = parse_options(RunConfig, ["--model.hidden", "100", "--model.heads", "10"], "x")
    assert (got.model.hidden, got.model.heads) == (100, 10)


def test_a_layer_need_not_be_valid_by_itself() -> None:
    below = [Layer({"model": {"hidden": 100}}, "a file")]
    got = parse_options(RunConfig, ["--model.heads", "10"], "x", lambda flags: below)
    assert got == validate(RunConfig, {"model": {"hidden": 100, "heads": 10}})
    with pytest.raises(ConfigError, match=r"^model.heads=12: model.hidden=100 is not divisible"):
        parse_options(RunConfig, [], "x", lambda flags: below)


def test_a_mistake_names_the_layer_whose_value_counts() -> None:
    low, high = Layer({"model": {"layers": "x"}}, "low.yaml"), Layer({"model": {"layers": True}}, "high.yaml")
    with pytest.raises(ConfigError, match=r"^low.yaml: model.layers=x: not an integer$"):
        build(RunConfig, [low])
    with pytest.raises(ConfigError, match=r"^high.yaml: model.layers=true: a value is needed here"):
        build(RunConfig, [low, high])
    with pytest.raises(ConfigError, match=r"^model.layers=y: not an integer$"):
        build(RunConfig, [low, high, Layer({"model": {"layers": "y"}})])
    assert build(RunConfig, [low, Layer({"model": {"layers": "3"}})]).model.layers == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("a --out o --kidn wrap", "--kidn: unknown option; did you mean --kind?"),
        ("a --out o --inner.lwo 1", "--inner.lwo: unknown option; did you mean --inner.low?"),
        ("a --out o --low 1", "--low: unknown option; did you mean --inner.low?"),
        ("a --out o --xyzzy", "--xyzzy: unknown option"),
        ("a --out o --inner.low abc", "inner.low=abc: not an integer"),
        ("a --out o --inner.low 1.5", "inner.low=1.5: not an integer"),
        ("a --out o --inner.low -1", "inner.low=-1: use 0 or more"),
        ("a --out o --inner.low 9", "inner.low=9: above inner.high=3; exchange them"),
        ("a --out o --inner.rate x", "inner.rate=x: not a number"),
        ("a --out o --inner.rate nan", "inner.rate=nan: not a finite number"),
        ("a --out o --kind wrapp", "kind=wrapp: use wrap or stream"),
        ("a --out o --kind", "--kind: a value is missing"),
        ("a --out o --kind --switch", "--kind: a value is missing"),
        ("a --out o --switch=maybe", "switch=maybe: not true or false"),
        ("a --out o --steps 1 x", "steps=1 x: not an integer"),
        ("a --out o --shares web", "shares=web: keys and values come in pairs"),
        ("a", "--out: required"),
        ("--out o", "INPUTS is missing; usage: bd3 example INPUTS... --out OUT [OPTIONS]"),
        ("a --out -x", "--out: a value is missing; one that begins with - is written --out=-x"),
    ],
)
def test_mistakes(words: str, line: str) -> None:
    assert mistake(*words.split()) == line


def test_a_word_too_many() -> None:
    with pytest.raises(ConfigError, match=r"^4: unexpected argument; leave it out, or name its option"):
        parse_options(RunConfig, ["4"], "x")
    line = r"^model.kv_heads=4: unexpected argument; did you mean --model.kv-heads 4\?$"
    with pytest.raises(ConfigError, match=line):
        parse_options(RunConfig, ["model.kv_heads=4"], "x")


def test_help_lists_every_option_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--inner.low", "3", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: bd3 example" in text
    assert all(word in text for word in ("--inner.low", "lower end", "100% of the output", "files"))


def test_a_long_value_is_cut_off_in_the_message_of_a_validator() -> None:
    with pytest.raises(ConfigError) as error:
        validate(JobOptions, {"time": "a" * 100_000})
    assert str(error.value).startswith("time=aaaa")
    assert str(error.value).endswith("...: not a time; use minutes (90), H:MM:SS or D-HH:MM:SS")
    assert len(str(error.value)) < 200


@settings(deadline=None)
@example(["-\x1e"])  # a line break to splitlines
@given(st.lists(st.text(max_size=8) | st.sampled_from(["--out", "--inner.low=2", "--shares", "--no-switch", "-"])))
def test_no_words_break_the_parser(args: list[str]) -> None:
    """Whatever is typed gives a value or a ConfigError of one line, and nothing is printed."""
    assume("-h" not in args and "--help" not in args)
    line = None
    try:
        assert isinstance(parse_options(Example, args, "x"), Example)
    except ConfigError as error:
        line = str(error)
    assert line is None or len(line.splitlines()) == 1


@settings(deadline=None)
@given(st.integers(0, 2**40), st.floats(allow_nan=False, allow_infinity=False), st.text(min_size=1, max_size=20))
def test_values_arrive_as_typed(low: int, rate: float, out: str) -> None:
    args = ["a", f"--out={out}", f"--inner.low={low}", f"--inner.high={low}", f"--inner.rate={rate!r}"]
    got = parse(*args)
    assert (got.out, got.inner.low, got.inner.rate) == (out, low, rate)


def test_suggestions() -> None:
    known = ["model.layers", "train.lr", "train.seed"]
    assert did_you_mean("model.layrs", known) == "; did you mean model.layers?"
    assert did_you_mean("lr", known) == "; did you mean train.lr?"
    assert did_you_mean("model.seed", known) == "; did you mean train.seed?"
    assert did_you_mean("quux", known) == ""
