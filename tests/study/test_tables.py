"""Tables and verdicts from made-up rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sla.figures import claims, study, study_attention
from sla.results import write_results
from sla.study.plan import load_plan
from sla.study.records import ACCURACY, FRECHET, StudyResults, measurement, read_records, withdrawal

ROOT = Path(__file__).resolve().parents[2]
CLIPS = np.random.default_rng(0).uniform(0.5, 1.5, (40, 4))


def write(
    root: Path,
    arm: str,
    factor: float,
    seeds: tuple[int, ...] = (0, 1, 2),
    *,
    name: str = "video",
    weights: str = "w",
    date: str = "2026-01-01",
    swapped: float = 1.0,
    spread: float = 0.0001,
    last: int = 500,
) -> None:
    """An arm whose loss is `factor` and, by seed, more times that of every clip; `last` steps."""
    results = StudyResults(root, arm)
    for seed in seeds:
        common = {"study": name, "group": "main", "arm": arm, "digest": "d", "seed": seed}
        rows: list[dict[str, Any]] = [
            *([measurement(0, "val_loss", swapped * CLIPS)] if last else []),
            measurement(last, "val_loss", (factor + spread * seed) * CLIPS),
            measurement(last, "psnr", [20.0 + seed, 22.0 + seed]),
            measurement(last, "ssim", [0.5, 0.7]),
            measurement(last, "temporal_flickering", [0.9, 0.9]),
            measurement(last, ACCURACY, [1.0, 0.5]),
            measurement(last, FRECHET, 3.0 + seed),
            measurement(last, "attention_error_l1", [0.1, 0.3]),
            measurement(last, "exact_fraction", [0.047, 0.047]),
            measurement(last, "attention_flops", 5e10),
            measurement(last, "attention_flops_ratio", 0.065),
        ]
        end = {"status": "finished", "date": date, "weights_sha256": weights}
        results.append([*({**common, **row} for row in rows), {**common, **end}])


def verdict(root: Path, beginning: str) -> claims.Verdict:
    (claim,) = [c for c in claims.CLAIMS if c.text.startswith(beginning)]
    return claim.judge(read_records(root), root)


def test_table_1_has_ours_and_the_papers_apart(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0)
    write(tmp_path, "sla", 1.005)
    text = study.TABLES["study_1"](tmp_path)
    ours, paper = text.split("The paper's (")
    (line,) = [row for row in ours.splitlines() if row.startswith("| SLA (top 5 %)")]
    assert line == (
        "| SLA (top 5 %) | +0.50% [+0.50, +0.50] ± 0.00 | 22.00 [21.00, 23.00] ± 1.00 "
        "| 0.600 [0.500, 0.700] ± 0.000 | 0.9000 [0.9000, 0.9000] ± 0.0000 "
        "| 75.0% [50.0, 100.0] ± 0.0 | 4.00 [1.52, 6.48] | 0.200 [0.200, 0.200] | 50.0G | 6.50% "
        "| 95.3% | - | - | - | 3 |"
    )
    assert "76.96" not in ours  # nothing of the paper's in our block
    assert "| VSA | (no record yet) |" in ours
    assert "76.96" in paper
    assert "not measured by us" in paper


def test_table_3_is_of_the_images(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0)
    text = study.TABLES["study_3"](tmp_path)
    assert "make study CONFIG=configs/study/images.yaml" in text  # the video arm is not taken
    write(tmp_path, "full", 1.0, name="images")
    write(tmp_path, "sla", 0.99, name="images")
    text = study.TABLES["study_3"](tmp_path)
    assert "| SLA | -1.00% [-1.00, -1.00]" in text
    assert "| SLA | 31.49 | 1.73G | 87.5% |" in text


def test_verdicts_follow_the_criteria(tmp_path: Path) -> None:
    matches, beats, wins = "SLA at 95 % matches", "SLA at 95 % beats", "SLA beats the published"
    assert verdict(tmp_path, matches).status == claims.MISSING
    write(tmp_path, "full", 1.0)
    write(tmp_path, "sla", 1.005, swapped=1.2)
    assert str(verdict(tmp_path, matches)) == claims.HOLDS
    assert verdict(tmp_path, beats).status == claims.MISSING
    write(tmp_path, "sparse_only_85", 0.99)
    assert verdict(tmp_path, beats).status == claims.FAILS
    assert verdict(tmp_path, "SLA must be fine-tuned").status == claims.HOLDS
    assert verdict(tmp_path, "SLA takes about a twentieth").status == claims.HOLDS
    # Of several parts one that fails decides, one that is missing leaves it open.
    write(tmp_path, "sparge_t", 1.05)
    write(tmp_path, "vsa_89", 1.05)
    assert verdict(tmp_path, wins).status == claims.MISSING
    write(tmp_path, "vmoba_85", 1.05)
    assert verdict(tmp_path, wins).status == claims.HOLDS
    assert "VSA: -4.2" in verdict(tmp_path, wins).numbers


def test_attention_weights_are_those_of_the_arms_own_model(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0, weights="ours")
    for weights, above in (("ours", 0.09), ("the demo's", 0.5)):
        capture = {"measure": "capture", "weights_sha256": weights}
        whole = {"measure": "weights", "layer": None, "head": None, "timestep": None}
        layer = {**whole, "layer": 0, "above": 0.3}
        write_results("analysis", [capture, layer, {**whole, "above": above}], root=tmp_path)
    found = verdict(tmp_path, "About 8 %")
    assert (found.status, found.numbers) == (claims.HOLDS, "9.0%")


def test_the_table_of_attention_is_of_the_arms_own_model(tmp_path: Path) -> None:
    assert "no record yet" in study_attention.attention(tmp_path)
    write(tmp_path, "full", 1.0, weights="ours")
    place = {"order": "raster", "layer": None, "head": None, "timestep": None, "critical": [0.05]}
    for weights, value in (("ours", 0.25), ("the demo's", 0.5)):
        recall = {"measure": "recall", "pooled": [value], "oracle": [0.6], "agreement": [0.7]}
        branches = {"measure": "branches", "mass": [value], "sparse": [0.9], "proj_layer": [0.8]}
        names = ("scaled", "mixed", "mixed_exact", "proj_head", "mixed_proj_layer")
        branches |= {name: [0.125] for name in names}
        rows = [{**place, **recall}, {**place, **branches}, {**place, **branches, "layer": 0}]
        write_results(
            "analysis", [{"measure": "capture", "weights_sha256": weights}, *rows], root=tmp_path
        )
    text = study_attention.attention(tmp_path)
    assert "| consecutive tokens | 5.0% | 25.0% | 60.0% | 70.0% |" in text
    (line,) = [x for x in text.splitlines() if "0.900" in x]
    assert line.startswith("| consecutive tokens | 5.0% | 25.0% | 0.900 | 0.800 | 0.125 | - |")


def test_stages_of_training_stand_in_their_order(tmp_path: Path) -> None:
    assert "no record yet" in study_attention.stages(tmp_path)
    write(tmp_path, "full", 1.0, weights="ours")
    place = {"layer": None, "head": None, "timestep": None}
    ranks = {"stable_rank": 4.0, "stable_rank_top": 5.0, "stable_rank_rest": 2.0}
    for weights, run, stage, above in (
        ("earlier", "study", None, 0.4),
        ("ours", "study", None, 0.25),
        ("tuned", "tuned", "after 500 steps", 0.125),
        ("random", "start", "before training", 0.5),
        ("the demo's", "demo", None, 0.75),
    ):
        capture = {"measure": "capture", "weights_sha256": weights, "run": run, "samples": 2}
        shares = {"above": above, "sum_above": 0.9, "below": 0.1}
        recall = {"order": "raster", "critical": [0.1, 0.05], "pooled": [0.3, 0.2]}
        rows = [
            {**capture, "grid": [2, 2, 2], **({"stage": stage} if stage else {})},
            {"measure": "weights", **place, **shares, **ranks},
            {"measure": "recall", **place, **recall, "oracle": [0.5, 0.25]},
        ]
        write_results("analysis", rows, root=tmp_path)
    lines = study_attention.stages(tmp_path).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:-2]] == [
        "before training",
        "pretrained too little (superseded)",
        "pretrained",
        "after 500 steps",
    ]
    assert (
        "| pretrained | 2 | 25.0% | 90.0% | 10.0% | 4.0 | 5.0 | 2.0 | 20.0% | 25.0% |" in lines[4]
    )


def test_a_verdict_needs_every_seed_on_one_side(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0)
    write(tmp_path, "sla", 1.0095, spread=0.0004)  # the bound of 1 % lies between the seeds
    assert verdict(tmp_path, "SLA at 95 % matches").status == claims.UNDECIDED


def test_few_seeds_are_provisional(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0)
    write(tmp_path, "sla", 1.0, seeds=(1,))
    assert str(verdict(tmp_path, "SLA at 95 % matches")) == "so far holds (1 seed)"


def test_an_arm_that_trains_nothing_counts_for_every_seed(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0, spread=0.01)
    write(tmp_path, "sparge_t", 1.0)
    write(tmp_path, "sparge_f", 2.0, seeds=(0,), last=0)
    found = verdict(tmp_path, "Sparge without training fails")
    assert (str(found), found.seeds) == (claims.HOLDS, 3)
    losses = claims.by_seed(read_records(tmp_path), "video", "sparge_f", "full")
    assert losses == pytest.approx([2 / 1.0 - 1, 2 / 1.01 - 1, 2 / 1.02 - 1])
    table = study.TABLES["study_1"](tmp_path).splitlines()
    ours, _ = [row for row in table if row.startswith("| Sparge-F |")]
    assert ours.endswith("| - | 1, not trained |")


def test_arms_from_earlier_weights_are_named_and_not_compared(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0, weights="old")
    write(tmp_path, "sparge_f", 1.0, weights="old", seeds=(0,))
    write(tmp_path, "sla", 1.0, date="2026-02-01")
    assert verdict(tmp_path, "SLA at 95 % matches").status == claims.MISSING
    assert "| Sparge-F | (no record yet) |" in study.TABLES["study_1"](tmp_path)
    text = study.TABLES["study_arms"](tmp_path)
    assert "| main | sla |" in text
    assert "| main | full |" not in text
    assert "full (seed 2), sparge_f (seed 0); their rows are in results/study/" in text


def test_all_arms_and_failures_are_listed(tmp_path: Path) -> None:
    write(tmp_path, "full", 1.0)
    common = {"study": "video", "arm": "vsa_89", "digest": "d", "seed": 2}
    StudyResults(tmp_path).append([{**common, "status": "failed", "reason": "no memory"}])
    text = study.TABLES["study_arms"](tmp_path)
    assert "| main | full | +0.00%" in text
    assert "vsa_89, seed 2: failed, no memory" in text
    assert "| full | +0.00%" in study.TABLES["study_curve"](tmp_path)


def test_what_was_withdrawn_is_named_with_its_reason(tmp_path: Path) -> None:
    for arm in ("full", "vsa_89"):
        write(tmp_path, arm, 1.0)
    runs = read_records(tmp_path).of("video", "vsa_89")
    rows = [withdrawal(run, "No gradient.", "2026-01-02") for run in runs[:2]]
    StudyResults(tmp_path).append(rows)
    text = study.TABLES["study_arms"](tmp_path)
    assert "Withdrawn: vsa_89 (seed 0), vsa_89 (seed 1). No gradient. Their rows are in " in text
    assert "| vsa_89 |" in text  # the third


def test_forms_are_compared_with_full_attention_and_with_sla(tmp_path: Path) -> None:
    assert "no record yet" in study.TABLES["study_forms"](tmp_path)
    write(tmp_path, "full", 1.0)
    write(tmp_path, "sla", 1.25)
    write(tmp_path, "sparse_pooled_95", 1.1)
    lines = study.TABLES["study_forms"](tmp_path).splitlines()
    (found,) = [line for line in lines if line.startswith("| sparse pooled, 5 % |")]
    loss, over = found.split(" | ")[1:3]
    assert loss.startswith("+10.")
    assert over.startswith("-12.")
    assert any(line.startswith("| SLA2, 5 % | (no record yet) |") for line in lines)


@pytest.mark.parametrize("name", ["arms", "images"])
def test_the_studies_of_the_repository_can_be_read(name: str) -> None:
    plan = load_plan(ROOT / f"configs/study/{name}.yaml")
    jobs = plan.jobs()
    assert all(plan.questions.values())
    # Groups in the order of the file, seeds inside: a question is answered before the next.
    main = [(job.arm.name, job.seed) for job in jobs if job.arm.group == "main"]
    assert [seed for _, seed in main] == sorted(seed for _, seed in main)
    assert len({plan.digest(job, "w", "e") for job in jobs}) == len(plan.arms)


def test_every_arm_that_a_table_or_claim_names_exists() -> None:
    video = {arm.name for arm in load_plan(ROOT / "configs/study/arms.yaml").arms}
    images = {arm.name for arm in load_plan(ROOT / "configs/study/images.yaml").arms}
    assert {line.arm for line in (*study.TABLE_1, *study.TABLE_2)} <= video
    assert {line.arm for line in study.TABLE_3} - {None} <= images
    assert set(claims.ARMS) <= video | images


def test_sizes_of_the_study() -> None:
    plan = load_plan(ROOT / "configs/study/arms.yaml")
    experiment = plan.base_experiment()
    data = experiment.data
    grid = experiment.model.grid((data.num_frames, data.height, data.width))  # type: ignore[attr-defined]
    assert grid == (32, 16, 16)
    assert experiment.model.head_dim == 64  # type: ignore[attr-defined]
