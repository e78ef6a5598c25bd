"""Which package may import which, read from the syntax trees (nothing is imported)."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"sla": "src/sla", "sla_kernels": "kernels/sla_kernels", "sla_eval": "eval/sla_eval"}

ENTRY_POINTS = ("sla.__main__", "sla.cli", "sla.capture", "sla.benchmark")
_BELOW_MODELS = ("sla.attention", "sla_kernels")
_BELOW_DATA = ("sla.models", "sla.diffusion", *_BELOW_MODELS)
_BELOW_TRAINING = ("sla.data", "sla.analysis", "sla.files", "sla.seeds", *_BELOW_DATA)
# What each part of sla may import of this repository besides itself; entry points may import all.
# A part that is not here fails the test: give it a layer.
LAYERS: dict[str, tuple[str, ...]] = {
    "sla.attention": ("sla_kernels",),
    "sla.models": ("sla.files", "sla.seeds", *_BELOW_MODELS),
    "sla.diffusion": _BELOW_MODELS,
    "sla.files": (),
    "sla.seeds": (),
    "sla.data": ("sla.files", *_BELOW_DATA),
    "sla.analysis": ("sla.files", "sla.seeds", *_BELOW_DATA),
    "sla.flops": _BELOW_MODELS,
    "sla.results": _BELOW_TRAINING,
    "sla.training": _BELOW_TRAINING,
    "sla.figures": ("sla.results", "sla.flops", "sla.study", *_BELOW_TRAINING),
    "sla.config": ("sla.training", *_BELOW_TRAINING),
    # It runs experiments and measures them: above all but the entry points.
    "sla.study": (
        *("sla.training", "sla.config", "sla.results", "sla.flops", "sla_eval"),
        *_BELOW_TRAINING,
    ),
}
# The only modules of sla that may import a library; the reason it is kept apart is in the message.
LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "lightning": (
        (
            *("sla.training", "sla.data.module", *ENTRY_POINTS),
            # A callback of training runs, and the training of the evaluator network.
            *("sla.study.callbacks", "sla.study.evaluator"),
        ),
        "what is below training works without a trainer",
    ),
    "pytorch_lightning": ((), "the package is called lightning"),
    "omegaconf": (("sla.config",), "below it configs are plain dataclasses"),
    "diffusers": (("sla.models",), "only adapters of real models know it"),
}
LAZY = ("decord", "av")  # some machines lack them
KERNEL_LIBRARIES = ("torch", "triton")


@dataclass(frozen=True)
class Import:
    """One imported name: `module` at `line`, and whether a function's body holds it."""

    module: str
    line: int
    lazy: bool


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def module_name(path: Path, package: str, folder: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join((package, *parts))


def known_modules(root: Path = ROOT) -> dict[str, Path]:
    return {
        module_name(path, package, root / folder): path
        for package, folder in PACKAGES.items()
        for path in sorted((root / folder).rglob("*.py"))
    }


def imports_of(source: str, module: str, *, is_package: bool, known: set[str]) -> list[Import]:
    """All imports of a module: at its top, in functions, under `if TYPE_CHECKING`, by name."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = node.level - 1 if is_package else node.level
                parent = module.split(".")[: len(module.split(".")) - above]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                # `from sla import training` imports sla.training; of other names only the base.
                inner = f"{base}.{alias.name}"
                is_module = any(within(name, (inner,)) for name in known)
                found.append(Import(inner if is_module else base, node.lineno, lazy))
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if (
                name in ("import_module", "__import__")
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
                and not first.value.startswith(".")
            ):
                found.append(Import(first.value, node.lineno, lazy))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for field, child in ast.iter_fields(node):
            # Only the body runs late; decorators and defaults run with the module.
            for item in child if isinstance(child, list) else [child]:
                if isinstance(item, ast.AST):
                    visit(item, lazy or (inside and field == "body"))

    visit(ast.parse(source), False)
    return found


def faults(source: str, module: str, *, is_package: bool, known: set[str]) -> list[str]:
    """Rules that a module's imports break, one line each."""
    package = module.split(".")[0]
    layer = ".".join(module.split(".")[:2])
    is_entry_point = within(module, ENTRY_POINTS)
    broken: list[str] = []
    if package == "sla" and module != "sla" and not is_entry_point and layer not in LAYERS:
        broken.append(f"{module}: {layer} has no layer; add it to LAYERS in {Path(__file__).name}")
    for item in imports_of(source, module, is_package=is_package, known=known):
        target, top = item.module, item.module.split(".")[0]
        place = f"{module} line {item.line} imports {target}: "
        if top in LAZY and not item.lazy:
            broken.append(place + "import it inside the function that needs it")
        if package == "sla_kernels":
            if top not in (*KERNEL_LIBRARIES, "sla_kernels", *sys.stdlib_module_names):
                broken.append(place + "sla_kernels may import torch, triton and itself alone")
            continue
        if package == "sla_eval" and top in ("sla", "sla_kernels"):
            broken.append(place + "sla_eval is usable alone")
        if top in LIBRARIES:
            allowed, reason = LIBRARIES[top]
            if not within(module, allowed):
                where = ", ".join(allowed) or "nothing"
                broken.append(place + f"only {where} may ({reason})")
        if package != "sla" or is_entry_point or top not in PACKAGES or target == "sla":
            continue
        allowed_here = LAYERS.get(layer, ())
        if not within(target, (layer, *allowed_here)):
            may = ", ".join(allowed_here) or "nothing else here"
            broken.append(place + f"{layer} may import {may}")
    return broken


MODULES = known_modules()
PARTS = sorted({".".join(module.split(".")[:2]) for module in MODULES})


@pytest.mark.parametrize("part", PARTS)
def test_imports_go_downwards(part: str) -> None:
    broken = [
        fault
        for module, path in MODULES.items()
        if ".".join(module.split(".")[:2]) == part
        for fault in faults(
            path.read_text(encoding="utf-8"),
            module,
            is_package=path.name == "__init__.py",
            known=set(MODULES),
        )
    ]
    assert not broken, "\n".join(["imports against the layering:", *broken])


def test_all_three_packages_are_read() -> None:
    assert {"sla", "sla_kernels", "sla_eval"} <= MODULES.keys()
    assert {"sla.attention", "sla.data.module", "sla.training.config"} <= MODULES.keys()


def test_no_init_file_where_there_is_no_package() -> None:
    wrong = [ROOT / folder / "__init__.py" for folder in ("src", "kernels", "eval")]
    wrong = [path for path in wrong if path.exists()]
    wrong += sorted((ROOT / "tests").rglob("__init__.py"))
    names = [str(path.relative_to(ROOT)) for path in wrong]
    assert not names, f"remove {names}: these folders are not packages"


KNOWN = {
    *("sla", "sla.attention", "sla.attention.config", "sla.models", "sla.models.dit"),
    *("sla.diffusion", "sla.data", "sla.data.module", "sla.data.video", "sla.training"),
    *("sla.training.run", "sla.config", "sla.results", "sla_kernels", "sla_eval"),
}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sla.models.dit", "from sla.diffusion import FlowMatching"),
        ("sla.diffusion.sampling", "import sla.models.dit"),
        ("sla.diffusion.sampling", "from sla import models"),
        ("sla.diffusion.sampling", "from ..models import dit"),
        ("sla.attention.sla", "def f():\n    from sla.models import VideoDiT"),
        ("sla.attention.sla", "if TYPE_CHECKING:\n    from sla.models import VideoDiT"),
        ("sla.attention.sla", "import importlib\nimportlib.import_module('sla.models')"),
        ("sla.data.video", "from sla.analysis import probe"),
        ("sla.training.run", "from sla.results import write_results"),
        ("sla.training.run", "from sla.config import load_experiment"),
        ("sla.training.run", "from sla.cli.main import main"),
        ("sla.training.run", "import sla_eval"),
        ("sla.results", "from sla.training import run"),
        ("sla.newcomer", "import math"),
        ("sla.data.video", "import lightning"),
        ("sla.models.dit", "from lightning.pytorch import LightningModule"),
        ("sla.training.config", "from omegaconf import OmegaConf"),
        ("sla.cli.main", "import omegaconf"),
        ("sla.training.run", "import diffusers"),
        ("sla.data.video", "import decord"),
        ("sla.data.video", "try:\n    import av\nexcept ImportError:\n    av = None"),
        ("sla.data.video", "class A:\n    import av"),
        ("sla.data.video", "def f(x=__import__('av')):\n    pass"),
        ("sla_kernels.eager", "import numpy"),
        ("sla_kernels.eager", "from sla.attention import build_attention"),
        ("sla_eval.report", "from sla.data.files import write_text"),
        ("sla_eval.report", "def f():\n    import sla"),
        ("sla_eval.videos", "import av"),
        ("sla_eval.videos", "import lightning"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    broken = faults(source, module, is_package=False, known=KNOWN)
    assert len(broken) == 1
    assert broken[0].startswith(module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sla.models.dit", "from sla.attention import build_attention\nimport diffusers"),
        ("sla.attention.sla", "from . import config\nfrom .config import SLAConfig"),
        ("sla.attention.sla", "from sla_kernels import sparse_linear_attention"),
        ("sla.data.video", "def f():\n    import av, decord"),
        ("sla.data.module", "import lightning"),
        ("sla.config", "from omegaconf import OmegaConf\nfrom sla.training import run"),
        ("sla.figures.tables", "from sla.results import read_results"),
        ("sla.cli.evaluate", "import sla_eval, lightning\nfrom sla import config, results"),
        ("sla.benchmark.kernels", "import sla_kernels\nfrom sla.results import write_results"),
        ("sla_kernels.eager", "import math, torch\nimport triton.language as tl"),
        ("sla_eval.report", "import numpy, torchmetrics\nfrom sla_eval.videos import read_video"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert faults(source, module, is_package=False, known=KNOWN) == []
