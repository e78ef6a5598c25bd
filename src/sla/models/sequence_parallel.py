"""Sequence parallelism (Ulysses) for diffusers' transformers that carry our methods.

    apply_attention(transformer, SLAConfig())
    enable_sequence_parallel(transformer, 8)  # 8 neighbouring ranks share a video
    transformer = DistributedDataParallel(transformer)  # or fully_shard

Each of the P ranks of a group holds N / P of the tokens between the first layer and the last. Only
self-attention needs the others': an all-to-all gives each rank all tokens of H / P heads, the
method runs on these as it would alone, and another all-to-all brings the tokens back. Text is whole
on every rank and cross-attention is local. Outputs are gathered: every rank has the whole output.

A compiled layer has graph breaks at the exchanges: torch 2.11 gets their gradients wrong, without
an error, where it traces them into its graph.

Order: weights, LoRA and `fuse_qkv_projections` first, `apply_attention`, then this, then compile,
`DistributedDataParallel` or `fully_shard`, optimisers and EMA copies. `apply_attention` and
`remove_attention` switch it off. A forward or backward is a collective: all ranks of a group call
the transformer in step. They call it with the same arguments: the same sample, noise, timestep and
text. With an int for the group, ranks k P to k P + P - 1 form one, so data is for replica
`rank // P` of `world // P`, and random numbers are seeded by replica, not by rank. Caches of
diffusers that skip layers by what they see in the tokens (first block cache) would decide rank by
rank: leave them off.

Gradients: every rank computes the same loss of the whole output, as one process would, and without
a factor. A rank's gradients hold P times what its tokens and its heads contribute, so that their
mean over the group is the gradient of one process, of every parameter that gets one: the methods'
own too. `DistributedDataParallel` and `fully_shard` over all ranks take the mean over groups and
within them, which is then that of data parallelism over the groups: nothing else is to be done, and
loss terms that go around the transformer stay right. Without either, call `average_gradients` after
the backward; clip norms only after that.

Parameters of a method that have a head axis are cut to the rank's heads: those whose sizes grow
with H when the method is built, heads in front along that axis (`Gate` of VSA, `mixing: head` of
SLA2). All others apply to every head. A method treats its heads one by one, as all of ours do.
Hooks on a method see the rank's heads and all tokens. The layer's hidden states are gathered for
methods whose `unsupported_reason` asks for them (VSA), for others `context.hidden_states` is None.

Why not diffusers' `enable_parallelism`: it exchanges inside its own attention, which our methods
replace; its hooks split the rotary embedding before tile order could be made of it; its gather
leaves the factor P to the loss; and it needs an accelerator.

Shape letters as in `sla.attention.interface`; P ranks of a group, n = N / P, h = H / P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call

from sla.attention import (
    AttentionContext,
    AttentionMethod,
    UnsupportedAttentionError,
    build_attention,
)
from sla.attention.interface import tokens_of
from sla.models.injection import adapter_of, injection_of, processors_of, unwrap

Grid = tuple[int, int, int]


class SequenceShard:
    """This rank's place in a group that shares the tokens of a sample. Copies of a model share it.

    Args:
        group: a process group that this rank is in.

    Attributes:
        degree: P.
        rank: in the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.degree = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceShard:
        return self

    def check_tokens(self, grid: Grid) -> None:
        """Refuse a grid whose tokens cannot be shared out evenly.

        Raises:
            UnsupportedAttentionError: names the tokens and P.
        """
        tokens = tokens_of(grid)
        if tokens % self.degree:
            raise UnsupportedAttentionError(
                f"a grid of {' x '.join(map(str, grid))} is {tokens} tokens, which do not divide "
                f"by the sequence parallel degree {self.degree}: choose another size or degree"
            )

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that all ranks have."""
        size = tensor.shape[dim] // self.degree
        return tensor.narrow(dim, self.rank * size, size)

    @torch.compiler.disable
    def gather_output(self, tensor: Tensor, dim: int) -> Tensor:
        """All ranks' parts of what they then compute the same loss of.

        In the backward a rank takes its part of the gradient P times: see the head of this file.
        """
        gathered: Tensor = _Gather.apply(tensor, dim, self, False)
        return gathered

    @torch.compiler.disable
    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """All ranks' parts of what they then use differently: gradients are added up."""
        gathered: Tensor = _Gather.apply(tensor, dim, self, True)
        return gathered

    @torch.compiler.disable
    def tokens_to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(B, H, n, D) each, of one shape, to this rank's heads (B, h, N, D), strided."""
        if len({tensor.dtype for tensor in tensors}) > 1:
            return [self.tokens_to_heads([tensor])[0] for tensor in tensors]
        parts = [t.unflatten(1, (self.degree, -1)).permute(1, 3, 0, 2, 4) for t in tensors]
        # (P, n, tensors, B, h, D): tokens outermost, so that what is received need not be copied.
        received: Tensor = _AllToAll.apply(torch.stack(parts, dim=2), self)
        return list(received.flatten(0, 1).permute(1, 2, 3, 0, 4).unbind(0))

    @torch.compiler.disable
    def heads_to_tokens(self, tensor: Tensor) -> Tensor:
        """(B, h, N, D) to this rank's tokens with the heads joined, (B, n, H D)."""
        parts = tensor.unflatten(2, (self.degree, -1)).permute(2, 3, 0, 1, 4)
        received: Tensor = _AllToAll.apply(parts, self)  # (P, n, B, h, D)
        return received.permute(2, 1, 0, 3, 4).flatten(2)


