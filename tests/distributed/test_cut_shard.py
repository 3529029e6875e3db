"""A shard truncated under a running `bd3 pretrain`: each rank ends with an exit code, none by a signal."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.distributed.launch import TIMEOUT, Job
from tests.polling import until

ARGS = "--model.layers 1 --model.hidden 16 --model.heads 2 --model.length 32 --diffusion.block-size 4"
ARGS += " --train.global-batch 4 --train.micro-batch 2 --train.precision fp32 --train.steps 100000 --train.lr 1e-3"
ARGS += " --train.warmup-steps 2 --eval.rows 8 --eval.every 0 --checkpoint.every 0 --log.tensorboard false"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shard_cut_under_a_run_ends_it_with_one_line(tmp_path, data_set, ranks):
    data = shutil.copytree(data_set, tmp_path / "data")
    run, shard = tmp_path / "run", data / "train" / "train-000000.tar"
    job = Job(["pretrain", *ARGS.split(), "--data.path", data, "--run", run], ranks, tmp_path)
    metrics = run / "metrics.jsonl"
    until(lambda: not job.running or (metrics.exists() and metrics.read_bytes().count(b'"train"') > 2), TIMEOUT)
    assert job.running, job.finish()
    os.truncate(shard, 512)
    ended = job.finish()
    codes = [done.code for done in ended]
    assert set(codes) <= {1, 2}, [done.err for done in ended]
    assert 2 in codes
    for done in ended:
        assert "Traceback" not in done.err
        if done.code == 2:
            last = done.err.splitlines()[-1]
            assert "train-000000.tar: ends before byte" in last
            assert "copy the data set again" in last
