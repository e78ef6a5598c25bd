"""`python -m sla data`: build the demo set; and building it for the commands that need it."""

from __future__ import annotations

from pathlib import Path

from sla.data.demo import build_demo_set
from sla.data.module import DataConfig

DEMO_ROOT = Path(DataConfig.root)


def build(root: Path) -> None:
    """Build or complete the demo set and say what it holds."""
    print(build_demo_set(root))


def ensure(config: DataConfig) -> None:
    """Build the demo set if that is what the config names and it is not there yet."""
    if config.source != "manifest":
        return
    if Path(config.root) == DEMO_ROOT and not (DEMO_ROOT / "manifest.jsonl").is_file():
        print(f"{DEMO_ROOT} is not there yet; building the demo set of real clips")
        build(DEMO_ROOT)
