"""A weights file in parts, where no large file may travel; joined again, byte for byte.

`model.safetensors` becomes `model.safetensors.00`, `.01`, ... and `model.safetensors.parts.json`
with its checksum.
"""

from __future__ import annotations

import json
from pathlib import Path

from sla.files import atomic_path, file_sha256, write_text
from sla.study.plan import StudyError

MOST_BYTES = 15 * 2**20


def split(path: Path, folder: Path, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Write a file's parts.

    Args:
        path: the file.
        folder: where the parts go; made.
        most_bytes: of a part.

    Returns:
        The parts, and last the JSON file.

    Raises:
        StudyError: there is no such file, or parts of less than a byte.
    """
    if not path.is_file():
        raise StudyError(f"no file {path} to split")
    if most_bytes < 1:
        raise StudyError(f"most_bytes is {most_bytes}; it must be at least 1")
    names: list[str] = []
    written: list[Path] = []
    with path.open("rb") as file:
        while (data := file.read(most_bytes)) or not names:
            names.append(f"{path.name}.{len(names):02d}")
            with atomic_path(folder / names[-1]) as temporary:
                temporary.write_bytes(data)
            written.append(folder / names[-1])
    listing = {"file": path.name, "sha256": file_sha256(path), "parts": names}
    record = folder / f"{path.name}.parts.json"
    write_text(record, json.dumps(listing, indent=1) + "\n")
    return [*written, record]


def join(path: Path, folder: Path | None = None) -> Path:
    """Make a file of its parts, unless it is there.

    Args:
        path: the file.
        folder: where the parts are; None for beside it.

    Raises:
        StudyError: neither the file nor all of its parts are there, or they are damaged.
    """
    if path.is_file():
        return path
    record = (folder or path.parent) / f"{path.name}.parts.json"
    try:
        listing = json.loads(record.read_text(encoding="utf-8"))
        wanted, names = listing["sha256"], listing["parts"]
    except FileNotFoundError:
        raise StudyError(f"no file {path}, and no parts of it ({record})") from None
    except (ValueError, KeyError, TypeError):
        raise StudyError(f"{record} does not list the parts of a file") from None
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            for name in names:
                part = record.parent / name
                if not part.is_file():
                    raise StudyError(f"{part} is missing: {path.name} has {len(names)} parts")
                file.write(part.read_bytes())
        if file_sha256(temporary) != wanted:
            raise StudyError(f"the parts of {path} do not make the file that was split")
    return path
