"""Runs and their ids: no checkpoint of another run is published into a folder, or taken from it."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import time
from pathlib import Path

import pytest

from bd3_common.errors import ConfigError
from pretrain.checkpoint.folder import folder_of, folders
from pretrain.checkpoint.owner import identity_of
from pretrain.checkpoint.reader import find_checkpoint, newest_checkpoint
from pretrain.config.resolve import load_run_config, load_saved, save_config
from pretrain.run_folder import events, layout
from pretrain.run_folder.identity import Identity, check_folder, read_identity, write_identity
from pretrain.run_folder.prepare import contents, prepare
from pretrain.trainer.resume import check_same_run, settings
from tests.polling import TIMEOUT, until
from tests.unit.commands import Done, bd3, start

RECIPE = """
model: {layers: 1, hidden: 16, heads: 2, length: 32}
diffusion: {block_size: 4}
train: {steps: 2, global_batch: 2, micro_batch: 2, precision: fp32, warmup_steps: 2, lr: 0.003}
eval: {every: 0, rows: 2}
checkpoint: {every: 1, keep: 9}
log: {tensorboard: false}
preflight: {enabled: false}
"""


class Runs:
    """Small runs in one folder, with one data set."""

    def __init__(self, folder: Path, data_set: Path):
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE)
        self.args = ("pretrain", "--config", folder / "recipe.yaml", "--data.path", data_set)

    def start(self, name: str, *args, log: str = "log", **options):
        return start(*self.args, "--run", self.folder / name, *args, log=self.folder / log, **options)

    def finish(self, name: str, *args, **options) -> Done:
        return bd3(*self.args, "--run", self.folder / name, *args, log=self.folder / "log", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_set) -> Runs:
    """Runs ``one`` and ``two`` of 2 steps."""
    runs = Runs(tmp_path_factory.mktemp("finished"), data_set)
    for name, seed in (("one", 1), ("two", 2)):
        done = runs.finish(name, "--train.seed", seed)
        assert done.code == 0, done.err
    return runs


@pytest.fixture
def runs(tmp_path, finished, data_set) -> Runs:
    """Copies of the finished runs."""
    for name in ("one", "two"):
        shutil.copytree(finished.folder / name, tmp_path / name)
    return Runs(tmp_path, data_set)


def change_meta(path: Path, step: int | None = None, **values: object) -> None:
    """Change the meta of a checkpoint, or remove keys (None), and give it another step."""
    listing = json.loads((path / layout.COMPLETE).read_text())
    meta = listing["meta"] | values
    listing |= {"meta": {name: value for name, value in meta.items() if value is not None}}
    listing["step"] = listing["step"] if step is None else step
    (path / layout.COMPLETE).write_text(json.dumps(listing))


def test_every_run_has_an_id_of_its_own_in_all_its_checkpoints(finished):
    ids = []
    for name in ("one", "two"):
        run = finished.folder / name
        found = read_identity(run)
        ids.append(found.id)
        assert (found.parents, found.earlier) == ([], [])
        for step in (1, 2):
            meta = find_checkpoint(run, step).meta
            assert meta["run"] == found.id
            lines = (run / layout.METRICS).read_bytes().splitlines(keepends=True)[: 2 * step]  # validation at both ends
            assert (meta["records"], meta["record_bytes"]) == (2 * step, sum(map(len, lines)))
    assert len(set(ids)) == 2
    assert meta["settings"]["train"]["seed"] == 2
    assert meta["settings"].keys() == {"model", "diffusion", "clip_search", "data", "train"}


def test_a_checkpoint_copied_in_from_another_run_is_never_taken(runs):
    one, two = runs.folder / "one", runs.folder / "two"
    for step, source in ((3, two), (4, one)):
        shutil.copytree(folder_of(source, 2), folder_of(one, step))
        change_meta(folder_of(one, step), step)
    change_meta(folder_of(one, 4), run=None)  # of a version without ids
    done = runs.finish("one", "--train.seed", 1, "--train.steps", 3)
    assert done.code == 0, done.err
    lines = [line.removeprefix(f"{one / 'checkpoints'}/") for line in done.messages]
    theirs, ours = read_identity(two).id, read_identity(one).id
    assert f"step-00000003: is of run {theirs}, not of this run {ours}; skipped" in lines
    assert any(line.startswith("step-00000004: has no run id ") and line.endswith("; skipped") for line in lines)
    assert f"{one}: going on from step 2" in done.messages
    assert find_checkpoint(one, 3).meta["run"] == ours  # in place of the other
    with pytest.raises(ConfigError, match="has no run id"):
        find_checkpoint(one, 4)
    assert newest_checkpoint(one).step == 3


def test_an_old_folder_gets_an_id_and_keeps_its_checkpoints(runs):
    run = runs.folder / "one"
    for path in folders(run):
        change_meta(path, run=None, settings=None, records=None, record_bytes=None)
    (run / layout.RUN_ID).unlink()
    shutil.copytree(folder_of(runs.folder / "two", 2), folder_of(run, 5))
    change_meta(folder_of(run, 5), 5)
    done = runs.finish("one", "--train.seed", 1, "--train.steps", 3)
    assert done.code == 0, done.err
    assert f"{run}: going on from step 2" in done.messages
    found = read_identity(run)
    assert found.earlier == [1, 2]
    assert [find_checkpoint(run, step).meta.get("run") for step in (1, 2, 3)] == [None, None, found.id]


def test_a_lost_id_is_that_of_the_checkpoints_unless_they_are_of_several_runs(runs):
    one, two = runs.folder / "one", runs.folder / "two"
    before = read_identity(one)
    (one / layout.RUN_ID).unlink()
    assert identity_of(one) == before
    shutil.copytree(folder_of(two, 2), folder_of(one, 3))
    change_meta(folder_of(one, 3), 3)
    with pytest.raises(ConfigError, match=r"run_id.json is missing, and the checkpoints are of 2 runs; put the file"):
        identity_of(one)
    (one / layout.RUN_ID).write_text('{"id": "../x"}')
    with pytest.raises(ConfigError, match=r"run_id.json: id: .*; put back what bd3 pretrain wrote$"):
        identity_of(one)


def hold_the_second_write_in_the_folder(until_there: Path, begun: Path) -> None:
    """Hold a checkpoint when its files are written and it is about to be published."""
    from pretrain.checkpoint.writer import _Write

    original, calls = _Write._in_run_folder, itertools.count(1)

    def held(self, action) -> None:
        if next(calls) == 2:
            begun.touch()
            while not until_there.exists():
                time.sleep(0.01)
        original(self, action)

    _Write._in_run_folder = held


@pytest.mark.parametrize("again", [True, False])
def test_a_folder_removed_or_begun_again_gets_no_checkpoint_of_the_job_before(runs, again):
    run, go, begun = (runs.folder / name for name in ("run", "go", "begun"))
    hold = functools.partial(hold_the_second_write_in_the_folder, go, begun)
    first = runs.start("run", "--checkpoint.every", 2, log="first", before=hold)
    until(lambda: begun.exists() or first.exitcode is not None, TIMEOUT)
    shutil.rmtree(run)
    before: dict[Path, bytes] = {}
    if again:
        shutil.copytree(runs.folder / "two", run)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    go.touch()
    first.join(TIMEOUT)
    lines = (runs.folder / "first.err").read_text().splitlines()
    happened = f"was begun again, as run {read_identity(run).id}," if again else "was removed or moved"
    assert lines[-1].startswith(f"run={run}: the folder {happened} under this job of run "), lines
    assert first.exitcode == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def hold_a_step(step: int, until_there: Path, begun: Path) -> None:
    """Hold the run before a step."""
    from pretrain.trainer.batches import Batches

    original = Batches.at

    def at(self, number: int):
        if number == step - 1:
            begun.touch()
            while not until_there.exists():
                time.sleep(0.01)
        return original(self, number)

    Batches.at = at


def test_a_folder_is_one_jobs_and_when_renamed_under_it_goes_on_under_its_new_name(runs):
    run, moved, go, begun = (runs.folder / name for name in ("run", "moved", "go", "begun"))
    hold = functools.partial(hold_a_step, 2, go, begun)
    first = runs.start("run", "--train.seed", 1, log="first", before=hold)
    until(lambda: (begun.exists() and folder_of(run, 1).exists()) or first.exitcode is not None, TIMEOUT)
    second = runs.finish("run", "--train.seed", 1)
    assert second.code == 2
    assert second.err.splitlines()[-1].endswith("another process is training in it; wait for it or use another --run")
    run.rename(moved)
    go.touch()
    first.join(TIMEOUT)
    line = (runs.folder / "first.err").read_text().splitlines()[-1]
    assert line.startswith(f"{run / layout.METRICS}: was removed, replaced, or moved with its folder under the run, ")
    assert first.exitcode == 2
    assert not run.exists()
    done = runs.finish("moved", "--train.seed", 1)
    assert done.code == 0, done.err
    assert (moved / layout.METRICS).read_bytes() == (runs.folder / "one" / layout.METRICS).read_bytes()


def test_a_job_that_another_one_overtook_is_refused(tmp_path):
    config = load_run_config([])
    tmp_path.joinpath("checkpoints").mkdir()
    seen = contents(tmp_path)
    write_identity(tmp_path, Identity())
    before = (tmp_path / layout.RUN_ID).read_bytes()
    with pytest.raises(ConfigError, match=r"another process has trained in it just now; start this job again$"):
        prepare(tmp_path, config, None, Identity(), seen)
    assert (tmp_path / layout.RUN_ID).read_bytes() == before
    check_folder(tmp_path, identity_of(tmp_path).id)
    with pytest.raises(ConfigError, match=r"was begun again, as run [0-9a-f]{32}, under this job of run"):
        check_folder(tmp_path, "0" * 32)


def test_a_configuration_edited_in_the_folder_is_refused_by_the_checkpoint(runs):
    run = runs.folder / "one"
    saved = load_saved(run / layout.CONFIG)
    edited = saved.model_copy(update={"train": saved.train.model_copy(update={"seed": 7})})
    save_config(edited, run / layout.CONFIG)
    done = bd3("pretrain", "--config", run / layout.CONFIG, "--run", run, log=runs.folder / "log")
    line = f"train.seed=7: the run in {run} was started with 1; use that, or another --run"
    assert (done.code, done.messages) == (2, [line])
    recorded = find_checkpoint(run).meta["settings"]
    check_same_run(run, saved, recorded)  # the edited file does not matter
    assert load_saved(run / layout.CONFIG).train.seed == 7


LR = "use that, another --run, or --resume.allow train."


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--train.lr 0.1", f"train.lr=0.1: the run in RUN was started with 0.0003; {LR}lr"),
        ("--train.lr 0.1 --resume.allow train.lr", None),
        ("--train.warmup-steps 5", f"train.warmup_steps=5: the run in RUN was started with 2500; {LR}warmup-steps"),
        ("--train.warmup-steps 5 --resume.allow train.warmup-steps train.lr", None),
        ("--train.steps 2000", None),
        ("--train.decay cosine", f"train.decay=cosine: the run in RUN was started with constant; {LR}decay"),
        ("--train.decay cosine --resume.allow train.decay", None),
        (
            "--train.decay cosine --train.steps 2000 --resume.allow train.decay",
            f"train.steps=2000: the run in RUN was started with 1000, where its learning rate reaches its minimum; "
            f"{LR}steps",
        ),
        ("--train.decay linear --train.steps 2000 --resume.allow train.decay train.steps", None),
        ("--train.seed 1", "train.seed=1: the run in RUN was started with 0; use that, or another --run"),
        ("--train.beta2 0.9", "train.beta2=0.9: the run in RUN was started with 0.999; use that, or another --run"),
        (
            "--data.mix a 2 b 1",
            "data.mix=a list of 2: the run in RUN was started with None; use that, or another --run",
        ),
        ("--parallel.tensor 2 --kernels.attention chunked --log.every 3 --checkpoint.every 7 --eval.every 1", None),
    ],
)
def test_what_decides_weights_stays_and_the_learning_rate_may_change_by_option(tmp_path, flags, problem):
    recorded = json.loads(json.dumps(settings(load_run_config([]))))
    del recorded["train"]["ema_decay"]  # as if the key did not exist yet
    save_config(load_run_config(["--train.seed", "9"]), tmp_path / layout.CONFIG)
    config = load_run_config(flags.split())
    if problem is None:
        check_same_run(tmp_path, config, recorded)
        return
    with pytest.raises(ConfigError) as caught:
        check_same_run(tmp_path, config, recorded)
    assert str(caught.value) == problem.replace("RUN", str(tmp_path))


def test_only_the_learning_rate_and_the_steps_may_be_allowed():
    with pytest.raises(ConfigError, match=r"^resume.allow=train.seed: may not change in a run; use any of train.lr, "):
        load_run_config(["--resume.allow", "train.seed"])


def test_a_torn_event_is_cut_off(tmp_path, caplog):
    events.record(tmp_path, "started", step=0)
    whole = (tmp_path / layout.EVENTS).read_bytes()
    (tmp_path / layout.EVENTS).write_bytes(whole + b'{"time": 3, "eve')
    events.record(tmp_path, "stopped", step=1)
    assert [event["event"] for event in events.read(tmp_path)] == ["started", "stopped"]
    (tmp_path / layout.EVENTS).write_bytes(whole + b'{"time": 3, "eve')
    events.mend(tmp_path)
    events.mend(tmp_path)
    assert (tmp_path / layout.EVENTS).read_bytes() == whole
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / layout.EVENTS}: the last line was torn; its 16 bytes are cut off"
    ]
