"""`python -m sla generate`: one prompt or a file of them, and going on after an interruption."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sla.cli import videos
from sla.cli.main import main
from sla.config import load_experiment
from sla.files import file_sha256
from sla.models.checkpoint import save_model
from sla.training.build import build_networks
from sla.training.testing import write_tiny_experiment

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = """# what to make

A red ball rolls.
A red ball rolls.
Ein Ödland, "ganz" in 红色
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with untrained weights of SLA to sample with, and a file of prompts beside it."""
    path = write_tiny_experiment(tmp_path_factory.mktemp("tiny")).with_name("sla.yaml")
    save_model(path.parent / "start.safetensors", *build_networks(load_experiment(path)))
    (path.parent / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return path


def call(config: Path, *more: str) -> list[str]:
    start = f"run.init_weights={config.parent / 'start.safetensors'}"
    return ["generate", "--config", str(config), *more, start, "sampling.seed=7"]


def of_list(config: Path, out: Path, *more: str) -> list[str]:
    prompts = str(config.parent / "prompts.txt")
    return call(config, "--prompts", prompts, "--out", str(out), *more)


@pytest.fixture(scope="module")
def out(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos of the file, made in one go."""
    folder = tmp_path_factory.mktemp("videos") / "all"
    assert main(of_list(config, folder)) == 0
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Prompts and seeds that are sampled during the test."""
    calls: list[tuple[str, int]] = []
    plain = videos.sample_videos

    def counting(experiment: Any, module: Any, prompts: list[str], *more: Any) -> Any:
        calls.append((prompts[0], experiment.sampling.seed))
        return plain(experiment, module, prompts, *more)

    monkeypatch.setattr(videos, "sample_videos", counting)
    return calls


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def test_each_prompt_has_a_video_a_strip_and_a_sidecar(config: Path, out: Path) -> None:
    stems = ["0000-a-red-ball-rolls-sla-7", "0001-a-red-ball-rolls-sla-8"]
    stems.append("0002-ein-dland-ganz-in-sla-9")
    names = {f"{stem}.{ending}" for stem in stems for ending in ("mp4", "png", "json")}
    assert {path.name for path in out.iterdir()} == names
    assert len(set(contents(out).values())) == 3
    sidecars = [json.loads((out / f"{stem}.json").read_text()) for stem in stems]
    first = "A red ball rolls."
    assert [s["prompt"] for s in sidecars] == [first, first, 'Ein Ödland, "ganz" in 红色']
    for seed, sidecar in enumerate(sidecars, start=7):
        assert sidecar["seed"] == sidecar["sampling"]["seed"] == seed
        assert sidecar["attention"]["name"] == "sla"
        assert sidecar["sampling"]["scheduler"] == "euler"
        weights = config.parent / "start.safetensors"
        assert sidecar["weights"] == str(weights)
        assert sidecar["made_of"]["weights_sha256"] == file_sha256(weights)
        assert sidecar["device"] == "cpu"
        assert {"torch", "diffusers", "commit", "date"} <= sidecar["provenance"].keys()
        seconds = sidecar["seconds"]
        steps = seconds.pop("denoising_steps")
        assert seconds.keys() == {"text_encoding", "denoising", "decoding", "writing"}
        assert all(value > 0 for value in seconds.values())
        assert len(steps) == 2
        assert sum(steps) == pytest.approx(seconds["denoising"], abs=2e-4)


def test_a_second_call_makes_only_what_is_missing(
    config: Path, out: Path, made: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(out)
    assert main(of_list(config, out)) == 0
    assert made == []
    assert "3 of 3 videos are there already" in capsys.readouterr().out

    files = sorted(out.glob("*.mp4"))
    files[0].with_suffix(".json").unlink()  # killed between video and sidecar
    files[2].write_bytes(files[2].read_bytes()[:-1])  # not what its sidecar says
    assert main(of_list(config, out)) == 0
    assert [seed for _, seed in made] == [7, 9]
    assert "1 of 3 videos are there already" in capsys.readouterr().out
    assert contents(out) == before, "same prompt and seed, same video"


@pytest.mark.parametrize(
    "change",
    [
        *("sampling.steps=3", "sampling.scheduler=unipc", "sampling.guidance=1", "flow.shift=1"),
        *("sampling.batched_guidance=false", "data.num_frames=3", "weights"),
    ],
)
def test_a_video_made_otherwise_is_not_taken(
    config: Path,
    out: Path,
    tmp_path: Path,
    made: list[tuple[str, int]],
    change: str,
) -> None:
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "0002-ein-dland-ganz-in-sla-9.json").unlink()
    arguments = of_list(config, tmp_path)
    if change == "weights":
        torch.manual_seed(1)
        other = tmp_path / "other.safetensors"
        experiment = load_experiment(config, ["run.seed=1"])
        save_model(other, *build_networks(experiment))
        arguments += ["--weights", str(other)]
    else:
        arguments.append(change)
    assert main(arguments) == 0
    assert [seed for _, seed in made] == [7, 8, 9]


def test_a_call_that_was_cut_off_goes_on(
    config: Path,
    out: Path,
    tmp_path: Path,
    made: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = videos.write_video

    def full_at_the_second(path: Path, *arguments: Any) -> None:
        if path.name.startswith("0001"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(videos, "write_video", full_at_the_second)
        assert main(of_list(config, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert "0001-a-red-ball-rolls-sla-8.mp4" in error
    assert "run the same command again to go on" in error
    assert len(contents(tmp_path)) == 1

    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(videos, "write_text", killed)
        assert main(of_list(config, tmp_path)) == 130
    assert len(contents(tmp_path)) == 2, "the second has a video, but no sidecar"

    made.clear()
    assert main(of_list(config, tmp_path)) == 0
    assert [seed for _, seed in made] == [8, 9]
    assert contents(tmp_path) == contents(out)
    assert not list(tmp_path.glob("*.part*"))


def test_too_little_gpu_memory_says_what_would_do(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(videos, "sample_videos", too_much)
    assert main(of_list(config, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "too little memory: tried to allocate 9 GiB" in error
    assert "sampling.batched_guidance=false" in error


def test_one_prompt(
    config: Path, tmp_path: Path, made: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"run.dir={tmp_path / 'runs'}"
    alike = ["A cat", "A cat!", "红", "白", "x" * 60, "x" * 61]
    names = []
    for prompt in alike:
        assert main(call(config, "--prompt", prompt, run)) == 0
        file, strip = (Path(line) for line in capsys.readouterr().out.splitlines()[-2:])
        assert json.loads(file.with_suffix(".json").read_text())["prompt"] == prompt
        assert strip.suffix == ".png"
        assert strip.is_file()
        names.append(file.name)
    assert len(set(names)) == len(alike)
    assert names[0].startswith("a-cat-")
    assert names[0].endswith("-sla-7.mp4")
    assert main(call(config, "--prompt", "A cat", "--out", str(tmp_path))) == 0
    assert (tmp_path / names[0]).is_file()
    assert made[-1] == ("A cat", 7)
    assert main(call(config, "--prompt", "", "--out", str(tmp_path / "new" / "v.mp4"))) == 0
    assert (tmp_path / "new" / "v.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--out", "v.png"], "OUT is 'v.png'"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["--prompts", "latin.txt"], "latin.txt"),
        (["--prompts", "."], "Is a directory"),
        (["--prompts", "builtin", "--out", "empty.txt"], "must be a folder"),
        (["--prompts", "builtin", "--out", "new.mp4"], "must be a folder"),
        (["--prompt", "x", "sampling.scheduler=ddim"], "sampling.scheduler is 'ddim'"),
    ],
)
def test_mistakes_are_named_before_any_work(
    config: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("# nothing\n\n")
    Path("latin.txt").write_bytes("Öl".encode("latin-1"))
    assert main(call(config, *arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "sampling with" not in captured.out


@pytest.mark.parametrize("arguments", [[], ["--prompt", "x", "--prompts", "builtin"]])
def test_exactly_one_of_prompt_and_file(
    config: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(call(config, *arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "--prompt" in error
    assert "--prompts" in error


def test_make_hands_the_prompt_over_as_it_is() -> None:
    def lines(*given: str) -> subprocess.CompletedProcess[str]:
        # `make test` may run this: its own variables must not reach the make that is started.
        own = ("MAKE", "MFLAGS", "ARGS", "CONFIG", "CKPT", "OUT", "PROMPT")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        # Instead of python, what prints every word that make hands over on its own line.
        command = ["make", "--no-print-directory", "generate", "PY=printf '%s\\n'", *given]
        return subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False
        )

    prompt = """It's "red"; a `dog` & -- 'cat'"""
    assert f"--prompt={prompt}" in lines(f"PROMPT={prompt}").stdout.splitlines()
    words = lines("PROMPTS=list.txt", "OUT=videos").stdout.splitlines()
    assert words[words.index("--prompts") + 1] == "list.txt"
    assert words[words.index("--out") + 1] == "videos"
    neither = lines()
    assert neither.returncode == 2
    assert "usage: make generate PROMPT=" in neither.stderr
