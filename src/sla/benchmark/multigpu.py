"""Wan2.1's fine-tuning on several GPUs of one host: losses, scaling, checkpoints, a killed rank.

Runs are `finetune` runs of the paper's config with random weights on a latent cache of noise, with
a callback that watches (`multigpu_rank`). All of them take the same global batch of as many samples
a step as there are GPUs, in the same order, with the same noise and timesteps: one GPU accumulates
over what n ranks take at once, and ranks that share each sample accumulate likewise. So losses can
be compared step by step, and the time of a step is that of the same work.

Rows, by `what`:

- train: losses and their relative difference to one GPU's, time of an optimiser step, throughput,
  scaling efficiency, peak memory of each rank.
- kill: one rank killed (kill -9) in the middle: how long until all processes were gone.
- resume: going on from a checkpoint, on the same or another number of ranks: the losses against
  those of the run that made it.
- inference: one video shared by all ranks against one rank alone.

Where there are GPUs the next launch gets ready while the last is measured: its processes start and
build the model on the CPU, and wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sla.benchmark.kernels import SEED, quantiles
from sla.benchmark.multigpu_inputs import NEVER, Inputs, write_inputs
from sla.benchmark.multigpu_rank import GO
from sla.benchmark.recording import add_options, results_file
from sla.figures.paper import GPU_BLOCKS
from sla.models.wan_sizes import WAN_CONFIGS

STRATEGIES = ("ddp", "fsdp2", "sequence")
WHAT = ("train", "inference", "kill", "resume")
SINGLE = "single"
WARM_UP = 3  # steps: compilation, and the optimiser's state
RESUMED_STEPS = 4
GENERATION_STEPS = 4
REPEATS = 5
END_SECONDS = 120.0  # how long processes may outlive a killed rank
POLL_SECONDS = 0.01
LEARNING_RATES = {"1.3b": 1e-5, "tiny": 1e-2}
# Between the losses of two runs of the same samples.
TOLERANCE = {"bf16-mixed": 2e-2, "32-true": 1e-4}
# NVLink multicast can put a host's GPUs out of service, which others may share.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
_MARK = "SLA_MULTIGPU_LAUNCH"  # environment variable: finds all processes of a launch
HEAD = (
    f"{'what':>10} {'strategy':>9} {'ranks':>5} {'ms':>9} {'samples/s':>9} {'times':>6} "
    f"{'GiB':>6} {'difference':>10}"
)


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--size", choices=["1.3b", "tiny"], default="1.3b")
    parser.add_argument(
        "--devices", nargs="+", type=int, help="numbers of GPUs; default: 1 and all"
    )
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of a training row")
    parser.add_argument("--batch", type=int, help="samples of a step; default: the most devices")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: GPUs if there are any")
    parser.add_argument(
        "--launcher",
        choices=["lightning", "torchrun"],
        default="lightning",
        help="who starts the ranks of a training run",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    parser.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        help="get the next launch ready while one is measured; default: on GPUs",
    )
    parser.add_argument("--max-seconds", type=float, help="start no launch after this long")
    parser.add_argument("--launch-seconds", type=float, default=300.0, help="limit of one launch")
    parser.add_argument(
        "--scratch", type=Path, help="for runs and checkpoints (1.3b: 50 GB); default: temporary"
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked; 1 if something failed or differs."""
    try:
        settings = Settings.of(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = results_file(options, "multigpu", seed=SEED, label=options.size)
    folder = Path(tempfile.mkdtemp(prefix="sla-multigpu-", dir=options.scratch))
    print(HEAD)
    status = 0
    # `timeout` ends it so: what it has started must not stay on the GPUs.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        rows = Benchmark(settings, folder, options.max_seconds).rows()
        with contextlib.closing(rows):
            for row in rows:
                if file is not None:
                    file.append(row)
                print(line(row), flush=True)
                status = 1 if row["error"] else status
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)
    if file is not None and file.path.exists():
        print(f"recorded in {file.path}")
    return status


