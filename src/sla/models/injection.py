"""Our attention methods inside diffusers' transformers, through public hooks alone.

    pipe = WanPipeline.from_pretrained(...)
    apply_attention(pipe.transformer, SLAConfig())
    video = pipe("a cat").frames

Every self-attention gets a processor, a module that owns one `AttentionMethod`: its parameters are
parameters of the transformer, named `<attention layer>.processor.method.<name>`, for Wan
`blocks.0.attn1.processor.method.proj_l.weight`. A hook before the transformer's forward makes the
`AttentionContext` of the call (latent grid, timestep, token order), and the layers get it together
with their rotary embedding, as `CarriedContext`. It belongs to the call and is stored nowhere, so
activation checkpointing recomputes a layer in the context it had, whatever ran in between.

What a model family needs is in its `ModelAdapter`; `@register_adapter("ClassName")` adds one, also
from outside the repository. Files are in `sla.models.pretrained`.

Apply first; compile, shard, build optimisers and EMA copies afterwards. diffusers'
`set_attn_processor` for the whole model (and CogVideoX's `fuse_qkv_projections`, which calls it)
deletes the methods with their weights: fuse before applying.

Shape letters as in `sla.attention.interface`; dim is the width of the layer's hidden states.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sla.attention import (
    AttentionConfig,
    AttentionContext,
    AttentionMethod,
    UnsupportedAttentionError,
    build_attention,
)
from sla.attention.interface import tokens_of

if TYPE_CHECKING:
    from sla.models.sequence_parallel import HeadExchange, SequenceShard

AdapterT = TypeVar("AdapterT", bound="type[ModelAdapter]")

_ADAPTERS: dict[str, ModelAdapter] = {}
_STATE = "_sla_attention"


class CarriedContext(NamedTuple):
    """What the layers get in place of their rotary embedding.

    Attributes:
        rotary: the rotary embedding as the transformer made it, or None.
        context: the call's, without hidden states.
    """

    rotary: Any
    context: AttentionContext


class MethodProcessor(nn.Module, abc.ABC):
    """An attention processor of diffusers that owns an attention method.

    A subclass repeats in `forward` what its model's own processor does before and after attention,
    and calls `attend` in between.

    Args:
        method: the layer's method.
        original: the processor that it replaces.

    Attributes:
        exchange: how tokens are exchanged for heads, where `enable_sequence_parallel` has split
            the tokens over ranks; else None.
    """

    def __init__(self, method: AttentionMethod, original: Any) -> None:
        super().__init__()
        self.method = method
        self.exchange: HeadExchange | None = None
        # In a tuple: a module in there must not become a part of this one.
        self._original = (original,)

    @property
    def original(self) -> Any:
        """The processor that it replaces."""
        return self._original[0]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, context: AttentionContext
    ) -> Tensor:
        """The method on (B, H, N, D), any strides, with (B, N, dim) hidden states.

        With the tokens split over ranks, N is the number of this rank's, here and below.

        Returns:
            (B, N, H D), the heads joined, dtype of `query`.

        Raises:
            UnsupportedAttentionError: the tokens are not those of the grid, or the method refuses.
        """
        grid, text, exchange = context.grid, context.always_critical, self.exchange
        tokens = hidden.shape[1] * (1 if exchange is None else exchange.degree)
        if grid is not None and tokens != text + tokens_of(grid):
            raise UnsupportedAttentionError(
                f"layer {self.method.layer_index} has {tokens} tokens, but {text} of text "
                f"and a grid of {' x '.join(map(str, grid))} are {text + tokens_of(grid)}: is the "
                "sequence split over devices by other means than enable_sequence_parallel, or are "
                "there tokens that the adapter does not know?"
            )
        if exchange is not None:
            return exchange.attend(query, key, value, hidden, context)
        output: Tensor = self.method(query, key, value, context.with_hidden_states(hidden))
        return output.transpose(1, 2).flatten(2, 3).type_as(query)

    def carried(self, value: Any) -> CarriedContext:
        """The rotary embedding and context that came in its place.

        Raises:
            UnsupportedAttentionError: the layer was called without the transformer around it.
        """
        if not isinstance(value, CarriedContext):
            raise UnsupportedAttentionError(
                f"layer {self.method.layer_index} got no context: call the transformer that "
                "apply_attention was given, not its layers"
            )
        return value

    def refuse_mask(self, mask: Any) -> None:
        """Refuse an attention mask.

        Raises:
            UnsupportedAttentionError: there is one.
        """
        if mask is not None:
            raise UnsupportedAttentionError(
                f"layer {self.method.layer_index} got an attention mask; attention "
                f"{self.method.config.name!r} has none: batch samples of equal length"
            )


class ModelAdapter(abc.ABC):
    """How to reach the self-attention of one family of transformers.

    Attributes:
        processor: class of the processors.
        joint_text: whether text tokens are in the sequence, before those of the grid.
        can_reorder: whether `connect` can put the grid's tokens into tile order.
    """

    processor: type[MethodProcessor]
    joint_text: bool = False
    can_reorder: bool = False

    @abc.abstractmethod
    def attention_layers(self, transformer: nn.Module) -> list[nn.Module]:
        """The self-attention layers, first layer first."""

    @abc.abstractmethod
    def context(
        self, transformer: nn.Module, arguments: Mapping[str, Any]
    ) -> AttentionContext | None:
        """The context of a call of the transformer, without hidden states and tile.

        Args:
            transformer: the model.
            arguments: of its forward, by name.

        Returns:
            None where an argument is missing; the transformer's forward then says so.
        """

    @abc.abstractmethod
    def connect(self, transformer: nn.Module, config: AttentionConfig) -> list[RemovableHandle]:
        """Register the hooks that bring the context to the layers."""

    def split_sequence(self, transformer: nn.Module, shard: SequenceShard) -> list[RemovableHandle]:
        """Register the hooks that leave each rank its part of the tokens between the first and the
        last layer; they run after those of `connect`. By default it refuses.

        Raises:
            UnsupportedAttentionError: there is no sequence parallelism for this model.
        """
        why = "it has its text in the sequence" if self.joint_text else "its adapter has none yet"
        raise UnsupportedAttentionError(
            f"no sequence parallelism for a {type(transformer).__name__}: {why}"
        )

    def unsupported_reason(self, transformer: nn.Module, config: AttentionConfig) -> str | None:
        """Why the method cannot work in this model, or None."""
        if config.tile is not None and not self.can_reorder:
            return (
                f"attention.tile is {config.tile}, but the tokens of this model stay in raster "
                "order; set attention.tile to null"
            )
        return None


def register_adapter(class_name: str) -> Callable[[AdapterT], AdapterT]:
    """Class decorator that adds an adapter for the transformers of a class (and its subclasses).

    Args:
        class_name: name of diffusers' class.

    Raises:
        ValueError: the name is taken by another adapter.
    """

    def add(adapter_class: AdapterT) -> AdapterT:
        known = _ADAPTERS.get(class_name)
        if known is not None and type(known).__qualname__ != adapter_class.__qualname__:
            raise ValueError(f"class name {class_name!r} is taken by {type(known).__qualname__}")
        _ADAPTERS[class_name] = adapter_class()
        return adapter_class

    return add


def available_adapters() -> list[str]:
    """Names of the transformer classes that have an adapter, sorted."""
    # They import this module, and diffusers.
    from sla.models import cogvideox, hunyuan, ltx, wan  # noqa: F401

    return sorted(_ADAPTERS)


def adapter_of(transformer: nn.Module) -> ModelAdapter:
    """The adapter of a transformer.

    Raises:
        TypeError: there is none for its class; names those that there are.
    """
    names = available_adapters()
    for parent in type(transformer).__mro__:
        if parent.__name__ in _ADAPTERS:
            return _ADAPTERS[parent.__name__]
    raise TypeError(
        f"no adapter for a {type(transformer).__name__}; there are some for {', '.join(names)}. "
        "register_adapter adds one"
    )


@dataclass
class _Injection:
    """What was done to a transformer; kept on it, and copied with it."""

    config: AttentionConfig
    handles: list[RemovableHandle]
    # Of `ModelAdapter.split_sequence`.
    splitting: list[RemovableHandle] = field(default_factory=list)


def apply_attention(
    transformer: nn.Module, config: AttentionConfig, *, discard: bool = False
) -> nn.Module:
    """Put an attention method into every self-attention of a diffusers transformer, in place.

    Cross-attention stays as it is. The methods' parameters are new, on each layer's device and in
    its dtype (a method may keep some in float32), and train if the method trains them.
    `transformer.save_pretrained` then writes base weights that plain diffusers loads, and the
    methods beside them (`sla.models.pretrained`).

    Args:
        transformer: of a class in `available_adapters()`, weights loaded, possibly compiled.
        config: of a registered method.
        discard: replace methods that were applied before even if they have been trained.

    Returns:
        The transformer.

    Raises:
        TypeError: no adapter for this class, or not the method's config class.
        ValueError: an unknown method, a number out of range, weights that are not loaded (meta
            device), or trained methods that would be lost.
        UnsupportedAttentionError: the method cannot work in this model; says why. What depends on
            sizes that only a call has is refused there.
    """
    from sla.models.pretrained import save_pretrained  # it imports this module

    module = unwrap(transformer)
    adapter = adapter_of(module)
    layers = adapter.attention_layers(module)
    methods = [_build(config, layer, index) for index, layer in enumerate(layers)]
    reason = adapter.unsupported_reason(module, config)
    if reason is None and adapter.joint_text:
        reason = _joint_text_reason(methods[0])
    if reason is not None:
        raise UnsupportedAttentionError(
            f"attention {config.name!r} cannot work in a {type(module).__name__}: {reason}"
        )
    remove_attention(module, discard=discard)
    for layer, method in zip(layers, methods, strict=True):
        processor = adapter.processor(method.train(module.training), layer.processor)
        layer.set_processor(processor)  # type: ignore[operator]
    handles = adapter.connect(module, config)
    setattr(module, _STATE, _Injection(config, handles))
    # An attribute of this one object: what DiffusionPipeline.save_pretrained calls too.
    module.save_pretrained = functools.partial(save_pretrained, module)  # type: ignore[assignment]
    return transformer


def remove_attention(transformer: nn.Module, *, discard: bool = False) -> nn.Module:
    """Give every self-attention its original processor back, in place.

    Does nothing to a transformer without our methods.

    Args:
        transformer: what `apply_attention` was given.
        discard: drop parameters that have been trained.

    Returns:
        The transformer.

    Raises:
        ValueError: parameters of the methods are not as they start, and `discard` is not set.
    """
    module = unwrap(transformer)
    injection = injection_of(module)
    if injection is None:
        return transformer
    trained = [method for method in attention_modules(module) if _is_trained(method)]
    if trained and not discard:
        raise ValueError(
            f"attention {injection.config.name!r} has trained parameters in {len(trained)} layers, "
            "which would be lost; keep them with save_attention, or give discard=True"
        )
    for layer, processor in processors_of(module):
        layer.set_processor(processor.original)  # type: ignore[operator]
    for handle in [*injection.handles, *injection.splitting]:
        handle.remove()
    delattr(module, _STATE)
    del module.save_pretrained
    return transformer


def attention_modules(transformer: nn.Module) -> Iterator[AttentionMethod]:
    """The method of every self-attention, first layer first; none before `apply_attention`."""
    for _, processor in processors_of(unwrap(transformer)):
        yield processor.method


def attention_config(transformer: nn.Module) -> AttentionConfig | None:
    """The config of the methods in it, or None."""
    injection = injection_of(unwrap(transformer))
    return None if injection is None else injection.config


@contextmanager
def original_processors(transformer: nn.Module) -> Iterator[None]:
    """Within the block the transformer has its original processors and no parameter of ours."""
    pairs = list(processors_of(unwrap(transformer)))
    try:
        for layer, processor in pairs:
            layer.set_processor(processor.original)  # type: ignore[operator]
        yield
    finally:
        for layer, processor in pairs:
            layer.set_processor(processor)  # type: ignore[operator]


def unwrap(transformer: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    module: nn.Module = getattr(transformer, "_orig_mod", transformer)
    return module


def injection_of(module: nn.Module) -> _Injection | None:
    """What `apply_attention` noted on a module, or None."""
    found: _Injection | None = getattr(module, _STATE, None)
    return found


def processors_of(module: nn.Module) -> Iterator[tuple[nn.Module, MethodProcessor]]:
    """The layers that have a processor of ours, with it, first layer first."""
    if injection_of(module) is None:
        return
    for layer in adapter_of(module).attention_layers(module):
        if isinstance(layer.processor, MethodProcessor):
            yield layer, layer.processor


def layer_sizes(layer: Any) -> tuple[int, int, int]:
    """H, D and dim of one of diffusers' attention layers."""
    # Of the linear layer and not of its weight, which may be packed or a LoRA's.
    return layer.heads, layer.to_q.out_features // layer.heads, layer.to_q.in_features


