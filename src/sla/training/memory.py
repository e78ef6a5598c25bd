"""The GPU memory that training a transformer takes, before it starts.

For Wan's blocks and methods that keep query, key, value and output for the backward, as exact
attention and SLA do. Counts are exact where they can be (weights, optimiser); of the activations
the tensors that autograd keeps are counted, which was checked against autograd itself.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from sla.attention.config import AttentionConfig, BlockSparseConfig
from sla.models.families import WanConfig
from sla.models.video_model import Grid, VideoModel
from sla.models.wan_sizes import WAN_CONFIGS
from sla.training.config import Experiment
from sla.training.run_folder import RunError

log = logging.getLogger(__name__)

# Refuse only what is too large even if the estimate is this much too high.
TOLERANCE = 0.1
STRATEGIES = ("single", "ddp", "fsdp")
_FP32 = 4
# Of a Wan block, how many tensors as wide as the model autograd keeps, in float32 and in the dtype
# computed with. In float32 the inputs of three layer norms (3), two of them normalised (for the
# modulation's gradient, 2), the MLP's output (for its gate's, 1), and for three RMS norms input and
# result (6); in the other the inputs of the layers that follow the norms (3), query, key, value and
# output of self-attention (4), query and output of cross-attention (2), the gated output (1).
_KEPT = (12, 10)
# Without gradients of modulation, gates and norms, as with adapters in the linear layers alone.
_KEPT_ADAPTERS = (6, 9)
# torch.compile recomputes what is cheap.
_KEPT_COMPILED, _KEPT_COMPILED_ADAPTERS = (1, 15), (1, 13)
_KEPT_MLP = 2  # before and after the activation function, as wide as the MLP
_KEPT_OUTSIDE = 3  # float32, around the blocks
# Of text tokens: keys of cross-attention before and in their norm; key and value.
_KEPT_TEXT_FP32, _KEPT_TEXT = 2, 2
_ADAPTER_SHARE = 0.01  # weights of LoRA adapters over the model's, to say what they would save


@dataclass(frozen=True)
class TransformerShape:
    """What the activations of one sample depend on.

    Attributes:
        width: of the hidden states.
        mlp_width: of the MLP's inner layer.
        depth: blocks.
        heads: attention heads.
        tokens: video tokens of a sample.
        text_tokens: tokens that cross-attention reads.
    """

    width: int
    mlp_width: int
    depth: int
    heads: int
    tokens: int
    text_tokens: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "width", "mlp_width", "depth", "heads", "tokens")
        _require(self.text_tokens >= 0, "text_tokens", self.text_tokens, "0 or more")


@dataclass(frozen=True)
class ParameterCounts:
    """Weights of a transformer, in numbers.

    Attributes:
        trainable: with gradients.
        frozen: without. Where they outnumber the trainable ones, these are taken to be adapters
            (LoRA) of the linear layers.
        block: all weights of the largest block; 0 where it is not known (FSDP and checkpointing
            then seem to take a little less than they do).
    """

    trainable: int
    frozen: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        for name in ("trainable", "frozen", "block"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")

    @property
    def total(self) -> int:
        """All weights."""
        return self.trainable + self.frozen

    @property
    def are_adapters(self) -> bool:
        """Whether only additions to the model are trained."""
        return self.trainable < self.frozen


@dataclass(frozen=True)
class MemorySettings:
    """How a run trains.

    Attributes:
        batch: samples a GPU and a forward.
        parameter_bytes: of a stored weight, its gradient and each optimiser state: 4 for float32.
        compute_bytes: of the activations' dtype: 2 for bf16-mixed, which also makes bf16 copies of
            float32 weights; 4 for float32.
        optimizer_states: numbers that the optimiser keeps for a weight; AdamW 2.
        fused_optimizer: whether it needs no temporary copy of all weights in its step, as
            AdamW(fused=True); PyTorch's default on a GPU needs one.
        keep_gradients: whether a step's gradients live on through the next forward, as in
            Lightning's loop, which frees them just before the backward.
        accumulate: batches an optimiser step; above 1 gradients are there all the time.
        average: a moving average of the weights on the GPU: a copy of the whole model.
        teacher_parameters, teacher_bytes: a frozen second model, for distillation, and the bytes
            of its weights.
        checkpointing: whether blocks are recomputed in the backward.
        compiled: whether they are compiled.
        strategy: `single`, `ddp` (gradients a second time, in its buckets) or `fsdp` (weights,
            gradients, optimiser, average and teacher in equal parts, block by block put together).
        gpus: over which `fsdp` shards.
        attention_bytes: what a layer's method keeps of a sample beyond query, key, value, output
            and log-sum-exp; see `block_table_bytes`.
        other_bytes: anything else on the GPU, such as a text encoder.

    Raises:
        ValueError: a value out of range.
    """

    batch: int = 1
    parameter_bytes: int = 4
    compute_bytes: int = 2
    optimizer_states: int = 2
    fused_optimizer: bool = False
    keep_gradients: bool = True
    accumulate: int = 1
    average: bool = False
    teacher_parameters: int = 0
    teacher_bytes: int = 4
    checkpointing: bool = False
    compiled: bool = False
    strategy: str = "single"
    gpus: int = 1
    attention_bytes: int = 0
    other_bytes: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "batch", "parameter_bytes", "compute_bytes", "teacher_bytes")
        _require_positive(self, "accumulate", "gpus")
        for name in ("optimizer_states", "teacher_parameters", "attention_bytes", "other_bytes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        known = self.strategy in STRATEGIES
        _require(known, "strategy", self.strategy, f"one of {', '.join(STRATEGIES)}")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU at the moment of a step that needs most.

    Attributes:
        phase: that moment: `forward` (its end), `backward` or `optimizer` (its step).
        weights, optimizer, average, teacher, other: there all the time.
        gradients: with DDP's buckets.
        copies: weights in the compute dtype, or FSDP's blocks put together.
        activations: kept for the backward; with checkpointing the blocks' inputs and one block.
        working: what is in use for a moment.
        shape, parameters, settings: what this is an estimate of.
    """

    phase: str
    weights: int
    gradients: int
    optimizer: int
    average: int
    teacher: int
    copies: int
    activations: int
    working: int
    other: int
    shape: TransformerShape
    parameters: ParameterCounts
    settings: MemorySettings

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to `total`, by name, in bytes."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "average of the weights": self.average,
            "teacher": self.teacher,
            "copies of weights to compute with": self.copies,
            "activations": self.activations,
            "working memory": self.working,
            "other": self.other,
        }

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def estimate_memory(
    shape: TransformerShape,
    parameters: ParameterCounts,
    settings: MemorySettings | None = None,
) -> MemoryEstimate:
    """Memory of a training step with AdamW, of each GPU.

    With P weights in p bytes (P_t trained), n GPUs under FSDP and else 1, N = batch x tokens, width
    W, MLP width M, L blocks, H heads, c bytes a number computed with:

    - weights p P / n, optimiser 2 p P_t / n, average p P / n, gradients p P_t / n (twice with DDP);
    - copies c P if c < p, all at once without checkpointing, a block's with it; under FSDP two
      blocks and a block's gradients;
    - a block keeps N ((12 x 4 + 10 c) W + 2 c M + 8 H) and what cross-attention keeps of the text;
      instead of 12 and 10 it is 6 and 9 with adapters alone, which need no gradient of modulation
      and norms, 1 and 15 compiled, 1 and 13 with both;
    - activations: L blocks, or with checkpointing L inputs of c N W and in the backward one block;
      at the end of the forward also 12 N W after the blocks;
    - working memory N (c M + 4 W), and in the optimiser's step a copy of P_t / n unless fused.

    Not all of it is needed at once: gradients grow while activations are freed. The moment that
    needs most counts.

    Assumes: Wan's block as diffusers writes it; methods that keep what exact attention keeps; full
    sharding; adapters in all linear layers (in those of attention alone 2 c M is c M). Not counted:
    latents, logits and other tensors that do not grow with the width (under 1 % at real sizes),
    CUDA's own memory (about 0.5 GiB), and what the allocator cannot use (a few per cent).
    """
    settings = settings or MemorySettings()
    total, trained = parameters.total, parameters.trainable
    shards = settings.gpus if settings.strategy == "fsdp" else 1
    stored, compute = settings.parameter_bytes, settings.compute_bytes

    def of_shard(size: int) -> int:
        return math.ceil(size / shards)

    gradients = of_shard(stored * trained)
    buckets = stored * trained if settings.strategy == "ddp" else 0
    fixed = {
        "weights": of_shard(stored * total),
        "optimizer": of_shard(settings.optimizer_states * stored * trained),
        "average": of_shard(stored * total) if settings.average else 0,
        "teacher": of_shard(settings.teacher_bytes * settings.teacher_parameters),
        "other": settings.other_bytes,
    }

    tokens = settings.batch * shape.tokens
    block = _block_bytes(shape, parameters, settings)
    outside = 0 if parameters.are_adapters else _KEPT_OUTSIDE * _FP32 * shape.width * tokens
    working = tokens * (compute * shape.mlp_width + _FP32 * shape.width)
    if settings.checkpointing:
        kept, recomputed = shape.depth * compute * shape.width * tokens, block
    else:
        kept, recomputed = shape.depth * block, 0

    block_copy = compute * parameters.block
    if settings.strategy == "fsdp":
        in_forward = in_backward = 2 * block_copy
        at_end = 3 * block_copy
    elif compute >= stored:
        in_forward = in_backward = at_end = 0
    elif settings.checkpointing:
        # Autocast keeps those of trained weights until the forward is over.
        in_forward, in_backward, at_end = compute * trained, block_copy, block_copy
    else:
        in_forward, in_backward, at_end = compute * total, compute * total, block_copy

    always = settings.accumulate > 1
    before = gradients if always else 0
    update = 0 if settings.fused_optimizer else gradients
    # phase: gradients, copies, activations, working memory
    moments = [
        (
            *("forward", gradients if settings.keep_gradients else before, in_forward),
            *(kept + outside, working),
        ),
        ("backward", before, in_backward, kept + recomputed, working),
        ("backward", gradients, at_end, block, working),
        ("optimizer", gradients, 0, 0, update),
    ]
    phase, grown, copies, activations, working = max(moments, key=lambda m: sum(m[1:]))
    return MemoryEstimate(
        phase=phase,
        gradients=grown + buckets,
        copies=copies,
        activations=activations,
        working=working,
        shape=shape,
        parameters=parameters,
        settings=settings,
        **fixed,
    )


