"""`python -m sla eval`: validation loss and video metrics of methods against full attention.

Each method makes videos of the same prompts from the same seeds. Videos stay, and a later call
takes those that would come out the same; so an interrupted call goes on where it was.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla_eval.prompts import Prompt, read_prompts
from sla_eval.report import (
    choose_metrics,
    paired_differences,
    score_files,
    write_json,
    write_table,
)
from sla_eval.tables import Table, difference_table, method_table
from tqdm import tqdm

from sla.cli import videos, weights
from sla.cli.data import ensure
from sla.cli.quiet import quiet_lightning
from sla.config import ConfigError, load_experiment
from sla.data.module import VideoDataModule
from sla.figures import quality
from sla.flops import CASES
from sla.models.families import family
from sla.results import RESULTS, ResultsFile, provenance
from sla.seeds import drawing
from sla.training.build import build_data, sampling_device
from sla.training.config import Experiment
from sla.training.run import default_prompts
from sla.training.run import evaluate as measure
from sla.training.run_folder import RunError


@dataclass(frozen=True)
class Method:
    """A model to measure.

    Attributes:
        label: its line in tables.
        folder: name for its files.
        path: weights.
        experiment: config with its attention.
        swapped: the config's attention in place of the weights' own, without fine-tuning.
    """

    label: str
    folder: str
    path: Path
    experiment: Experiment
    swapped: bool = False

    def load(self) -> weights.Loaded:
        """The model; what a swap adds is drawn from `run.seed`."""
        with drawing(self.experiment.run.seed):
            return weights.load(self.experiment, self.path, swap=self.swapped)


def evaluate(
    config: Path,
    overrides: Sequence[str],
    path: Path | None,
    out: Path | None,
    *,
    record: bool = False,
) -> None:
    """Measure methods beside the pretrained full-attention model, at the same prompts and seeds.

    Writes `<method>.json` a method, the tables of scores, of differences and of the paper's numbers
    as Markdown, CSV and LaTeX, and `report.json` with everything.

    Args:
        path: weights of the config's own method; None takes those of the config's run, or before
            it is finished the pretrained ones with the method swapped in.
        out: folder to write; None takes `runs/<name>/eval`.
        record: keep the scores under `results/eval` too.

    Raises:
        RunError: no weights, or `eval.require` and a metric that is not available.
        ConfigError, ValueError: a config, metric or list of prompts that cannot be used.
    """
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    try:
        classes = choose_metrics(experiment.eval.metrics)  # before any work
    except ValueError as error:
        raise ConfigError(f"eval.metrics: {error}") from error
    ensure(experiment.data)
    methods = choose_methods(config, overrides, experiment, path)
    out = out or Path(experiment.run.dir) / experiment.run.name / "eval"

    report: dict[str, Any] = {"provenance": provenance(experiment.sampling.seed), "methods": {}}
    found: dict[str, dict[str, Any]] = report["methods"]
    made: dict[str, list[Path]] = {}
    prompts: list[str] = []
    data: VideoDataModule | None = None
    for method in methods:
        loaded = method.load()
        if data is None:  # the first is full attention: what all are measured on is told by it
            data = build_data(loaded.experiment)
            prompts = choose_prompts(experiment, data)
        entry: dict[str, Any] = {
            "weights": str(method.path),
            "attention": loaded.name,
            "swapped": method.swapped,
        }
        found[method.label] = entry
        if experiment.eval.validation:
            measured = measure(loaded.experiment, loaded.module, data)
            entry |= {"val_loss": measured.loss, "attention_error": measured.error}
            print(
                f"{method.label}: validation loss {measured.loss:.5f}, attention error "
                f"{measured.error:.4f}",
                flush=True,
            )
        made[method.label] = generate(method, loaded, prompts, out / method.folder)
        entry["videos"] = [file.relative_to(out).as_posix() for file in made[method.label]]
        del loaded
        gc.collect()  # two models at a time would be one too many for large ones

    report["prompts"] = prompts
    reference = methods[0]
    if prompts:
        scores = score(methods, made, prompts, experiment, classes)
        differences = {
            method.label: paired_differences(scores[method.label], scores[reference.label])
            for method in methods[1:]
        }
        for method in methods:
            entry = found[method.label]
            entry["scores"] = scores[method.label]
            entry["difference"] = differences.get(method.label, {})
            write_json(out / f"{method.folder}.json", {"method": method.label, **entry})
        count = len(prompts)
        tables = {
            "table": method_table(
                scores,
                baseline=reference.label,
                extra=_validation(found),
                caption=f"Measured by us: {count} videos a method, mean [95 % interval]",
            ),
            "differences": difference_table(
                differences,
                reference.label,
                f"Measured by us: paired difference to {reference.label} on the same prompts and "
                f"seeds, mean [95 % interval]",
            ),
            "paper": paper_table(),
        }
        for name, table in tables.items():
            write_table(out / name, table)
            print(f"\n{table.caption}\n\n{table.markdown()}", end="")
    write_json(out / "report.json", report)
    if record:
        print(f"\nrecorded in {keep(found, experiment.sampling.seed)}")
    print(f"\n{out / 'report.json'}; videos and tables in {out}")
    if prompts and experiment.eval.require:
        _require_all(scores)


def choose_methods(
    config: Path, overrides: Sequence[str], experiment: Experiment, path: Path | None
) -> list[Method]:
    """What to measure; full attention, whose videos are the reference, first.

    Raises:
        RunError: no pretrained weights, weights of another method than `eval.weights` says, or
            `eval.weights` for a method that is not measured.
        ConfigError: an unknown method.
    """
    own = experiment.attention.name
    start = weights.pretrained(experiment)
    files = family(experiment.model.name)
    first = f"{files.stored_attention(start).name} (reference)"
    methods = [Method(first, videos.slug(first), start, experiment)]
    names = list(dict.fromkeys(experiment.eval.methods or [own]))
    unused = experiment.eval.weights.keys() - set(names)
    if unused:
        raise RunError(f"eval.weights names {sorted(unused)}, which eval.methods does not")
    for name in names:
        given = experiment.eval.weights.get(name)
        its_path = Path(given) if given else None
        its_experiment = experiment
        if name == own:
            its_path = path or its_path or weights.newest(experiment)
        else:
            # Numbers given on the command line are the config's own method's.
            others = [item for item in overrides if not item.startswith("attention.")]
            its_experiment = load_experiment(config, [*others, f"attention.name={name}"])
        if its_path is None:
            if name == "full":
                continue  # as the reference
            print(f"{name}: no fine-tuned weights; measuring it swapped in, without fine-tuning")
            label = f"{name} (not fine-tuned)"
            methods.append(Method(label, videos.slug(label), start, its_experiment, swapped=True))
            continue
        if not its_path.exists():
            raise RunError(f"no weights {its_path} of {name}")
        held = files.stored_attention(its_path).name
        if held != name and its_path != path:
            raise RunError(f"{its_path} is to be {name}'s, but holds a model with {held} attention")
        methods.append(Method(held, videos.slug(held), its_path, its_experiment))
    return methods


def choose_prompts(experiment: Experiment, data: VideoDataModule) -> list[str]:
    """The prompts of `eval.prompts`, or those that a run samples."""
    config = experiment.eval
    if not config.prompts:
        return default_prompts(experiment, data)
    prompts = [prompt.text for prompt in read_prompts(config.prompts)]
    count = min(config.num_prompts or len(prompts), len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def generate(
    method: Method, loaded: weights.Loaded, prompts: Sequence[str], folder: Path
) -> list[Path]:
    """The videos of the prompts, made or found; beside each a JSON file says what made it."""
    experiment = loaded.experiment
    device = sampling_device(experiment.trainer)
    digest = family(experiment.model.name).digest(method.path)
    wanted = []
    for i, prompt in enumerate(prompts):
        seed = experiment.sampling.seed + i
        wanted.append(
            videos.describe(
                folder / f"{seed:05d}-{videos.slug(prompt)[:48] or 'empty'}.mp4",
                experiment,
                prompt,
                seed,
                weights_sha256=digest,
                device=device,
                swapped=method.swapped,
            )
        )
    reuse = experiment.eval.reuse
    missing = [video for video in wanted if not (reuse and videos.is_made(video))]
    if len(missing) < len(wanted):
        print(f"{method.label}: {len(wanted) - len(missing)} videos are there already")
    if missing:
        family(experiment.model.name).for_inference(loaded.module.model, device)
        module = loaded.module.to(device)
        for video in tqdm(missing, f"{method.label}: {len(missing)} videos", file=sys.stderr):
            videos.make(video, module, method.path)
    return [video.file for video in wanted]


def score(
    methods: Sequence[Method],
    made: Mapping[str, Sequence[Path]],
    prompts: Sequence[str],
    experiment: Experiment,
    classes: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """A report a method; all but the first are compared with the first one's videos."""
    config = experiment.eval
    reference = methods[0]
    device = sampling_device(experiment.trainer)
    dimensions = {}
    if config.prompts:
        dimensions = {p.text: p.dimensions for p in read_prompts(config.prompts)}
    scores = {}
    for method in methods:
        files = made[method.label]
        seeds = range(experiment.sampling.seed, experiment.sampling.seed + len(files))
        named = {
            file.name: Prompt(text, dimensions.get(text, ()), seed)
            for file, text, seed in zip(files, prompts, seeds, strict=True)
        }
        scores[method.label] = score_files(
            files,
            None if method is reference else made[reference.label],
            classes,
            prompts=named,
            workers=config.workers,
            processes=0 if device.type == "cpu" else config.processes,
            device=device,
            weights_dir=config.weights_dir or None,
        )
    return scores