class _AllToAll(torch.autograd.Function):
    """Part j of dimension 0 goes to rank j, whose part comes to place j; its own transpose."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return _all_to_all(tensor, shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0], ctx.shard), None


class _Gather(torch.autograd.Function):
    """Concatenate the ranks' parts. Its backward: `SequenceShard.gather` and `gather_output`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, shard: SequenceShard, add: bool) -> Tensor:
        ctx.dim, ctx.shard, ctx.add = dim, shard, add
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(shard.degree)]
        dist.all_gather(parts, tensor, group=shard.group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shard: SequenceShard = ctx.shard
        if not ctx.add:
            return shard.split(grads[0], ctx.dim) * shard.degree, None, None, None
        # Not reduce_scatter: gloo has none in some versions, and it moves as much.
        parts = torch.stack(grads[0].chunk(shard.degree, dim=ctx.dim))
        return _all_to_all(parts, shard).sum(dim=0), None, None, None


def _all_to_all(tensor: Tensor, shard: SequenceShard) -> Tensor:
    sent = tensor.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=shard.group)
    return received


class HeadExchange:
    """A layer's method on this rank's heads.

    Args:
        method: the layer's, of all heads.
        shard: this rank's.

    Raises:
        UnsupportedAttentionError: the heads, or a parameter's, do not divide by P.
    """

    def __init__(self, method: AttentionMethod, shard: SequenceShard) -> None:
        self.method = method
        self.shard = shard
        heads, sizes = method.num_heads, (method.head_dim, method.dim, method.layer_index)
        if heads % shard.degree:
            raise UnsupportedAttentionError(
                f"layer {method.layer_index} has {heads} heads, which do not divide by the "
                f"sequence parallel degree {shard.degree}: choose a degree that divides {heads}"
            )
        # Has the method's code and sizes for h heads; its own parameters are never looked at.
        with torch.device("meta"):
            self.local = build_attention(method.config, heads // shard.degree, *sizes)
        self.head_dims = self._head_dims()
        self.needs_hidden = _needs_hidden_states(self.local)

    @property
    def degree(self) -> int:
        """P."""
        return self.shard.degree

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, context: AttentionContext
    ) -> Tensor:
        """As `MethodProcessor.attend`, with n tokens in and out and the context of all.

        (B, H, n, D) each and (B, n, dim) hidden states, to (B, n, H D).
        """
        gathered = self.shard.gather(hidden, 1) if self.needs_hidden else None
        context = context.with_hidden_states(gathered)
        whole = self.shard.tokens_to_heads([query, key, value])
        # Its hooks run; its forward is `forward` below.
        output: Tensor = self.method(*whole, context)
        return self.shard.heads_to_tokens(output.type_as(query))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        """The method on this rank's heads, (B, h, N, D) each and returned; stands in for its own
        forward."""
        tensors = {}
        for name, tensor in _tensors_of(self.method).items():
            dim = self.head_dims[name]
            tensors[name] = tensor if dim is None else self.shard.split(tensor, dim)
        self.local.train(self.method.training)
        output: Tensor = functional_call(self.local, tensors, (query, key, value, context))
        return output

    def _head_dims(self) -> dict[str, int | None]:
        """The head axis of each parameter and buffer of the method, or None."""
        found: dict[str, int | None] = {}
        local = _tensors_of(self.local)
        for name, tensor in _tensors_of(self.method).items():
            whole, part = tuple(tensor.shape), tuple(local[name].shape)
            dims = [d for d in range(len(whole)) if whole[d] != part[d]]
            if len(dims) > 1 or any(whole[d] != part[d] * self.shard.degree for d in dims):
                raise UnsupportedAttentionError(
                    f"attention {self.method.config.name!r} cannot be split over heads: its "
                    f"{name} is {whole} for {self.method.num_heads} heads and {part} for "
                    f"{self.local.num_heads}"
                )
            found[name] = dims[0] if dims else None
        return found


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _needs_hidden_states(method: AttentionMethod) -> bool:
    """Whether the method refuses a call for its lack of hidden states."""
    tokens = torch.empty(1, method.num_heads, 8, method.head_dim, device="meta")
    hidden = torch.empty(1, 8, method.dim, device="meta")
    having = AttentionContext(grid=(2, 2, 2), hidden_states=hidden)
    reasons = [
        method.unsupported_reason(tokens, tokens, tokens, context)
        for context in (having, AttentionContext(grid=(2, 2, 2)))
    ]
    return reasons[0] != reasons[1]


