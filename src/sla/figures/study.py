"""The paper's Tables 1 to 3 from results/study, and all arms of the study. Needs no torch.

Ours and the paper's numbers stand in blocks of their own: they are of other models, other data and
other metrics, and only the order of the methods can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sla.figures import claims, quality
from sla.figures.markdown import markdown, origin
from sla.results import RESULTS, Results
from sla.study.records import ACCURACY, FRECHET, REAL_CLIPS, Records, Run, read_records
from sla.study.statistics import Estimate, mean_over_clips, over_seeds

VIDEO, IMAGES = "video", "images"
_NONE = "-"


@dataclass(frozen=True)
class Line:
    """A line of a paper's table: its name there, and our arm; either may have no counterpart."""

    paper: str
    arm: str | None


TABLE_1 = (
    Line("Full attention", "full"),
    Line("Sparge-F", "sparge_f"),
    Line("Sparge-T", "sparge_t"),
    Line("VMoBA", "vmoba_85"),
    Line("VSA", "vsa_89"),
    Line("SLA (top 5 %)", "sla"),
)
TABLE_2 = (
    Line("Full attention", "full"),
    Line("Linear only", "linear_only"),
    Line("Sparse only", "sparse_only_85"),
    Line("L+S", "linear_plus_sparse_90"),
    Line("SLA (top 5 %)", "sla"),
    Line("SLA (elu+1)", "sla_elu"),
    Line("SLA (hedgehog)", "sla_hedgehog"),
    Line("SLA (top 10 %)", "sla_top10"),
    Line("SLA (top 20 %)", "sla_top20"),
)
TABLE_3 = (
    Line("Full attention", "full"),
    Line("SpargeAttn-F", "sparge_f"),
    Line("SpargeAttn-T", "sparge_t"),
    Line("VSA(2D)", "vsa_75"),
    Line("VMoBA(2D)", None),
    Line("SLA", "sla"),
)
# What the form of the output and the blocks' shape do; no table of the paper's.
FORMS = (
    Line("sparse only, 5 %", "sparse_only_95"),
    Line("SLA, 5 %", "sla"),
    Line("SLA2, 5 %", "sla2_95"),
    Line("sparse pooled, 5 %", "sparse_pooled_95"),
    Line("sparse only, 5 %, blocks of 4x4x4", "sparse_only_95_tiles"),
    Line("SLA, 5 %, blocks of 4x4x4", "sla_tiles"),
    Line("sparse pooled, 5 %, blocks of 4x4x4", "sparse_pooled_95_tiles"),
    Line("sparse pooled, 3 %", "sparse_pooled_97"),
    Line("L+S, 10 %", "linear_plus_sparse_90"),
    Line("sparse only, 15 %", "sparse_only_85"),
)
# FID, FLOPs, sparsity; LightningDiT-1p0B/1, ImageNet at 512 x 512, 100,000 steps.
PAPER_TABLE_3 = {
    "Full attention": ("31.87", "12.88G", "0%"),
    "SpargeAttn-F": ("206.11", "3.66G", "71.57%"),
    "SpargeAttn-T": ("46.05", "3.16G", "75.45%"),
    "VSA(2D)": ("35.75", "3.62G", "75%"),
    "VMoBA(2D)": ("39.45", "3.22G", "75%"),
    "SLA": ("31.49", "1.73G", "87.5%"),
}

_MEASURES = {VIDEO: ("psnr", "ssim", "temporal_flickering"), IMAGES: ("psnr", "ssim")}
_TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "temporal_flickering": "temporal flickering",
}


def table_1(root: Path = RESULTS) -> str:
    """The paper's Table 1: SLA against published methods."""
    return _paper_table(root, VIDEO, TABLE_1, _paper_block(TABLE_1), "--groups main baselines")


def table_2(root: Path = RESULTS) -> str:
    """The paper's Table 2: SLA's parts, feature maps and k_h."""
    wanted = "--groups main feature_map critical"
    return _paper_table(root, VIDEO, TABLE_2, _paper_block(TABLE_2), wanted)


