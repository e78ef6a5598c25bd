"""A tiny study with pretrained weights and an evaluator, made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sla.attention import FullConfig
from sla.cli.main import main
from sla.config import load_experiment
from sla.models.checkpoint import save_model
from sla.study.testing import write_tiny_study
from sla.training.build import build_networks


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the arms, whose weights and evaluator are there."""
    arms = write_tiny_study(tmp_path_factory.mktemp("study"))
    model, text_encoder = build_networks(load_experiment(arms.with_name("base.yaml")), FullConfig())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh weights have gates of zero: attention would change nothing
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_model(arms.with_name("weights.safetensors"), model, text_encoder)
    out = str(arms.parent / "evaluated")
    assert main(["study-evaluator", "--config", str(arms), "--out", out]) == 0
    return arms
