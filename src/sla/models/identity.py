"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights_checksum(module: nn.Module, numbers: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of a module's weights, hexadecimal: names, dtypes, shapes and values.

    Args:
        numbers: JSON values that change what it computes besides the weights.
    """
    digest = hashlib.sha256(json.dumps(numbers or {}, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def require_source(section: str, name: str, source: str, revision: str, dtype: str) -> None:
    """Checks the fields of a config that name pretrained weights.

    Raises:
        ValueError: no source, a hub id without a commit (nobody must be able to change the weights
            under a cache), or an unknown dtype; names the field of `section`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{section}.dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if not source:
        raise ValueError(
            f"{section}.source is empty; for {name} it must be a hub id or a local folder"
        )
    if not Path(source).is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"{section}.revision is {revision!r}; {section}.source ({source}) is no local folder, "
            "so it must be the 40 digits of a commit of that hub repository"
        )