def check_memory(estimate: MemoryEstimate, available_bytes: int) -> None:
    """Refuse a run that cannot fit; warn of one that may not.

    Args:
        estimate: of the run.
        available_bytes: memory that the process may use on its GPU.

    Raises:
        RunError: `1 - TOLERANCE` of the estimate exceeds it; lists the parts and what would help.
    """
    if estimate.total <= available_bytes:
        return
    message = (
        f"training needs about {_gib(estimate.total)} on each GPU, and {_gib(available_bytes)} are "
        f"available. Needed most in the {_PHASES[estimate.phase]}:\n{_listing(estimate)}"
    )
    if (1 - TOLERANCE) * estimate.total <= available_bytes:
        log.warning("%s\nIt may fit: trying.", message)
        return
    helps = "\n".join(
        f"  {change}: {_gib(other.total)}" for change, other in _alternatives(estimate).items()
    )
    raise RunError(
        f"GPU too small: {message}\nWhat would help, and what would be needed then:\n{helps}\n"
        "or a smaller video (data.num_frames, data.height, data.width)"
    )


def parameters_of(module: nn.Module) -> ParameterCounts:
    """Counts a transformer's weights, shared ones once; its largest block is the largest entry of
    any of its `nn.ModuleList`s."""
    found = {id(p): p for p in module.parameters()}.values()
    trainable = sum(p.numel() for p in found if p.requires_grad)
    blocks = [
        sum(p.numel() for p in entry.parameters())
        for part in module.modules()
        if isinstance(part, nn.ModuleList)
        for entry in part
    ]
    frozen = sum(p.numel() for p in found) - trainable
    return ParameterCounts(trainable, frozen, max(blocks, default=0))


