"""Runs what is missing of a study: one (arm, seed) after the other.

A finished (arm, seed) has its rows in results/study and is never run again, wherever they were
made: only these files need to travel. A run that was cut off goes on from its folder under `runs`.
Several processes with the same folders do a study together: each takes what no other is at.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sla.attention import FullConfig
from sla.config import to_dict
from sla.data.manifest import DataError
from sla.data.module import VideoBatch, VideoDataModule
from sla.files import atomic_path, file_sha256, locked, sha256, write_text
from sla.results import provenance
from sla.seeds import drawing
from sla.study.callbacks import Curve, KernelTime, OutOfTimeError
from sla.study.evaluator import Evaluator, load_evaluator
from sla.study.frames import real_clips_of, spread, write_strips
from sla.study.labels import Prompt, read_prompts
from sla.study.measure import Draws, measure_attention, proj_norm, triple_losses, validation_batches
from sla.study.parts import join
from sla.study.plan import Job, Plan, StudyError
from sla.study.records import (
    FAILED,
    FINISHED,
    TIMED,
    Key,
    Records,
    StudyResults,
    measurement,
    read_records,
    timestamp,
)
from sla.study.videos import (
    Videos,
    check_metrics,
    real_clips,
    sample_prompts,
    score,
    strips_of,
)
from sla.training.build import (
    build_data,
    build_module,
    build_networks,
    build_trainer,
    resolve_precision,
    sampling_device,
)
from sla.training.config import Experiment
from sla.training.module import DiffusionModule
from sla.training.router import DEFAULT_NAME as ROUTER
from sla.training.router import load_router, train_routers
from sla.training.run import check_checkpoint
from sla.training.run_folder import RunFolder, open_run
from sla.training.trainable import choose_trainable

log = logging.getLogger(__name__)

Row = dict[str, Any]
WINDOW = 20  # training steps that are timed together
TIMED_STEPS = 5 * WINDOW  # of a run that is for times alone
WATCHED_STEPS = 5  # after them, whose kernels are timed


@dataclass
class Outcome:
    """What a session did, by `arm/seed`.

    Attributes:
        finished: were run now.
        failed: failed now; their reasons are recorded.
        before: were finished, or had failed, before.
        left: not done when time was over.
        elsewhere: another process is at them.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        others = f", another process is at {len(self.elsewhere)}" if self.elsewhere else ""
        return (
            f"{len(self.finished)} finished, {len(self.failed)} failed, {len(self.before)} were "
            f"done before, {len(self.left)} are left{others}"
        )


