"""`bd3 bench data`: preparing text beside bare `tokenizers`, reading rows beside `numpy.memmap` and `webdataset`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bd3_common.errors import ConfigError
from data_prep.build import pool
from data_prep.build.prep import PrepConfig, prep
from data_prep.format.manifest import Manifest, Split, save_manifest
from data_prep.format.pack import Rows
from data_prep.format.shards import write_shard
from data_prep.format.text_encoder import TextEncoder
from data_prep.format.tokenizer import load_tokenizer, shared_tokenizer, train_bpe
from data_prep.read.reader import RowReader
from data_prep.sources import Document, Fields, expand, read_part, split
from pretrain.bench.options import DataOptions

BUNDLED = Path(__file__).parents[2] / "corpora" / "austen.jsonl.gz"
BATCHES = 200  # of random rows in one turn
SINGLE_ROWS = 2048  # written with a tar member each


def bench_data(options: DataOptions) -> None:
    """Print a row per measurement and the ratios.

    Raises:
        ConfigError, DataError: no text, or a tokenizer that is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(options, Path(folder))
    if options.json_:
        print(json.dumps(found))
        return
    size, turns = found["text_megabytes"], options.repeats
    print(f"text {size:.1f} MB, L={options.length}, {options.tokenizer}; fastest of {turns} turns")
    for row in found["prep"]:
        print(f"{row['what']:<44}{row['megabytes_per_second']:>9.2f} MB/s {row['time']}")
    print(f"  one process / bare tokenizers {found['prep_vs_tokenizers']:.3f}")
    for row in found["prep_scaling"]:
        print(
            f"  {row['workers']} processes / 1: speed {row['speedup']:.2f}, {row['efficiency']:.2f} for each; "
            f"CPU time of all {row['cpu_ratio']:.2f}"
        )
    for row in found["read"]:
        rate = row.get("skipped") or f"{row['rows_per_second']:>12,.0f}{row['megatokens_per_second']:>9.1f}"
        print(f"{row['what']:<44}{rate}{'' if 'skipped' in row else ' rows, Mtok per CPU second'}")
    print(f"  rows / memmap {found['read_vs_memmap']:.3f}")


def _measure(options: DataOptions, folder: Path) -> dict[str, Any]:
    documents = _documents(options.text)
    tokenizer = folder / "tokenizer.json"
    if options.tokenizer.startswith("bpe:"):
        size = PrepConfig(inputs=("-",), out="-", tokenizer=options.tokenizer).bpe_size
        train_bpe((document.text for document in documents), size).save(str(tokenizer))
    else:
        load_tokenizer(options.tokenizer)
        tokenizer.write_bytes(Path(options.tokenizer).read_bytes())
    manifest, single = _single(options, folder, documents, tokenizer)
    scaled = _scaling(options, folder, documents, tokenizer)
    return single | scaled | {"prep": single["prep"] + scaled["prep"]} | _reading(options, folder, manifest)


def _documents(text: str | None) -> list[Document]:
    """All documents of the text, in memory."""
    if text is None and not BUNDLED.is_file():
        raise ConfigError(f"text=null: {BUNDLED} is not there (not a checkout?); name a JSONL file with --text")
    documents = []
    for source in expand([text or str(BUNDLED)]):
        for part in split(source, source.bytes):
            documents += read_part(part, Path(source.path), Fields(), lambda *_: None, lambda _: None)
    if not documents:
        raise ConfigError(f"text={text}: no documents in it; name a JSONL file with text")
    return documents


def _repeated(documents: Sequence[Document], megabytes: float) -> Iterator[Document]:
    """The documents again and again, under new ids, until there is so much text."""
    size = 0
    for turn in count():
        for document in documents:
            if size >= megabytes * 1e6:
                return
            yield document._replace(id=f"{document.id}-{turn}")
            size += len(document.text.encode())


def _write(path: Path, documents: Sequence[Document]) -> float:
    """Write plain JSONL; returns megabytes of text."""
    with path.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
    return sum(len(document.text.encode()) for document in documents) / 1e6