def _build(config: AttentionConfig, layer: Any, index: int) -> AttentionMethod:
    weight: Tensor = layer.to_q.weight
    if weight.is_meta:
        raise ValueError(
            "the transformer's weights are on the meta device; load them first, apply the "
            "attention second, and turn offloading on after that"
        )
    method = build_attention(config, *layer_sizes(layer), index)
    # Quantised weights have no floating dtype: the methods then stay in float32.
    return method.to(weight.device, weight.dtype if weight.is_floating_point() else None)


def _joint_text_reason(method: AttentionMethod) -> str | None:
    """Why the method cannot work with text tokens in the sequence, or None.

    What it says to eight tokens with text and does not say to eight without.
    """
    tokens = torch.empty(1, method.num_heads, 8, method.head_dim, device="meta")
    hidden = torch.empty(1, 8, method.dim, device="meta")
    text = AttentionContext(grid=(1, 1, 7), hidden_states=hidden, always_critical=1)
    without = AttentionContext(grid=(2, 2, 2), hidden_states=hidden)
    reason = method.unsupported_reason(tokens, tokens, tokens, text)
    if reason == method.unsupported_reason(tokens, tokens, tokens, without):
        return None
    return f"its text tokens are part of the sequence ({reason})"


def _is_trained(method: AttentionMethod) -> bool:
    """Whether a parameter differs from where the method starts."""
    sizes = (method.num_heads, method.head_dim, method.dim, method.layer_index)
    start = build_attention(method.config, *sizes).state_dict()
    return any(
        not torch.equal(value.detach().cpu(), start[name].to(value.dtype))
        for name, value in method.state_dict().items()
    )


