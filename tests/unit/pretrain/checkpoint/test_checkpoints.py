"""Checkpoints: bitwise round trips, continuation, damage, retention."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig
from bd3_megatron.engine.base import StepResult
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.parallel import seed_dropout
from pretrain.checkpoint import folder as checkpoint_folder
from pretrain.checkpoint import tensor_file
from pretrain.checkpoint.reader import (
    find_checkpoint,
    newest_checkpoint,
    newest_on_all_ranks,
    read_weights,
    restore,
)
from pretrain.checkpoint.writer import CheckpointWriter, Written, save_checkpoint
from pretrain.run_folder.layout import COMPLETE
from tests.polling import until
from tests.unit import tiny

DIFFUSION = DiffusionConfig(block_size=4)
DROPOUT = 0.2


def made(world, precision: str = "fp32", seed: int = 0, **changes) -> MegatronEngine:
    return tiny.engine(world, tiny.shape(dropout=DROPOUT, **changes), DIFFUSION, seed, precision=precision)


def train(engine: MegatronEngine, first: int, last: int) -> list[StepResult]:
    """Steps ``first`` to ``last`` (1 is the first), two micro-batches each, dropout and all."""
    results = []
    for step in range(first, last + 1):
        seed_dropout(0, step)
        batches = [tiny.batch_of(tiny.shape(), DIFFUSION, 2, 10 * step + micro) for micro in range(2)]
        results.append(engine.train_step(batches, 1e-2))
    return results


def copied(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in tiny.state(engine).items()}


def any_checkpoint(run: Path) -> bool:
    return bool(checkpoint_folder.folders(run))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def three_steps(world, tmp_path_factory) -> Path:
    folder, engine = tmp_path_factory.mktemp("run"), made(world)
    for step in range(1, 4):
        train(engine, step, step)
        save_checkpoint(folder, engine, step, {"tokens": 100 * step}, keep=3)
    return folder


@pytest.fixture
def run(three_steps, tmp_path) -> Path:
    """A run folder with checkpoints of steps 1, 2 and 3."""
    return shutil.copytree(three_steps, tmp_path / "run")


def steps_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- round trips ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_steps_after_a_restart_equal_the_run_that_went_on(world, tmp_path, precision):
    engine = made(world, precision)
    train(engine, 1, 3)
    save_checkpoint(tmp_path, engine, 3, {"tokens": 7, "note": "x"}, keep=1)
    saved = copied(engine)
    went_on = train(engine, 4, 5)

    found = find_checkpoint(tmp_path)
    assert (found.step, found.meta) == (3, {"tokens": 7, "note": "x"})
    again = made(world, precision, seed=9)
    restore(found, again)
    assert again.updates == 3
    assert all(group["step"] == 3 for group in again.optimizer.param_groups)  # where fused optimizers count
    restored = tiny.state(again)
    assert {name.partition("/")[0] for name in restored} == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(restored[name], tensor), name
    assert train(again, 4, 5) == went_on
    for name, tensor in tiny.state(engine).items():
        assert torch.equal(tiny.state(again)[name], tensor), name
    for one, other in zip(engine.module.parameters(), again.module.parameters()):
        assert torch.equal(one, other)


def test_a_run_without_averaged_weights_keeps_none(world, tmp_path):
    engine = tiny.engine(world, tiny.shape(), DIFFUSION, ema_decay=0)
    save_checkpoint(tmp_path, engine, 1, {}, keep=1)
    assert not any(name.startswith("ema/") for name in tiny.state(engine))
    weights = read_weights(find_checkpoint(tmp_path), averaged=True)
    assert all(torch.equal(x, tiny.state(engine)[f"weights/{name}"].reshape(x.shape)) for name, x in weights.items())


@pytest.mark.parametrize(("averaged", "section"), [(True, "ema"), (False, "weights")])
def test_whole_weights_are_read_without_an_engine(world, run, averaged, section):
    found = find_checkpoint(run)
    engine = made(world)
    restore(found, engine)
    weights = read_weights(found, averaged)
    state = {name: x for name, x in tiny.state(engine).items() if name.startswith(f"{section}/")}
    assert {f"{section}/{name}" for name in weights} == set(state)
    assert all(torch.equal(x, state[f"{section}/{name}"].reshape(x.shape)) for name, x in weights.items())


def test_saving_the_same_state_twice_is_harmless(world, run):
    engine = made(world)
    restore(find_checkpoint(run), engine)
    before = copied(engine)
    save_checkpoint(run, engine, 3, {"tokens": 300}, keep=3)
    restore(find_checkpoint(run), engine)
    assert all(torch.equal(x, before[name]) for name, x in tiny.state(engine).items())
    assert steps_in(run) == ["step-00000001", "step-00000002", "step-00000003"]


# ---- while training goes on ----


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """Nothing is written before this event."""
    event, start = threading.Event(), checkpoint_folder.start

    def wait(*args) -> None:
        assert event.wait(60)
        start(*args)

    monkeypatch.setattr(checkpoint_folder, "start", wait)
    return event


def test_steps_taken_while_it_is_written_do_not_change_a_checkpoint(world, tmp_path, slow_disk):
    engine, other = made(world), made(world)
    with CheckpointWriter(tmp_path, engine, keep=9) as writer:
        train(engine, 1, 1)
        saved = copied(engine)
        writer.save(1, {})
        results = train(engine, 2, 4)
        writer.poll()  # still under way, and nothing to raise
        assert not any_checkpoint(tmp_path)
        slow_disk.set()
    restore(find_checkpoint(tmp_path), other)
    assert all(torch.equal(x, saved[name]) for name, x in tiny.state(other).items())
    assert train(other, 2, 4) == results


def test_a_save_waits_for_the_one_before_and_each_is_reported(world, tmp_path, slow_disk):
    written: list[Written] = []
    with CheckpointWriter(tmp_path, made(world), keep=9, report=written.append) as writer:
        writer.save(1, {})
        began = time.monotonic()
        threading.Timer(0.2, slow_disk.set).start()
        writer.save(2, {})
        waited = time.monotonic() - began
        assert find_checkpoint(tmp_path, 1).step == 1
    assert [record.step for record in written] == [1, 2]
    first, second = written
    assert first.stall_seconds < first.write_seconds
    assert 0 < second.stall_seconds <= waited
    listed = json.loads((find_checkpoint(tmp_path).path / COMPLETE).read_text())["files"]
    assert second.bytes == sum(stamp["bytes"] for stamp in listed.values())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_writer_leaves_neither_thread_nor_group(world, tmp_path, asynchronous):
    def left() -> tuple[set, int]:
        return set(threading.enumerate()), len(dist.distributed_c10d._world.pg_map)

    before = left()
    with CheckpointWriter(tmp_path, made(world), keep=1, asynchronous=asynchronous) as writer:
        writer.save(1, {})
        assert (asynchronous, any_checkpoint(tmp_path)) != (False, False)
    assert left() == before
    with pytest.raises(RuntimeError, match="of the loop"):
        _fail_while_writing(tmp_path, made(world))
    assert left() == before
    assert find_checkpoint(tmp_path).step == 2  # what was under way is completed


def _fail_while_writing(run: Path, engine: MegatronEngine) -> None:
    with CheckpointWriter(run, engine, keep=1) as writer:
        writer.save(2, {})
        raise RuntimeError("of the loop")


NOTICES = {
    "poll": lambda writer: until(writer.poll),
    "save": lambda writer: writer.save(5, {}),
    "wait": lambda writer: writer.wait(),
}


@pytest.mark.parametrize("notice", NOTICES)
def test_a_failure_in_the_background_is_raised_at_the_next_occasion(world, run, monkeypatch, notice):
    before = contents(run)

    def fail(*_, **__):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr(tensor_file, "write_tensors", fail)
    with CheckpointWriter(run, made(world), keep=1) as writer:
        writer.save(4, {})
        with pytest.raises(OSError, match="No space left") as caught:
            NOTICES[notice](writer)
        assert caught.value.collective
        writer.poll()  # raised once
    assert contents(run) == before


# ---- damage ----


def tensors_file(path: Path) -> Path:
    return max(path.iterdir(), key=lambda file: file.stat().st_size)


def flip_a_byte(path: Path) -> str:
    file = tensors_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return f"{file.name} has another checksum than listed"


def cut(path: Path) -> str:
    file = tensors_file(path)
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} has another size than listed"


def remove_tensors(path: Path) -> str:
    file = tensors_file(path)
    file.unlink()
    return f"{file.name} is missing"


def remove_index(path: Path) -> str:
    (path / "index.json").unlink()
    return "index.json is missing"


def remove_list(path: Path) -> str:
    (path / COMPLETE).unlink()
    return "complete.json is missing"


def cut_list(path: Path) -> str:
    file = path / COMPLETE
    file.write_text(file.read_text()[:-20])
    return "complete.json: is no JSON: "


def empty_list(path: Path) -> str:
    (path / COMPLETE).write_text('{"files": {}}')
    return "complete.json: step: is missing"


def garbled_list(path: Path) -> str:
    (path / COMPLETE).write_bytes(b"\xff\xfe")
    return "complete.json: is no JSON: "


def changed(path: Path, *keys: str, value: object) -> None:
    """Set a value in ``complete.json``; None stands for null."""
    listing = json.loads((path / COMPLETE).read_text())
    place = listing
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (path / COMPLETE).write_text(json.dumps(listing))


def null_step(path: Path) -> str:
    changed(path, "step", value=None)
    return "complete.json: step: value None: "


def null_meta(path: Path) -> str:
    changed(path, "meta", value=None)
    return "complete.json: meta: value None: "


def updates_as_text(path: Path) -> str:
    changed(path, "meta", "updates", value="3")
    return "complete.json: meta.updates: value 3: "


def step_of_another_folder(path: Path) -> str:
    changed(path, "step", value=2)
    return "complete.json is that of step 2"


def later_format(path: Path) -> str:
    changed(path, "format", value=3)
    return "complete.json: format: value 3: "


def empty_list_of_files(path: Path) -> str:
    changed(path, "files", value={})
    return "index.json is not listed in complete.json"


def unlisted_file(path: Path) -> str:
    (path / "rank-00001.safetensors").write_bytes(b"")
    return "rank-00001.safetensors is not listed in complete.json"


def file_outside(path: Path) -> str:
    listing = json.loads((path / COMPLETE).read_text())
    changed(path, "files", value=listing["files"] | {"../../x": {"bytes": 0, "sha256": "0" * 64}})
    return "complete.json: files.../../x"


def pipe(path: Path) -> str:
    (path / "index.json").unlink()
    os.mkfifo(path / "index.json")
    return "index.json is not a regular file"


DAMAGES = [
    flip_a_byte,
    cut,
    remove_tensors,
    remove_index,
    remove_list,
    cut_list,
    empty_list,
    garbled_list,
    null_step,
    null_meta,
    updates_as_text,
    step_of_another_folder,
    later_format,
    empty_list_of_files,
    unlisted_file,
    file_outside,
    pipe,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(world, run, damage, caplog):
    path = run / "checkpoints" / "step-00000003"
    problem = damage(path)
    for on_all_ranks in (False, True):
        caplog.clear()
        found = newest_on_all_ranks(run, world) if on_all_ranks else newest_checkpoint(run)
        assert (found.step, found.meta) == (2, {"tokens": 200})
        (message,) = caplog.messages
        assert message.startswith(f"{path}: {problem}")
        assert message.endswith("; skipped")
    assert find_checkpoint(run).step == 2
    with pytest.raises(ConfigError, match=r"; use another step$"):
        find_checkpoint(run, 3)


def test_two_damaged_checkpoints_are_passed_over(run, caplog):
    remove_list(run / "checkpoints" / "step-00000003")
    flip_a_byte(run / "checkpoints" / "step-00000002")
    assert newest_checkpoint(run).step == 1
    assert len(caplog.messages) == 2


def test_what_a_killed_writer_leaves_is_not_a_checkpoint_and_is_replaced(world, run, caplog):
    folder = run / "checkpoints"
    partial = folder / ".step-00000004.f00d.partial"
    shutil.copytree(folder / "step-00000003", partial)
    (partial / "stray").write_text("left by the killed")
    assert newest_checkpoint(run).step == 3
    assert caplog.messages == []
    engine = made(world)
    restore(find_checkpoint(run), engine)
    train(engine, 4, 4)
    saved = save_checkpoint(run, engine, 4, {}, keep=2)
    assert steps_in(run) == ["step-00000003", "step-00000004"]
    assert not (saved / "stray").exists()


def test_foreign_folders_are_not_checkpoints(run):
    shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000004.old")
    (run / "checkpoints" / "notes.txt").write_text("mine")
    assert find_checkpoint(run).step == 3


def test_a_failed_write_leaves_what_was_there(world, run, monkeypatch):
    before = contents(run)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, made(world), 4, {}, keep=1)
    assert contents(run) == before
    assert find_checkpoint(run).step == 3


# ---- which are kept and found ----


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(world, tmp_path, keep, left):
    engine = tiny.engine(world, tiny.shape(layers=1), DIFFUSION, ema_decay=0)
    for step in range(1, 6):
        save_checkpoint(tmp_path, engine, step, {}, keep)
    assert steps_in(tmp_path) == [f"step-{step:08d}" for step in left]


def test_those_of_every_so_many_steps_are_kept_for_ever(world, tmp_path):
    engine = tiny.engine(world, tiny.shape(layers=1), DIFFUSION, ema_decay=0)
    with CheckpointWriter(tmp_path, engine, keep=2, keep_every=3) as writer:
        for step in range(1, 9):
            writer.save(step, {})
    assert steps_in(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


def test_a_damaged_later_checkpoint_costs_no_good_one(world, run):
    """The run went back to step 1; what it writes at step 2 must outlive the ruin of step 3."""
    flip_a_byte(run / "checkpoints" / "step-00000003")
    flip_a_byte(run / "checkpoints" / "step-00000002")
    engine = made(world)
    restore(newest_checkpoint(run), engine)
    train(engine, 2, 2)
    save_checkpoint(run, engine, 2, {}, keep=1)
    assert find_checkpoint(run).step == 2


def test_a_checkpoint_is_found_by_its_step(run):
    assert [find_checkpoint(run, step).step for step in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"^step 7: no checkpoint .*; there are: 1, 2, 3$"):
        find_checkpoint(run, 7)


def test_no_checkpoints_are_told_in_one_line(run, tmp_path):
    with pytest.raises(ConfigError, match="has no checkpoints"):
        find_checkpoint(tmp_path / "elsewhere")
    for path in (run / "checkpoints").iterdir():
        cut(path)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        find_checkpoint(run)
    assert newest_checkpoint(run) is None


@pytest.mark.parametrize("changes", [{"layers": 3}, {"hidden": 16}, {"vocab_size": 50}])
def test_a_model_of_another_shape_is_told_in_one_line_and_left_alone(world, run, changes):
    other = made(world, **changes)
    before = copied(other)
    with pytest.raises(ConfigError) as caught:
        restore(find_checkpoint(run), other)
    assert "\n" not in str(caught.value)
    assert "use the configuration the run was started with" in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in tiny.state(other).items())


def test_the_list_names_every_file_with_its_size(run):
    path = run / "checkpoints" / "step-00000003"
    listing = json.loads((path / COMPLETE).read_text())
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != COMPLETE}
    assert {name: stamp["bytes"] for name, stamp in listing["files"].items()} == sizes
    assert len(sizes) >= 2
