"""Files that are either whole or not there, and locks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`; renamed to `path` when the block ends well.

    A reader sees the old file or the complete new one. If the block fails (no space
    left, an interruption), the temporary file is removed and `path` stays as it was. Parent folders
    are made.

    Raises:
        OSError: the system's own error number, with `path` in the message.
    """
    target = Path(path)
    # Same folder, as os.replace is atomic within a file system; same ending, as writers look at it.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:
            raise
        reason = error.strerror or os.strerror(error.errno)
        raise OSError(error.errno, f"cannot write: {reason}", str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock that one process of a machine has at a time; given back when it dies.

    Args:
        path: the lock's file; made, with its folder, and left behind.
        wait: until it is free.

    Yields:
        Whether it is held: False only without `wait`, where another one has it.
    """
    import fcntl

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, atomically (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stable_number(text: str) -> int:
    """A number in [0, 2^64) that depends on the text alone, in every process and version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()
