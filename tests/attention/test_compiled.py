"""Every registered attention method in a layer through torch.compile: results and gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from sla_kernels.testing import check_rounding
from torch import Tensor, nn

from sla.attention import (
    AttentionContext,
    attention_config_class,
    available_attention,
    build_attention,
)

# Numbers that suit so few tokens; of others the defaults.
SMALL: dict[str, dict[str, object]] = {
    "vsa": {"cube": (3, 4, 4), "fine_gate": "learned"},  # whose blocks have filling
    "vmoba": {
        "temporal": 1,
        "spatial": (4, 4),
        "spatio_temporal": (2, 4, 4),
        "block_q": 16,
        "block_kv": 16,
    },
    "sparge": {"block_q": 16, "block_kv": 16, "selection": "density", "critical": 0.2},
    **{
        name: {"block_q": 16, "block_kv": 16, "critical": 0.2}
        for name in ("sparse_only", "sparse_pooled", "sla", "sla2", "linear_plus_sparse")
    },
}
REAL: dict[str, dict[str, object]] = {
    "vsa": {"cube": (4, 4, 4), "critical": 0.11, "fine_gate": "learned"},
    "vmoba": {"temporal": 2, "spatial": (4, 4), "spatio_temporal": (4, 4, 4)},
    "sparge": {"selection": "density", "critical": 0.16},
}


class Layer(nn.Module):
    """Norm, projections, attention with gates from the normed states, output, residual."""

    def __init__(
        self, name: str, numbers: dict[str, object], heads: int, grid: tuple[int, int, int]
    ) -> None:
        super().__init__()
        dim = heads * 64
        self.heads, self.grid = heads, grid
        self.norm = nn.LayerNorm(dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        config = attention_config_class(name)(**numbers)  # type: ignore[arg-type]
        self.attention = build_attention(config, heads, 64, dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        query, key, value = (
            part.unflatten(-1, (self.heads, 64)).transpose(1, 2)
            for part in self.to_qkv(hidden).chunk(3, dim=-1)
        )
        context = AttentionContext(grid=self.grid, hidden_states=hidden)
        output = self.attention(query, key, value, context)
        return x + self.to_out(output.transpose(1, 2).flatten(2))


def gradients(layer: Layer, x: Tensor, *, compiled: bool, bf16: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    torch._dynamo.reset()
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    run = torch.compile(layer) if compiled else layer
    with torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
        output = run(leaf)
    output.float().square().mean().backward()
    assert leaf.grad is not None
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"output": output.detach().float(), "input": leaf.grad, **found}


def prepared(
    name: str, numbers: dict[str, object], heads: int, grid: tuple[int, int, int], device: str
) -> tuple[Layer, Tensor]:
    """A layer whose learnable parts are off their first values, and its input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Layer(name, numbers, heads, grid)
        with torch.no_grad():
            for parameter in layer.attention.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
            layer.to_qkv.weight *= 2.0  # scores that differ
        x = torch.randn(2, grid[0] * grid[1] * grid[2], heads * 64)
    return layer.to(device), x.to(device)


@pytest.mark.slow
@pytest.mark.parametrize("name", available_attention())
def test_compiling_changes_no_gradient(name: str) -> None:
    layer, x = prepared(name, SMALL.get(name, {}), 1, (4, 8, 8), "cpu")
    found, expected = (gradients(layer, x, compiled=compiled) for compiled in (True, False))
    assert found.keys() == expected.keys()
    for what, tensor in expected.items():
        bound = 1e-5 * tensor.abs().max().item()
        torch.testing.assert_close(found[what], tensor, atol=bound, rtol=1e-4, msg=what)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", available_attention())
def test_a_gpu_computes_what_the_cpu_does(name: str) -> None:
    """The kernels and the eager code in float32: in the methods' own layouts and orders."""
    layer, x = prepared(name, SMALL.get(name, {}), 1, (4, 8, 8), "cpu")
    expected = gradients(layer, x, compiled=False)
    found = gradients(layer.cuda(), x.cuda(), compiled=False)
    for what, tensor in expected.items():
        bound = 1e-3 * tensor.abs().max().item()
        torch.testing.assert_close(found[what].cpu(), tensor, atol=bound, rtol=1e-3, msg=what)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", available_attention())
def test_compiled_gradients_of_a_real_layer_on_a_gpu(name: str) -> None:
    """At the study's size. What rounding does to the eager code is the measure."""
    layer, x = prepared(name, REAL.get(name, {}), 8, (32, 16, 16), "cuda")
    exact = gradients(layer, x, compiled=False)
    eager = gradients(layer, x, compiled=False, bf16=True)
    compiled = gradients(layer, x, compiled=True, bf16=True)
    check_rounding(compiled, eager, exact)