def enable_sequence_parallel(
    transformer: nn.Module, group: DeviceMesh | dist.ProcessGroup | int
) -> nn.Module:
    """Share the tokens of each sample out over a group of ranks, in place.

    What it asks of data, loss and gradients is at the head of this file. Whatever was switched on
    before is switched off first. All ranks of the group call it; with an int, all ranks.

    Args:
        transformer: that `apply_attention` was given, of a class whose adapter can split it (Wan).
        group: the ranks: a mesh of one dimension, a process group, or P for groups of P
            neighbouring ranks (each call makes new groups unless P is all ranks). One rank is none.

    Returns:
        The transformer.

    Raises:
        TypeError: the group is none of these.
        ValueError: no attention was applied or a layer has lost it, or there is no such group.
        UnsupportedAttentionError: the model cannot be split, or its heads do not divide by P. What
            depends on sizes that only a call has is refused there, before any communication.
    """
    module = unwrap(transformer)
    injection = injection_of(module)
    if injection is None:
        raise ValueError("the transformer has no attention of ours: call apply_attention first")
    ranks = _group_of(group)
    if ranks is None or dist.get_world_size(ranks) == 1:
        return disable_sequence_parallel(transformer)
    adapter, shard = adapter_of(module), SequenceShard(ranks)
    processors = [processor for _, processor in processors_of(module)]
    layers = len(adapter.attention_layers(module))
    if len(processors) != layers:
        raise ValueError(
            f"{layers - len(processors)} of {layers} layers have lost their method (by "
            "set_attn_processor?): call apply_attention again"
        )
    exchanges = [HeadExchange(processor.method, shard) for processor in processors]
    disable_sequence_parallel(transformer)
    injection.splitting = adapter.split_sequence(module, shard)
    for processor, exchange in zip(processors, exchanges, strict=True):
        processor.exchange = exchange
        processor.method.forward = exchange.forward  # type: ignore[method-assign]
    return transformer


def disable_sequence_parallel(transformer: nn.Module) -> nn.Module:
    """Undo `enable_sequence_parallel`, in place; does nothing where it is not on.

    Returns:
        The transformer.
    """
    module = unwrap(transformer)
    injection = injection_of(module)
    if injection is None:
        return transformer
    for handle in injection.splitting:
        handle.remove()
    injection.splitting = []
    for _, processor in processors_of(module):
        if processor.exchange is not None:
            processor.exchange = None
            del processor.method.forward
    return transformer


def sequence_parallel_group(transformer: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share the tokens of a sample with this one, or None."""
    for _, processor in processors_of(unwrap(transformer)):
        if processor.exchange is not None:
            return processor.exchange.shard.group
    return None


def average_gradients(transformer: nn.Module) -> None:
    """Make every gradient the mean over the group, which is that of one process, in place.

    For training without `DistributedDataParallel` and `fully_shard`, which do it. Does nothing
    where sequence parallelism is not on.
    """
    module = unwrap(transformer)
    group = sequence_parallel_group(module)
    if group is None:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    works = [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]
    for work in works:
        work.wait()
    for grad in grads:
        grad /= dist.get_world_size(group)


def _group_of(group: DeviceMesh | dist.ProcessGroup | int) -> dist.ProcessGroup | None:
    """The process group of this rank; None for one rank.

    Raises:
        TypeError, ValueError: as `enable_sequence_parallel`.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of {group.ndim} dimensions; give the one whose ranks share the "
                "tokens, such as mesh['sequence']"
            )
        return group.get_group()
    # What new_group gives to ranks that are not in it: a number.
    outside = group == dist.GroupMember.NON_GROUP_MEMBER
    if outside or (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0):
        raise ValueError(f"group does not have this rank, {dist.get_rank()}")
    if isinstance(group, dist.ProcessGroup):
        return group
    if type(group) is not int:
        raise TypeError(
            f"group is a {type(group).__name__}; it must be a mesh, a process group or an int"
        )
    if group < 1:
        raise ValueError(f"group is {group}; it must be at least 1")
    if group == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(
            f"group is {group}, but torch.distributed has no ranks: call init_process_group first"
        )
    world = dist.get_world_size()
    if world % group:
        raise ValueError(f"group is {group}, which does not divide the {world} ranks")
    own = dist.group.WORLD if group == world else dist.new_subgroups(group)[0]
    assert own is not None
    return own


__all__ = [
    "HeadExchange",
    "SequenceShard",
    "average_gradients",
    "disable_sequence_parallel",
    "enable_sequence_parallel",
    "sequence_parallel_group",
]
