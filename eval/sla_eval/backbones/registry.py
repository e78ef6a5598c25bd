"""The registry of backbones, and how one is found, checked and loaded."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ENVIRONMENT_VARIABLE = "SLA_EVAL_WEIGHTS"
DEFAULT_FOLDER = "weights"

EVAL_EXTRA = "pip install 'sla-reproduction[eval]'"


class BackboneUnavailableError(RuntimeError):
    """A network that cannot be loaded here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class WeightFile:
    """A file or a folder of weights.

    Attributes:
        path: relative to the folder of weights.
        origin: who publishes it, in words.
        sha256: of the file, in hex. Where its publisher gives only the beginning, as in the names
            of torch's hub, that; None where we know none, and then it is not checked.
    """

    path: str
    origin: str
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """One way to a network.

    Attributes:
        files: that must be there.
        packages: what must be importable, to how it is installed.
        load: takes the paths of `files`, in their order.
    """

    files: tuple[WeightFile, ...]
    packages: Mapping[str, str]
    load: Callable[..., nn.Module]


@dataclass(frozen=True)
class Backbone:
    """A network by name.

    Attributes:
        name: in this registry.
        title: what it is.
        sources: ways to it; the first that is complete is taken.
        random: builds its architecture, with random weights, of the packages of the first source.
            None where that takes files too; a source without files needs none.
        why_not_random: where `random` is None, what its architecture comes from.
    """

    name: str
    title: str
    sources: tuple[Source, ...]
    random: Callable[[], nn.Module] | None = None
    why_not_random: str = ""


_BACKBONES: dict[str, Backbone] = {}


def register_backbone(backbone: Backbone) -> Backbone:
    """Makes a backbone known under its name.

    Raises:
        ValueError: the name is taken.
    """
    if backbone.name in _BACKBONES:
        raise ValueError(f"a backbone named {backbone.name!r} is registered")
    _BACKBONES[backbone.name] = backbone
    return backbone


def available_backbones() -> list[str]:
    """Names of all registered backbones, sorted."""
    return sorted(_BACKBONES)


def get_backbone(name: str) -> Backbone:
    """The backbone registered under `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in _BACKBONES:
        raise ValueError(f"unknown backbone {name!r} (known: {', '.join(available_backbones())})")
    return _BACKBONES[name]


def weights_folder(weights_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of weights: the argument, or $SLA_EVAL_WEIGHTS, or `weights/`."""
    if weights_dir is not None:
        return Path(weights_dir)
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_FOLDER)


def missing_backbone(name: str, weights_dir: str | os.PathLike[str] | None = None) -> str | None:
    """None if a backbone's packages and files are there, else one line saying how to get them.

    Files are looked for, not read; packages are looked for, not imported.

    Raises:
        ValueError: no backbone has this name.
    """
    backbone = get_backbone(name)
    folder = weights_folder(weights_dir)
    missing = [_missing(source, folder) for source in backbone.sources]
    if not all(missing):
        return None
    ways = "; or: ".join(" and ".join(parts) for parts in missing)
    return (
        f"{backbone.title} is missing: needs {ways} "
        f"(folder of weights: {folder}; set {ENVIRONMENT_VARIABLE} for another)"
    )


def load_backbone(name: str, weights_dir: str | os.PathLike[str] | None = None) -> nn.Module:
    """A backbone with its weights, on the CPU, float32, in evaluation mode, without gradients.

    Raises:
        ValueError: no backbone has this name.
        BackboneUnavailableError: a package or file is missing or unusable, or not as pinned.
    """
    backbone = get_backbone(name)
    folder = weights_folder(weights_dir)
    for source in backbone.sources:
        if _missing(source, folder):
            continue
        paths = [folder / file.path for file in source.files]
        for file, path in zip(source.files, paths, strict=True):
            _check_digest(file, path)
        try:
            network = source.load(*paths)
        except BackboneUnavailableError:
            raise
        except Exception as error:  # whatever the packages that load it raise
            reason = " ".join(str(error).split())[:300]
            raise BackboneUnavailableError(
                f"cannot load {backbone.title} ({', '.join(map(str, paths)) or 'no files'}): "
                f"{type(error).__name__}: {reason}"
            ) from error
        return network.eval().requires_grad_(False)
    raise BackboneUnavailableError(str(missing_backbone(name, weights_dir)))