def _config(options: DataOptions, text: Path, out: Path, tokenizer: Path, workers: int) -> PrepConfig:
    return PrepConfig(
        inputs=(str(text),), out=str(out), length=options.length, tokenizer=str(tokenizer), workers=workers
    )


def _single(
    options: DataOptions, folder: Path, documents: Sequence[Document], tokenizer: Path
) -> tuple[Manifest, dict[str, Any]]:
    """prep in this process against `encode_batch_fast` of the same batches.

    The speed of a core drifts over a turn of seconds, so the fastest time is taken batch by batch: of what prep spends
    in its encoder, of what bare tokenizers spend on the same texts, and of all else that prep does.
    """
    size = _write(folder / "single.jsonl", list(_repeated(documents, options.megabytes)))
    plain = shared_tokenizer(tokenizer)  # the one that prep uses, so that nothing else differs
    manifests: list[Manifest] = []
    batches: list[list[str]] = []
    inside: list[list[float]] = []  # [turn][batch]
    outside: list[float] = []
    bare: list[list[float]] = []

    encode = TextEncoder.encode

    def watched(encoder: TextEncoder, texts: list[str]) -> list:
        if len(inside) == 1:
            batches.append(texts)
        begin = time.process_time()
        ids = encode(encoder, texts)
        inside[-1].append(time.process_time() - begin)
        return ids

    def ours(turn: int) -> None:
        inside.append([])
        begin = time.process_time()
        manifests.append(prep(_config(options, folder / "single.jsonl", folder / f"single-{turn}", tokenizer, 1)))
        outside.append(time.process_time() - begin - sum(inside[-1]))

    def tokenizers_alone(turn: int) -> None:
        bare.append([])
        for texts in batches:
            begin = time.process_time()
            plain.encode_batch_fast(texts, add_special_tokens=False)
            bare[-1].append(time.process_time() - begin)

    with pool.one_thread(), _replaced(TextEncoder, "encode", watched):
        _turns([ours, tokenizers_alone], options.repeats)
    seconds = np.min(inside, axis=0).sum() + min(outside), np.min(bare, axis=0).sum()
    rows = [
        {"what": name, "megabytes_per_second": size / took, "time": "of CPU, one process"}
        for name, took in zip(("prep", "tokenizers.encode_batch_fast"), seconds)
    ]
    return manifests[-1], {"text_megabytes": size, "prep_vs_tokenizers": seconds[1] / seconds[0], "prep": rows}