@dataclass(frozen=True)
class Settings:
    """What is measured, every default resolved.

    Raises:
        ValueError: `of`: numbers of devices or a batch that cannot be used.
    """

    size: str
    devices: tuple[int, ...]
    strategies: tuple[str, ...]
    what: tuple[str, ...]
    steps: int
    batch: int
    device: str
    launcher: str
    compile: bool
    overlap: bool
    launch_seconds: float

    @classmethod
    def of(cls, options: argparse.Namespace) -> Settings:
        there = torch.cuda.device_count()
        device = options.device or ("cuda" if there else "cpu")
        if device == "cuda" and not there:
            raise ValueError("--device is 'cuda', and there is no GPU: --device cpu")
        devices = tuple(sorted({*(options.devices or (1, there if device == "cuda" else 2)), 1}))
        if devices[0] < 1 or (device == "cuda" and devices[-1] > there):
            raise ValueError(
                f"--devices is {' '.join(map(str, devices))}; they must be at least 1"
                + (f", and at most the {there} GPU(s) here" if device == "cuda" else "")
            )
        batch = options.batch or devices[-1]
        if any(batch % n for n in devices):
            raise ValueError(
                f"--batch is {batch}; it must be a multiple of each of --devices, "
                f"such as {math.lcm(*devices)}"
            )
        if options.steps <= WARM_UP + 1:
            raise ValueError(f"--steps is {options.steps}; it must be at least {WARM_UP + 2}")
        on_gpu = device == "cuda"
        return cls(
            size=options.size,
            devices=devices,
            strategies=tuple(options.strategies),
            what=tuple(options.what),
            steps=options.steps,
            batch=batch,
            device=device,
            launcher=options.launcher,
            compile=on_gpu if options.compile is None else options.compile,
            overlap=on_gpu if options.overlap is None else options.overlap,
            launch_seconds=options.launch_seconds,
        )

    @property
    def precision(self) -> str:
        return "bf16-mixed" if self.device == "cuda" else "32-true"

    @property
    def blocks(self) -> tuple[int, int]:
        """Of SLA: queries and keys."""
        return GPU_BLOCKS if self.size != "tiny" else (16, 16)

    @property
    def checkpoint_step(self) -> int:
        """Past the middle, so that there is one checkpoint in `steps`. Odd, so that the batches
        before it are no multiple of those that fewer ranks take a step."""
        return (self.steps // 2 + 1) | 1

    def degree(self, ranks: int) -> int:
        """The most ranks of `ranks` that can share a sample: heads are what they exchange."""
        return math.gcd(int(WAN_CONFIGS[self.size]["num_attention_heads"]), ranks)

    def overrides(self, strategy: str, ranks: int) -> list[str]:
        """Of a training run."""
        degree = self.degree(ranks) if strategy == "sequence" else 1
        lightning = {SINGLE: "auto", "sequence": "ddp"}.get(strategy, strategy)
        return [
            f"trainer.devices={ranks}",
            f"trainer.strategy={lightning}",
            f"trainer.sequence_parallel={degree}",
            f"optim.accumulate={self.batch * degree // ranks}",
        ]

    def changes(self) -> dict[str, dict[str, Any]]:
        """Of the paper's experiment, for every run."""
        query, key = self.blocks
        return {
            "attention": {"block_q": query, "block_kv": key},
            # Large enough for the losses to depend on what was learned in a few steps.
            "optim": {
                "learning_rate": LEARNING_RATES[self.size],
                "method_lr_scale": 1.0,
                "warmup_steps": 0,
            },
            "trainer": {
                "accelerator": "gpu" if self.device == "cuda" else "cpu",
                "precision": self.precision,
                "compile": self.compile,
                "max_steps": NEVER,
                "val_every": NEVER,
                "val_strata": 1,
                "checkpoint_every": NEVER,
                "progress_bar": False,
            },
        }


@dataclass(frozen=True)
class Job:
    """One launch.

    Attributes:
        what: `train`, `resume` or `inference`.
        name: of its run, and of its folder.
        strategy: of `STRATEGIES`, or `single`.
        ranks: how many.
        overrides: of the run's config.
        kill: the rank that is killed, once `steps` are done.
        steps: optimiser steps of this launch that are looked at; it ends after them.
        source: the run whose checkpoint it goes on from.
    """

    what: str
    name: str
    strategy: str
    ranks: int
    overrides: tuple[str, ...] = ()
    kill: int | None = None
    steps: int = 0
    source: str | None = None

    @property
    def stop_after(self) -> int | None:
        """Steps; None for a run that is killed."""
        return self.steps if self.kill is None else None


@dataclass
class Run:
    """What is known of a training run.

    Attributes:
        losses: mean loss of each step.
        samples: indices of each step's samples.
    """

    losses: dict[int, float] = field(default_factory=dict)
    samples: dict[int, set[int]] = field(default_factory=dict)


class LaunchError(RuntimeError):
    """A launch that failed; the message is the end of what it printed."""


class Benchmark:
    """The launches, one after the other.

    Args:
        settings: what to measure.
        folder: for everything that is written; empty.
        max_seconds: after which no launch is started.
    """

    def __init__(self, settings: Settings, folder: Path, max_seconds: float | None) -> None:
        self.settings = settings
        self.folder = folder
        self.max_seconds = max_seconds
        self.start = time.monotonic()
        self.known: dict[str, Run] = {}
        self.single_ms: float | None = None
        self.inputs: Inputs | None = None

    def jobs(self) -> list[Job]:
        """In the order of their importance, each after what it needs."""
        s = self.settings
        several = [n for n in reversed(s.devices) if n > 1]
        resumes, kills = "resume" in s.what, "kill" in s.what
        saves = (f"trainer.checkpoint_every={s.checkpoint_step}",)

        def training(strategy: str, ranks: int, kill: int | None = None, save: bool = False) -> Job:
            overrides = (*s.overrides(strategy, ranks), *(saves if save else ()))
            name = f"{strategy}-{ranks}"
            return Job("train", name, strategy, ranks, overrides, kill, s.steps)

        def going_on(source: str, strategy: str, ranks: int, kill: int | None = None) -> Job:
            own = source == f"{strategy}-{ranks}"  # the same run, which was killed
            last = self.folder / "runs" / source / "checkpoints" / "last.ckpt"
            overrides = tuple(s.overrides(strategy, ranks))
            if not own:
                overrides += (f"run.resume={last}",)
            name = source if own else f"{source}-on-{strategy}-{ranks}"
            return Job("resume", name, strategy, ranks, overrides, kill, RESUMED_STEPS, source)

        # The one that is killed: sharded checkpoints, which each rank writes a part of.
        killed = "fsdp2" if "fsdp2" in s.strategies else s.strategies[0]
        others = [x for x in s.strategies if x != "sequence"]
        more = others[0] if others else "ddp"
        jobs, last = [], []
        if "train" in s.what or resumes or "kill" in s.what:
            jobs.append(training(SINGLE, 1, save=resumes and bool(several)))
        for ranks in several:
            largest = ranks == several[0]
            for strategy in s.strategies:
                save = largest and strategy == killed and (kills or resumes)
                if strategy == "sequence" and s.degree(ranks) == 1:
                    continue
                if "train" in s.what or save:
                    victim = ranks - 1 if save and kills else None
                    jobs.append(training(strategy, ranks, victim, save))
            if largest and resumes:
                # A folder of shards needs the strategy that wrote it.
                jobs.append(
                    going_on(f"{killed}-{ranks}", "fsdp2" if killed == "fsdp2" else SINGLE, 1)
                )
                jobs.append(going_on(f"{SINGLE}-1", more, ranks, kill=0 if kills else None))
            if largest and kills:
                last.append(going_on(f"{killed}-{ranks}", killed, ranks))
            if "inference" in s.what and s.degree(ranks) > 1:
                degree = s.degree(ranks)
                jobs.append(Job("inference", f"inference-{degree}", "sequence", degree))
        return list(dict.fromkeys([*jobs, *last]))

    def rows(self) -> Generator[dict[str, Any]]:
        """Each as soon as it is measured."""
        s = self.settings
        self.inputs = write_inputs(self.folder, s.size, changes=s.changes(), seed=SEED)
        jobs = self.jobs()
        waiting: Launch | None = None
        launch: Launch | None = None
        try:
            for number, job in enumerate(jobs):
                if self.max_seconds and time.monotonic() - self.start > self.max_seconds:
                    print(f"left out after {self.max_seconds:.0f} s: {job.what} {job.name}")
                    continue
                if self._lacks_source(job):
                    yield self._row(job) | {"error": f"{job.source} has left no checkpoint"}
                    continue
                launch = waiting or Launch(job, self.inputs, self.folder, s)
                waiting = None
                launch.go()
                if (
                    s.overlap
                    and number + 1 < len(jobs)
                    and not self._lacks_source(jobs[number + 1])
                ):
                    waiting = Launch(jobs[number + 1], self.inputs, self.folder, s)
                found = []
                try:
                    for row in self._measure(launch):
                        found.append(row)
                except LaunchError as error:
                    found.append(self._row(job) | {"error": str(error)})
                launch.end()
                yield from found
        finally:
            for left in (launch, waiting):
                if left is not None:
                    left.end()

    def _lacks_source(self, job: Job) -> bool:
        if job.source is None:
            return False
        return not (self.folder / "runs" / job.source / "checkpoints" / "last.ckpt").exists()

    def _measure(self, launch: Launch) -> Iterator[dict[str, Any]]:
        job = launch.job
        killed = None
        if job.what == "inference":
            try:
                launch.wait()
            except LaunchError:
                yield from self._inference_rows(launch)
                raise
            yield from self._inference_rows(launch)
            return
        if job.kill is None:
            launch.wait()
        else:
            killed = self._kill(launch)
        if job.what == "train":
            yield self._train_row(launch)
        else:
            yield self._resume_row(launch)
        if killed is not None:
            yield self._row(job) | {"what": "kill", "error": None, **killed}

    def _row(self, job: Job) -> dict[str, Any]:
        """What every row says."""
        s = self.settings
        assert self.inputs is not None
        return {
            "what": job.what,
            "strategy": job.strategy,
            "ranks": job.ranks,
            "size": s.size,
            "device": s.device,
            "batch": s.batch,
            "tokens": self.inputs.tokens,
            "overrides": [text.replace(f"{self.folder}{os.sep}", "") for text in job.overrides],
            "precision": s.precision,
            "compiled": s.compile,
            "launcher": s.launcher if job.ranks > 1 else None,
            "overlap": s.overlap,
            "error": None,
        }

    def _train_row(self, launch: Launch) -> dict[str, Any]:
        s, job = self.settings, launch.job
        run = self.known[job.name] = launch.run()
        seconds = {entry["step"]: entry["seconds"] for entry in launch.entries(0, "step")}
        timed = [seconds[step] * 1e3 for step in range(WARM_UP + 1, s.steps + 1)]
        times = quantiles(timed)
        ms = times["ms_median"]
        if job.strategy == SINGLE:
            self.single_ms = ms
        speedup = self.single_ms / ms if self.single_ms else None
        row = self._row(job) | times
        assert self.inputs is not None
        row |= {
            "steps": s.steps,
            "samples_per_s": s.batch / ms * 1e3,
            "tokens_per_s": s.batch * self.inputs.tokens / ms * 1e3,
            "speedup": speedup,
            "efficiency": speedup / job.ranks if speedup else None,
            "first_step_s": seconds[1],
            "peak_bytes": [launch.peak(rank, self._until(job)) for rank in range(job.ranks)],
            **launch.durations(),
            "losses": [run.losses[step] for step in range(1, s.steps + 1)],
        }
        return row | self._difference(run, self.known.get(f"{SINGLE}-1"), range(1, s.steps + 1))

    def _until(self, job: Job) -> int:
        """The last step before anything is saved."""
        saves = any(o.startswith("trainer.checkpoint_every") for o in job.overrides)
        return self.settings.checkpoint_step if saves else self.settings.steps

    def _resume_row(self, launch: Launch) -> dict[str, Any]:
        job = launch.job
        assert job.source is not None
        first = launch.entries(0, "at")[0]["at"]
        run = launch.run()
        steps = range(first + 1, first + 1 + job.steps)
        row = self._row(job) | {
            "source": job.source,
            "from_step": first,
            "steps": job.steps,
            "losses": [run.losses.get(step) for step in steps],
            **launch.durations(),
        }
        return row | self._difference(run, self.known.get(job.source), steps)

    def _difference(self, run: Run, other: Run | None, steps: Sequence[int]) -> dict[str, Any]:
        """Relative, between the losses of two runs at steps that both have; an error if large."""
        limit = TOLERANCE[self.settings.precision]
        both = [] if other is None else [n for n in steps if n in run.losses and n in other.losses]
        if other is None or not both:
            return {"difference_max": None, "difference_mean": None, "compared_steps": 0}
        found = [abs(run.losses[n] - other.losses[n]) / abs(other.losses[n]) for n in both]
        # max() would pass over a NaN that is not the first.
        worst = max(found, key=lambda value: math.inf if math.isnan(value) else value)
        error = None
        if any(run.samples[n] != other.samples[n] for n in both):
            error = "the steps are of other samples"
        elif not worst <= limit:
            error = f"a loss differs by {worst:.1e} > {limit}"
        return {
            "difference_max": worst,
            "difference_mean": statistics.fmean(found),
            "compared_steps": len(both),
            "error": error,
        }

    def _kill(self, launch: Launch) -> dict[str, Any]:
        """Kill one rank in the middle, at least two steps past the last checkpoint."""
        job, every = launch.job, self.settings.checkpoint_step
        assert job.kill is not None
        while True:
            launch.check()
            step, first = launch.step(), launch.first()
            fresh = job.what == "train"
            past = step % every if fresh else step - first
            if step - first >= job.steps and past >= 2 and launch.ranks_at(step):
                break
            time.sleep(POLL_SECONDS)
        os.kill(launch.pid(job.kill), signal.SIGKILL)
        start = time.monotonic()
        while time.monotonic() - start < END_SECONDS:
            # One that is ending has no environment any more.
            if launch.process.poll() is not None and not launch.alive():
                break
            time.sleep(POLL_SECONDS)
        ended = time.monotonic() - start
        left = len(launch.alive())
        status = launch.process.poll()
        found: dict[str, Any] = {
            "killed_rank": job.kill,
            "at_step": step,
            "seconds_to_end": None if left else ended,
            "exit_status": status,
            "left": left,
        }
        if left:
            found["error"] = f"{left} processes outlived rank {job.kill} by {END_SECONDS:.0f} s"
        elif status == 0:
            found["error"] = "the run says that all is well"
        return found

    def _inference_rows(self, launch: Launch) -> Iterator[dict[str, Any]]:
        for entry in launch.entries(0, "ms_median_alone"):
            speedup = entry["ms_median_alone"] / entry["ms_median"]
            yield self._row(launch.job) | {
                "what": "inference",
                "task": entry["what"],
                "mode": entry["mode"],
                "batch": 1,
                "compiled": entry["mode"] == "compiled",
                "launcher": "torchrun",
                "ms_median": entry["ms_median"],
                "ms_alone": entry["ms_median_alone"],
                "speedup": speedup,
                "efficiency": speedup / entry["ranks"],
                "peak_bytes": [entry["peak_bytes"]],
                "peak_bytes_alone": entry["peak_bytes_alone"],
                "difference_max": entry["difference"],
            }


class Launch:
    """The processes of one job, which wait until `go`.

    Attributes:
        job: what it does.
        folder: of its logs.
        process: the one that was started; the ranks are its children, and it one of them where
            Lightning starts them.
    """

    def __init__(self, job: Job, inputs: Inputs, folder: Path, settings: Settings) -> None:
        self.job = job
        number = sum(1 for _ in folder.glob("launch-*"))
        self.folder = folder / f"launch-{number}"
        self.folder.mkdir()
        self.mark = uuid.uuid4().hex
        self.limit = settings.launch_seconds
        self.deadline: float | None = None
        if job.what != "inference":
            _write_baseline(inputs.runs / job.name)
        environment = {**os.environ, **NO_MULTICAST, _MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        if settings.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command(job, inputs, self.folder, settings),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def go(self) -> None:
        """Let it begin; its time runs from here."""
        (self.folder / GO).touch()
        self.deadline = time.monotonic() + self.limit

    def wait(self) -> None:
        """Until it is over, or all that it measures is written down.

        Raises:
            LaunchError: it failed, or took too long.
        """
        while self.process.poll() is None:
            if all(self.entries(rank, "ended") for rank in range(self.job.ranks)):
                return
            self._check_deadline()
            time.sleep(POLL_SECONDS)
        if self.process.returncode:
            raise LaunchError(f"exit status {self.process.returncode}: {self._tail()}")

    def check(self) -> None:
        """Raises LaunchError if it is over, or takes too long."""
        if self.process.poll() is not None:
            raise LaunchError(f"ended with {self.process.returncode} too early: {self._tail()}")
        self._check_deadline()

    def end(self) -> None:
        """Kill what is left of it, and what that had just started, so that nothing writes on."""
        deadline = time.monotonic() + 10
        while (left := self.alive()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)

    def alive(self) -> list[int]:
        """Its processes, loader workers among them; by their environment, as ranks of torchrun are
        in sessions of their own. What is dead and not yet collected does not count."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() not in (path / "environ").read_bytes():
                    continue
                state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except (OSError, IndexError):
                continue  # of somebody else, or gone
            if state not in "ZX":
                found.append(int(path.name))
        return found

    # What the ranks have written

    def entries(self, rank: int, key: str) -> list[dict[str, Any]]:
        """Lines of a rank that have a key."""
        path = self.folder / f"rank-{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()  # the last may be half written
        return [entry for entry in map(json.loads, whole) if key in entry]

    def step(self) -> int:
        """The last that rank 0 has done."""
        entries = self.entries(0, "step")
        return int(entries[-1]["step"]) if entries else 0

    def first(self) -> int:
        """The step that it went on from."""
        entries = self.entries(0, "at")
        return int(entries[0]["at"]) if entries else 0

    def ranks_at(self, step: int) -> bool:
        """Whether all ranks have done a step."""
        done = [self.entries(rank, "step") for rank in range(self.job.ranks)]
        return all(entries and entries[-1]["step"] >= step for entries in done)

    def pid(self, rank: int) -> int:
        return int(self.entries(rank, "pid")[0]["pid"])

    def peak(self, rank: int, until: int) -> int:
        """Peak memory of a rank up to a step, in bytes."""
        return max(e["peak_bytes"] for e in self.entries(rank, "step") if e["step"] <= until)

    def run(self) -> Run:
        """The losses; of samples that several ranks have, their mean."""
        run = Run()
        by_step: dict[int, dict[int, list[float]]] = {}
        for rank in range(self.job.ranks):
            for entry in self.entries(rank, "step"):
                of_step = by_step.setdefault(entry["step"], {})
                for index, loss in entry["losses"].items():
                    of_step.setdefault(int(index), []).append(loss)
        for step, of_step in by_step.items():
            run.samples[step] = set(of_step)
            run.losses[step] = statistics.fmean(map(statistics.fmean, of_step.values()))
        return run

    def durations(self) -> dict[str, float | None]:
        """Seconds to save, and from the ranks' being ready to the first step's start."""
        saved = self.entries(0, "saved")
        ready, started = self.entries(0, "ready"), self.entries(0, "started")
        go = (self.folder / GO).stat().st_mtime
        return {
            "save_s": saved[0]["seconds"] if saved else None,
            "load_s": started[0]["started"] - max(go, ready[0]["ready"]),
        }

    def _check_deadline(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise LaunchError(f"not over after {self.limit:.0f} s: {self._tail()}")

    def _tail(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        # torchrun's own report, which says little, comes after what the ranks have said.
        own = [n for n, text in enumerate(lines) if "torch/distributed/elastic" in text]
        said = lines[: own[0]] if own and own[0] else lines
        return " ".join(" ".join(said).split())[-600:]


def command(job: Job, inputs: Inputs, folder: Path, settings: Settings) -> list[str]:
    """What starts a job."""
    module = ["-m", "sla.benchmark.multigpu_rank"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
    if job.what == "inference":
        modes = ["eager", "compiled"] if settings.compile else ["eager"]
        given = ["--size", settings.size, "--device", settings.device, "--modes", *modes]
        given += ["--blocks", *map(str, settings.blocks), "--repeats", str(REPEATS)]
        given += ["--generation-steps", str(GENERATION_STEPS), "--folder", str(folder)]
        return [sys.executable, *torchrun, *module, "inference", *given]
    given = ["--config", str(inputs.config), "--folder", str(folder)]
    if job.stop_after is not None:
        given += ["--stop-after", str(job.stop_after)]
    by = torchrun if settings.launcher == "torchrun" and job.ranks > 1 else []
    return [sys.executable, *by, *module, "train", *given, f"run.name={job.name}", *job.overrides]


def _write_baseline(run: Path) -> None:
    """What a run measures before training, and keeps: here nothing, as nobody reads it."""
    names = ("full_val_loss", "sla_val_loss_before", "attention_error_before")
    run.mkdir(parents=True, exist_ok=True)
    (run / "baseline.json").write_text(json.dumps(dict.fromkeys(names, float("nan"))))


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    what = f"{row['what']:>10} {row['strategy']:>9} {row['ranks']:5d}"

    def number(name: str, form: str, width: int) -> str:
        value = row.get(name)
        return " " * width if value is None else f"{value:{width}{form}}"

    cells = [number("ms_median", ".1f", 9), number("samples_per_s", ".2f", 9)]
    cells.append(number("speedup", ".2f", 6))
    peaks = row.get("peak_bytes")
    cells.append(f"{max(peaks) / 2**30:6.1f}" if peaks else " " * 6)
    cells.append(number("difference_max", ".1e", 10))
    notes = []
    if row["what"] == "inference" and "task" in row:
        notes.append(f"{row['task']}, {row['mode']}; alone {row['ms_alone']:.1f} ms")
    if row["what"] == "resume" and "source" in row and "from_step" in row:
        notes.append(f"from step {row['from_step']} of {row['source']}, {row['load_s']:.1f} s")
    if row["what"] == "kill":
        ended = row["seconds_to_end"]
        when = "not all ended" if ended is None else f"all ended after {ended:.1f} s"
        notes.append(f"rank {row['killed_rank']} at step {row['at_step']}: {when}")
        notes.append(f"exit status {row['exit_status']}")
    if row.get("save_s") is not None:
        notes.append(f"saved in {row['save_s']:.1f} s")
    if row["error"]:
        notes.append(row["error"])
    return f"{what} {' '.join(cells)}  {', '.join(notes)}".rstrip()


__all__ = ["Benchmark", "Job", "Launch", "Settings", "add_parser", "command", "line", "run"]
