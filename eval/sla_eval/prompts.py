"""Prompts: lists of them, and which video was made from which."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

VBENCH_FILE = "VBench_full_info.json"
BUILTIN = "builtin"
VBENCH = "vbench"

# What VBench measures; a prompt of its list names those that it is for.
VBENCH_DIMENSIONS = frozenset(
    (
        *("subject_consistency", "background_consistency", "temporal_flickering"),
        *("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality"),
        *("object_class", "multiple_objects", "human_action", "color", "spatial_relationship"),
        *("scene", "appearance_style", "temporal_style", "overall_consistency"),
    )
)


class PromptError(ValueError):
    """Prompts that cannot be read, or that do not fit the videos; the message says what would."""


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text: what the video shall show.
        dimensions: VBench's dimensions that it is for; empty where the list is not VBench's, and
            every metric takes it.
        seed: of the video's noise, where it is known.
    """

    text: str
    dimensions: tuple[str, ...] = ()
    seed: int | None = None

    def is_for(self, metric: str) -> bool:
        """Whether the video counts for a metric: VBench's list says so for its dimensions."""
        return not self.dimensions or metric not in VBENCH_DIMENSIONS or metric in self.dimensions


def read_prompts(source: str | os.PathLike[str]) -> list[Prompt]:
    """A list of prompts, in its order.

    Args:
        source: `builtin`, the list that ships; `vbench`, the standard list of the installed vbench
            package; or a file: text with a prompt a line (empty lines and those that begin with
            `#` are left out), or JSON with a list of strings or of VBench's objects
            `{"prompt_en": ..., "dimension": [...]}`.

    Raises:
        PromptError: no such file or list, another format, or no prompt in it.
    """
    if os.fspath(source) == BUILTIN:
        text = (importlib.resources.files("sla_eval") / "data/prompts.txt").read_text("utf-8")
        return _from_lines(text)
    if os.fspath(source) == VBENCH:
        path = find_vbench_file()
        if path is None:
            raise PromptError(
                f"prompts is 'vbench', and no vbench package with {VBENCH_FILE} is installed; "
                f"`pip install vbench`, or give the path of the file"
            )
        source = path
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"prompts must be a readable text or JSON file, 'builtin' or 'vbench', got "
            f"{str(source)!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    prompts = _from_json(text, path) if path.suffix.lower() == ".json" else _from_lines(text)
    if not prompts:
        raise PromptError(f"{path} holds no prompt")
    return prompts


def find_vbench_file() -> Path | None:
    """VBench's list in the installed vbench package, which is not imported; None without it."""
    try:
        spec = importlib.util.find_spec("vbench")
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in (Path(folder) / VBENCH_FILE, Path(folder).parent / VBENCH_FILE):
            if path.is_file():
                return path
    return None


def read_sidecar(video: Path) -> Prompt | None:
    """The prompt and seed in the JSON file beside a video, of the same name; None without one.

    `python -m sla generate` and `eval` write them: `{"prompt": ..., "sampling": {"seed": ...}}`.
    A file that is no such JSON counts as none.
    """
    try:
        values = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        return None
    seed = values.get("seed")
    if seed is None and isinstance(values.get("sampling"), dict):
        seed = values["sampling"].get("seed")
    return Prompt(values["prompt"], seed=seed if type(seed) is int else None)


def assign_prompts(
    videos: Sequence[Path], prompts: Sequence[Prompt] | None = None
) -> dict[str, Prompt]:
    """Which prompt each video was made from, by file name.

    Without a list the sidecars say it; a video without one has no prompt. With a list, a video
    belongs to the prompt that its sidecar names; else to the one that its file is named after, as
    VBench does (`<prompt>.mp4` or `<prompt>-<number>.mp4`); or else, if no video is told by either
    and there are as many videos as prompts, to that at the same place, videos sorted by name.

    Args:
        videos: the files.
        prompts: the list; None for the sidecars alone.

    Returns:
        {file name: prompt}. Where a list gives a text twice, for other dimensions, they are joined.

    Raises:
        PromptError: a list by which a video's prompt cannot be told.
    """
    sidecars = {path.name: read_sidecar(path) for path in videos}
    if prompts is None:
        return {name: found for name, found in sidecars.items() if found is not None}
    by_text: dict[str, Prompt] = {}
    for prompt in prompts:
        earlier = by_text.get(prompt.text, prompt).dimensions
        joined = tuple(dict.fromkeys((*earlier, *prompt.dimensions)))
        by_text[prompt.text] = replace(prompt, dimensions=joined)
    found: dict[str, Prompt] = {}
    for path in videos:
        sidecar = sidecars[path.name]
        if sidecar is not None and sidecar.text in by_text:
            found[path.name] = replace(by_text[sidecar.text], seed=sidecar.seed)
            continue
        stem, _, number = path.stem.rpartition("-")
        for text in (path.stem, stem if number.isdecimal() else path.stem):
            if text in by_text:
                found[path.name] = by_text[text]
                break
    if not found and len(videos) == len(prompts):
        ordered = sorted(videos, key=lambda path: path.name)
        return {path.name: prompt for path, prompt in zip(ordered, prompts, strict=True)}
    untold = [path.name for path in videos if path.name not in found]
    if untold:
        raise PromptError(
            f"the prompts of {len(untold)} of {len(videos)} videos cannot be told, the first is "
            f'{untold[0]}: put a JSON file with its "prompt" beside each video, name each after '
            f"its prompt ('<prompt>-0.mp4'), or give as many prompts as there are videos "
            f"({len(prompts)} were given)"
        )
    return found


def _from_lines(text: str) -> list[Prompt]:
    lines = (line.strip() for line in text.splitlines())
    return [Prompt(line) for line in lines if line and not line.startswith("#")]


def _from_json(text: str, path: Path) -> list[Prompt]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise PromptError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, list):
        raise PromptError(f"{path} must hold a list of prompts, got {type(values).__name__}")
    return [_from_value(value, path, place) for place, value in enumerate(values)]


def _from_value(value: Any, path: Path, place: int) -> Prompt:
    if isinstance(value, str) and value.strip():
        return Prompt(value)
    if isinstance(value, dict) and isinstance(value.get("prompt_en"), str):
        dimensions = value.get("dimension", [])
        dimensions = [dimensions] if isinstance(dimensions, str) else dimensions
        if isinstance(dimensions, list) and all(isinstance(d, str) for d in dimensions):
            return Prompt(value["prompt_en"], tuple(dimensions))
    raise PromptError(
        f"{path}, entry {place}, must be a text or VBench's "
        f'{{"prompt_en": text, "dimension": [names]}}, got {str(value)[:80]!r}'
    )
