"""The training loop; `bd3 pretrain`. One process is one rank: torchrun or srun start many, alone it is a world of 1."""

from __future__ import annotations

import fcntl
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from bd3_megatron.cost import flops
from bd3_megatron.engine import build_engine, check_installed
from bd3_megatron.engine.base import Engine, StepResult
from data_prep.read.stream import RowStream
from pretrain.checkpoint import reader as checkpoint
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig, TrainConfig, check_batches, check_profile, check_run
from pretrain.distributed.collectives import (
    collective_errors,
    lost_ranks,
    max_over_ranks,
    on_rank_0,
    raise_on_all_ranks,
)
from pretrain.distributed.ranks import read_ranks, rendezvous
from pretrain.estimate.devices import peak_flops
from pretrain.preflight.run import Preflight
from pretrain.resilience import signals
from pretrain.resilience.watchdog import Watchdog
from pretrain.run_folder import data as run_data
from pretrain.run_folder import events, layout
from pretrain.run_folder.data import open_data
from pretrain.tracking.console import Progress, Throughput
from pretrain.tracking.metrics import MetricsWriter, read_metrics, series
from pretrain.tracking.plots import ascii_curve, plot_curves
from pretrain.trainer.batches import Batches
from pretrain.trainer.likelihood import Evaluation, evaluate
from pretrain.trainer.profiler import Profiler, out_of_memory, record_allocations
from pretrain.trainer.resume import check_same_run, checkpoint_to_resume, position
from pretrain.trainer.stability import Guard


def train(config: RunConfig) -> Path:
    """Run the configuration to its last step and return the run folder.

    Raises:
        ConfigError, DataError: one line for a mistake of the user, before anything is written.
        LostRank: another rank died; the run goes on from its last checkpoint when it is started again.
        Stopped: a signal asked for it; there is a checkpoint, and the run goes on when it is started again.
    """
    ranks = read_ranks()
    with collective_errors():
        data_size = check_run(config, ranks.world_size)
        check_batches(config.train, config.parallel, data_size)
        check_profile(config.profile, ranks.world_size)
        if not config.data.weights():
            raise ConfigError("data.path: not set; give the folder that bd3 prep wrote with --data.path")
    lock = trainer = watch = None
    try:
        with (
            # Whoever was refused has not touched the run.
            events.failures(Path(config.run), ranks, lambda: lock is not None),
            lost_ranks(ranks.rank, lambda: f"at step {trainer.step + 1}" if trainer else "before the first step"),
            out_of_memory(config, ranks.rank, lambda: watch.phase if watch else "at the start"),
        ):
            store = rendezvous(ranks)
            world = parallel.start(config.parallel, ranks.rank, ranks.world_size, ranks.local_rank, store)
            record_allocations(config.profile)
            watch = Watchdog(ranks, config.parallel.timeout_minutes, Path(config.run) / layout.HANG)
            # From here on what may fail on one rank alone is agreed on by all.
            raise_on_all_ranks(lambda: check_installed(config.engine()))
            preflight = Preflight(config, ranks, world, watch)
            preflight.nodes()
            config, stream, validation = preflight.data(lambda: open_data(config, world))
            run = Path(config.run)
            on_rank_0(lambda: check_same_run(run, config))
            found = checkpoint_to_resume(run, config, stream, world)
            lock = on_rank_0(lambda: _prepare_folder(run, config, stream))
            preflight.folders(config)
            engine = build_engine(config.engine(), world, config.train.seed)
            if found is not None:
                checkpoint.restore(found, engine, say=_warn if world.is_first else lambda _: None)
            with Trainer(config, run, engine, stream, validation, found.step if found else 0, watch) as trainer:
                trainer.run()
    finally:
        if watch is not None:
            watch.close(sys.exc_info()[1])
        if lock is not None and ranks.rank == 0:
            os.close(lock)
        parallel.stop()
    return run


class _Asked(Exception):
    """All ranks have agreed to stop, because at least one got this signal."""

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


