"""A process's place in the world, from what launchers leave in the environment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common.errors import ConfigError
from pretrain.distributed.ranks import Ranks, read_ranks
from slurm.environment import compress_hosts, expand_hosts

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
BATCH_SHELL = {  # Slurm gives the shell of a batch script a SLURM_PROCID as well
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
}
TASK = BATCH_SHELL | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


def test_alone() -> None:
    assert read_ranks({}) == Ranks(0, 1, 0, launcher="none")
    assert read_ranks({"MASTER_ADDR": "left-over"}) == Ranks()


def test_torchrun_also_inside_slurm() -> None:
    expected = Ranks(5, 8, 1, "node7", 29500, "torchrun")
    assert read_ranks(TORCHRUN) == read_ranks(TORCHRUN | TASK) == expected


def test_slurm_task() -> None:
    got = read_ranks(TASK)
    assert (got.rank, got.world_size, got.local_rank) == (5, 8, 1)
    assert (got.master_addr, got.launcher) == ("gpu03", "slurm")
    assert 10_000 <= got.master_port < 30_000


def test_the_port_is_one_per_step_and_no_other_step_has_it() -> None:
    port = read_ranks(TASK).master_port
    assert read_ranks(TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).master_port == port
    assert read_ranks(TASK | {"SLURM_STEP_ID": "1"}).master_port != port
    assert read_ranks(TASK | {"SLURM_JOB_ID": "4243"}).master_port != port


def test_a_job_script_may_choose_the_meeting_point() -> None:
    got = read_ranks(TASK | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (got.master_addr, got.master_port) == ("head", 1234)


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291"])
def test_the_shell_of_a_job_is_a_world_of_one(step: str | None) -> None:
    """Without srun there is no step, or one of Slurm's own: interactive (salloc) or batch."""
    environ = BATCH_SHELL | ({"SLURM_STEP_ID": step} if step else {})
    assert read_ranks(environ) == Ranks()


def test_the_step_counts_not_the_job() -> None:
    environ = TASK | {"SLURM_NTASKS": "64", "SLURM_STEP_NODELIST": "gpu[04-05]", "SLURM_STEP_NUM_TASKS": "6"}
    got = read_ranks(environ)
    assert (got.world_size, got.master_addr, got.one_machine) == (6, "gpu04", False)


def test_ranks_of_one_machine_meet_on_its_loopback_address() -> None:
    got = read_ranks(TASK | {"SLURM_STEP_NODELIST": "gpu04"})
    assert (got.master_addr, got.one_machine) == ("127.0.0.1", True)
    assert read_ranks(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}).one_machine
    assert not read_ranks(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}).one_machine


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            without(TORCHRUN, "MASTER_PORT"),
            "MASTER_PORT: not set, though RANK is; start with torchrun, or unset",
        ),
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE: not set, though RANK is"),
        ({"WORLD_SIZE": "2"}, "RANK: not set, though WORLD_SIZE is"),
        ({"RANK": ""}, "RANK: not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8: not below WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1: not a number"),
        (TORCHRUN | {"LOCAL_RANK": "6"}, "LOCAL_RANK=6: above RANK=5"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: not a port"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0: not a port"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT=http: not a number"),
        (TORCHRUN | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9999"),
        (TORCHRUN | {"WORLD_SIZE": "2000000"}, "WORLD_SIZE=2000000: not a number of ranks"),
        (TORCHRUN | {"RANK": "1e3"}, "RANK=1e3: not a number"),
        (TORCHRUN | {"RANK": "\u0665"}, "RANK=\u0665: not a number"),
        (TORCHRUN | {"RANK": "5\x1b[31m"}, "RANK=5\\x1b[31m: not a number"),
        (TORCHRUN | {"MASTER_ADDR": "a b"}, "MASTER_ADDR=a b: not a host name"),
        (TORCHRUN | {"MASTER_ADDR": "n" * 300}, "MASTER_ADDR=nnn"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE=1: not above LOCAL_RANK=1"),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT=x: not a number"),
        (TASK | {"SLURM_LOCALID": "6"}, "SLURM_LOCALID=6: above SLURM_PROCID=5"),
        (TASK | {"SLURM_STEP_NUM_TASKS": "9" * 5000}, "SLURM_STEP_NUM_TASKS=999"),
        (TASK | {"SLURM_STEP_NUM_TASKS": "2000000"}, "SLURM_STEP_NUM_TASKS=2000000: more than"),
        (TASK | {"SLURM_STEP_NODELIST": "n[0-999999999999]"}, "SLURM_STEP_NODELIST=n[0-999999999999]: more than"),
        (TASK | {"SLURM_STEP_NODELIST": "n[0-9999][0-9999]"}, "SLURM_STEP_NODELIST=n[0-9999][0-9999]: more than"),
        (TASK | {"SLURM_STEP_NODELIST": "n\x1b[1]"}, "SLURM_STEP_NODELIST=n\\x1b[1]: not a host list"),
        (without(TASK, "SLURM_PROCID"), "SLURM_PROCID: not set"),
        (TASK | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID=x: not a number"),
        (TASK | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8: not below SLURM_STEP_NUM_TASKS=8"),
        (TASK | {"SLURM_STEP_NODELIST": "gpu[3"}, "SLURM_STEP_NODELIST=gpu[3: not a host list"),
        (TASK | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "SLURM_STEP_NODELIST: not set"),
    ],
)
def test_mistakes(environ: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_ranks(environ)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("login", ["login"]),
        ("n[01-03,7],login", ["n01", "n02", "n03", "n7", "login"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[3,5].site", ["r1n3.site", "r1n5.site", "r2n3.site", "r2n5.site"]),
        ("a,b[1]-ib", ["a", "b1-ib"]),
    ],
)
def test_host_lists(hosts: str, names: list[str]) -> None:
    assert expand_hosts(hosts) == names


@pytest.mark.parametrize(
    "hosts", ["", "a,,b", "n[1-3", "n1-3]", "n[]", "n[3-1]", "n[a-b]", "n[1,]", "n[[1]]", "a b", "n[" + "1" * 30 + "]"]
)
def test_garbled_host_lists(hosts: str) -> None:
    with pytest.raises(ValueError, match=r"host list|numbers and ranges"):
        expand_hosts(hosts)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(0, 30), st.integers(1, 6))
def test_ranges_keep_their_width(low: int, extra: int, width: int) -> None:
    names = expand_hosts(f"n[{low:0{width}d}-{low + extra}]")
    assert names == [f"n{value:0{max(width, len(str(low)))}d}" for value in range(low, low + extra + 1)]


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        (["n01", "n02", "n03", "n7", "login"], "n[01-03,7],login"),
        (["n9", "n10", "n11"], "n[9-11]"),
        (["n2", "n1", "n1"], "n[1-2]"),
        (["a1-ib", "a2-ib", "b"], "a[1-2]-ib,b"),
        (["r1n3.site", "r1n4.site", "r2n3.site"], "r1n[3-4].site,r2n3.site"),
        (["n", "1n", "2n"], "n,[1-2]n"),
        (["n1", "n02", "n2"], "n[1-2,02]"),
        ([], ""),
    ],
)
def test_names_become_a_host_list(names: list[str], hosts: str) -> None:
    assert compress_hosts(names) == hosts


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[ab]?-?[0-9]{0,3}[ab]?\.?[0-9]{0,2}c?", fullmatch=True).filter(bool), min_size=1))
def test_a_host_list_stands_for_its_names(names: list[str]) -> None:
    found = expand_hosts(compress_hosts(names))
    assert sorted(found) == sorted(set(names))
