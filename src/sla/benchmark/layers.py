"""What stands beside self-attention in Wan's layers: each piece written in several ways.

With attention at 5 % of its work these decide how long a step takes. A piece's bytes are those it
must move once, its operations those of its products (a multiply-add as two).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sla_kernels.norm_rotary import norm_rotary
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla.benchmark import timing
from sla.benchmark.e2e import LATENTS, TEXT_TOKENS
from sla.benchmark.kernels import SEED, quantiles
from sla.benchmark.recording import add_options, results_file
from sla.models.fusion import linear_gelu
from sla.models.wan import rotate
from sla.models.wan_sizes import WAN_CONFIGS

HEAD = f"{'piece':16} {'written as':18} {'ms':>9} {'TB/s':>6} {'TFLOP/s':>8}"
EPS = 1e-6


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--size", choices=WAN_CONFIGS, default="1.3b")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--budget-ms", type=float, default=300, help="on a GPU, a measurement")
    parser.add_argument("--repeats", type=int, default=3, help="on a CPU")
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked; 1 if a row could not be measured."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    file = results_file(options, "layers", seed=SEED, label=options.size)
    print(HEAD)
    failed = False
    for row in measure(options, device):
        failed |= row["error"] is not None
        print(line(row), flush=True)
        if file is not None:
            file.append(row)
    if file is not None:
        print(f"recorded in {file.path}")
    return int(failed)


@dataclass(frozen=True)
class Piece:
    """A part of a layer.

    Attributes:
        ways: name to the function that computes it.
        bytes: that any of them must move, 0 where products bound it.
        flops: of its products.
    """

    ways: Mapping[str, Callable[[], object]]
    bytes: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Of a layer: tokens of the video and of the text, width, heads, width inside the MLP."""

    tokens: int
    text: int
    dim: int
    heads: int
    ffn_dim: int


Draw = Callable[..., Tensor]


def _norm_rotary(draw: Draw, s: Sizes) -> Piece:
    query, key = draw(1, s.tokens, s.dim), draw(1, s.tokens, s.dim)
    weights = draw(s.dim), draw(s.dim)
    angles = draw(1, s.tokens, 1, s.dim // s.heads // 2).float().repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()

    def plain(query: Tensor, key: Tensor) -> list[Tensor]:
        return [
            rotate(
                F.rms_norm(x, (s.dim,), weight, EPS).unflatten(2, (s.heads, -1)),
                cos,
                sin,
            )
            for x, weight in zip((query, key), weights, strict=True)
        ]

    ways: dict[str, Callable[[], object]] = {
        "kernel": partial(norm_rotary, query, key, *weights, cos, sin, s.heads, EPS),
        "compiled": partial(_compiled(plain), query, key),
    }
    return Piece(ways, bytes=4 * query.nbytes)


def _projections(draw: Draw, s: Sizes) -> Piece:
    hidden = draw(1, s.tokens, s.dim)
    weights = [draw(s.dim, s.dim) for _ in range(3)]
    biases = [draw(s.dim) for _ in range(3)]
    joined = torch.cat(weights), torch.cat(biases)
    ways: dict[str, Callable[[], object]] = {
        "three products": lambda: [
            F.linear(hidden, w, b) for w, b in zip(weights, biases, strict=True)
        ],
        "one product": lambda: F.linear(hidden, *joined).chunk(3, dim=-1),
        "joined in a step": lambda: F.linear(hidden, torch.cat(weights), torch.cat(biases)).chunk(
            3, dim=-1
        ),
    }
    return Piece(ways, flops=6.0 * s.tokens * s.dim**2)


def _feed_forward(draw: Draw, s: Sizes) -> Piece:
    hidden, weight, bias = draw(1, s.tokens, s.dim), draw(s.ffn_dim, s.dim), draw(s.ffn_dim)

    def plain(hidden: Tensor) -> Tensor:
        return F.gelu(F.linear(hidden, weight, bias), approximate="tanh")

    ways: dict[str, Callable[[], object]] = {
        "epilogue": partial(linear_gelu, hidden, weight, bias),
        "compiled": partial(_compiled(plain), hidden),
    }
    return Piece(ways, flops=2.0 * s.tokens * s.dim * s.ffn_dim)


def _feed_forward_out(draw: Draw, s: Sizes) -> Piece:
    hidden, weight, bias = draw(1, s.tokens, s.ffn_dim), draw(s.dim, s.ffn_dim), draw(s.dim)
    residual, gate = draw(1, s.tokens, s.dim), draw(1, 1, s.dim).float()

    def plain(hidden: Tensor) -> Tensor:
        gated = F.linear(hidden, weight, bias).float() * gate
        return (residual.float() + gated).type_as(residual)  # as diffusers writes it

    ways: dict[str, Callable[[], object]] = {
        "eager": partial(plain, hidden),
        "compiled": partial(_compiled(plain), hidden),
    }
    return Piece(ways, flops=2.0 * s.tokens * s.dim * s.ffn_dim)


def _cross_attention(draw: Draw, s: Sizes) -> Piece:
    head_dim = s.dim // s.heads
    query = draw(1, s.heads, s.tokens, head_dim)
    key, value = draw(1, s.heads, s.text, head_dim), draw(1, s.heads, s.text, head_dim)

    def attend(kernel: SDPBackend | None) -> Tensor:
        if kernel is None:
            return F.scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, key, value)

    kernels: dict[str, SDPBackend | None] = {"torch's choice": None}
    if query.is_cuda:
        kernels["FlashAttention-2"] = SDPBackend.FLASH_ATTENTION
        kernels["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    ways: dict[str, Callable[[], object]] = {
        name: partial(attend, kernel) for name, kernel in kernels.items()
    }
    return Piece(ways, flops=4.0 * s.tokens * s.text * s.dim)


PIECES: dict[str, Callable[[Draw, Sizes], Piece]] = {
    "norm_rotary": _norm_rotary,
    "projections": _projections,
    "feed_forward": _feed_forward,
    "feed_forward_out": _feed_forward_out,
    "cross_attention": _cross_attention,
}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, options={"coordinate_descent_tuning": True})


@torch.no_grad()
def measure(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each way of each piece."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = WAN_CONFIGS[options.size]
    frames, height, width = LATENTS[options.size]
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    sizes = Sizes(
        tokens=frames * (height // 2) * (width // 2),
        text=TEXT_TOKENS[options.size],
        dim=dim,
        heads=config["num_attention_heads"],
        ffn_dim=config["ffn_dim"],
    )
    generator = torch.Generator(device=device).manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    for name in options.pieces:
        piece = PIECES[name](draw, sizes)
        for way, step in piece.ways.items():
            row: dict[str, Any] = {
                "piece": name,
                "way": way,
                "size": options.size,
                "tokens": sizes.tokens,
                "device": device.type,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": piece.bytes,
                "flops": piece.flops,
                "ms_median": None,
                "error": None,
            }
            try:
                if on_gpu:
                    times = timing.gpu_times(step, options.budget_ms)
                else:
                    times = timing.cpu_times(step, options.repeats)
                row |= quantiles(times)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield row
        torch._dynamo.reset()


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"{row['piece']:16} {row['way']:18} "
    if row["error"] is not None:
        return start + str(row["error"])
    ms = row["ms_median"]
    rates = [f"{row[of] / ms / 1e9:.2f}" if row[of] else "" for of in ("bytes", "flops")]
    return f"{start}{ms:9.4f} {rates[0]:>6} {rates[1]:>8}".rstrip()