class Runner:
    """Runs a plan's jobs.

    Args:
        plan: the study.
        runs: folder of the runs' states.
        timed: record the times of steps; False where the GPU is shared with other processes.

    Raises:
        StudyError: weights, evaluator, prompts or metrics that are not there; says what would do.
    """

    def __init__(self, plan: Plan, runs: Path = Path("runs/study"), *, timed: bool = True) -> None:
        self.plan = plan
        self.runs = runs
        self.timed = timed
        try:
            self.weights = join(Path(plan.base_experiment().run.init_weights))
        except StudyError as error:
            raise StudyError(f"{error}: `make study-weights`, or `make pretrain`") from error
        self.weights_sha256 = file_sha256(self.weights)
        self.evaluator: tuple[Evaluator, Tensor] | None = None
        self.evaluator_sha256 = ""
        if plan.evaluator.weights:
            path = Path(plan.evaluator.weights)
            with contextlib.suppress(StudyError):
                join(path)
            self.evaluator = load_evaluator(path)
            self.evaluator_sha256 = file_sha256(path)
        check_metrics(plan.measures.video_metrics)
        self.prompts: list[Prompt] = []
        if plan.measures.prompts:
            try:
                self.prompts = read_prompts(
                    plan.measures.prompt_shards,
                    plan.evaluator.attributes,
                    plan.measures.prompts,
                    plan.base_experiment().data.caption_field,
                )
            except DataError as error:
                raise StudyError(
                    f"measures.prompt_shards is {list(plan.measures.prompt_shards)}: {error}; "
                    "`make study-data` makes the study's own clips"
                ) from error
        self._shown = spread(plan.measures.frames, len(self.prompts))  # of which frames are kept
        self._validations: dict[str, tuple[list[VideoBatch], Draws]] = {}

    def key(self, job: Job) -> Key:
        """What names the job's rows."""
        digest = self.plan.digest(job, self.weights_sha256, self.evaluator_sha256)
        return (self.plan.name, job.arm.name, digest, job.seed)

    def run(
        self,
        jobs: Sequence[Job],
        records: Records,
        results: StudyResults,
        *,
        max_seconds: float | None = None,
        begin_within: float | None = None,
        retry: bool = False,
        times: bool = False,
    ) -> Outcome:
        """Run what is missing, in order.

        Args:
            jobs: from `Plan.jobs`.
            records: what was there before.
            results: where rows go.
            max_seconds: begin no further step after so long; the run at hand stays resumable.
            begin_within: begin no further run after so long; the one at hand ends.
            retry: run again what had failed; with `times`, measure all of them anew.
            times: measure the times of steps alone, of those that have none.

        Raises:
            StudyError: the GPU cannot be used any more in this process.
            DataError: a clip whose frames are kept cannot be read.
            OSError: rows cannot be written.
        """
        now = time.monotonic()
        deadline = None if max_seconds is None else now + max_seconds
        limits = [now + limit for limit in (max_seconds, begin_within) if limit is not None]
        last_begin = min(limits, default=None)
        outcome = Outcome()
        without_real_clips = bool(self._shown) and not times
        for job in jobs:
            key, name = self.key(job), f"{job.arm.name}/{job.seed}"
            if _is_done(key, records, retry, times):
                outcome.before.append(name)
                continue
            if outcome.left or (last_begin is not None and time.monotonic() > last_begin):
                outcome.left.append(name)
                continue
            with locked(f"{self._path(key, times)}.lock", wait=False) as mine:
                if not mine:
                    log.info(f"{name}: another process is at it")
                    outcome.elsewhere.append(name)
                    continue
                if _is_done(key, read_records(results.root), retry, times):  # by another, since
                    outcome.before.append(name)
                    continue
                if without_real_clips:
                    self._keep_real_clips(results.root)
                    without_real_clips = False
                self._do(job, key, results, outcome, deadline, times)
        return outcome

    def _do(
        self,
        job: Job,
        key: Key,
        results: StudyResults,
        outcome: Outcome,
        deadline: float | None,
        times: bool,
    ) -> None:
        """Run a job and write its rows, or the reason why it failed."""
        name = f"{job.arm.name}/{job.seed}"
        log.info(f"{name}: {job.arm.group}, {key[2]}")
        common = {
            "study": self.plan.name,
            "group": job.arm.group,
            "arm": job.arm.name,
            "digest": key[2],
            "seed": job.seed,
            "method": job.experiment.attention.name,
        }
        try:
            if times:
                rows, end = self._time(job, key)
            else:
                rows, end = self._run(job, key, deadline, results.root)
        except OutOfTimeError:
            log.info(f"{name}: time is over; the same command goes on with it")
            outcome.left.append(name)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {first}"
            write_text(self._path(key) / "failure.txt", traceback.format_exc())
            results.append([{**common, "status": FAILED, "reason": reason, "date": timestamp()}])
            outcome.failed[name] = reason
            log.warning(f"{name} failed: {reason}")
        else:
            results.append(
                [
                    *({**common, **row} for row in rows),
                    {**common, "status": TIMED if times else FINISHED, **end},
                ]
            )
            outcome.finished.append(name)
        _clean_up(job.experiment)

    def _path(self, key: Key, times: bool = False) -> Path:
        """A run's folder, or that of its times; its lock has the same name and lies beside it."""
        study, arm, digest, seed = key
        return self.runs / study / f"{'times-' if times else ''}{arm}-{seed}-{digest[:8]}"

    def _run(self, job: Job, key: Key, deadline: float | None, root: Path) -> tuple[list[Row], Row]:
        """Rows and the last row's own fields; frames go to the results folder `root`."""
        begun = time.monotonic()
        experiment = self._experiment(job, self._path(key), job.experiment.trainer.max_steps)
        # Of equal digest, all that may differ changes no number: an unfinished run goes on.
        folder = open_run(experiment.run, job.numbers)
        rows = _RowFile(folder.path / "rows.jsonl")
        module = self._module(job, experiment, folder)
        data = build_data(experiment)
        batches, draws = self._validation(experiment, data)
        device = sampling_device(experiment.trainer)
        in_bf16 = str(resolve_precision(experiment.trainer)).startswith("bf16")
        stored = check_checkpoint(folder.checkpoint, module) if folder.checkpoint else None
        done = 0 if stored is None else int(stored["global_step"])
        rows.drop(lambda row: row["step"] > done)
        if job.arm.router:
            rows.add(_router_rows(folder.path / ROUTER))

        def measure(module: DiffusionModule, step: int) -> None:
            start = time.perf_counter()
            rows.add(self._measure(module, step, batches, draws, in_bf16))
            loss = rows.value(step, "val_loss")
            log.info(
                f"  step {step}: validation loss {loss:.5f}, attention error "
                f"{rows.value(step, 'attention_error_l1'):.4f} "
                f"({time.perf_counter() - start:.1f} s)"
            )

        last = job.arm.curve[-1]
        if rows.value(0, "val_loss") is None:
            measure(module.to(device), 0)
        if last and done < last:
            checkpoint = folder.checkpoints / "last.ckpt"
            curve = Curve(job.arm.curve, measure, deadline, checkpoint, WINDOW)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer = build_trainer(experiment, folder.path, [curve])
            resumed = None if stored is None else str(folder.checkpoint)
            del stored
            trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=False)
            if self.timed and curve.step_ms is not None:
                rows.add([measurement(last, "train_step_ms", curve.step_ms)])
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**30
                rows.add([measurement(last, "train_peak_gib", peak)])
        elif last and stored is not None:
            module.load_state_dict(stored["state_dict"])
        module.to(device)
        if rows.value(last, "val_loss") is None:  # killed after the last checkpoint
            measure(module, last)
        if self.prompts and job.arm.videos:
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTimeError
            measured, videos = self._videos(experiment, module, last, device)
            if self._shown and job.seed == job.arm.seeds[0]:  # one seed: files are committed
                noise = experiment.sampling.seed
                write_strips(strips_of(key, videos, self.prompts, noise, self._shown), root)
            rows.add(measured)
        exact = rows.value(last, "exact_fraction")
        found = [{**row, "sparsity": None if exact is None else 1 - exact} for row in rows.rows]
        _remove_checkpoints(folder)
        end = {
            "steps": last,
            "wall_seconds": round(time.monotonic() - begun, 1),
            "compiled": experiment.trainer.compile,
            "date": timestamp(),
            "sparsity": found[-1]["sparsity"],
            "numbers": job.numbers,
            "weights_sha256": self.weights_sha256,
            "evaluator_sha256": self.evaluator_sha256,
        }
        return found, end

    def _experiment(self, job: Job, path: Path, steps: int) -> Experiment:
        """The job's, of so many steps, in a folder of its own."""
        return replace(
            job.experiment,
            run=replace(
                job.experiment.run,
                dir=str(path.parent),
                name=path.name,
                resume="auto",
                init_weights=str(self.weights),
            ),
            # It measures by itself, at the steps of the curve, and on one device.
            trainer=replace(
                job.experiment.trainer,
                max_steps=steps,
                val_every=steps + 1,
                devices="1",
                strategy="auto",
                sequence_parallel=1,
            ),
        )

    def _time(self, job: Job, key: Key) -> tuple[list[Row], Row]:
        """Rows of the times of steps, and the last row's own fields: a short run, not kept."""
        begun = time.monotonic()
        steps = TIMED_STEPS + WATCHED_STEPS
        experiment = self._experiment(job, self._path(key, times=True), steps)
        folder = open_run(experiment.run, job.numbers)
        module = self._module(job, experiment, folder)
        last = job.arm.curve[-1]
        rows: list[Row] = []
        if last:
            curve = Curve((), lambda *_: None, None, folder.checkpoints / "last.ckpt", WINDOW)
            kernels = KernelTime(TIMED_STEPS, WATCHED_STEPS)
            trainer = build_trainer(experiment, folder.path, [curve, kernels])
            trainer.fit(module, datamodule=build_data(experiment))
            assert curve.step_ms is not None  # more than two windows
            rows.append(measurement(last, "train_step_ms", curve.step_ms))
            if kernels.step_ms is not None:
                rows.append(measurement(last, "train_kernel_ms", kernels.step_ms))
        module.to(sampling_device(experiment.trainer))
        if self.prompts and job.arm.videos:
            few = self.prompts[: 3 * experiment.sampling.batch_size]
            sampled = sample_prompts(experiment, module, few)
            if sampled.step_ms is not None:
                rows.append(measurement(last, "denoise_step_ms", sampled.step_ms))
        _remove_checkpoints(folder)
        return rows, {
            "wall_seconds": round(time.monotonic() - begun, 1),
            "compiled": experiment.trainer.compile,
            "date": timestamp(),
        }

    def _module(self, job: Job, experiment: Experiment, folder: RunFolder) -> DiffusionModule:
        weights = experiment.run.init_weights
        model, text_encoder = build_networks(experiment, weights=weights)
        if job.arm.router:
            router = folder.path / ROUTER
            if not router.with_suffix(".json").is_file():  # written last
                train_routers(experiment, to_dict(experiment))
            load_router(router, model)
        elif experiment.run.router_weights is not None:
            load_router(experiment.run.router_weights, model)
        with drawing(experiment.run.seed):
            choose_trainable(model, text_encoder, experiment.optim)
        teacher = None
        if experiment.flow.target == "teacher":
            teacher, _ = build_networks(
                experiment, FullConfig(tile=experiment.attention.tile), weights
            )
        return build_module(experiment, model, text_encoder, teacher)

    def _validation(
        self, experiment: Experiment, data: VideoDataModule
    ) -> tuple[list[VideoBatch], Draws]:
        """The validation clips, decoded once for all arms that cut them alike, and their noise."""
        key = json.dumps({**to_dict(experiment)["data"], "seed": 0}, sort_keys=True)
        if key not in self._validations:
            self._validations[key] = validation_batches(data), Draws()
        return self._validations[key]

    def _measure(
        self,
        module: DiffusionModule,
        step: int,
        batches: Sequence[VideoBatch],
        draws: Draws,
        in_bf16: bool,
    ) -> list[Row]:
        losses = triple_losses(module, batches, in_bf16=in_bf16, draws=draws)
        clips = _first(batches, self.plan.measures.attention_clips)
        attention = measure_attention(module, clips, in_bf16=in_bf16)
        rows = [
            measurement(step, "val_loss", losses),
            measurement(step, "attention_error_l1", attention.error_l1),
            measurement(step, "attention_error_l2", attention.error_l2),
            measurement(step, "exact_fraction", attention.exact),
            measurement(step, "marginal_fraction", attention.marginal),
            measurement(step, "negligible_fraction", attention.negligible),
            measurement(step, "attention_flops", attention.flops),
            measurement(step, "attention_flops_ratio", attention.flops / attention.full_flops),
        ]
        norm = proj_norm(module)
        if norm is not None:
            rows.append(measurement(step, "method_norm", norm))
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"validation loss is not finite at step {step}")
        return rows

    def _videos(
        self, experiment: Experiment, module: DiffusionModule, step: int, device: torch.device
    ) -> tuple[list[Row], Videos]:
        reference = self._reference(experiment, device)
        sampled = sample_prompts(experiment, module, self.prompts)
        rows = score(
            step,
            sampled.videos,
            reference,
            self.prompts,
            self.plan.measures.video_metrics,
            experiment.sampling.fps,
            self.evaluator,
            device,
        )
        if self.timed and sampled.step_ms is not None:
            rows.append(measurement(step, "denoise_step_ms", sampled.step_ms))
        return rows, sampled.videos

    def _keep_real_clips(self, root: Path) -> None:
        """Frames of the real clips whose captions the shown prompts are. Raises DataError."""
        shown = [self.prompts[i] for i in self._shown]
        data = self.plan.base_experiment().data
        videos = real_clips(data, self.plan.measures.prompt_shards, shown)
        key = real_clips_of(self.plan.name)
        write_strips(strips_of(key, videos, shown, None, range(len(shown))), root)

    def _reference(self, experiment: Experiment, device: torch.device) -> Videos:
        """The pretrained full-attention model's videos, made once for all processes."""
        full = replace(experiment, attention=FullConfig())
        values = to_dict(full)
        decides = [
            *(values[name] for name in ("sampling", "model", "flow")),
            {**values["data"], "seed": 0},
            self.weights_sha256,
            [prompt.text for prompt in self.prompts],
            # Another device, version or code may round otherwise.
            *(device.type, *(self._made[name] for name in ("device", "torch", "commit"))),
        ]
        key = sha256(json.dumps(decides).encode())[:16]
        path = self.runs / self.plan.name / f"reference-{key}.npy"
        with locked(f"{path}.lock"):
            if not path.is_file():
                model, text_encoder = build_networks(full, weights=str(self.weights))
                module = build_module(full, model, text_encoder).to(device)
                made = sample_prompts(full, module, self.prompts).videos
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, made)
        videos: Videos = np.load(path)
        return videos

    @cached_property
    def _made(self) -> dict[str, Any]:
        """What this process measures with."""
        return provenance()


