"""`python -m sla eval`: validation loss and video metrics of a model against full attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sla_eval.report

from sla.cli import weights
from sla.cli.data import ensure
from sla.cli.quiet import quiet_lightning
from sla.config import load_experiment
from sla.data.video import write_video
from sla.training.build import build_data, sampling_device
from sla.training.run import default_prompts, sample_videos
from sla.training.run import evaluate as measure


def evaluate(config: Path, overrides: Sequence[str], path: Path | None, out: Path | None) -> None:
    """Measure weights beside the pretrained full-attention model, at the same prompts and seeds.

    Args:
        path: weights; None takes those of the config's run, or before it is finished the
            pretrained ones with the config's attention swapped in.
        out: folder for the videos and `report.json`; None takes `runs/<name>/eval`.
    """
    quiet_lightning()
    experiment = load_experiment(config, overrides)
    ensure(experiment.data)
    full = weights.load(experiment, weights.pretrained(experiment))
    path = path or weights.newest(experiment)
    if path is None:
        print("no finished run of this config: measuring its attention without fine-tuning")
        model = weights.load(experiment, full.path, swap=True)
    else:
        model = weights.load(experiment, path)
    out = out or Path(experiment.run.dir) / experiment.run.name / "eval"
    data = build_data(experiment)
    prompts = default_prompts(experiment, data)

    report: dict[str, object] = {"weights": str(model.path), "attention": model.name}
    print(f"{'model':<28}{'validation loss':>16}{'attention error':>17}")
    for name, loaded in (("full attention (reference)", full), (model.name, model)):
        measured = measure(loaded.experiment, loaded.module, data)
        report[name] = {"val_loss": measured.loss, "attention_error": measured.error}
        print(f"{name:<28}{measured.loss:>16.5f}{measured.error:>17.4f}", flush=True)

    folders = {"reference": out / "reference", "videos": out / "videos"}
    for folder, loaded in zip(folders.values(), (full, model), strict=True):
        module = loaded.module.to(sampling_device(experiment.trainer))
        for old in folder.glob("*.mp4"):
            old.unlink()
        for i, video in enumerate(sample_videos(loaded.experiment, module, prompts)):
            write_video(folder / f"{i:03d}.mp4", video, experiment.sampling.fps)
    if prompts:
        scores = sla_eval.report.score_folder(folders["videos"], folders["reference"])
        report["videos"] = scores
        print(f"\n{len(prompts)} videos, same prompts and seeds, against full attention's:")
        print(sla_eval.report.markdown_table(scores))
    report["prompts"] = prompts
    sla_eval.report.write_json(out / "report.json", report)
    print(f"\n{out / 'report.json'}; videos in {out}")
