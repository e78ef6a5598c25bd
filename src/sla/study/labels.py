"""Attributes of clips in shards, and the held-out prompts."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla.data.shards import expand_urls
from sla.study.plan import StudyError


@dataclass(frozen=True)
class Prompt:
    """What a held-out clip's JSON says.

    Attributes:
        id: the clip's, as the loaders give it.
        text: the prompt: its caption.
        attributes: value of each attribute.
    """

    id: str
    text: str
    attributes: dict[str, str]


def read_records(patterns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON of every clip in local tar files, in order.

    Args:
        patterns: paths with `*` and `{00000..00009}`, as `data.shards`.

    Yields:
        (the clip's `clip_id`, the fields of its JSON).

    Raises:
        StudyError: a file cannot be read.
        DataError: no files.
    """
    for url in expand_urls(patterns):
        try:
            with tarfile.open(url, "r:") as tar:
                for member in tar:
                    name, suffix = os.path.splitext(member.name)
                    content = tar.extractfile(member) if suffix == ".json" else None
                    if content is None:
                        continue
                    fields = json.load(content)
                    if isinstance(fields, dict):
                        yield f"{Path(url).stem}/{name}", fields
        except (OSError, tarfile.TarError, ValueError) as error:
            raise StudyError(f"{url}: cannot read the clips' JSON: {error}") from error


def read_labels(
    patterns: Sequence[str], attributes: Sequence[str]
) -> dict[str, dict[str, str | None]]:
    """{clip_id: {attribute: its value, None where its JSON has none}}. Raises as `read_records`."""
    return {
        clip: {name: _word(fields.get(name)) for name in attributes}
        for clip, fields in read_records(patterns)
    }


def read_prompts(
    patterns: Sequence[str], attributes: Sequence[str], count: int, caption_field: str = "caption"
) -> list[Prompt]:
    """Captions of clips, evenly spaced over those that have a caption and every attribute.

    Args:
        count: how many; fewer if there are not so many.

    Raises:
        StudyError: none has; as `read_records`.
    """
    found = [
        Prompt(clip, str(fields[caption_field]), {n: str(fields[n]) for n in attributes})
        for clip, fields in read_records(patterns)
        if fields.get(caption_field) and all(_word(fields.get(n)) for n in attributes)
    ]
    if not found:
        wanted = ", ".join([caption_field, *attributes])
        raise StudyError(f"no clip of {list(patterns)} has {wanted} in its JSON")
    count = min(count, len(found))
    return [found[int((k + 0.5) * len(found) / count)] for k in range(count)]


def classes_of(labels: Mapping[str, Mapping[str, str | None]]) -> dict[str, list[str]]:
    """{attribute: its values, sorted}."""
    values: dict[str, set[str]] = {}
    for of_clip in labels.values():
        for name, value in of_clip.items():
            values.setdefault(name, set()).update([] if value is None else [value])
    return {name: sorted(found) for name, found in values.items()}


def _word(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)