class _RowFile:
    """Measurements of a run so far, kept beside its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path.is_file():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, rows: Sequence[Row]) -> None:
        named = {(row["step"], row["metric"]) for row in rows}
        self.rows = [row for row in self.rows if (row["step"], row["metric"]) not in named]
        self.rows += rows
        self._write()

    def drop(self, unwanted: Callable[[Row], bool]) -> None:
        self.rows = [row for row in self.rows if not unwanted(row)]
        self._write()

    def value(self, step: int, metric: str) -> float | None:
        for row in self.rows:
            if (row["step"], row["metric"]) == (step, metric):
                return float(row["value"])
        return None

    def _write(self) -> None:
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))


def _router_rows(path: Path) -> list[Row]:
    """What stage 1 did to each layer, from the report beside its file: attention on the critical
    blocks and squared error, with the hard top-k, before and after."""
    layers = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["layers"]
    return [
        measurement(0, f"router_{what}_{when}", [layer[when][what] for layer in layers])
        for what in ("recall", "error")
        for when in ("before", "after")
    ]


def _first(batches: Sequence[VideoBatch], count: int) -> VideoBatch:
    """The first clips of the first batch, as a batch."""
    batch = batches[0]
    values: Any = {name: value[:count] for name, value in batch.items()}  # type: ignore[index]
    clips: VideoBatch = values
    return clips


def _is_done(key: Key, records: Records, retry: bool, times: bool) -> bool:
    run = records.runs.get(key)
    if times:
        return not retry and (key in records.times or (run is not None and run.has_times))
    return run is not None or (key in records.failures and not retry)


def _remove_checkpoints(folder: RunFolder) -> None:
    """They are hundreds of MiB a run, and the rows are what is kept of it."""
    for path in _files(folder.checkpoints):
        path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.glob("*") if path.is_file())


def _clean_up(experiment: Experiment) -> None:
    """Give back what a run held.

    Raises:
        StudyError: the GPU does not answer any more: whatever follows would fail with it.
    """
    if experiment.trainer.compile:
        # Of one block's code only a few compiled forms are kept; every arm is one.
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise StudyError(f"the GPU cannot be used after this: {error}; run again") from error


__all__ = ["Outcome", "Runner"]
