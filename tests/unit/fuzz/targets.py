"""Readers under the fuzzer: for each, the sample files, their forms, and a call that reads them as a command does."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import zstandard

from bd3_megatron.hf.convert import read_checkpoint
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.tokenizer import tokenizer_with_mask
from data_prep.build.assemble import Stream, build_shard, recorded_shard, shard_jobs
from data_prep.build.encode import EncodeJob, encode_part, read_result
from data_prep.build.index import index_folder
from data_prep.build.token_tar import IndexConfig
from data_prep.build.work_folder import Work, check_replaceable
from data_prep.format.files import sha256_file
from data_prep.format.manifest import SPLITS, load_manifest
from data_prep.format.text_encoder import TextEncoder
from data_prep.format.tokenizer import control_ids, load_tokenizer, remarks, special_ids
from data_prep.read.reader import RowReader
from data_prep.read.stream import RowStream
from data_prep.sources import Fields, expand, read_part, split
from data_prep.verify.check import check
from pretrain.checkpoint.loaded_run import load_run
from pretrain.checkpoint.reader import newest_checkpoint
from pretrain.checkpoint.upgrade import upgrade_checkpoints
from pretrain.config.resolve import load_run_config
from pretrain.config.schema import GuardConfig
from pretrain.config.site import site_layer
from pretrain.config.values import build
from pretrain.jobs.run_status import find_runs, run_status, status_lines
from pretrain.resilience import heartbeat
from pretrain.resilience.exit_reason import exit_reason
from pretrain.resilience.progress import finished, starts_without_progress
from pretrain.resilience.slurm_job import SlurmJob
from pretrain.resilience.supervisor import reason_not_to_start, take_bad_nodes
from pretrain.run_folder import events
from pretrain.tracking.metrics import read_metrics
from pretrain.tracking.sinks.jsonl import Jsonl
from pretrain.trainer.stability import check_skips, read_history, read_ranges
from slurm.client import SlurmError
from slurm.options import JobOptions

OLD = Path(__file__).parents[2] / "data" / "before_rooms"
TEXTS = [{"id": n, "text": f"A house, number {n}, and no letters. " * 4, "meta": {"score": 0.5}} for n in range(12)]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        make: writes the sample into an empty folder.
        files: globs of the files to mutate, and their forms.
        call: reads the folder.
        share: part of all mutations, in any unit.
        restamp: makes sizes and hashes that are stored those of the files; used on half of the mutations.
    """

    name: str
    make: Callable[[Path], None]
    files: dict[str, str]
    call: Callable[[Path], object]
    share: int = 10
    restamp: Callable[[Path], None] = lambda folder: None