class _Hooks:
    """Hooks that carry the context of a call to the layers.

    Bound methods of an object, not closures: copying the transformer copies them.
    """

    def __init__(
        self, adapter: ModelAdapter, transformer: nn.Module, config: AttentionConfig
    ) -> None:
        self.adapter = adapter
        self.tile = config.tile
        # Read once: binding arguments by signature would break a compiled graph.
        self.names = tuple(inspect.signature(transformer.forward).parameters)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of the transformer's forward by name."""
        if len(args) > len(self.names):
            raise TypeError(
                f"{len(args)} arguments by position; the transformer takes {len(self.names)}: "
                f"{', '.join(self.names)}"
            )
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def make(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> AttentionContext | None:
        """The context of the call, or None where an argument is missing."""
        context = self.adapter.context(transformer, arguments)
        if context is not None and self.tile is not None:
            context = replace(context, tile=self.tile)
        return context


class ArgumentHooks(_Hooks):
    """Carry the context in an argument of the transformer that it hands to its layers as it is."""

    def __init__(
        self,
        adapter: ModelAdapter,
        transformer: nn.Module,
        config: AttentionConfig,
        argument: str,
    ) -> None:
        super().__init__(adapter, transformer, config)
        self.argument = argument

    def connect(self, transformer: nn.Module) -> list[RemovableHandle]:
        return [transformer.register_forward_pre_hook(self.before, with_kwargs=True)]

    def before(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = self.arguments(args, kwargs)
        context = self.make(transformer, arguments)
        if context is None:
            return None
        arguments[self.argument] = CarriedContext(arguments.get(self.argument), context)
        return (), arguments


class RotaryHooks(_Hooks):
    """Carry the context with what the transformer's rotary module returns.

    The context waits here from the start of the call to that module, and no longer.
    """

    def __init__(
        self, adapter: ModelAdapter, transformer: nn.Module, config: AttentionConfig
    ) -> None:
        super().__init__(adapter, transformer, config)
        self.waiting: AttentionContext | None = None

    def connect(self, transformer: nn.Module, rotary: nn.Module) -> list[RemovableHandle]:
        return [
            transformer.register_forward_pre_hook(self.before, with_kwargs=True),
            rotary.register_forward_hook(self.after_rotary),
        ]

    def before(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.waiting = self.make(transformer, self.arguments(args, kwargs))
        return None

    def after_rotary(self, rotary: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        context, self.waiting = self.waiting, None
        return output if context is None else CarriedContext(output, context)


def per_sample(timestep: Any, batch: int, device: torch.device) -> Tensor | None:
    """(B,) timesteps from what transformers take: a number, (), (B,), or one a token.

    Of several in a sample the largest: tokens that are given rather than generated have less.
    """
    if timestep is None:
        return None
    if not isinstance(timestep, Tensor):
        return torch.full((batch,), float(timestep), device=device)
    if timestep.ndim == 0:
        return timestep.expand(batch)
    if timestep.ndim == 1 and timestep.shape[0] == batch:
        return timestep
    return timestep.reshape(batch, -1).amax(dim=1)


__all__ = [
    "ArgumentHooks",
    "CarriedContext",
    "MethodProcessor",
    "ModelAdapter",
    "RotaryHooks",
    "adapter_of",
    "apply_attention",
    "attention_config",
    "attention_modules",
    "available_adapters",
    "original_processors",
    "register_adapter",
    "remove_attention",
]
