"""The benchmark of several GPUs, on two processes of a CPU and a tiny Wan."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sla.benchmark import multigpu
from sla.benchmark.__main__ import main
from sla.benchmark.multigpu_inputs import Inputs
from sla.figures import tables

TINY = ["--size", "tiny", "--device", "cpu", "--devices", "1", "2", "--steps", "6"]


def settings(*arguments: str) -> multigpu.Settings:
    parser = argparse.ArgumentParser()
    multigpu.add_parser(parser)
    return multigpu.Settings.of(parser.parse_args([*TINY, *arguments]))


def benchmark(folder: Path, *arguments: str) -> multigpu.Benchmark:
    found = multigpu.Benchmark(settings(*arguments), folder, None)
    found.inputs = Inputs(folder / "run.yaml", folder / "runs", 72)
    return found


def rows_in(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("multigpu/*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


@pytest.mark.slow  # three launches; the others differ in overrides, and are seen in the jobs below
def test_losses_a_killed_rank_and_going_on_are_measured_on_two_processes(tmp_path: Path) -> None:
    chosen = ["--strategies", "fsdp2", "--what", "train", "kill"]
    where = ["--scratch", str(tmp_path), "--out", str(tmp_path)]
    assert main(["multigpu", *TINY, *chosen, *where]) == 0
    assert not list(tmp_path.glob("sla-multigpu-*")), "checkpoints are deleted"
    rows = rows_in(tmp_path)
    assert [(row["what"], row["strategy"], row["ranks"]) for row in rows] == [
        ("train", "single", 1),
        ("train", "fsdp2", 2),
        ("kill", "fsdp2", 2),
        ("resume", "fsdp2", 2),
    ]
    single = rows[0]
    # They depend on what was learned, many times more than the tolerance.
    assert single["losses"][-1] < 0.9 * single["losses"][0]
    for row in rows:
        assert row["error"] is None
        if row["what"] == "train":
            assert len(row["losses"]) == 6
            assert row["difference_max"] < 1e-5
            assert row["samples_per_s"] == pytest.approx(2000 / row["ms_median"])
            assert row["speedup"] == pytest.approx(single["ms_median"] / row["ms_median"])
            assert row["efficiency"] == pytest.approx(row["speedup"] / row["ranks"])
            assert len(row["peak_bytes"]) == row["ranks"]
        elif row["what"] == "resume":
            assert row["from_step"] == 5, "an odd number, also where a step is of two batches"
            assert row["compared_steps"] >= 1
            assert row["difference_max"] < 1e-5
        else:
            assert row["exit_status"] not in (0, None)
            assert row["left"] == 0
            assert row["seconds_to_end"] < 30


def test_a_record_names_no_path_of_this_machine(tmp_path: Path) -> None:
    made = benchmark(tmp_path)
    assert any(str(tmp_path) in text for job in made.jobs() for text in job.overrides)
    rows = [made._row(job) for job in made.jobs()]
    assert str(tmp_path) not in json.dumps(rows)
    assert "run.resume=runs/fsdp2-2/checkpoints/last.ckpt" in json.dumps(rows)


def test_what_is_needed_comes_before_what_needs_it(tmp_path: Path) -> None:
    jobs = benchmark(tmp_path).jobs()
    assert [job.name for job in jobs] == [
        *("single-1", "ddp-2", "fsdp2-2", "sequence-2"),
        *("fsdp2-2-on-fsdp2-1", "single-1-on-ddp-2", "inference-2", "fsdp2-2"),
    ]
    by_name = {job.name: place for place, job in reversed(list(enumerate(jobs)))}
    for place, job in enumerate(jobs):
        if job.source is not None:
            maker = jobs[by_name[job.source]]
            assert by_name[job.source] < place
            assert "trainer.checkpoint_every=5" in maker.overrides
    # A batch of two samples on every number of processes.
    assert [job.overrides[3] for job in jobs[:4]] == [
        f"optim.accumulate={count}" for count in (2, 1, 1, 2)
    ]
    assert [job.kill for job in jobs] == [None, None, 1, None, None, 0, None, None]
    assert [job.name for job in benchmark(tmp_path, "--what", "inference").jobs()] == [
        "inference-2"
    ]


def test_eight_ranks_share_twelve_heads_in_groups_of_four(tmp_path: Path) -> None:
    given = ("--size", "1.3b", "--devices", "1", "8")
    assert settings(*given).overrides("sequence", 8)[2:] == [
        "trainer.sequence_parallel=4",
        "optim.accumulate=4",  # two groups, eight samples
    ]
    assert benchmark(tmp_path, *given, "--what", "inference").jobs()[0].ranks == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "2", "3"), "--batch is 3; it must be a multiple .* such as 6"),
        (("--devices", "0"), "--devices is 0 1; they must be at least 1"),
        (("--steps", "4"), "--steps is 4; it must be at least 5"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(*arguments)


def test_runs_that_differ_are_an_error(tmp_path: Path) -> None:
    found = benchmark(tmp_path)
    one = multigpu.Run({1: 2.0, 2: 1.0}, {1: {0, 1}, 2: {2, 3}})
    same = found._difference(multigpu.Run({1: 2.0, 2: 1.00001}, one.samples), one, range(1, 3))
    assert same["difference_max"] == pytest.approx(1e-5)
    assert (same["compared_steps"], same["error"]) == (2, None)
    for losses, samples, message in (
        ({1: 2.0, 2: 1.1}, one.samples, "a loss differs by 1.0e-01 > 0.0001"),
        ({1: 2.0, 2: float("nan")}, one.samples, "a loss differs by nan"),
        (one.losses, {1: {0, 1}, 2: {2, 4}}, "the steps are of other samples"),
    ):
        error = found._difference(multigpu.Run(losses, samples), one, range(1, 3))["error"]
        assert error is not None
        assert error.startswith(message)


def test_samples_of_several_ranks_count_once(tmp_path: Path) -> None:
    launch = object.__new__(multigpu.Launch)
    launch.folder = tmp_path
    launch.job = multigpu.Job("train", "sequence-2", "sequence", 2)
    for rank, loss in enumerate((1.0, 3.0)):
        entry = {"step": 1, "losses": {"0": loss, str(1 + rank): 5.0}, "peak_bytes": 1}
        text = json.dumps(entry) + "\n"
        (tmp_path / f"rank-{rank}.jsonl").write_text(text + '{"step": 2, "los')
    run = launch.run()
    assert run.samples == {1: {0, 1, 2}}
    assert run.losses == {1: pytest.approx((2.0 + 5.0 + 5.0) / 3)}


def test_a_launch_that_fails_is_a_row_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes are found in whatever session they are, and know that multicast is off."""
    code = (
        "import os, subprocess, sys; subprocess.Popen(['sleep', '60'], start_new_session=True); "
        "sys.exit('no room, multicast ' + os.environ['NCCL_NVLS_ENABLE'])"
    )
    started = []

    def write_inputs(folder: Path, *_: object, **__: object) -> Inputs:
        return Inputs(folder / "run.yaml", folder / "runs", 72)

    def end(launch: multigpu.Launch) -> None:
        started.append((launch, len(launch.alive())))
        original(launch)

    original = multigpu.Launch.end
    monkeypatch.setattr(multigpu, "write_inputs", write_inputs)
    monkeypatch.setattr(multigpu, "command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(multigpu.Launch, "end", end)
    given = ["--what", "train", "--strategies", "ddp", "--out", str(tmp_path)]
    assert main(["multigpu", *TINY, *given]) == 1
    rows = rows_in(tmp_path)
    assert [row["error"] for row in rows] == ["exit status 1: no room, multicast 0"] * 2
    assert started[0][1] == 1
    assert not any(launch.alive() for launch, _ in started)


def test_the_page_has_a_table_of_each_kind(tmp_path: Path) -> None:
    assert "not measured yet" in tables.TABLES["multi_gpu"](tmp_path)
    common = {"size": "1.3b", "device": "cuda", "batch": 2, "launcher": "lightning", "error": None}
    times = {"ms_median": 900.0, "speedup": 1.8, "efficiency": 0.9, "difference_max": 1e-3}
    rows = [
        common
        | times
        | {"what": "train", "strategy": "fsdp2", "ranks": 2, "peak_bytes": [2**34, 2**34]}
        | {"samples_per_s": 2.22, "tokens_per_s": 72800.0},
        common
        | times
        | {"what": "inference", "strategy": "sequence", "ranks": 2, "task": "step"}
        | {"mode": "eager", "ms_alone": 1620.0},
        common
        | {"what": "resume", "strategy": "ddp", "ranks": 2, "source": "single-1", "from_step": 11}
        | {"load_s": 12.0, "difference_max": 0.0, "compared_steps": 4},
        common
        | {"what": "kill", "strategy": "fsdp2", "ranks": 2, "killed_rank": 1}
        | {"seconds_to_end": 5.2, "exit_status": -9},
        common | {"what": "train", "strategy": "ddp", "ranks": 2, "error": "no room"},
    ]
    head = {
        "device": "card",
        "date": "2026-01-02",
        "torch": "2.11",
        "commit": "abcdef123456",
        "dirty": False,
        "command": "python -m bench",
    }
    (tmp_path / "multigpu").mkdir()
    lines = [json.dumps(line) for line in ({"provenance": head}, *rows)]
    (tmp_path / "multigpu" / "card.jsonl").write_text("\n".join(lines) + "\n")
    text = tables.TABLES["multi_gpu"](tmp_path)
    assert "| `fsdp2` | 2 | 900 | 2.22 | 72,800 | 1.80 (90%) | 16.0 | 1.0e-03 |" in text
    assert "| `ddp` | 2 | failed |" in text
    assert "| denoising step | 2 | eager | 900 | 1620 | 1.80 (90%) | 1.0e-03 |" in text
    assert "| one GPU | 2 | `ddp` | 12 | 0.0e+00 in 4 steps |" in text
    assert "| rank 1 of 2, `fsdp2` | 5.2 | -9 |" in text
