"""Process groups and the state of dropout."""

from __future__ import annotations

import datetime
import itertools

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from bd3_megatron import parallel
from bd3_megatron.config import ParallelConfig


def test_dropout_differs_by_seed_step_rows_and_layers():
    places = itertools.product((0, 1, 2**62), range(3000), (0, 1, 1024), (0, 1))
    seeds = [parallel.dropout_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert parallel.dropout_seed(1, 2, 3, 4) == parallel.dropout_seed(1, 2, 3, 4)


@pytest.mark.parametrize(("minutes", "patience"), [(0.1, 120), (10, 120), (90.5, 182)])
def test_no_group_is_less_patient_than_the_watch(minutes, patience):
    parallel.stop()
    parallel.start(ParallelConfig(timeout_minutes=minutes))
    try:
        groups = [dist.group.WORLD, parallel_state.get_data_parallel_group(), parallel_state.get_model_parallel_group()]
        for group in groups:
            backend = group._get_backend(parallel.cpu_compat.device())
            assert backend.options._timeout == datetime.timedelta(minutes=patience)
    finally:
        parallel.stop()