def comes_with_weights(name: str) -> bool:
    """Whether a backbone's weights are in a package, so that no file is looked for.

    Raises:
        ValueError: no backbone has this name.
    """
    return any(not source.files for source in get_backbone(name).sources)


def missing_random_backbone(name: str) -> str | None:
    """None if `random_backbone` can build this one, else why not, in one line.

    Raises:
        ValueError: no backbone has this name.
    """
    backbone = get_backbone(name)
    if comes_with_weights(name):
        return missing_backbone(name)
    if backbone.random is None:
        why = backbone.why_not_random or "it cannot be built without its files"
        return f"{backbone.title} with random weights: {why}"
    packages = _missing_packages(backbone.sources[0])
    return f"{backbone.title} is missing: needs {' and '.join(packages)}" if packages else None


def random_backbone(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A backbone with random weights, to measure speed with; no score may be made of it.

    It is the network of `load_backbone` but for the numbers in it: same class, parameters, dtype.
    The weights are always the same. One whose weights are in its package has those.

    Args:
        name: of a registered backbone.
        device: where it is built and stays; a GPU draws the numbers faster.

    Raises:
        ValueError: no backbone has this name.
        BackboneUnavailableError: a package is missing, or the architecture is in the files.
    """
    missing = missing_random_backbone(name)
    if missing is not None:
        raise BackboneUnavailableError(missing)
    build = get_backbone(name).random
    if build is None:
        return load_backbone(name).to(device)
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        network = build()
        for parameter in network.parameters():
            # Where weights are always loaded, the constructor leaves zeros.
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return network.to(device).eval().requires_grad_(False)


def weight_checksums(
    name: str, weights_dir: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """{path: SHA-256} of the files that `load_backbone` reads; folders are left out.

    Raises:
        ValueError: no backbone has this name.
        BackboneUnavailableError: it is not there.
    """
    folder = weights_folder(weights_dir)
    for source in get_backbone(name).sources:
        if not _missing(source, folder):
            paths = {file.path: folder / file.path for file in source.files}
            return {key: file_sha256(path) for key, path in paths.items() if path.is_file()}
    raise BackboneUnavailableError(str(missing_backbone(name, weights_dir)))


def backbone_table() -> str:
    """All backbones as a Markdown table: files, checksums ("not known" where none is pinned)."""
    lines = ["| backbone | file | SHA-256 | packages | from |", "|---|---|---|---|---|"]
    for name in available_backbones():
        for source in _BACKBONES[name].sources:
            packages = ", ".join(source.packages) or "–"
            if not source.files:
                lines.append(f"| {name} | – | – | {packages} | the package |")
            for file in source.files:
                digest = file.sha256 or "not known, not checked"
                if file.sha256 is not None and len(file.sha256) < 64:
                    digest += "… (beginning)"
                lines.append(f"| {name} | {file.path} | {digest} | {packages} | {file.origin} |")
    return "\n".join(lines) + "\n"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; of an unchanged file it is computed once."""
    stat = path.stat()
    return _digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest(path: str, size: int, time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digest(file: WeightFile, path: Path) -> None:
    if file.sha256 is not None and not file_sha256(path).startswith(file.sha256):
        raise BackboneUnavailableError(
            f"{path} is not the published file: its SHA-256 is {file_sha256(path)}, "
            f"expected {file.sha256}; get it again ({file.origin})"
        )


def _missing_packages(source: Source) -> list[str]:
    return [
        f"package {package} ({how})"
        for package, how in source.packages.items()
        if not _has_package(package)
    ]


def _missing(source: Source, folder: Path) -> list[str]:
    return _missing_packages(source) + [
        f"{file.path} in {folder} ({file.origin})"
        for file in source.files
        if not (folder / file.path).exists()
    ]


def _has_package(name: str) -> bool:
    """Whether a module is there; for "a.b" whether package a has a module or folder b."""
    top, _, rest = name.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not rest:
        return spec is not None
    inner = rest.replace(".", "/")
    return any(
        (Path(place) / inner).is_dir() or (Path(place) / f"{inner}.py").is_file()
        for place in spec.submodule_search_locations or ()
    )


def state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Parameters of a file that torch has saved; `key` names them where it holds more."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content if key is None else content[key]
