"""`python -m sla study`, `study-evaluator` and `study-weights`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sla.cli.quiet import quiet_lightning
from sla.cli.together import run_together, visible_gpus
from sla.study import parts
from sla.study.evaluator import train_evaluator
from sla.study.plan import Job, StudyError, load_plan
from sla.study.records import (
    ACCURACY,
    REAL_CLIPS,
    Key,
    Records,
    StudyResults,
    measurement,
    read_records,
    timestamp,
    withdrawal,
)
from sla.study.runner import Runner


def run(
    config: Path,
    overrides: Sequence[str],
    *,
    arms: Sequence[str] = (),
    groups: Sequence[str] = (),
    seeds: Sequence[int] = (),
    share: tuple[int, int] = (1, 1),
    max_seconds: float | None = None,
    begin_within: float | None = None,
    out: Path = Path("results"),
    runs: Path = Path("runs/study"),
    retry: bool = False,
    timed: bool = True,
    times: bool = False,
    listing: bool = False,
    withdraw: str | None = None,
) -> int:
    """Run what is missing of a study; returns 1 if an arm failed now.

    Args:
        arms, groups, seeds: of those alone; none for all.
        share: (i, n) takes every n-th of these from the i-th on, so that n machines do all of it.
            Processes with the same folders need none: each takes what no other is at.
        max_seconds: begin no further step after so long.
        begin_within: begin no further run after so long.
        out: the results folder, read for what is finished and written.
        runs: folder of unfinished runs.
        retry: run again what had failed; with `times`, measure all of them anew.
        timed: record the times of steps.
        times: measure the times of steps alone, of those that have none.
        listing: print what there is and what is missing, run nothing.
        withdraw: take back what was finished of `arms` or `groups`, for this reason; run nothing.

    Raises:
        StudyError: the study cannot be run; says what would do.
    """
    quiet_lightning()
    if times and not timed:
        raise StudyError("--times measures times, which --untimed leaves out; give one of them")
    plan = load_plan(config, overrides)
    number, total = share
    jobs = plan.jobs(arms, groups, seeds)  # mistakes of any arm are said before any is run
    jobs = jobs[number - 1 :: total]
    runner = Runner(plan, runs, timed=timed)
    records = read_records(out)
    if listing:
        _list(jobs, runner, records)
        return 0
    # Of its own name for each share: they come together in one folder later.
    results = StudyResults(out, plan.name if total == 1 else f"{plan.name}-share{number}")
    if withdraw is not None:
        if not arms and not groups:
            raise StudyError("--withdraw takes back what --arms or --groups name; give one of them")
        _withdraw(jobs, runner, records, results, withdraw)
        return 0
    outcome = runner.run(
        jobs,
        records,
        results,
        max_seconds=max_seconds,
        begin_within=begin_within,
        retry=retry,
        times=times,
    )
    print(f"{config}: {outcome}")
    for name, reason in outcome.failed.items():
        print(f"  {name} failed: {reason}", file=sys.stderr)
    for path in results.paths:
        print(f"recorded in {path}")
    return 1 if outcome.failed else 0


def run_processes(arguments: Sequence[str], processes: int, *, timed: bool) -> int:
    """Run a study as several processes of one machine, each of which takes what no other is at.

    Args:
        arguments: of one of them.
        processes: how many.
        timed: whether they record times of steps, which mean nothing where two share a GPU.

    Returns:
        The largest of their exit statuses.

    Raises:
        StudyError: fewer than one, or times and fewer GPUs than processes.
    """
    gpus = visible_gpus()
    if processes < 1:
        raise StudyError(f"--processes is {processes}; it must be at least 1")
    if timed and processes > len(gpus):
        raise StudyError(
            f"--processes is {processes} and there are {len(gpus)} GPUs: times of steps mean "
            "nothing where processes share one; add --untimed"
        )
    # Bars would overwrite each other. Not at the end: `--seeds` would take it for a seed.
    command, *rest = arguments
    return run_together([command, "trainer.progress_bar=false", *rest], processes, gpus)


def _list(jobs: Sequence[Job], runner: Runner, records: Records) -> None:
    def state(key: Key) -> str:
        if key in records.runs:
            return "finished"
        return f"failed: {records.failures[key]}" if key in records.failures else "missing"

    for job in jobs:
        key = runner.key(job)
        print(
            f"{job.arm.group:<16}{job.arm.name:<28}{job.seed:>3}  {job.arm.curve[-1]:>6} steps  "
            f"{key[2]}  {state(key)}"
        )


def _withdraw(
    jobs: Sequence[Job], runner: Runner, records: Records, results: StudyResults, reason: str
) -> None:
    if not reason.strip():
        raise StudyError("--withdraw has no reason; say what is wrong with these runs")
    keys = [runner.key(job) for job in jobs]
    found = [records.runs[key] for key in keys if key in records.runs]
    if not found:
        raise StudyError("--withdraw: none of these runs is finished")
    now = timestamp()
    results.append(withdrawal(run, reason.strip(), now) for run in found)
    for run in found:
        print(f"{run.arm}/{run.seed}: withdrawn; `make study` runs it again")
    print(f"recorded in {results.paths[0]}")


def evaluator(
    config: Path, overrides: Sequence[str], *, out: Path = Path("results"), force: bool = False
) -> None:
    """Train the study's evaluator and record its accuracy on real held-out clips.

    Args:
        out: the results folder.
        force: train another one although there is one; arms measured with it count no more.

    Raises:
        StudyError: the study has none, or it is there already.
    """
    quiet_lightning()
    plan = load_plan(config, overrides)
    if not plan.evaluator.weights:
        raise StudyError(f"{config} has no evaluator.weights")
    if Path(plan.evaluator.weights).exists() and not force:
        raise StudyError(
            f"{plan.evaluator.weights} is there already; arms are measured with one evaluator "
            "(--force trains another)"
        )
    experiment = plan.base_experiment()
    trained = train_evaluator(
        plan.evaluator, experiment.data, plan.measures.prompt_shards, experiment.trainer
    )
    steps, results = plan.evaluator.steps, StudyResults(out, f"{plan.name}-evaluator")
    common = {"study": plan.name, "what": REAL_CLIPS}
    results.append(
        {**common, **measurement(steps, f"{ACCURACY}/{name}", right)}
        for name, right in trained.accuracy.items()
    )
    for name, right in trained.accuracy.items():
        print(f"{name:<12}{right.mean():6.1%} of {len(right)} real held-out clips")
    print(f"{trained.path}; recorded in {results.paths[0]}")


def split(path: Path, folder: Path) -> None:
    """Write the parts of a weights file."""
    for written in parts.split(path, folder):
        print(written)


def join(path: Path, folder: Path | None) -> None:
    """Make a weights file of its parts."""
    print(parts.join(path, folder))
