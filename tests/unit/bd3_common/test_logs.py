"""Log messages: the console of rank 0, and the file of every rank."""

from __future__ import annotations

import logging
import re

import pytest

from bd3_common import logs

LOG = logging.getLogger("pretrain.test")


@pytest.fixture(autouse=True)
def handlers():
    before = list(logging.getLogger().handlers)
    yield
    logs.close()
    logging.getLogger().handlers[:] = before


def test_a_command_without_ranks_prints_bare_messages(capsys):
    logs.to_console()
    LOG.info("read 3 rows")
    LOG.warning("one is torn")
    logging.getLogger("another.package").info("not for users")
    assert capsys.readouterr().err == "read 3 rows\nWARNING: one is torn\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_write_all_messages_to_their_files_and_rank_0_prints_them(tmp_path, capsys, rank):
    logs.of_rank(rank)
    LOG.info("before there is a folder")
    logs.to_file(tmp_path / "logs" / "rank.log")
    LOG.warning("after")
    LOG.error("printed elsewhere", extra=logs.FILE_ONLY)
    logs.close()
    head = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d rank {rank}"
    lines = (tmp_path / "logs" / "rank.log").read_text().splitlines()
    patterns = [rf"{head}: before there is a folder", rf"{head} WARNING: after", rf"{head} ERROR: printed elsewhere"]
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), lines
    assert capsys.readouterr().err.splitlines() == (lines[:2] if rank == 0 else [])


def test_messages_go_above_a_progress_bar(capsys):
    above: list[str] = []
    logs.to_console()
    with logs.console_through(above.append):
        LOG.info("above")
    LOG.info("after")
    assert (above, capsys.readouterr().err) == (["above"], "after\n")