@contextmanager
def _replaced(owner: type, name: str, function: Callable) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _scaling(options: DataOptions, folder: Path, documents: Sequence[Document], tokenizer: Path) -> dict[str, Any]:
    """prep with many processes against one, start of the processes included."""
    size = _write(folder / "scaling.jsonl", list(_repeated(documents, options.scaling_megabytes)))

    cpu: dict[int, list[float]] = {}

    def with_workers(workers: int) -> Callable[[int], None]:
        def turn(number: int) -> None:
            out = folder / f"scaling-{workers}-{number}"
            begin = sum(os.times()[:4])  # of this process and of its children that have ended
            prep(_config(options, folder / "scaling.jsonl", out, tokenizer, workers=workers))
            cpu.setdefault(workers, []).append(sum(os.times()[:4]) - begin)

        return turn

    numbers = list(dict.fromkeys([1, *options.workers]))
    turns = max(1, options.repeats // 5)  # long ones
    times = _turns([with_workers(workers) for workers in numbers], turns, clock=time.perf_counter, warm=False)
    wall = {workers: min(found) for workers, found in zip(numbers, times)}
    work = {workers: min(found) for workers, found in cpu.items()}
    rates = [
        {
            "what": f"prep, {workers} process(es)",
            "megabytes_per_second": size / seconds,
            "time": f"of wall time, {size:.0f} MB",
        }
        for workers, seconds in wall.items()
    ]
    scaling = [
        {
            "workers": workers,
            "speedup": wall[1] / wall[workers],
            "efficiency": wall[1] / wall[workers] / workers,
            "cpu_ratio": work[workers] / work[1],
        }
        for workers in numbers[1:]
    ]
    return {"prep_scaling": scaling, "prep": rates}


def _reading(options: DataOptions, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Random rows through the reader and from a flat file, and whole passes of webdataset."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, manifest.vocab_size - 1, (options.rows, options.length), np.dtype(manifest.dtype))
    reader = RowReader(_rows_as_data_set(folder / "rows", tokens, manifest, options.shards), "train")
    np.save(folder / "flat.npy", tokens)
    flat = np.load(folder / "flat.npy", mmap_mode="r")
    picks = rng.integers(0, options.rows, (options.repeats, BATCHES, options.batch))
    for begin in range(0, options.rows, options.batch):  # each page of both is mapped by now
        everywhere = np.arange(begin, min(begin + options.batch, options.rows))
        if not (reader.rows(everywhere) == flat[everywhere]).all():
            raise RuntimeError("the reader's rows are not those that were written")

    def random_rows(read: Callable[[np.ndarray], np.ndarray]) -> Callable[[int], None]:
        def turn(number: int) -> None:
            for indices in picks[number % len(picks)]:
                read(indices)

        return turn

    ours, plain = _turns([random_rows(reader.rows), random_rows(flat.__getitem__)], options.repeats)
    rows = BATCHES * options.batch
    return {
        "read_vs_memmap": min(plain) / min(ours),
        "read": [
            _read_row(f"RowReader, batches of {options.batch}", rows, ours, options.length),
            _read_row(f"numpy.memmap, batches of {options.batch}", rows, plain, options.length),
            *_webdataset(options, folder, tokens[:SINGLE_ROWS]),
        ],
    }


def _webdataset(options: DataOptions, folder: Path, few: np.ndarray) -> list[dict[str, Any]]:
    """One pass of plain webdataset decoding over the shards, and over the first rows with a member for each."""
    try:
        import webdataset
    except ImportError:
        return [{"what": "webdataset", "skipped": "not installed; pip install 'bd3-megatron[data]'"}]
    with webdataset.TarWriter(str(folder / "single.tar")) as writer:
        for number, row in enumerate(few):
            writer.write({"__key__": f"{number:08d}", "tokens.npy": row})
    shards = sorted(str(path) for path in (folder / "rows" / "train").glob("*.tar"))

    def walk(paths: list[str]) -> Callable[[int], None]:
        def turn(number: int) -> None:
            for _ in webdataset.WebDataset(paths, shardshuffle=False).decode():
                pass

        return turn

    many, single = _turns([walk(shards), walk([str(folder / "single.tar")])], options.repeats)
    return [
        _read_row("webdataset, the same shards in order", options.rows, many, options.length),
        _read_row("webdataset, a member for each row, in order", len(few), single, options.length),
    ]


def _rows_as_data_set(folder: Path, tokens: np.ndarray, manifest: Manifest, shards: int) -> Path:
    """Write ``tokens [n, L]`` as the train split of a data set of ``shards`` tars."""
    (folder / "train").mkdir(parents=True)
    nothing, size = np.empty((0, 2), np.int32), manifest.recipe.rows_per_member
    written = []
    for number, chunk in enumerate(np.array_split(tokens, min(shards, len(tokens)))):
        samples = (Rows(chunk[begin : begin + size], nothing) for begin in range(0, len(chunk), size))
        written.append(write_shard(folder / "train", "train", number, samples))
    values = dict.fromkeys(("documents", "text_bytes", "dropped_tokens", "unigram_entropy"), 0)
    train = Split(rows=len(tokens), tokens=tokens.size, shards=written, **values)
    save_manifest(manifest.model_copy(update={"splits": manifest.splits | {"train": train}}), folder)
    return folder


def _read_row(what: str, rows: int, seconds: Sequence[float], length: int) -> dict[str, Any]:
    rate = rows / min(seconds)
    return {"what": what, "rows_per_second": rate, "megatokens_per_second": rate * length / 1e6}


def _turns(
    functions: Sequence[Callable[[int], Any]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    warm: bool = True,
) -> list[list[float]]:
    """Seconds of each function in each turn; they take turns, after one uncounted turn of each."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(-1 if warm else 0, repeats):
        for function, found in zip(functions, seconds):
            begin = clock()
            function(turn)
            if turn >= 0:
                found.append(clock() - begin)
    return seconds