def table_3(root: Path = RESULTS) -> str:
    """The paper's Table 3: images."""
    head = ["method", "paper's FID", "paper's FLOPs", "paper's sparsity"]
    paper = markdown(head, [[line.paper, *PAPER_TABLE_3[line.paper]] for line in TABLE_3])
    source = "arXiv 2509.24006, Table 3: LightningDiT-1p0B/1, ImageNet 512 x 512, 100,000 steps"
    block = f"The paper's ({source}; not measured by us):\n\n{paper}"
    return _paper_table(root, IMAGES, TABLE_3, block, "")


def forms(root: Path = RESULTS) -> str:
    """Block means in the same softmax beside SLA's two branches, also over SLA's own loss."""
    records = read_records(root)
    body, used = _lines(records, VIDEO, FORMS, beside="sla")
    if not used:
        return _no_record("--groups main pooled order")
    full, *others = _head(VIDEO)[1:]
    head = ["method", full, "over SLA's", *others]
    return f"{markdown(head, body)}\n\n{_legend(records, VIDEO)}\n\n{_origin(used)}"


def all_arms(root: Path = RESULTS) -> str:
    """Every arm that was run, by question, those that failed too."""
    records = read_records(root)
    parts: list[str] = []
    for study in (VIDEO, IMAGES):
        arms = records.arms(study)
        failed = {k: reason for k, reason in records.failures.items() if k[0] == study}
        withdrawn = _withdrawn(records, study)
        if not arms and not failed and not withdrawn:
            continue
        groups = list(dict.fromkeys(records.of(study, arm)[0].group for arm in arms))
        body, used = [], []
        for group in groups:
            for arm in arms:
                runs = records.of(study, arm)
                if runs[0].group == group:
                    body.append([group, *_cells(records, study, arm)])
                    used += [source for run in runs for source in run.sources]
        text = f"{study}:\n\n{markdown(['group', *_head(study)], body)}" if body else f"{study}:"
        for (_, arm, _, seed), reason in failed.items():
            text += f"\n\n{arm}, seed {seed}: failed, {reason}"
        earlier = records.superseded(study)
        if earlier:
            names, files = _named(earlier)
            text += (
                "\n\nNot here, as they began from earlier weights or were judged by an earlier "
                f"evaluator: {names}; their rows are in {files}."
            )
        for reason, runs in withdrawn.items():
            names, files = _named(runs)
            text += f"\n\nWithdrawn: {names}. {reason} Their rows are in {files}."
        parts.append(f"{text}\n\n{_legend(records, study)}\n\n{_origin(used)}")
    if not parts:
        return _no_record("")
    return "\n\n".join(parts)


def _withdrawn(records: Records, study: str) -> dict[str, list[Run]]:
    """What was taken back, by reason."""
    reasons: dict[str, list[Run]] = {}
    for run, reason in records.withdrawn:
        if run.study == study:
            reasons.setdefault(reason, []).append(run)
    return reasons


def _named(runs: Iterable[Run]) -> tuple[str, str]:
    """Names of runs, and of the files that have their rows."""
    runs = sorted(runs, key=lambda run: (run.arm, run.seed))
    files = dict.fromkeys(f"results/study/{run.source.path.name}" for run in runs)
    return ", ".join(f"{run.arm} (seed {run.seed})" for run in runs), ", ".join(files)


def curve(root: Path = RESULTS) -> str:
    """Validation loss over full attention's by step, of arms that were measured on the way."""
    records = read_records(root)
    body, used = [], []
    steps: set[int] = set()
    lines: dict[str, dict[int, str]] = {}
    for arm in records.arms(VIDEO):
        runs = records.of(VIDEO, arm)
        if runs[0].group not in ("main", "steps") or not runs[0].trained:
            continue
        cells: dict[int, str] = {}
        for step in sorted({step for step, metric in runs[0].rows if metric == "val_loss"}):
            found = claims.compare(records, VIDEO, arm, claims.full_for(records, VIDEO, arm), step)
            if found is not None:
                cells[step] = _percent(found.estimate)
        steps |= cells.keys()
        lines[arm] = cells
        used += [source for run in runs for source in run.sources]
    for arm, cells in lines.items():
        body.append([arm, *(cells.get(step, "") for step in sorted(steps))])
    if not body:
        return _no_record("--groups main steps")
    head = ["validation loss over full attention's", *(f"step {step:,}" for step in sorted(steps))]
    return f"{markdown(head, body)}\n\n{_origin(used)}"


