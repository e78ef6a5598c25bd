"""Which weights are trained: all, the attention methods' own, or those and low-rank additions."""

from __future__ import annotations

from typing import Any

from torch import nn

from sla.models.video_model import VideoModel
from sla.training.config import OptimConfig
from sla.training.run_folder import RunError


def choose_trainable(model: VideoModel, text_encoder: object, optim: OptimConfig) -> None:
    """Freeze what `optim.trainable` leaves out, and add LoRA where it asks for it, in place.

    Call it when the model has its weights and its attention, before optimisers and averages.

    Args:
        text_encoder: frozen with the rest, if it is a module.

    Raises:
        RunError: nothing to train, or LoRA targets that the model does not have; names both.
    """
    if optim.trainable == "all":
        return
    model.requires_grad_(False)
    if isinstance(text_encoder, nn.Module):
        text_encoder.requires_grad_(False)
    own = [p for method in model.attention_modules() for p in method.parameters()]
    for parameter in own:
        parameter.requires_grad_(True)
    if optim.trainable == "lora":
        _add_lora(model, optim)
    elif not own:
        raise RunError(
            f"optim.trainable is 'methods', but attention {model.attention_config.name!r} has no "
            "parameters of its own; 'all' or 'lora' would train something"
        )


def _add_lora(model: VideoModel, optim: OptimConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(optim.lora_targets or model.lora_targets)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in _linear(model)):
            raise RunError(
                f"optim.lora_targets: {target!r} ends the name of no linear layer of the model; "
                f"its usual targets are {', '.join(model.lora_targets)}"
            )
    # The methods keep their parameters whole; peft would freeze them, and adapt theirs.
    own = {id(p): p for method in model.attention_modules() for p in method.parameters()}
    prefixes = [f"{name}." for name, part in model.named_modules() if part in _methods(model)]
    chosen = [
        name
        for name, _ in _linear(model)
        if any(name == target or name.endswith(f".{target}") for target in targets)
        and not any(name.startswith(prefix) for prefix in prefixes)
    ]
    config = LoraConfig(r=optim.lora_rank, lora_alpha=optim.lora_alpha, target_modules=chosen)
    inject_adapter_in_model(config, model)
    for parameter in own.values():
        parameter.requires_grad_(True)


def merge_lora(model: VideoModel) -> int:
    """Add LoRA's products to the weights that they adapt, in place, and take the adapters out.

    The model is then one without LoRA, which any code loads.

    Returns:
        How many layers had one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    for parent, name, child in found:
        layer: Any = child
        layer.merge(safe_merge=True)
        setattr(parent, name, layer.get_base_layer())
    return len(found)


def _linear(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]


def _methods(model: VideoModel) -> set[nn.Module]:
    return set(model.attention_modules())


__all__ = ["choose_trainable", "merge_lora"]