def check_run(experiment: Experiment, model: VideoModel, grid: Grid, gpus: int) -> None:
    """Before training starts: whether a run fits the GPUs that it is given.

    On a CPU it says nothing, nor of models that the estimate is not made for.

    Args:
        model: with what is trained and its attention.
        grid: token grid of a sample.
        gpus: in all.

    Raises:
        RunError: it does not; see `check_memory`.
    """
    if not torch.cuda.is_available() or experiment.trainer.accelerator == "cpu":
        return
    estimate = estimate_run(experiment, model, grid, gpus)
    if estimate is None:
        return
    log.info("GPU memory: about %s needed", _gib(estimate.total))
    check_memory(estimate, torch.cuda.get_device_properties().total_memory)


def estimate_run(
    experiment: Experiment, model: VideoModel, grid: Grid, gpus: int = 1
) -> MemoryEstimate | None:
    """What a run needs on each GPU in bf16-mixed; None for a model whose blocks are not Wan's.

    Args as `check_run`.
    """
    if not isinstance(experiment.model, WanConfig):
        return None
    trainer, optim = experiment.trainer, experiment.optim
    ranks, tokens = trainer.sequence_parallel, math.prod(grid)
    shape = wan_shape(
        experiment.model.size, math.ceil(tokens / ranks), experiment.model.text_tokens
    )
    compute_bytes = 4 if "32" in trainer.precision else 2
    head_dim, heads = shape.width // shape.heads, max(1, shape.heads // ranks)
    kept = attention_bytes(model.attention_config, heads, head_dim, tokens, compute_bytes)
    parameters = parameters_of(model)
    teacher = parameters.total if experiment.flow.target == "teacher" else 0
    settings = MemorySettings(
        batch=experiment.data.batch_size,
        compute_bytes=compute_bytes,
        accumulate=optim.accumulate,
        average=optim.ema_decay > 0,
        teacher_parameters=teacher,
        checkpointing=trainer.activation_checkpointing,
        compiled=trainer.compile,
        strategy={"fsdp2": "fsdp", "ddp": "ddp"}.get(
            trainer.strategy, "ddp" if gpus > 1 else "single"
        ),
        gpus=gpus,
        attention_bytes=kept,
    )
    return estimate_memory(shape, parameters, settings)


