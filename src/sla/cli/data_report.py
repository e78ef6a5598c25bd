"""`python -m sla data-report`: counts, faults and a contact sheet of a set."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from sla.cli.data import ensure
from sla.config import ConfigError, load_experiment, to_dict
from sla.data.report import contact_sheet, examine, list_entries, markdown, summarize
from sla.data.video import write_picture
from sla.files import write_text
from sla.results import provenance

_CLIPS_A_WORKER = 8  # fewer are not worth a process


def report(
    config: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    sheet: int = 48,
    whole: bool = True,
    workers: int | None = None,
) -> None:
    """Write `report.md`, `report.json` and `contact_sheet.png`, and print what matters.

    Args:
        out: folder to write; None takes `runs/data-report/<name of the set>`.
        sheet: clips on the contact sheet; 0 for none.
        whole: decode all frames of every clip, else one.
        workers: processes; None takes one a core.

    Raises:
        ConfigError: the config names a latent cache.
        DataError: no set there.
    """
    experiment = load_experiment(config, overrides)
    data = experiment.data
    if data.source == "latents":
        raise ConfigError("data.source is 'latents'; a report is about videos, such as 'manifest'")
    ensure(data)
    entries, left_out = list_entries(data)
    if workers is None:
        workers = min(os.cpu_count() or 1, math.ceil(len(entries) / _CLIPS_A_WORKER))
    facts = list(
        examine(
            entries,
            thumbnails=sheet,
            whole=whole,
            workers=workers if workers > 1 else 0,
            timeout=data.timeout,
        )
    )
    name = Path(data.root).name if data.source != "webdataset" else "shards"
    out = out or Path(experiment.run.dir) / "data-report" / name
    of_bytes = experiment.text_encoder.name == "trained" and not experiment.text.words
    bytes_read = experiment.text.max_tokens if of_bytes else None
    summary = summarize(
        facts, left_out, num_frames=data.num_frames, fps=data.fps, max_bytes=bytes_read
    )
    picture = contact_sheet(facts)
    if picture is not None:
        write_picture(out / "contact_sheet.png", picture)
    values = {
        "provenance": provenance(),
        "data": to_dict(data),
        "all_frames_decoded": whole,
        **summary,
    }
    write_text(out / "report.json", json.dumps(values, indent=2) + "\n")
    shown = "contact_sheet.png" if picture is not None else None
    write_text(out / "report.md", markdown(summary, f"Data: {name}", shown))
    clips = summary["clips"]
    print(f"{clips['found']} clips found, {clips['sound']} sound, {clips['failed']} failed")
    for reason, count in list(summary["failure_reasons"].items())[:10]:
        print(f"  {count} x {reason}")
    if summary["duplicates"]:
        print(f"{len(summary['duplicates'])} files are there more than once")
    print("\n".join(str(out / file) for file in ("report.md", "report.json", shown) if file))
