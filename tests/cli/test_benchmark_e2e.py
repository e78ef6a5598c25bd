"""The end-to-end benchmark of Wan, on a tiny one."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sla.benchmark import e2e
from sla.benchmark.__main__ import main
from sla.models.schedulers import build_scheduler

TINY = ["e2e", "--size", "tiny", "--device", "cpu", "--modes", "eager", "--steps", "2"]


def rows_in(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("e2e/*.jsonl")
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    assert head["provenance"]["seed"] == 0
    return rows


def test_every_method_and_task_is_timed_baselines_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["sla", "cudnn", "sparse_only"]
    assert main([*TINY, "--methods", *methods, "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert [(row["method"], row["what"]) for row in rows] == [
        *(
            (method, what)
            for method in ("cudnn", "sla", "sparse_only")
            for what in ("step", "train", "generation")
        ),
        ("none", "decode"),
    ]
    by = {(row["method"], row["what"]): row for row in rows}
    for row in rows:
        assert row["error"] is None
        assert row["tokens"] == 72
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    ratio = by["cudnn", "step"]["ms_median"] / by["sla", "step"]["ms_median"]
    assert by["sla", "step"]["ratio_cudnn"] == pytest.approx(ratio)
    assert by["sla", "step"]["ratio_flash_attention_2"] is None
    assert by["sla", "generation"]["steps"] == 2
    assert {row["what"]: row["estimated_bytes"] is not None for row in rows} == {
        "step": False,
        "train": True,
        "generation": False,
        "decode": False,
    }
    # Weights, gradients and two optimiser states in float32 are the least that it takes.
    weights = sum(p.numel() for p in e2e.build_wan("tiny").parameters())
    assert by["cudnn", "train"]["estimated_bytes"] > 16 * weights
    assert by["sla", "train"]["estimated_bytes"] > by["cudnn", "train"]["estimated_bytes"]
    assert "generation" in capsys.readouterr().out


def test_the_estimate_follows_the_mode_and_checkpointing() -> None:
    model = e2e.build_wan("tiny")
    options = e2e.argparse.Namespace(size="tiny", checkpointing=False)
    arm, dtype = e2e.ARMS["cudnn"], torch.bfloat16
    eager = e2e.estimate(model, arm, "eager", options, dtype)
    assert e2e.estimate(model, arm, "compiled", options, dtype) < eager
    options.checkpointing = True
    assert e2e.estimate(model, arm, "eager", options, dtype) < eager


def test_the_decoder_is_timed_once_whatever_the_methods(tmp_path: Path) -> None:
    arguments = [*TINY[:5], "--what", "decode", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (row,) = rows_in(tmp_path)
    assert (row["method"], row["mode"], row["what"]) == ("none", "eager", "decode")
    assert row["ms_median"] > 0
    assert row["ratio_cudnn"] is None
    assert "decode" in e2e.line(row)
    autoencoder = e2e.build_autoencoder("tiny", torch.bfloat16, torch.device("cpu"))
    assert {p.dtype for p in autoencoder.parameters()} == {torch.bfloat16}
    full = e2e.build_autoencoder("1.3b", torch.bfloat16, torch.device("meta"))
    assert (full.config.z_dim, full.config.base_dim, full.training) == (16, 96, False)
    assert {p.dtype for p in full.parameters()} == {torch.bfloat16}


def test_a_row_shows_attentions_share_and_both_memories(tmp_path: Path) -> None:
    main([*TINY, "--methods", "sla", "--what", "step", "--out", str(tmp_path)])
    (row,) = rows_in(tmp_path)
    assert row["attention_share"] is None
    row |= {"ms_median": 50.0, "ms_attention": 10.0, "attention_share": 0.2}
    row |= {"peak_bytes": 3 * 2**30, "estimated_bytes": 4 * 2**30, "ratio_cudnn": 2.0}
    assert e2e.line(row).split()[3:] == ["50.0", "10.0", "20%", "3.0", "4.0", "cudnn", "2.00x"]
    for name in ("ms", "attention", "share", "GiB", "estimate"):
        end = e2e.HEAD.index(name) + len(name)
        assert e2e.line(row)[end - 1] != " ", "the column's numbers end where its name does"


def test_a_failure_of_ours_is_a_row_and_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(e2e, "make_inputs", fail)
    assert main([*TINY, "--methods", "sla", "--what", "step", "--out", str(tmp_path)]) == 1
    (row,) = rows_in(tmp_path)
    assert row["error"] == "RuntimeError: no room"
    assert row["ms_median"] is None
    assert "no room" in e2e.line(row)


def test_training_changes_every_weight_that_has_a_gradient() -> None:
    model = e2e.apply_attention(e2e.build_wan("tiny"), e2e.SLAConfig(block_q=8, block_kv=8))
    inputs = e2e.make_inputs("tiny", torch.device("cpu"), torch.float32)
    options = e2e.argparse.Namespace(checkpointing=True, steps=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    e2e.make_step(model, partial(e2e.forward, model), inputs, "train", options)()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert "blocks.0.attn1.processor.method.proj_l.weight" in changed
    assert len(changed) > 0.9 * len(before)


def test_a_generation_with_a_perfect_model_ends_at_the_data() -> None:
    target = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 4, 3, 8, 12, generator=torch.Generator().manual_seed(2))

    def perfect(latents: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        # x = (1 - s) x0 + s noise, so the velocity is (x - x0) / s; text moves it by 5 too much,
        # and what has none by 6.25, which guidance of 5 takes out.
        error = 5.0 + 1.25 * (1.0 - text.mean((1, 2)).view(-1, 1, 1, 1, 1))
        return (latents - target) / (timestep.view(-1, 1, 1, 1, 1) / 1000.0) + error

    inputs = {"hidden_states": noise, "encoder_hidden_states": torch.ones(1, 2, 3)}
    found = e2e.generate(perfect, inputs, 8)
    # The scheduler rounds the timesteps that it names: its sigmas differ in the fourth digit.
    assert (found - target).norm() < 1e-2 * target.norm()


@pytest.mark.parametrize(
    ("name", "shift", "message"),
    [("unipcc", 3.0, "name is 'unipcc'"), ("euler", 0.0, "shift is 0.0")],
)
def test_schedulers_that_are_none(name: str, shift: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_scheduler(name, shift)


def test_an_unknown_benchmark_is_refused_with_the_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["e2f"])
    assert "kernels" in capsys.readouterr().err