def claims_table(root: Path = RESULTS) -> str:
    """The paper's claims, each with what we found."""
    records = read_records(root)
    head = ["claim", "the paper's", "holds here if", "here", "numbers"]
    body = [
        [claim.text, claim.paper, claim.criterion, str(verdict), verdict.numbers]
        for claim in claims.CLAIMS
        for verdict in [claim.judge(records, root)]
    ]
    missing = sum(line[3] == claims.MISSING for line in body)
    note = f"{missing} of {len(body)} are not measured yet"
    how = "" if not missing else " (`make study`, `make study CONFIG=configs/study/images.yaml`)"
    return f"{markdown(head, body)}\n\n{note}{how}."


TABLES: dict[str, Callable[[Path], str]] = {
    "study_1": table_1,
    "study_2": table_2,
    "study_3": table_3,
    "study_arms": all_arms,
    "study_claims": claims_table,
    "study_curve": curve,
    "study_forms": forms,
}


def _paper_table(root: Path, study: str, lines: Sequence[Line], paper: str, wanted: str) -> str:
    records = read_records(root)
    body, used = _lines(records, study, lines)
    if not used:
        return f"Ours: {_no_record(wanted, study)}\n\n{paper}"
    head = ["method", *_head(study)[1:]]
    ours = f"Ours:\n\n{markdown(head, body)}\n\n{_legend(records, study)}\n\n{_origin(used)}"
    return f"{ours}\n\n{paper}"


def _lines(
    records: Records, study: str, lines: Sequence[Line], beside: str | None = None
) -> tuple[list[list[str]], list[Results]]:
    """Cells of each line, those without a run too, and the records behind them.

    Args:
        beside: an arm whose loss each is compared with in a column after that of full attention's.
    """
    body, used = [], []
    for line in lines:
        runs = records.of(study, line.arm) if line.arm else []
        if not runs or line.arm is None:
            reason = "no record yet" if line.arm else "no such arm"
            width = len(_head(study)) - 2 + (beside is not None)
            body.append([line.paper, f"({reason})", *[""] * width])
            continue
        _, loss, *cells = _cells(records, study, line.arm)
        if beside is not None:
            found = claims.compare(records, study, line.arm, beside)
            cells.insert(0, _percent(found.estimate) if found else _NONE)
        body.append([line.paper, loss, *cells])
        used += [source for run in runs for source in run.sources]
    return body, used


def _head(study: str) -> list[str]:
    return [
        "arm",
        "validation loss over full attention's",
        *(_TITLES[name] for name in _MEASURES[study]),
        "accuracy",
        "evaluator Frechet distance",
        "attention error, L1",
        "FLOPs",
        "FLOPs of full",
        "sparsity",
        "training step, ms",
        "of that kernels, ms",
        "denoising step, ms",
        "seeds",
    ]


def _cells(records: Records, study: str, arm: str) -> list[str]:
    runs = records.of(study, arm)
    found = claims.compare(records, study, arm, claims.full_for(records, study, arm))
    cells = [arm, _percent(found.estimate) if found else _NONE]
    for name in _MEASURES[study]:
        cells.append(_interval(by_clip(runs, name), _digits(name)))
    cells.append(_interval(by_clip(runs, ACCURACY), 1, 100, "%"))
    cells.append(_interval(by_seed(runs, FRECHET), 2))
    cells.append(_interval(by_seed(runs, "attention_error_l1"), 3))
    cells.append(_number(runs, "attention_flops", lambda v: f"{v / 1e9:.1f}G"))
    cells.append(_number(runs, "attention_flops_ratio", lambda v: f"{v:.2%}"))
    cells.append(_number(runs, "exact_fraction", lambda v: f"{1 - v:.1%}"))
    cells.append(_interval(by_seed(runs, "train_step_ms"), 1))
    cells.append(_interval(by_seed(runs, "train_kernel_ms"), 1))
    cells.append(_interval(by_seed(runs, "denoise_step_ms"), 2))
    cells.append(f"{len(runs)}{'' if not runs or runs[0].trained else ', not trained'}")
    return cells


