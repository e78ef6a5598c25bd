"""Wan2.1 from end to end: a denoising step, a training step and a whole generation, by method.

The exact architecture with random weights: speed and memory do not depend on what they are. The
text encoder is left out; the autoencoder's decoder is timed by itself, once: no method is in it.
Attention's part of the time is measured in the uncompiled model (of a generation: in one of two
steps), by events around every layer's method, since a compiled one cannot be looked into; the
kernels are the same. A training step has a second column of memory: what `sla.training.memory` says
before.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sla.attention import (
    AttentionConfig,
    FullConfig,
    SLA2Config,
    SLAConfig,
    SparseOnlyConfig,
    SparsePooledConfig,
)
from sla.benchmark import timing
from sla.benchmark.kernels import SEED, quantiles
from sla.benchmark.recording import add_options, results_file
from sla.figures.paper import GPU_BLOCKS
from sla.models.autoencoders import build_wan_autoencoder
from sla.models.fusion import CUDAGraphed, compile_blocks, fuse_feed_forward
from sla.models.injection import apply_attention, attention_modules
from sla.models.schedulers import build_scheduler
from sla.models.testing import tiny_wan_autoencoder
from sla.models.wan import WAN_CONFIGS, build_wan
from sla.training.memory import (
    MemorySettings,
    attention_bytes,
    estimate_memory,
    parameters_of,
    wan_shape,
)

# Latents of 480p x 81 frames: (channels, frames, height, width) after the autoencoder.
LATENTS = {"1.3b": (21, 60, 104), "14b": (21, 90, 160), "tiny": (3, 8, 12)}
TEXT_TOKENS = {"1.3b": 512, "14b": 512, "tiny": 7}
WHAT = ("step", "train", "generation", "decode")
DECODE = "decode"
# graph: compiled, and every forward is replayed as a CUDA graph; for inference alone.
MODES = ("eager", "compiled", "graph")
STEPS = 50
SHIFT = 3.0
Forward = Callable[..., Tensor]
_Q, _KV = GPU_BLOCKS


@dataclass(frozen=True)
class Arm:
    """A method to measure; `kernel` is what full attention runs on, None for PyTorch's choice."""

    config: AttentionConfig
    kernel: SDPBackend | None = None


ARMS: dict[str, Arm] = {
    "flash_attention_2": Arm(FullConfig(), SDPBackend.FLASH_ATTENTION),
    "cudnn": Arm(FullConfig(), SDPBackend.CUDNN_ATTENTION),
    "sparse_only": Arm(SparseOnlyConfig(block_q=_Q, block_kv=_KV)),
    "sla": Arm(SLAConfig(block_q=_Q, block_kv=_KV)),
    "sla-64x64": Arm(SLAConfig()),
    "sla2": Arm(SLA2Config()),
    "sparse_pooled": Arm(SparsePooledConfig(block_q=_Q, block_kv=_KV)),
}
NO_METHOD = "none"
BASELINES = ("flash_attention_2", "cudnn")
HEAD = (
    f"{'method':>18} {'mode':>9} {'what':>10} {'ms':>10} {'attention':>10} {'share':>5} "
    f"{'GiB':>7} {'estimate':>8}  times faster than"
)


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--size", choices=list(WAN_CONFIGS), default="1.3b")
    parser.add_argument("--methods", nargs="+", choices=list(ARMS), default=list(ARMS))
    # A graph gains nothing at Wan's length; it does where the host is slower than the GPU.
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager", "compiled"])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--steps", type=int, default=STEPS, help="of a generation")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in training")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--repeats", type=int, default=2, help="on a CPU")
    parser.add_argument("--budget-ms", type=float, default=3000.0, help="on a GPU, a measurement")
    parser.add_argument("--max-seconds", type=float, help="start no measurement after this long")
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and keep if asked; 1 if something of ours failed."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    file = results_file(options, "e2e", seed=SEED, label=options.size)
    print(HEAD)
    start, status = time.monotonic(), 0
    baselines: dict[tuple[str, str, str], float] = {}
    for name, mode, what in todo(options):
        if options.max_seconds and time.monotonic() - start > options.max_seconds:
            print(f"left out after {options.max_seconds} s: {name} {mode} {what}")
            continue
        row = measure(name, mode, what, options, device)
        for other in BASELINES:
            ms = baselines.get((other, mode, what))
            own = row["ms_median"]
            row[f"ratio_{other}"] = ms / own if ms and own else None
        if name in BASELINES and row["ms_median"]:
            baselines[name, mode, what] = row["ms_median"]
        elif row["error"]:
            status = 1
        if file is not None:
            file.append(row)
        print(line(row), flush=True)
    if file is not None and file.path.exists():
        print(f"recorded in {file.path}")
    return status


