"""A study runs what is missing, survives being killed, and records what fails."""

import itertools
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sla_eval.metrics import VideoMetric, build_metric

from sla.cli.main import main
from sla.study import callbacks, measure, runner
from sla.study.frames import read_strips, real_clips_of
from sla.study.records import Records, read_records

TIMES = {"train_step_ms", "denoise_step_ms"}
TIMES |= {"train_kernel_ms"} if torch.cuda.is_available() else set()


class KilledError(BaseException):
    """Nothing of ours may catch it, as nothing catches SIGKILL."""


def run(arms: Path, folder: Path, *options: str) -> int:
    where = ["--out", str(folder / "results"), "--runs", str(folder / "runs")]
    return main(["study", "--config", str(arms), *where, *options])


def changed(arms: Path, folder: Path, **groups: Any) -> Path:
    """The study with other groups of arms, beside the same base."""
    content = yaml.safe_load(arms.read_text())
    content["base"] = str(arms.parent / content["base"])
    content["groups"] = groups
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def numbers(records: Records) -> dict[Any, Any]:
    """All that was measured, without times."""
    return {
        (run.arm, run.seed, run.digest): {
            key: {k: v for k, v in row.items() if k != "digest"}
            for key, row in run.rows.items()
            if key[1] not in TIMES
        }
        for run in records.runs.values()
    }