def by_clip(runs: Sequence[Run], metric: str) -> Estimate | None:
    """Mean of a measurement that each clip or prompt has, over seeds; None if there is none."""
    values = [run.values(metric) for run in runs]
    if not values or any(v is None for v in values):
        return None
    return mean_over_clips(np.stack([np.asarray(v) for v in values]))


def by_seed(runs: Sequence[Run], metric: str) -> Estimate | None:
    """Mean of a number that each seed has; None if there is none."""
    values = [value for run in runs if (value := run.value(metric)) is not None]
    return over_seeds(values) if values else None


def _digits(metric: str) -> int:
    return {"psnr": 2, "ssim": 3}.get(metric, 4)


def _interval(
    estimate: Estimate | None, digits: int, scale: float = 1.0, unit: str = "", sign: str = ""
) -> str:
    """`value [low, high] ± spread over seeds`."""
    if estimate is None:
        return _NONE
    form = f"{sign}.{digits}f"
    text = f"{scale * estimate.value:{form}}{unit}"
    if not (math.isnan(estimate.low) or math.isnan(estimate.high)):
        text += f" [{scale * estimate.low:{form}}, {scale * estimate.high:{form}}]"
    # An interval over seeds says it already.
    if estimate.n and not math.isnan(estimate.spread):
        text += f" ± {scale * estimate.spread:.{digits}f}"
    return text


def _percent(estimate: Estimate) -> str:
    return _interval(estimate, 2, 100, "%", "+")


def _number(runs: Sequence[Run], metric: str, show: Callable[[float], str]) -> str:
    found = by_seed(runs, metric)
    return _NONE if found is None else show(found.value)


def _legend(records: Records, study: str) -> str:
    real = {
        str(row["metric"]).removeprefix(f"{ACCURACY}/"): row
        for row in reversed(records.plain)
        if row.get("what") == REAL_CLIPS and row.get("study") == study
    }
    ceiling = ", ".join(f"{name} {float(row['value']):.1%}" for name, row in real.items())
    on_real = f" (on real held-out clips: {ceiling})" if real else ""
    return (
        "<sub>Value [95 % interval] ± standard deviation over seeds. Intervals of the loss, of "
        "PSNR, SSIM, flickering and accuracy are bootstraps over the clips or prompts, those of "
        "the others Student's over seeds. The loss is compared pair by pair on the same clips, "
        "timesteps and noise; ± of it is that of the difference. PSNR and SSIM are to the videos "
        "of the pretrained full-attention model at the same prompts and seeds, so that full "
        "attention that was fine-tuned has no perfect score either. Accuracy: share of the "
        f"prompts' attributes that our evaluator network finds{on_real}; the Frechet distance is "
        "of its features, and comparable within this study only. FLOPs: attention of one sample "
        "and forward (`python -m sla flops`).</sub>"
    )


def _origin(used: Sequence[Results]) -> str:
    return origin(list({results.path: results for results in used}.values()))


def _no_record(wanted: str, study: str = VIDEO) -> str:
    config = "" if study == VIDEO else f" CONFIG=configs/study/{study}.yaml"
    arguments = f' ARGS="{wanted}"' if wanted else ""
    return f"no record yet: `make study{config}{arguments}`"


def _paper_block(lines: Sequence[Line]) -> str:
    from sla.flops import CASES

    costs: dict[str, Any] = {case.label: case for case in CASES}
    body = []
    for line in lines:
        case = costs[line.paper]
        cost = [f"{case.paper_tflops:.2f}T", f"{case.paper_sparsity:.0%}"]
        body.append([line.paper, *quality.QUALITY[line.paper], *cost])
    head = ["method", *(f"paper's {column}" for column in quality.COLUMNS)]
    head += ["paper's FLOPs", "paper's sparsity"]
    titles = "; ".join(f"{column}: {title}" for column, title in quality.COLUMN_TITLES.items())
    table = markdown(head, body)
    source = f"{quality.SOURCE}: {quality.SETTING}"
    return (
        f"The paper's ({source}; not measured by us):\n\n{table}\n\n<sub>{titles}. Not comparable "
        "with ours in value: another model, other data, other metrics.</sub>"
    )


__all__ = ["TABLES"]