def wan_shape(size: str, tokens: int, text_tokens: int) -> TransformerShape:
    """The shape of a Wan of a size in `WAN_CONFIGS`."""
    sizes = WAN_CONFIGS[size]
    heads = sizes["num_attention_heads"]
    return TransformerShape(
        width=heads * sizes["attention_head_dim"],
        mlp_width=sizes["ffn_dim"],
        depth=sizes["num_layers"],
        heads=heads,
        tokens=tokens,
        text_tokens=text_tokens,
    )


def attention_bytes(
    attention: AttentionConfig, heads: int, head_dim: int, tokens: int, compute_bytes: int
) -> int:
    """What a layer's method keeps of a sample beside exact attention's tensors: the tables of its
    blocks, and its branches' outputs; 0 for one that does not route over blocks."""
    if not isinstance(attention, BlockSparseConfig):
        return 0
    blocks = (attention.block_q, attention.block_kv, attention.critical)
    outputs = attention.branch_outputs * heads * head_dim * tokens * compute_bytes
    return block_table_bytes(heads, tokens, *blocks) + outputs


def block_table_bytes(heads: int, tokens: int, block_q: int, block_kv: int, critical: float) -> int:
    """What the block-sparse kernels keep of a sample and layer beside exact attention's tensors.

    A label (1 byte) for each pair of blocks, and of each row the numbers of its critical blocks and
    their count (4 bytes each).
    """
    rows, columns = math.ceil(tokens / block_q), math.ceil(tokens / block_kv)
    listed = max(1, math.ceil(critical * columns))
    return heads * rows * (columns + 4 * listed + 4)


_PHASES = {"forward": "forward", "backward": "backward", "optimizer": "optimiser's step"}


def _block_bytes(
    shape: TransformerShape, parameters: ParameterCounts, settings: MemorySettings
) -> int:
    """What one block keeps for the backward."""
    compute = settings.compute_bytes
    if settings.compiled:
        kept = _KEPT_COMPILED_ADAPTERS if parameters.are_adapters else _KEPT_COMPILED
    else:
        kept = _KEPT_ADAPTERS if parameters.are_adapters else _KEPT
    wide, narrow = kept
    a_token = (wide * _FP32 + narrow * compute) * shape.width
    a_token += _KEPT_MLP * compute * shape.mlp_width
    a_token += 2 * _FP32 * shape.heads  # log-sum-exp of self- and cross-attention
    a_text_token = (_KEPT_TEXT_FP32 * _FP32 + _KEPT_TEXT * compute) * shape.width
    a_sample = shape.tokens * a_token + shape.text_tokens * a_text_token + settings.attention_bytes
    return settings.batch * a_sample


def _alternatives(estimate: MemoryEstimate) -> dict[str, MemoryEstimate]:
    """Changes of a run that need less memory, and their estimates."""
    shape, parameters, settings = estimate.shape, estimate.parameters, estimate.settings
    lighter = replace(settings, checkpointing=True)
    changed: dict[str, tuple[ParameterCounts, MemorySettings]] = {}
    if not settings.checkpointing:
        changed["trainer.activation_checkpointing=true"] = (parameters, lighter)
    with_it = "" if settings.checkpointing else " and activation checkpointing"
    if not parameters.are_adapters:
        adapters = replace(
            parameters,
            trainable=round(_ADAPTER_SHARE * parameters.total),
            frozen=parameters.total,
        )
        changed[f"LoRA instead of all weights{with_it}"] = (adapters, lighter)
    more = max(8, 2 * settings.gpus)
    sharded = replace(lighter, strategy="fsdp", gpus=more)
    changed[f"FSDP over {more} GPUs{with_it}"] = (parameters, sharded)
    if settings.average:
        changed["no average of the weights (optim.ema_decay=0)"] = (
            parameters,
            replace(settings, average=False),
        )
    if settings.batch > 1:
        changed["data.batch_size=1"] = (parameters, replace(settings, batch=1))
    found = {change: estimate_memory(shape, *given) for change, given in changed.items()}
    return {change: other for change, other in found.items() if other.total < estimate.total}


def _listing(estimate: MemoryEstimate) -> str:
    parts = [(name, size) for name, size in estimate.parts.items() if size]
    return "\n".join(f"  {name}: {_gib(size)}" for name, size in parts)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        _require(getattr(owner, name) >= 1, name, getattr(owner, name), "1 or more")