@pytest.fixture(scope="module")
def whole(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, two seeds, not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(study, folder) == 0
    return folder


def test_every_arm_and_seed_is_measured(whole: Path) -> None:
    records = read_records(whole / "results")
    assert [(r.arm, r.seed) for r in records.runs.values()] == [
        *(("full", 0), ("sla", 0), ("full", 1), ("sla", 1))
    ]
    for found in records.runs.values():
        assert {step for step, metric in found.rows if metric == "val_loss"} == {0, 2, 4}
        losses = found.values("val_loss")
        assert losses is not None
        assert losses.shape == (4, 2)  # clips, strata
        assert found.value("val_loss") == pytest.approx(losses.mean(), rel=1e-6)
        for metric in ("psnr", "temporal_flickering", "accuracy", "accuracy/motion"):
            values = found.values(metric)
            assert values is not None
            assert values.shape == (2,)  # prompts
        assert found.value("evaluator_frechet") is not None
        assert (found.value("val_loss") or 9) < (found.value("val_loss", 0) or 0)
    (full, sla) = (records.of("tiny", arm)[0] for arm in ("full", "sla"))
    assert full.value("attention_error_l1") == pytest.approx(0, abs=1e-5)
    errors = sla.values("attention_error_l1")
    assert errors is not None
    assert errors.shape == (2,)  # layers
    assert errors.min() > 0.05
    assert sla.rows[4, "val_loss"]["sparsity"] == pytest.approx(15 / 16)
    assert full.value("attention_flops_ratio") == 1
    assert (sla.value("attention_flops_ratio") or 1) < 0.3
    assert not list((whole / "runs").glob("*/*/checkpoints/*"))


def test_frames_of_the_first_seed_and_of_the_real_clips_are_kept(study: Path, whole: Path) -> None:
    records, kept = read_records(whole / "results"), read_strips(whole / "results")
    of_arms = {arm: kept.pop(records.of("tiny", arm)[0].key) for arm in ("full", "sla")}
    real = kept.pop(real_clips_of("tiny"))
    assert not kept  # none of seed 1
    for strips in (*of_arms.values(), real):
        assert strips.frames.shape == (2, 4, 16, 16, 3)
        assert strips.prompts == real.prompts
        assert strips.prompts[0].endswith(("left.", "right."))
        assert strips.indices == (0, 1, 2, 3)
    assert of_arms["full"].noise_seeds == of_arms["sla"].noise_seeds
    # They are the videos that were scored: flickering of the frames is that in the rows.
    for arm, strips in of_arms.items():
        metric = build_metric("temporal_flickering")
        assert isinstance(metric, VideoMetric)
        for frames in strips.frames:
            metric.update(torch.from_numpy(frames).permute(0, 3, 1, 2))
        scored = records.of("tiny", arm)[0].values("temporal_flickering")
        assert scored is not None
        assert metric.per_video == pytest.approx(scored.tolist(), rel=1e-6)


def test_no_frames_are_kept_where_none_are_wanted(study: Path, tmp_path: Path) -> None:
    one = {"full": {"attention.name": "full", "trainer.max_steps": 1, "seeds": [0]}}
    arms = changed(study, tmp_path, one={"arms": one})
    arms.write_text(arms.read_text().replace("  prompts: 2\n", "  prompts: 2\n  frames: 0\n"))
    assert run(arms, tmp_path) == 0
    assert len(read_records(tmp_path / "results").runs) == 1
    assert not (tmp_path / "results" / "study" / "frames").exists()


def test_videos_of_the_reference_are_made_once_for_all_processes(
    study: Path, tmp_path: Path
) -> None:
    same = {"full": {"attention.name": "full", "zero_shot": True, "seeds": [0, 1]}}
    arms = changed(study, tmp_path, one={"arms": same})
    assert run(arms, tmp_path, "--seeds", "0") == 0
    (made,) = (tmp_path / "runs" / "tiny").glob("reference-*.npy")
    np.save(made, np.zeros_like(np.load(made)))
    assert run(arms, tmp_path, "--seeds", "1") == 0  # as another process would, with what is there
    of_itself, of_black = read_records(tmp_path / "results").of("tiny", "full")
    assert (of_itself.value("psnr") or 0) > 60
    assert 0 < (of_black.value("psnr") or 0) < 30


def test_times_can_be_measured_apart(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WINDOW", 2)
    monkeypatch.setattr(runner, "TIMED_STEPS", 6)
    two = {
        "full": {"attention.name": "full", "seeds": [0]},
        "swapped": {"attention.name": "sla", "zero_shot": True, "seeds": [0]},
    }
    arms = changed(study, tmp_path, two={"arms": two})
    assert run(arms, tmp_path, "--untimed") == 0
    plain = numbers(read_records(tmp_path / "results"))
    assert run(arms, tmp_path, "--times", "sampling.batch_size=1") == 0
    records = read_records(tmp_path / "results")
    assert numbers(records) == plain  # no other number, and no other run
    times = {r.arm: {m for _, m in r.rows if m in TIMES} for r in records.runs.values()}
    assert times == {"full": TIMES, "swapped": {"denoise_step_ms"}}
    for found in records.runs.values():
        assert (found.value("denoise_step_ms") or 0) > 0
        assert len(found.sources) == 2
    assert not list((tmp_path / "runs").glob("*/*/checkpoints/*"))
    capsys.readouterr()
    assert run(arms, tmp_path, "--times", "sampling.batch_size=1") == 0
    assert "0 finished, 0 failed, 2 were done before" in capsys.readouterr().out
    before = read_records(tmp_path / "results").of("tiny", "full")[0].timed
    again = ("--times", "--retry", "--arms", "full", "sampling.batch_size=1")
    assert run(arms, tmp_path, *again) == 0
    assert read_records(tmp_path / "results").of("tiny", "full")[0].timed != before  # the newest
    assert run(arms, tmp_path, "--times", "--untimed") == 2
    assert "give one of them" in capsys.readouterr().err


def test_arms_of_a_seed_are_paired(whole: Path) -> None:
    """All start from the same weights: exact attention's first loss is that of every seed."""
    records = read_records(whole / "results")
    first = [r.values("val_loss", 0) for r in records.of("tiny", "full")]
    assert np.array_equal(*first)
    last = [r.values("val_loss") for r in records.of("tiny", "full")]
    assert not np.array_equal(*last)  # other data and noise


def test_what_is_finished_is_not_run_again(
    study: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner.Runner, "_run", None)
    assert run(study, whole) == 0
    assert "0 finished, 0 failed, 4 were done before, 0 are left" in capsys.readouterr().out
    assert run(study, whole, "--list") == 0
    assert capsys.readouterr().out.count("finished") == 4


def test_shares_are_all_of_it_and_write_files_of_their_own(
    study: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = []
    for share in ("1/3", "2/3", "3/3"):
        assert run(study, tmp_path, "--list", "--share", share) == 0
        listed.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in listed] == [2, 1, 1]
    run(study, tmp_path, "--list")
    whole_list = capsys.readouterr().out.splitlines()
    assert sorted(line for lines in listed for line in lines) == sorted(whole_list)
    assert run(study, tmp_path, "--share", "2/3") == 0
    assert "-tiny-share2.jsonl" in capsys.readouterr().out
    of_share, of_all = (numbers(read_records(folder / "results")) for folder in (tmp_path, whole))
    assert len(of_share) == 1
    assert of_share.items() <= of_all.items()
    with pytest.raises(SystemExit):
        run(study, tmp_path, "--share", "0/2")
    assert "'0/2' is not I/N with 1 <= I <= N" in capsys.readouterr().err


def test_processes_with_the_same_folders_take_each_run_once(
    study: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another one comes while this one is at its first run, and does the other three."""
    begun: list[tuple[str, int]] = []
    alone = runner.Runner._run

    def beside(self: runner.Runner, job: Any, *rest: Any) -> Any:
        begun.append((job.arm.name, job.seed))
        if len(begun) == 1:
            assert run(study, tmp_path) == 0
            assert (
                "3 finished, 0 failed, 0 were done before, 0 are left, another process is at 1"
                in (capsys.readouterr().out)
            )
        return alone(self, job, *rest)

    monkeypatch.setattr(runner.Runner, "_run", beside)
    assert run(study, tmp_path) == 0
    assert "1 finished, 0 failed, 3 were done before, 0 are left\n" in capsys.readouterr().out
    assert begun == [("full", 0), ("sla", 0), ("full", 1), ("sla", 1)]
    assert len(list((tmp_path / "results" / "study").glob("*.jsonl"))) == 2
    assert numbers(read_records(tmp_path / "results")) == numbers(read_records(whole / "results"))


def test_several_processes_do_a_study_together(
    study: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # for equal rounding
    assert run(study, tmp_path, "--processes", "2", "--untimed", "--seeds", "0") == 0
    ended = [line for line in capfd.readouterr().out.splitlines() if " finished, " in line]
    assert len(ended) == 2
    found = read_records(tmp_path / "results")
    assert [run.arm for run in found.runs.values()] in (["full", "sla"], ["sla", "full"])
    assert numbers(found).items() <= numbers(read_records(whole / "results")).items()
    for run_ in found.runs.values():
        assert "--processes" not in run_.source.provenance["command"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes=0", "--untimed"], "--processes is 0; it must be at least 1"),
        (["--proc", "2"], "--processes is 2 and there are 1 GPUs.*add --untimed"),
    ],
)
def test_a_number_of_processes_that_cannot_be(
    study: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert run(study, tmp_path, *options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_study_that_was_killed_goes_on_to_the_same_numbers(
    study: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second arm, after its checkpoint at step 2, before its last measurement."""
    calls = 0

    def losses(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KilledError
        return measure.triple_losses(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "triple_losses", losses)
        with pytest.raises(KilledError):
            run(study, tmp_path)
    assert len(read_records(tmp_path / "results").runs) == 1
    (rows,) = (tmp_path / "runs" / "tiny").glob("sla-0-*/rows.jsonl")
    assert {json.loads(line)["step"] for line in rows.read_text().splitlines()} == {0, 2}
    assert run(study, tmp_path) == 0
    assert numbers(read_records(tmp_path / "results")) == numbers(read_records(whole / "results"))


def test_a_session_ends_in_time_and_the_next_goes_on(
    study: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only = ("--arms", "sla", "--seeds", "1")
    assert run(study, tmp_path, *only, "--max-seconds", "0") == 0
    assert "1 are left" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    # Time runs out within the run, after its third step.
    after = iter([0.0, 0.0, 1e9])
    clock = SimpleNamespace(
        perf_counter=time.perf_counter, monotonic=lambda: next(after) + time.monotonic()
    )
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "time", clock)
        assert run(study, tmp_path, *only, "--max-seconds", "1000") == 0
    assert "0 finished, 0 failed, 0 were done before, 1 are left" in capsys.readouterr().out
    assert list((tmp_path / "runs" / "tiny").glob("sla-1-*/checkpoints/last.ckpt"))
    assert run(study, tmp_path, *only) == 0
    found = numbers(read_records(tmp_path / "results"))
    assert len(found) == 1
    assert found.items() <= numbers(read_records(whole / "results")).items()


def test_no_run_begins_late_and_the_one_at_hand_ends(
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    same = {"full": {"attention.name": "full", "zero_shot": True, "seeds": [0, 1], "videos": False}}
    arms = changed(study, tmp_path, one={"arms": same})
    asked = itertools.chain([0.0, 0.0], itertools.repeat(1e9))  # late once the first run began
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(asked))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "time", clock)
        assert run(arms, tmp_path, "--begin-within", "1000") == 0
    assert "1 finished, 0 failed, 0 were done before, 1 are left" in capsys.readouterr().out


def test_clips_that_are_not_there_are_named_with_what_makes_them(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = changed(study, tmp_path, one={"arms": {"full": {"attention.name": "full"}}})
    content = yaml.safe_load(arms.read_text())
    content["measures"]["prompt_shards"] = ["nowhere/test-*.tar"]
    arms.write_text(yaml.safe_dump(content))
    assert run(arms, tmp_path, "--list") == 2
    said = capsys.readouterr().err
    assert "measures.prompt_shards is ['nowhere/test-*.tar']" in said
    assert "make study-data" in said


def test_a_failing_arm_is_recorded_and_the_rest_goes_on(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"attention.name": "full", "optim.trainable": "methods", "seeds": [0]}
    good = {"attention.name": "full", "trainer.max_steps": 1, "seeds": [0], "videos": False}
    arms = changed(study, tmp_path, one={"arms": {"wrong": wrong, "good": good}})
    assert run(arms, tmp_path) == 1
    assert "wrong/0 failed: RunError: optim.trainable is 'methods'" in capsys.readouterr().err
    records = read_records(tmp_path / "results")
    assert [r.arm for r in records.runs.values()] == ["good"]
    ((key, reason),) = records.failures.items()
    assert key[1] == "wrong"
    assert reason.startswith("RunError: ")
    assert records.of("tiny", "good")[0].value("psnr") is None
    assert run(arms, tmp_path) == 0  # not tried again unless asked to
    assert run(arms, tmp_path, "--retry") == 1


def test_what_was_withdrawn_is_run_again(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"full": {"attention.name": "full", "trainer.max_steps": 1, "seeds": [0]}}
    arms = changed(study, tmp_path, one={"arms": one})
    assert run(arms, tmp_path) == 0
    reason = ("--withdraw", "The gradient was wrong.")
    for options, message in (
        (reason, "--arms or --groups"),
        (("--arms", "full", "--withdraw", " "), "has no reason"),
    ):
        assert run(arms, tmp_path, *options) == 2
        assert message in capsys.readouterr().err
    assert run(arms, tmp_path, "--arms", "full", *reason) == 0
    assert not read_records(tmp_path / "results").runs
    assert run(arms, tmp_path, "--arms", "full", *reason) == 2
    assert "none of these runs is finished" in capsys.readouterr().err
    assert run(arms, tmp_path) == 0
    assert len(read_records(tmp_path / "results").runs) == 1


def test_no_times_are_kept_of_a_shared_gpu(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WINDOW", 1)
    one = {"full": {"attention.name": "full", "trainer.max_steps": 3, "seeds": [0]}}
    arms = changed(study, tmp_path, one={"arms": one})
    found = {}
    for folder, options in (("alone", ()), ("shared", ("--untimed",))):
        assert run(arms, tmp_path / folder, *options) == 0
        (found[folder],) = read_records(tmp_path / folder / "results").runs.values()
    alone, shared = ({metric for _, metric in r.rows} for r in found.values())
    assert alone - shared == set(TIMES)
    assert found["alone"].key == found["shared"].key


def test_an_arm_with_other_numbers_is_another_arm(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"trainer.max_steps": 1, "seeds": [0], "videos": False, "attention.name": "sla"}
    short |= {"attention.block_q": 16, "attention.block_kv": 16}
    both = {"a": {**short, "attention.critical": 0.1}, "b": {**short, "attention.critical": 0.2}}
    assert run(changed(study, tmp_path, one={"arms": both}), tmp_path) == 0
    both["b"]["attention.critical"] = 0.3
    assert run(changed(study, tmp_path, one={"arms": both}), tmp_path) == 0
    assert "1 finished, 0 failed, 1 were done before" in capsys.readouterr().out
    records = read_records(tmp_path / "results")
    assert len([r for r in records.runs.values() if r.arm == "b"]) == 2
    (newest,) = records.of("tiny", "b")
    assert newest.end["numbers"]["attention"]["critical"] == 0.3


def test_options_of_arms(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned routers, a teacher, no training, a density that depends on the inputs, times."""
    monkeypatch.setattr(runner, "WINDOW", 1)
    blocks = {"attention.block_q": 16, "attention.block_kv": 16}
    routed = {"attention.name": "sla2", "attention.critical": 0.2, **blocks, "router": True}
    routed |= {"router.clips": 2, "router.steps": 2, "router.critical": [0.2]}
    taught = {"attention.name": "sla", **blocks, "flow.target": "teacher"}
    free = {
        "attention.name": "sparge",
        "attention.mass": 0.5,
        "attention.similarity": 0.0,
        **blocks,
        "zero_shot": True,
    }
    arms = {"routed": routed, "taught": taught, "free": free}
    group = {"seeds": [0], "videos": False, "overrides": {"trainer.max_steps": 3}, "arms": arms}
    assert run(changed(study, tmp_path, one=group), tmp_path) == 0
    records = read_records(tmp_path / "results")
    (routed_run,), (taught_run,), (free_run,) = (records.of("tiny", arm) for arm in arms)
    assert list((tmp_path / "runs" / "tiny").glob("routed-0-*/router.safetensors"))
    assert routed_run.last == taught_run.last == 3
    recall = routed_run.values("router_recall_after", 0)
    assert recall is not None
    assert recall.shape == (2,)  # layers
    assert 0 < recall.min() <= recall.max() < 1
    assert (taught_run.value("train_step_ms") or 0) > 0
    assert free_run.last == 0
    exact = free_run.value("exact_fraction")
    assert exact is not None
    assert 1 / 16 <= exact < 1
    ratio = free_run.value("attention_flops_ratio")
    assert ratio is not None
    assert exact <= ratio < exact + 0.3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{root}/weights.safetensors", "{root}/none.safetensors", "no parts of it"),
        ("attention.name: full", "attention.nam: full", "did you mean attention.name"),
        ("curve: [0, 2]", "curve: [0, two]", "curve is"),
        ("  prompts: 2", "  prompt: 2", "unknown prompt"),
        ("psnr, ", "psnr, lpips, ", "lpips cannot run"),
        ("evaluator.safetensors", "evaluatr.safetensors", "study-evaluator"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    study: Path,
    tmp_path: Path,
    old: str,
    new: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = str(study.parent)
    old, new = old.format(root=root), new.format(root=root)
    for name in ("arms.yaml", "base.yaml"):
        (tmp_path / name).write_text((study.parent / name).read_text().replace(old, new))
    tiny = (study.parent / "tiny.yaml").read_text()
    (tmp_path / "tiny.yaml").write_text(tiny)
    assert run(tmp_path / "arms.yaml", tmp_path) == 2
    assert message in capsys.readouterr().err