def copy_of(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(OLD / name, folder, dirs_exist_ok=True)


def read_data(folder: Path) -> None:
    load_manifest(folder)
    for name in SPLITS:
        reader = RowReader(folder, name)
        stream = RowStream([reader])
        numbers = np.unique([0, len(reader) // 2, len(reader) - 1])
        reader.rows(numbers)
        reader.documents(numbers)
        stream.locate(numbers)
        reader.verify()
        assert isinstance(stream.unigram_perplexity + len(reader.unfinished), float)


def check_data(folder: Path) -> None:
    found = check(folder, workers=1, samples=1)
    assert all(isinstance(str(reasons), str) for reasons in found.faults.values())


def make_tars(folder: Path) -> None:
    shutil.copy(OLD / "data" / "tokenizer.json", folder)
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for sample in range(6):
                ids = np.arange(5 + 17 * number, 60 + sample, dtype="<i8")
                stream = io.BytesIO()
                np.save(stream, ids)
                payload = json.dumps({"input_ids": ids.tolist()}).encode() if number == 2 else stream.getvalue()
                info = tarfile.TarInfo(f"{number}-{sample}." + ("json" if number == 2 else "npy"))
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))


def make_index(folder: Path) -> None:
    make_tars(folder)
    index_folder(IndexConfig(index=str(folder), length=16, validation_fraction=0.4, workers=1), lambda line: None)


def index_tars(folder: Path) -> None:
    make_index_again = IndexConfig(index=str(folder), length=16, validation_fraction=0.4, workers=1, overwrite=True)
    index_folder(make_index_again, lambda line: None)


def make_sources(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(text) + "\n" for text in TEXTS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.txt").write_bytes(lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    for name, mode in (("e.tar", "w"), ("f.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as tar:
            for text in TEXTS:
                payload = json.dumps(text).encode()
                info = tarfile.TarInfo(f"{text['id']}.json")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    pq.write_table(pa.table({"id": [t["id"] for t in TEXTS], "text": [t["text"] for t in TEXTS]}), folder / "g.parquet")
    (folder / "k.json").write_text(json.dumps(TEXTS))
    (folder / "h.jsonl.bz2").write_bytes(bz2.compress(lines))
    (folder / "i.jsonl.xz").write_bytes(lzma.compress(lines))


def read_sources(folder: Path) -> None:
    reasons: list[str] = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            for source in expand([str(path)]):
                for part in split(source, 1 << 20):
                    for document in read_part(part, path, Fields(), lambda _, why: reasons.append(why), lambda _: None):
                        document.text.encode()
    assert all("\n" not in reason for reason in reasons)


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    special = special_ids(tokenizer)
    remarks(folder / "tokenizer.json", special)
    encoder = TextEncoder(load_tokenizer(folder / "tokenizer.json"), control_ids(special))
    encoder.encode(["A house <|eos|> and\tno letters.", ""])
    encoder.lost("A house <|eos|> and\tno letters.")
    tokenizer.decode([0, 5, 200], skip_special_tokens=True)
    tokens = TokenIds(special.bos, special.eos, special.mask)
    model = type("Model", (), {"vocab_size": special.vocab_size})
    tokenizer_with_mask(folder / "tokenizer.json", tokens, model)


def make_run(folder: Path) -> None:
    shutil.copytree(OLD / "run", folder, dirs_exist_ok=True)
    events.record(folder, "launched", jobs=["12"], launch="000")
    events.record(folder, "attempt", job="", restart=0, nodes=["node1", "node2"], step=0, lineage="a 1")
    events.record(folder, "ended", job="", restart=0, lineage="a 1", kind="failed", cause="x", before=0, step=4)
    events.record(folder, "requeued", job="12", excluded=["node3"])
    events.record(folder, "hang", text="rank 1 hangs: the job ends", hosts=["node2"])
    events.record(folder, "stopped", step=8, signal="SIGTERM")
    beat = heartbeat.Heartbeat("1.0 2", 3, 4, "in step 5", False, False, 60.0)
    (folder / "heartbeat.json").write_text(beat.encode())
    (folder / "suspects.json").write_text(json.dumps({"hosts": ["node3"], "reasons": {"node3": "slow"}}))
    (folder / "skips.json").write_text(
        json.dumps({"ranges": [{"first": 5, "last": 6, "spike_first": 5, "spike_last": 5}]})
    )


def read_status(folder: Path) -> None:
    with without_slurm():
        _read_status(folder)


@contextlib.contextmanager
def without_slurm() -> Iterator[None]:
    """Slurm's commands fail, and get no argument that they would take for an option or a list."""

    def call(program: str, *args: str, timeout: float = 0) -> str:
        assert all(re.fullmatch(r"[\w.=+,%-]+", arg) for arg in args), args
        assert not args[-1].startswith("-"), args
        raise SlurmError(f"{program}: not here")

    with mock.patch("slurm.client.call", call):
        yield


def _read_status(folder: Path) -> None:
    for run in find_runs(folder):
        found = run_status(run)
        lines = status_lines(found)
        json.dumps(found)
        assert all(line.isprintable() for line in lines), lines


def supervise(folder: Path) -> None:
    monitor = heartbeat.HeartbeatMonitor(folder)
    monitor.trouble(1.0)
    take_bad_nodes(folder, 1)
    happened = events.read(folder)
    starts_without_progress(happened, "a 1")
    exit_reason(1, [], happened, {}, "")
    finished(folder, 8)
    with without_slurm():
        reason_not_to_start(folder, SlurmJob.from_environ({}), 3)


def read_records(folder: Path) -> None:
    read_metrics(folder)
    read_ranges(folder)
    read_history(folder, 8, GuardConfig(spike=3.0))
    check_skips(folder, GuardConfig(skip=("2-3",)), 8)
    Jsonl(folder, 4).close()


def make_upgraded(folder: Path) -> None:
    make_run(folder)
    list(upgrade_checkpoints(folder))


def resume(folder: Path) -> None:
    newest_checkpoint(folder)
    load_run(folder)


def upgrade(folder: Path) -> None:
    newest_checkpoint(folder)
    list(upgrade_checkpoints(folder))
    load_run(folder)


def read_config(folder: Path) -> None:
    load_run_config(["--config", str(folder / "config.yaml")])


def make_site(folder: Path) -> None:
    (folder / "site.yaml").write_text(
        "partition: gpu\naccount: a\nsetup: [module load x]\nenv: {A: b}\ntime: 1:30:00\n"
    )


def read_site(folder: Path) -> None:
    build(JobOptions, [site_layer(str(folder / "site.yaml"), JobOptions)])


def read_export(folder: Path) -> None:
    read_checkpoint(folder)


def make_golden(folder: Path) -> None:
    """A single file in the format of the reference, small enough to mutate."""
    import torch
    from safetensors.torch import save_file

    tensors = {"weights.backbone.vocab_embed.embedding": torch.zeros(12, 4), "other": torch.zeros(3)}
    metadata = {"vocab_size": "12", "model_length": "8", "n_blocks": "1", "hidden_dim": "4", "n_heads": "1"}
    save_file(tensors, folder / "golden.safetensors", metadata={**metadata, "block_size": "4"})


def read_golden(folder: Path) -> None:
    read_checkpoint(folder / "golden.safetensors", "bd3lm")


def make_shards(folder: Path) -> None:
    """An export in two shards with their index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(OLD / "export", folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def make_work(folder: Path) -> None:
    """Unfinished work of a data preparation: a part with its result, a shard with its note."""
    shutil.copy(OLD / "data" / "tokenizer.json", folder)
    (folder / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    work, manifest = Work(folder / "out"), load_manifest(OLD / "data")
    with contextlib.suppress(KeyError), work.opened(manifest.recipe, discard=False):
        _encoded(folder)
        raise KeyError  # a failure: the finished part stays


def _encoded(folder: Path) -> None:
    from data_prep.verify.walk import Rules

    rules = Rules.of(load_manifest(OLD / "data"))
    (source,) = expand([str(folder / "a.jsonl")])
    (part,) = split(source)
    job = EncodeJob(
        part,
        folder / ".out.partial/parts/p",
        folder / "tokenizer.json",
        (2,),
        2,
        rules.rows,
        "<u2",
        Fields(),
        0,
        0.3,
        3,
    )
    encode_part(job)
    (folder / ".out.partial/data/train").mkdir(parents=True, exist_ok=True)
    build_shard(_shard_job(folder))


def _shard_job(folder: Path):
    from data_prep.build.assemble import Segment
    from data_prep.verify.walk import Rules

    rules = Rules.of(load_manifest(OLD / "data"))
    stream = Stream("train", (Segment(folder / ".out.partial/parts/p", 0, 64),), rules.rows, "<u2")
    places = {"folder": folder / ".out.partial/data/train", "notes": folder / ".out.partial/notes"}
    return shard_jobs(stream, 2, rows_per_member=2, documents=True, vocab_size=300, **places)[0]


def read_work(folder: Path) -> None:
    work, recipe = Work(folder / "out"), load_manifest(OLD / "data").recipe
    read_result(folder / ".out.partial/parts/p")
    recorded_shard(_shard_job(folder))
    with contextlib.suppress(KeyError), work.opened(recipe, discard=True):
        raise KeyError


def replace_data(folder: Path) -> None:
    check_replaceable(folder)


def restamp_data(folder: Path) -> None:
    """Sizes and hashes in the manifest made those of the files, so that readers go on to what is in them."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, part in manifest["splits"].items():
            for shard in part["shards"]:
                path = folder / shard["name"] if "samples" in shard else folder / name / shard["name"]
                shard["bytes"], shard["sha256"] = path.stat().st_size, sha256_file(path)
            if "index" in part:
                part["index_sha256"] = sha256_file(folder / part["index"])
        manifest["tokenizer_sha256"] = sha256_file(folder / "tokenizer.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))


def restamp_run(folder: Path) -> None:
    """Sizes and hashes in the checkpoint's list made those of its files."""
    for path in folder.glob("checkpoints/*/complete.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            listing = json.loads(path.read_text())
            for name, stamp in listing["files"].items():
                file = path.parent / name
                stamp["bytes"], stamp["sha256"] = file.stat().st_size, sha256_file(file)
            path.write_text(json.dumps(listing))


DATA = {"manifest.json": "json", "*/*.tar": "tar", "tokenizer.json": "json"}
INDEX = {"manifest.json": "json", "index/*.npy": "npy", "*.tar": "tar"}
SOURCES = {"*.jsonl": "jsonl", "*.txt": "jsonl", "*.gz": "bytes", "c.jsonl.gz": "gz", "*.zst": "zst", "e.tar": "tar"}
SOURCES |= {"*.bz2": "bz2", "*.xz": "xz", "k.json": "json", "*.parquet": "bytes"}
STATUS = {"events.jsonl": "jsonl", "*.jsonl": "jsonl", "*.json": "json", "config.yaml": "yaml"}
CHECKPOINT = {"checkpoints/*/*.json": "json", "checkpoints/*/*.safetensors": "safetensors", "config.yaml": "yaml"}
OLD_CHECKPOINT = {"checkpoints/*/*.json": "json", "checkpoints/*/.metadata": "bytes", "checkpoints/*/*.distcp": "bytes"}
WORK = {".out.partial/**/*.json": "json", ".out.partial/notes/*.counts": "bytes"}
TARGETS = [
    Target("data", copy_of("data"), DATA, read_data, 25, restamp_data),
    Target("check", copy_of("data"), DATA, check_data, 10, restamp_data),
    Target("index", make_index, INDEX, read_data, 20, restamp_data),
    Target("index-check", make_index, INDEX, check_data, 10, restamp_data),
    Target("tars", make_tars, {"*.tar": "tar"}, index_tars, 15),
    Target("sources", make_sources, SOURCES, read_sources, 25),
    Target("tokenizer", copy_of("data"), {"tokenizer.json": "json"}, read_tokenizer, 15),
    Target("status", make_run, STATUS, read_status, 12),
    Target("supervisor", make_run, {"events.jsonl": "jsonl", "*.json": "json"}, supervise, 20),
    Target("records", make_run, {"*.jsonl": "jsonl", "skips.json": "json"}, read_records, 10),
    Target("checkpoint", make_upgraded, CHECKPOINT, resume, 15, restamp_run),
    Target("old-checkpoint", make_run, OLD_CHECKPOINT, upgrade, 10, restamp_run),
    Target("config", make_run, {"config.yaml": "yaml"}, read_config, 10),
    Target("site", make_site, {"site.yaml": "yaml"}, read_site, 8),
    Target("export", copy_of("export"), {"*.json": "json", "*.safetensors": "safetensors"}, read_export, 20),
    Target("shards", make_shards, {"*.index.json": "json", "*.safetensors": "safetensors"}, read_export, 10),
    Target("golden", make_golden, {"*.safetensors": "safetensors"}, read_golden, 10),
    Target("work", make_work, WORK, read_work, 10),
    Target("replace", copy_of("data"), {"manifest.json": "json"}, replace_data, 2),
]