def todo(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(method, mode, what) in the order of measuring: baselines first, the decoder last."""
    methods = sorted(options.methods, key=lambda name: name not in BASELINES)
    by_method = [what for what in options.what if what != DECODE]
    rows = [
        (name, mode, what)
        for name in methods
        for mode in options.modes
        for what in by_method
        if (mode, what) != ("graph", "train")
    ]
    if DECODE in options.what:
        rows.append((NO_METHOD, "eager", DECODE))
    return rows


def measure(
    name: str, mode: str, what: str, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """One row: a method in one mode doing one thing, with a model of its own."""
    arm = ARMS.get(name)
    frames, height, width = LATENTS[options.size]
    config = WAN_CONFIGS[options.size]
    row: dict[str, Any] = {
        "method": name,
        "mode": mode,
        "what": what,
        "size": options.size,
        "latents": [config["in_channels"], frames, height, width],
        "tokens": math.prod((frames, height // 2, width // 2)),
        "device": device.type,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "block_q": getattr(arm and arm.config, "block_q", None),
        "block_kv": getattr(arm and arm.config, "block_kv", None),
        "steps": options.steps if what == "generation" else None,
        "checkpointing": options.checkpointing if what == "train" else None,
        "ms_median": None,
        "ms_p20": None,
        "ms_p80": None,
        "ms_attention": None,
        "attention_share": None,
        "peak_bytes": None,
        "estimated_bytes": None,
        "error": None,
    }
    try:
        if arm is None:
            row |= _measure_decoder(options, device)
        else:
            with kernel_of(arm, device):
                row |= _measure(arm, mode, what, options, device)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        error.__traceback__ = None  # its frames hold the model
    # Hooks and compiled blocks make cycles of it, and the next row's peak would count it too.
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _measure(
    arm: Arm, mode: str, what: str, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Training keeps float32 weights under autocast, as our runs do.
    weights = torch.float32 if what == "train" else dtype
    model = apply_attention(build_wan(options.size, weights, device, seed=SEED), arm.config)
    fuse_feed_forward(model)  # which takes part in inference only
    inputs = make_inputs(options.size, device, dtype)
    function: Forward = partial(forward, model)
    if mode == "graph":
        function = CUDAGraphed(function)
    step = make_step(model, function, inputs, what, options)
    # A generation is long: a short one warms up, and each thing is measured once.
    warm_up = step
    if what == "generation":
        warm_up = make_step(model, function, inputs, what, options, steps=2)
    found: dict[str, Any] = {}
    if what == "train":
        found["estimated_bytes"] = estimate(model, arm, mode, options, dtype)
    if mode == "eager":
        warm_up()
        found |= attention_times(model, warm_up, device)
        if what == "train":
            found["attention_share"] = None  # of the forward alone
        if what == "generation":
            found["ms_attention"] = None  # of the short one
    else:
        compile_blocks(model.blocks, fullgraph=True, tune=what != "train")  # type: ignore[arg-type]
    return found | _times(step, warm_up, what, options, device)


def _measure_decoder(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The autoencoder's decoder on the latents of a video."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decoder = build_autoencoder(options.size, dtype, device)
    generator = torch.Generator(device=device).manual_seed(SEED)
    shape = (1, decoder.config.z_dim, *LATENTS[options.size])
    latents = torch.randn(shape, generator=generator, device=device).to(dtype)

    @torch.no_grad()
    def step() -> Tensor:
        video: Tensor = decoder.decode(latents, return_dict=False)[0]
        return video

    return _times(step, step, DECODE, options, device)


def build_autoencoder(size: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Wan2.1's autoencoder, which both of its models share, with random weights; a tiny one for
    the tiny model."""
    if size == "tiny":
        # diffusers' own `to` warns of any dtype.
        return nn.Module.to(tiny_wan_autoencoder().eval(), device, dtype)
    return build_wan_autoencoder(dtype, device, seed=SEED)


def _times(
    step: timing.Step,
    warm_up: timing.Step,
    what: str,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Peak memory on a GPU, and times."""
    found: dict[str, Any] = {}
    on_gpu = device.type == "cuda"
    if on_gpu:
        warm_up()  # compiles, and makes the optimiser's state
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    if what == "generation":
        found |= dict.fromkeys(("ms_median", "ms_p20", "ms_p80"), _once(step, device))
    elif on_gpu:
        step()
        torch.cuda.synchronize()
    if on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if what == "generation":
        return found
    if on_gpu:
        return found | quantiles(timing.gpu_times(step, options.budget_ms))
    return found | quantiles(timing.cpu_times(step, options.repeats))


def estimate(
    model: nn.Module, arm: Arm, mode: str, options: argparse.Namespace, dtype: torch.dtype
) -> int:
    """Bytes that `sla.training.memory` expects of the training step."""
    frames, height, width = LATENTS[options.size]
    tokens = math.prod((frames, height // 2, width // 2))
    shape = wan_shape(options.size, tokens, TEXT_TOKENS[options.size])
    settings = MemorySettings(
        compute_bytes=dtype.itemsize,
        fused_optimizer=dtype == torch.bfloat16,
        keep_gradients=False,
        checkpointing=options.checkpointing,
        compiled=mode != "eager",
        attention_bytes=attention_bytes(
            arm.config, shape.heads, shape.width // shape.heads, tokens, dtype.itemsize
        ),
    )
    return estimate_memory(shape, parameters_of(model), settings).total


@contextmanager
def kernel_of(arm: Arm, device: torch.device) -> Iterator[None]:
    """PyTorch's exact attention on the arm's kernel, where it is a GPU's."""
    if arm.kernel is None or device.type != "cuda":
        yield
        return
    # torch.compile's cache of traced graphs does not know this choice: it would hand one arm the
    # other's graph. The cache behind it, of what the graphs compile to, is keyed by their kernels.
    with functorch_config.patch(enable_autograd_cache=False), sdpa_kernel(arm.kernel):
        yield  # cross-attention to text too


def make_inputs(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents, text and timestep of one sample."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    config = WAN_CONFIGS[size]
    latents = (1, config["in_channels"], *LATENTS[size])
    text = (1, TEXT_TOKENS[size], config["text_dim"])

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return {
        "hidden_states": draw(latents),
        "encoder_hidden_states": draw(text),
        "timestep": torch.full((1,), 500.0, device=device),
    }


def make_step(
    model: nn.Module,
    function: Forward,
    inputs: dict[str, Tensor],
    what: str,
    options: argparse.Namespace,
    *,
    steps: int | None = None,
) -> timing.Step:
    """The function to time; `function` is the model's forward for inference.

    step: one forward of one sample, no guidance. train: forward, backward and AdamW's step on the
    flow-matching loss. generation: `steps` (default: the options') steps of UniPC with guidance,
    from noise to latents; both velocities come from one forward of two samples, as our sampler
    takes them.
    """
    if what == "step":
        return lambda: function(*inputs.values())
    if what == "generation":
        return lambda: generate(function, inputs, steps or options.steps)
    model.train()
    if options.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    latents = inputs["hidden_states"]
    optimizer = torch.optim.AdamW(model.parameters(), fused=latents.is_cuda)
    target = torch.randn_like(latents)

    def train() -> None:
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
            velocity = model(**inputs, return_dict=False)[0]
        (velocity.float() - target.float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


@torch.no_grad()
def forward(model: nn.Module, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
    """The model's velocity."""
    velocity: Tensor = model(
        hidden_states=latents, encoder_hidden_states=text, timestep=timestep, return_dict=False
    )[0]
    return velocity


@torch.no_grad()
def generate(function: Forward, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """Latents from noise, with guidance 5 between the text and no text."""
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    texts = torch.cat([torch.zeros_like(text), text])
    scheduler = build_scheduler("unipc", SHIFT)
    scheduler.set_timesteps(steps, device=latents.device)
    current = latents.float()
    for timestep in scheduler.timesteps:
        given = current.to(latents.dtype).expand(2, *latents.shape[1:])
        without, with_text = function(given, texts, timestep.expand(2)).chunk(2)
        velocity = without + 5.0 * (with_text - without)
        current = scheduler.step(velocity.float(), timestep, current, return_dict=False)[0]
    return current


def attention_times(model: nn.Module, step: timing.Step, device: torch.device) -> dict[str, float]:
    """Time inside the attention methods during a step's forward passes, and its share of that step.

    Nothing on a CPU.
    """
    if device.type != "cuda":
        return {}
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def before(*_: object) -> None:
        events.append((_event(), _event()))
        events[-1][0].record()

    def after(*_: object) -> None:
        events[-1][1].record()

    handles = []
    for method in attention_modules(model):
        handles += [method.register_forward_pre_hook(before), method.register_forward_hook(after)]
    whole = _event(), _event()
    whole[0].record()
    step()
    whole[1].record()
    torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    spent = sum(start.elapsed_time(end) for start, end in events)
    return {"ms_attention": spent, "attention_share": spent / whole[0].elapsed_time(whole[1])}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _once(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    what = f"{row['method']:>18} {row['mode']:>9} {row['what']:>10}"
    if row["error"]:
        return f"{what} {row['error']}"
    attention = f"{row['ms_attention']:10.1f}" if row["ms_attention"] is not None else " " * 10
    share = f"{row['attention_share']:5.0%}" if row["attention_share"] is not None else " " * 5
    peak = f"{row['peak_bytes'] / 2**30:7.1f}" if row["peak_bytes"] is not None else " " * 7
    estimated = row["estimated_bytes"]
    expected = f"{estimated / 2**30:8.1f}" if estimated is not None else " " * 8
    found = {name: row[f"ratio_{name}"] for name in BASELINES if name != row["method"]}
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found.items() if ratio)
    numbers = f"{row['ms_median']:10.1f} {attention} {share} {peak} {expected}"
    return f"{what} {numbers}  {ratios}".rstrip()