class Trainer:
    """The loop over steps: train, record, evaluate, checkpoint. Leaving the context closes files and progress bar."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        engine: Engine,
        stream: RowStream,
        validation: RowStream,
        step: int,
        watch: Watchdog,
    ):
        self.config, self.folder, self.engine, self.step = config, run, engine, step
        self.watch, self.first_step, self.saved = watch, step, step
        self.stream, self.validation = stream, validation
        self.first = engine.world.is_first
        train = config.train
        self.writer = checkpoint.CheckpointWriter(
            run,
            engine,
            config.checkpoint.keep,
            config.checkpoint.keep_every,
            config.checkpoint.asynchronous,
            self._record_checkpoint,
        )
        self.batches = Batches(
            stream,
            config.model,
            config.diffusion,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=engine.world.data_rank,
            size=engine.world.data_size,
            noise_seed=train.seed,
            document_mask=config.data.document_mask,
        )
        self.metrics: MetricsWriter | None = None
        on_rank_0(self._open_metrics)
        self.guard = Guard(config, run, self.batches, engine.world, self._say)
        self.guard.resume(self.step)
        self.computed = 0  # steps of this process, those that it did again included
        self.progress = Progress(train.steps, self.step, config.log.every) if self.first else None
        self.profiler = Profiler(config.profile, run, engine.world.rank, self.step, self._say)
        self.throughput = Throughput(
            useful_flops=flops.training_flops_per_token(config.model, config.diffusion),
            model_flops=flops.six_n(config.model),
            peak_flops=peak_flops(config.log.peak_tflops, train.precision) * engine.world.size,
        )

    def _open_metrics(self) -> None:
        sinks = self.config.log.sink_names() if self.step < self.config.train.steps else ()
        self.metrics = MetricsWriter(self.folder, self.step, sinks, self.config.model_dump(mode="json"))

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.writer.close(error)
        self.profiler.close()
        if self.first:
            self.progress.close()
            self.metrics.close()

    def run(self) -> None:
        """Train to the last step, leave a checkpoint, an evaluation and the curves of it.

        Raises:
            Stopped: a signal asked for it; there is a checkpoint of the last step done.
        """
        try:
            self._train()
        except _Asked as asked:
            self._stop(asked.signal)
        if self.first:
            self._finish()

    def _train(self) -> None:
        steps = self.config.train.steps
        if self.step >= steps:
            self._say(f"{self.folder}: already at step {self.step} of {steps}; raise train.steps to go on")
        else:
            on_rank_0(lambda: events.record(self.folder, "started", step=self.step, ranks=self.engine.world.size))
            self.watch.start_heartbeat()
            self._say(f"{self.folder}: going on from step {self.step}" if self.step else self._describe())
        if self._evaluation_due() and not on_rank_0(lambda: self.metrics.has("validation", self.step)):
            self._evaluate()
        while self.step < steps:
            self._heed_signals()
            self.writer.poll()
            with self.profiler.step(self.step + 1):
                self._train_step()
            if self.guard.spike is not None:
                self._go_back()
                continue
            if self._evaluation_due():
                self._evaluate()
            if self.step == steps or _due(self.step, self.config.checkpoint.every):
                self._save()
        self.watch.tick("in the last checkpoint", may_take_long=True)
        self.writer.wait()

    def _evaluation_due(self) -> bool:
        return self.step in (0, self.config.train.steps) or _due(self.step, self.config.eval.every)

    def _heed_signals(self) -> None:
        """At a place that all ranks pass: end the run if any of them was asked to."""
        (signal,) = max_over_ranks([signals.received()], self.engine.world.device)
        if signal:
            raise _Asked(signal)

    def _stop(self, signal: int) -> None:
        """Leave a checkpoint of the last step done, and the run."""
        if self.step > self.saved:
            self._save()
        self.watch.tick("in the last checkpoint", may_take_long=True)
        self.writer.wait()
        signals.ignore()
        name = signals.name_of(signal)
        on_rank_0(lambda: events.record(self.folder, "stopped", step=self.step, signal=name))
        self._say(f"{self.folder}: {name}: stopped after step {self.step}; start it again to go on")
        raise signals.Stopped(signals.exit_code(signal))

    def _train_step(self) -> None:
        train, step = self.config.train, self.step
        # The first step may compile kernels.
        self.watch.tick(f"in step {step + 1}", may_take_long=self.computed == 0)
        lr, result = learning_rate(train, step), None
        if not self.guard.leaves_out(step + 1):
            batches = self.batches.at(step)
            parallel.seed_dropout(train.seed, step)
            result = self.engine.train_step(batches, lr)
            self.computed += 1
        self.step = step + 1
        if self.first:
            self._record(result, lr)
        self.guard.after(self.step, result, lr)

    def _record(self, result: StepResult | None, lr: float) -> None:
        values = self.guard.fields(result)
        skipped = values.pop("skipped", None)
        values |= {"lr": lr, "tokens": self._tokens(self.step)} | ({"skipped": skipped} if skipped else {})
        speed = self.throughput.mark(self.computed, self._tokens(self.computed)) if result is not None else {}
        self.metrics.train(self.step, values)
        if speed:
            self.metrics.throughput(self.step, speed)
        self.progress.update(self.step, values | speed | {"steps_skipped": self.guard.skipped + bool(skipped)})

    def _go_back(self) -> None:
        """Undo the steps from before a spike of the loss on, as a start from the checkpoint before them would."""
        self.watch.tick(f"going back after step {self.step}", may_take_long=True)
        with self.throughput.paused():
            self.writer.wait()
            found = self.guard.go_back()
            checkpoint.restore(found, self.engine)
            self.step = self.saved = found.step
            if self.first:
                self.metrics.close()
            on_rank_0(self._open_metrics)
            self.guard.resume(self.step)

    def _evaluate(self) -> Evaluation:
        config = self.config
        micro = config.eval.micro_batch or config.train.micro_batch
        phase = f"in the evaluation after step {self.step}"

        def progress() -> None:
            self.watch.tick(phase)
            self._heed_signals()  # an evaluation that is left is made when the run goes on

        self.watch.tick(phase, may_take_long=self.step == self.first_step)
        with self.throughput.paused(), self.engine.averaged():
            result = evaluate(
                self.engine,
                self.validation,
                config.model,
                config.diffusion,
                config.eval,
                micro,
                progress=progress,
                document_mask=config.data.document_mask,
            )
        self.watch.tick(f"after step {self.step}")
        if self.first:
            self.metrics.validation(self.step, result.record())
            self._say(
                f"step {self.step} | validation perplexity {result.perplexity:.2f} +- {result.perplexity_stderr:.2f} "
                f"(unigram {self.validation.unigram_perplexity:.2f}) | "
                f"NELBO {result.nelbo:.4f} +- {result.nelbo_stderr:.4f} nats per token"
            )
        return result

    def _save(self) -> None:
        on_rank_0(lambda: self.metrics.sync())  # the other ranks have none
        meta = position(self.config, self.step, self.stream) | {
            "tokens": self._tokens(self.step),
            "data": run_data.data_identity(*self.stream.manifests),
            "updates": self.engine.updates,
            "skips": len(self.guard.ranges),
        }
        self.watch.tick(f"in the checkpoint of step {self.step}", may_take_long=True)
        with self.throughput.paused():
            self.writer.save(self.step, meta)
        self.saved = self.step

    def _record_checkpoint(self, written: checkpoint.Written) -> None:
        if self.first:
            self.metrics.checkpoint(
                written.step,
                {
                    "stall_seconds": written.stall_seconds,
                    "write_seconds": written.write_seconds,
                    "bytes": written.bytes,
                },
            )

    def _finish(self) -> None:
        self.watch.tick("at the end", may_take_long=True)
        unigram = self.validation.unigram_perplexity
        plot = plot_curves(self.folder, reference={"unigram": unigram})
        records = read_metrics(self.folder)
        self.progress.close()
        _, losses = series(records, "train", "loss")
        _, perplexities = series(records, "validation", "perplexity")
        self._say(ascii_curve(losses, "train loss"))
        self._say(ascii_curve(perplexities, "validation perplexity"))
        self._say(f"unigram perplexity of the validation split: {unigram:.2f}")
        self._say(f"run folder: {self.folder} (curves: {plot})")
        if self.first_step < self.config.train.steps:
            events.record(self.folder, "finished", step=self.step)

    def _tokens(self, step: int) -> int:
        """Data tokens after ``step`` steps: L per row."""
        return step * self.config.train.global_batch * self.config.model.length

    def _describe(self) -> str:
        config, world = self.config, self.engine.world
        return (
            f"{config.model.parameters(config.model.vocab_size) / 1e6:.2f}M parameters, {config.model.backbone}, "
            f"L={config.model.length}, B'={config.diffusion.block_size}, {config.train.precision}, "
            f"{world.size} process(es) on {world.device.type}; {len(self.stream)} train rows, "
            f"{config.train.steps * config.train.global_batch / len(self.stream):.2f} epochs"
        )

    def _say(self, text: str) -> None:
        if self.first:
            self.progress.message(text)


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of step ``step`` (0 is the first): linear warm-up, then constant or decay to ``min_lr``."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.decay == "constant":
        return train.lr
    done = min(1.0, (step + 1 - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    left = 1 - done if train.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return train.min_lr + (train.lr - train.min_lr) * left


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _prepare_folder(run: Path, config: RunConfig, stream: RowStream) -> int:
    """Make the run folder and write what describes the run; returns the descriptor that holds the folder's lock.

    Raises:
        ConfigError: another process of this machine trains in it.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(f"run={run}: another process is training in it; wait for it or use another --run") from None
    tokenizer = run / layout.TOKENIZER
    if not tokenizer.exists():
        partial = tokenizer.with_suffix(".partial")
        stream.readers[0].copy_tokenizer(partial)
        partial.replace(tokenizer)
    lines = [f"python {platform.python_version()}"]
    lines += [f"{name} {version(name)}" for name in ("bd3-megatron", "torch", "megatron-core", "numpy")]
    (run / "versions.txt").write_text("\n".join(lines) + "\n")
    save_config(config, run / layout.CONFIG)
    return lock
