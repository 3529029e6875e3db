"""The training loop of `bd3 pretrain`: one process is one rank; without a launcher it is a world of 1."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bd3_common.errors import ConfigError
from bd3_megatron import parallel
from bd3_megatron.cost import flops
from bd3_megatron.engine import build_engine, check_installed
from bd3_megatron.engine.base import Engine, StepResult
from data_prep.read.stream import RowStream
from pretrain.checkpoint.reader import restore
from pretrain.checkpoint.writer import CheckpointWriter, Written
from pretrain.config.schema import RunConfig, check_batches, check_profile, check_run
from pretrain.distributed.collective_errors import collective_errors
from pretrain.distributed.collectives import max_over_ranks, on_rank_0, raise_on_all_ranks
from pretrain.distributed.ranks import Ranks, read_ranks
from pretrain.estimate.devices import peak_flops
from pretrain.evaluation.likelihood import Evaluation, evaluate
from pretrain.preflight.run import Preflight
from pretrain.preflight.startup import start_ranks
from pretrain.resilience import signals
from pretrain.resilience.watchdog import Watchdog
from pretrain.run_folder import events
from pretrain.run_folder.data import data_identity, open_data
from pretrain.run_folder.identity import META_KEY, check_folder
from pretrain.run_folder.place import check_place
from pretrain.run_folder.prepare import prepare
from pretrain.tracking.console import Progress, Throughput
from pretrain.tracking.metrics import MetricsWriter, read_metrics, series
from pretrain.tracking.plots import ascii_curve, plot_curves
from pretrain.trainer.batches import Batches
from pretrain.trainer.clip_interval import ClipInterval
from pretrain.trainer.learning_rate import learning_rate
from pretrain.trainer.noise_scale import NoiseScale
from pretrain.trainer.profiler import Profiler, out_of_memory, record_allocations
from pretrain.trainer.resume import Beginning, find_beginning, position, settings
from pretrain.trainer.stability import StabilityMonitor

_LOG = logging.getLogger(__name__)


def train(config: RunConfig) -> Path:
    """Train to the configuration's last step and return the run folder.

    Raises:
        ConfigError, DataError: a mistake of the user, before anything is written.
        LostRank: another rank died; a new start goes on from the last checkpoint.
        Stopped: a signal stopped the run; a new start goes on from its checkpoint.
    """
    ranks = read_ranks()
    with collective_errors():
        _check(config, ranks)
    with start_ranks(config, ranks) as job, out_of_memory(config, ranks.rank, lambda: job.phase):
        record_allocations(config.profile)
        raise_on_all_ranks(lambda: check_installed(config.engine()))
        preflight = Preflight(config, ranks, job.world, job.watchdog)
        preflight.nodes()
        config, stream, validation = preflight.data(lambda: open_data(config, job.world))
        begin = find_beginning(job.run, config, stream, job.world)
        job.take_run_folder(lambda: prepare(job.run, config, stream, begin.identity, begin.seen), begin.identity.id)
        if (initial := begin.initial) is not None:
            on_rank_0(lambda: initial.keep(job.run))
        preflight.folders(config)
        job.log_to_run_folder()
        engine = build_engine(config.engine(), job.world, config.train.seed)
        if begin.checkpoint is not None:
            restore(begin.checkpoint, engine)
        elif begin.initial is not None:
            begin.initial.fill(engine)
            _LOG.info(f"weights from {config.init}: {' '.join(begin.initial.parents)}")
        with Trainer(config, job.run, engine, stream, validation, begin, job.watchdog) as trainer:
            trainer.run()
    return job.run


def _check(config: RunConfig, ranks: Ranks) -> None:
    """Check the configuration for this number of ranks.

    Raises:
        ConfigError: names the key that does not fit.
    """
    data_size = check_run(config, ranks.world_size)
    check_batches(config.train, config.parallel, data_size)
    check_profile(config.profile, ranks.world_size)
    if not config.data.weights():
        raise ConfigError("data.path: not set; give the folder that bd3 prep wrote with --data.path")
    check_place(config)


class _StopRequested(Exception):
    """A signal to stop has reached at least one rank; raised on all ranks."""

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
        begin: Beginning,
        watchdog: Watchdog,
    ):
        step, self.run_id = begin.step, begin.identity.id
        self.config, self.folder, self.engine, self.step = config, run, engine, step
        self.watchdog, self.first_step, self.saved = watchdog, step, step
        self.data = data_identity(*stream.manifests)
        self.stream, self.validation = stream, validation
        self.first = engine.world.is_first
        train = config.train
        self.writer = CheckpointWriter(
            run,
            engine,
            config.checkpoint.keep,
            config.checkpoint.keep_every,
            config.checkpoint.asynchronous,
            self._record_checkpoint,
            check=lambda: check_folder(run, self.run_id),
        )
        self.clip = ClipInterval(config, begin.meta)
        self.batches = Batches(
            stream,
            config.model,
            self.clip.diffusion,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            rank=engine.world.data_rank,
            size=engine.world.data_size,
            noise_seed=train.seed,
            document_mask=config.data.document_mask,
        )
        self.noise_scale = NoiseScale(config)
        self.metrics: MetricsWriter | None = None
        on_rank_0(lambda: self._open_metrics(begin.meta))
        self.stability = StabilityMonitor(config, run, self.batches, engine.world)
        self.stability.resume(self.step)
        self.computed = 0  # steps of this process, repeated ones included
        self.progress = Progress(train.steps, self.step, config.log.every) if self.first else None
        self.profiler = Profiler(config.profile, run, engine.world.rank, self.step)
        self.throughput = Throughput(
            useful_flops=flops.training_flops_per_token(config.model, self.clip.diffusion),
            model_flops=flops.six_n(config.model),
            peak_flops=peak_flops(config.log.peak_tflops, train.precision) * engine.world.size,
        )

    def _open_metrics(self, meta: Mapping[str, Any]) -> None:
        """Open the metrics of a run that continues from a checkpoint with this meta."""
        sinks = self.config.log.sink_names() if self.step < self.config.train.steps else ()
        self.metrics = MetricsWriter(self.folder, self.step, sinks, self.config.model_dump(mode="json"), meta)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.writer.close(error)
        self.profiler.close()
        if self.first:
            self.progress.close()
            self.metrics.close()

    def run(self) -> None:
        """Train to the last step; write its checkpoint, evaluation and curves.

        Raises:
            Stopped: a signal stopped the run; its last step has a checkpoint.
        """
        try:
            self._train()
        except _StopRequested as request:
            self._stop(request.signal)
        if self.first:
            self._finish()

    def _train(self) -> None:
        steps = self.config.train.steps
        if self.step >= steps:
            _LOG.info(f"{self.folder}: already at step {self.step} of {steps}; raise train.steps to go on")
        else:
            on_rank_0(lambda: events.record(self.folder, "started", step=self.step, ranks=self.engine.world.size))
            self.watchdog.start_heartbeat()
            _LOG.info(f"{self.folder}: going on from step {self.step}" if self.step else self._describe())
        if self._evaluation_due() and not on_rank_0(lambda: self.metrics.has("validation", self.step)):
            self._evaluate()
        if self.clip.due(self.step):  # a signal in the evaluation kept the run from it
            self._search_interval()
        while self.step < steps:
            self._check_signals()
            self.writer.poll()
            with self.profiler.step(self.step + 1):
                self._train_step()
            if self.stability.spike is not None:
                self._go_back()
                continue
            if self._evaluation_due():
                self._evaluate()
            if self.clip.due(self.step):
                self._search_interval()
            if self.step == steps or _due(self.step, self.config.checkpoint.every):
                self._save()
        self.watchdog.tick("in the last checkpoint", may_take_long=True)
        self.writer.wait()

    def _evaluation_due(self) -> bool:
        return self.step in (0, self.config.train.steps) or _due(self.step, self.config.eval.every)

    def _check_signals(self) -> None:
        """Stop the run if a signal has reached any rank; a collective of all ranks."""
        (signal,) = max_over_ranks([signals.received()], self.engine.world.device)
        if signal:
            raise _StopRequested(signal)

    def _stop(self, signal: int) -> None:
        """Write a checkpoint of the last step and end the run."""
        if self.step > self.saved:
            self._save()
        self.watchdog.tick("in the last checkpoint", may_take_long=True)
        self.writer.wait()
        signals.ignore()
        name = signals.name_of(signal)
        on_rank_0(lambda: events.record(self.folder, "stopped", step=self.step, signal=name))
        _LOG.info(f"{self.folder}: {name}: stopped after step {self.step}; start it again to go on")
        raise signals.Stopped(signals.exit_code(signal))

    def _train_step(self) -> None:
        train, step = self.config.train, self.step
        # The first step may compile kernels.
        self.watchdog.tick(f"in step {step + 1}", may_take_long=self.computed == 0)
        lr, result, half = learning_rate(train, step), None, None
        if not self.stability.skips(step + 1):
            batches = self.batches.at(step)
            half = self.noise_scale.half_norm(step + 1, self.engine, batches)
            parallel.seed_dropout(train.seed, step)
            result = self.engine.train_step(batches, lr, _due(step + 1, self.config.log.blocks_every))
            self.computed += 1
        self.step = step + 1
        if self.first:
            self._record(result, lr, self.noise_scale.fields(half, result))
        self.stability.after(self.step, result, lr)

    def _record(self, result: StepResult | None, lr: float, noise: Mapping[str, float | None]) -> None:
        values = self.stability.fields(result)
        skipped = values.pop("skipped", None)
        values |= {"lr": lr, "tokens": self._tokens(self.step)} | ({"skipped": skipped} if skipped else {})
        details = dict(noise) if result is None or not result.applied else {**result.blocks, **noise}
        speed = self.throughput.mark(self.computed, self._tokens(self.computed)) if result is not None else {}
        self.metrics.train(self.step, values | details)
        if speed:
            self.metrics.throughput(self.step, speed)
        self.progress.update(self.step, values | speed | {"steps_skipped": self.stability.skipped + bool(skipped)})

    def _go_back(self) -> None:
        """Resume from the checkpoint before a loss spike, as a new start does."""
        self.watchdog.tick(f"going back after step {self.step}", may_take_long=True)
        with self.throughput.paused():
            self.writer.wait()
            found = self.stability.go_back()
            restore(found, self.engine)
            self.step = self.saved = found.step
            self.clip = ClipInterval(self.config, found.meta)
            self._take_interval()
            if self.first:
                self.metrics.close()
            on_rank_0(lambda: self._open_metrics(found.meta))
            self.stability.resume(self.step)

    def _evaluate(self) -> Evaluation:
        config = self.config
        micro = config.eval.micro_batch or config.train.micro_batch
        phase = f"in the evaluation after step {self.step}"

        def progress() -> None:
            self.watchdog.tick(phase)
            self._check_signals()  # after a stop, the next start evaluates again

        self.watchdog.tick(phase, may_take_long=self.step == self.first_step)
        with self.throughput.paused(), self.engine.averaged():
            found = evaluate(
                self.engine,
                self.validation,
                config.model,
                config.diffusion,
                config.eval,
                micro,
                progress=progress,
                document_mask=config.data.document_mask,
                by_document=config.eval.estimator != "levels",
            )
            result = found.summarize()
        self.watchdog.tick(f"after step {self.step}")
        if self.first:
            details = found.details() if config.eval.estimator != "levels" else {}  # which old runs have
            self.metrics.validation(self.step, result.record() | details)
            _LOG.info(
                f"step {self.step} | validation perplexity {result.perplexity:.2f} +- {result.perplexity_stderr:.2f} "
                f"(unigram {self.validation.unigram_perplexity:.2f}) | "
                f"NELBO {result.nelbo:.4f} +- {result.nelbo_stderr:.4f} nats per token"
            )
        return result

    def _search_interval(self) -> None:
        """Search for the clip interval of least loss variance, and train on it from now on."""
        phase = f"in the search for a clip interval after step {self.step}"
        self.watchdog.tick(phase, may_take_long=True)
        with self.throughput.paused(), self.engine.averaged():
            fields = self.clip.search(
                self.step, self.engine, self.validation, progress=lambda: self.watchdog.tick(phase)
            )
        self._take_interval()
        self.watchdog.tick(f"after step {self.step}")
        if self.first:
            self.metrics.clip_search(self.step, fields)
            _LOG.info(f"step {self.step} | {self.clip.describe()}")

    def _take_interval(self) -> None:
        """Train on the noise levels of the clip interval from now on."""
        self.batches.diffusion = self.clip.diffusion
        self.throughput.useful_flops(flops.training_flops_per_token(self.config.model, self.clip.diffusion))

    def _save(self) -> None:
        records = on_rank_0(lambda: self.metrics.sync())  # only rank 0 has metrics
        meta = (
            position(self.config, self.step, self.stream)
            | self.clip.state()
            | {
                META_KEY: self.run_id,
                "settings": settings(self.config),
                "tokens": self._tokens(self.step),
                "data": self.data,
                "updates": self.engine.updates,
                "skips": len(self.stability.ranges),
                **records,
            }
        )
        self.watchdog.tick(f"in the checkpoint of step {self.step}", may_take_long=True)
        with self.throughput.paused():
            self.writer.save(self.step, meta)
        self.saved = self.step

    def _record_checkpoint(self, written: Written) -> None:
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
        self.watchdog.tick("at the end", may_take_long=True)
        unigram = self.validation.unigram_perplexity
        plot = plot_curves(self.folder, reference={"unigram": unigram}, loss_name=self.clip.diffusion.loss_name)
        records = read_metrics(self.folder)
        self.progress.close()
        _, losses = series(records, "train", "loss")
        _, perplexities = series(records, "validation", "perplexity")
        _LOG.info(ascii_curve(losses, "train loss"))
        _LOG.info(ascii_curve(perplexities, "validation perplexity"))
        _LOG.info(f"unigram perplexity of the validation split: {unigram:.2f}")
        _LOG.info(f"run folder: {self.folder} (curves: {plot})")
        if self.first_step < self.config.train.steps:
            events.record(self.folder, "finished", step=self.step)

    def _tokens(self, step: int) -> int:
        """Data tokens after ``step`` steps: L per row."""
        return step * self.config.train.global_batch * self.config.model.length

    def _describe(self) -> str:
        config, world = self.config, self.engine.world
        parameters = config.model.parameters(config.model.vocab_size)
        return (
            f"{self.folder}: {parameters / 1e6:.2f}M parameters, {config.model.backbone}, "
            f"L={config.model.length}, B'={config.diffusion.block_size}, {config.train.precision}, "
            f"{world.size} process(es) on {world.device.type}; {len(self.stream)} train rows, "
            f"{config.train.steps * config.train.global_batch / len(self.stream):.2f} epochs"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