def paper_table() -> Table:
    """The paper's own numbers, which are of another model, other data and other prompts."""
    costs = {case.label: case for case in CASES}
    titles = quality.COLUMN_TITLES
    body, records = [], []
    for label, values in quality.QUALITY.items():
        case = costs[label]
        assert case.paper_tflops is not None
        assert case.paper_sparsity is not None
        flops, sparsity = f"{case.paper_tflops:.2f}T", f"{case.paper_sparsity:.0%}"
        body.append([label, *values, flops, sparsity])
        numbers = {f"paper: {titles[c]}": v for c, v in zip(quality.COLUMNS, values, strict=True)}
        cost = {"paper: TFLOPs": case.paper_tflops, "paper: sparsity": case.paper_sparsity}
        records.append({"method": label, **numbers, **cost})
    head = ["method", *(f"paper's {column}" for column in quality.COLUMNS)]
    notes = [
        f"{quality.SETTING}; not comparable with the scores of another model, set of prompts or "
        "resolution",
        "; ".join(f"{column}: {title}" for column, title in titles.items()),
    ]
    return Table(
        f"The paper's numbers, not measured by us ({quality.SOURCE})",
        [*head, "paper's FLOPs", "paper's sparsity"],
        body,
        notes,
        records,
    )


def keep(found: Mapping[str, Mapping[str, Any]], seed: int, root: Path = RESULTS) -> Path:
    """Write all scores to a results file: a row a video and metric, and a row a mean."""
    file = ResultsFile("eval", seed=seed, root=root)
    for label, entry in found.items():
        common = {"model": entry["weights"], "method": label, "swapped": entry["swapped"]}
        for metric in ("val_loss", "attention_error"):
            if metric in entry:
                file.append({**common, "metric": metric, "video": None, "value": entry[metric]})
        for metric, scored in entry.get("scores", {}).get("metrics", {}).items():
            if "mean" not in scored:
                continue
            difference = entry["difference"].get(metric, {})
            row = {
                "video": None,
                "value": scored["mean"],
                "low": scored["low"],
                "high": scored["high"],
                "n": scored["count"],
                **{f"difference_{key}": difference.get(key) for key in ("mean", "low", "high")},
            }
            file.append({**common, "metric": metric, **_plain(row)})
            for video, value in scored["per_video"].items():
                row = {"video": video, "value": value}
                file.append({**common, "metric": metric, **_plain(row)})
    return file.path


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no nan."""
    return {
        key: str(value) if isinstance(value, float) and math.isinf(value) else
        None if isinstance(value, float) and math.isnan(value) else value
        for key, value in row.items()
    }  # fmt: skip


def _validation(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    columns = {"validation loss ↓": "val_loss", "attention error ↓": "attention_error"}
    return {
        title: {label: entry[key] for label, entry in found.items() if key in entry}
        for title, key in columns.items()
        if any(key in entry for entry in found.values())
    }


def _require_all(scores: Mapping[str, Mapping[str, Any]]) -> None:
    missing = {
        name: entry["not_available"]
        for report in list(scores.values())[1:] or scores.values()
        for name, entry in report["metrics"].items()
        if "not_available" in entry
    }
    if missing:
        listing = "\n".join(f"  {name}: {why}" for name, why in missing.items())
        raise RunError(f"eval.require is true and these metrics are not available:\n{listing}")
