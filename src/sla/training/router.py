"""Stage 1 of SLA2: routers and mixing ratios on captured queries, keys and values.

Of each layer, router and mixing ratio alone are trained to give the output of exact attention, in
mean squared error, with SoftTop-k in place of the hard top-k (arXiv 2602.12675, Algorithm 1). Then
the router is frozen, and stage 2 is `sla.training.run.finetune` with `run.router_weights`.

Shape letters as in `sla.attention.interface`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sla_kernels.block_map import block_counts, num_blocks
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sla.analysis.capture_qkv import QKVSample, capture_qkv
from sla.attention import FullConfig, SLA2Attention, SLA2Config
from sla.diffusion.flow_matching import per_sample_noise
from sla.files import atomic_path, write_text
from sla.models.video_model import VideoModel
from sla.training.build import (
    build_data,
    build_module,
    build_networks,
    sampling_device,
)
from sla.training.config import Experiment, RouterConfig
from sla.training.run_folder import RunError

log = logging.getLogger(__name__)

FORMAT = "sla-router"
VERSION = 1
DEFAULT_NAME = "router.safetensors"
_HEADER_KEY = "sla"
_LOG_EVERY = 50


@dataclass(frozen=True)
class Quality:
    """A method with hard top-k, at its config's critical fraction, against exact attention.

    Attributes:
        error: mean squared error of the output.
        recall: mass of the exact attention weights that lies on the critical blocks, mean over
            queries, in [0, 1].
    """

    error: float
    recall: float


@dataclass(frozen=True)
class RouterReport:
    """What `train_router` did to one layer.

    Attributes:
        losses: mean squared error of each step, with SoftTop-k (hard if straight through).
        before, after: quality with hard top-k, on the same samples and query blocks.
        alpha: mean mixing ratio after.
    """

    losses: list[float]
    before: Quality
    after: Quality
    alpha: float


def train_router(
    method: SLA2Attention, samples: Sequence[QKVSample], config: RouterConfig, *, seed: int = 0
) -> RouterReport:
    """Train the router and the mixing ratio of one layer; all else stays as it is.

    A step takes one sample and some of its query blocks. The critical fractions of the config come
    one after the other. The router is frozen again at the end, also after an error.

    Args:
        method: the layer's method, on the device to train on.
        samples: captured samples of the layer; the tensors stay where they are.
        config: the numbers; those of capturing are not looked at.
        seed: of the order of the samples and of the query blocks.

    Raises:
        ValueError: no samples, or samples of too few blocks to choose among.
        UnsupportedAttentionError: samples that do not fit the method.
    """
    if not samples:
        raise ValueError(f"samples of layer {method.layer_index} is empty; capture some first")
    for sample in samples:
        _check_choice(method, sample, config)
    generator = torch.Generator().manual_seed(seed)
    before = measure(method, samples, config.query_blocks, seed=seed)
    method.router.requires_grad_(True)
    # At tau = 0.1 the gradients of the router are tiny: probabilities of 1 / T_n hardly move a
    # mask. Adam's usual epsilon would drown them.
    optimizer = torch.optim.Adam(
        [
            {"params": method.router_parameters(), "lr": config.learning_rate},
            {"params": list(method.mixing.parameters()), "lr": config.mixing_learning_rate},
        ],
        eps=1e-16,
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    device = trained[0].device
    losses: list[Tensor] = []
    try:
        for step in range(config.steps):
            critical = config.critical[step * len(config.critical) // config.steps]
            choice = int(torch.randint(len(samples), (), generator=generator))
            query, key, value = _batch(samples[choice], device)
            rows = _draw_rows(method, query, config.query_blocks, generator)
            with torch.no_grad():
                tokens = method.row_tokens(rows, query.shape[2])
                target = scaled_dot_product_attention(query[:, :, tokens], key, value)
            output = method.soft_attend(
                query,
                key,
                value,
                samples[choice].context(device),
                critical=critical,
                tau=config.tau,
                straight_through=config.straight_through,
                rows=rows,
            )
            loss = F.mse_loss(output, target.to(output.dtype))
            # Of these parameters alone: a model around the method may train others.
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses.append(loss.detach())
            if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.steps:
                recent = torch.stack(losses[-_LOG_EVERY:]).mean().item()
                log.info(
                    f"layer {method.layer_index}, step {step + 1} of {config.steps}, "
                    f"critical {critical:g}: loss {recent:.4g}"
                )
    finally:
        method.freeze_router()
        for parameter in trained:
            parameter.grad = None
    after = measure(method, samples, config.query_blocks, seed=seed)
    log.info(
        f"layer {method.layer_index}: recall {before.recall:.3f} -> {after.recall:.3f}, "
        f"error {before.error:.4g} -> {after.error:.4g} with hard top-k"
    )
    alpha = method.mixing().mean().item()
    return RouterReport([loss.item() for loss in losses], before, after, alpha)


@torch.no_grad()
def measure(
    method: SLA2Attention, samples: Sequence[QKVSample], query_blocks: int, *, seed: int = 0
) -> Quality:
    """Error and recall of a method with hard top-k on samples.

    Args:
        method: on the device to compute on.
        samples: captured samples of its layer.
        query_blocks: query blocks of a sample at which recall is measured; the error is that of
            all queries.
        seed: of their choice.
    """
    generator = torch.Generator().manual_seed(seed)
    device = method.router.proj_q.device
    errors, recalls = [], []
    for sample in samples:
        query, key, value = _batch(sample, device)
        context = sample.context(device)
        exact = scaled_dot_product_attention(query, key, value)
        errors.append(F.mse_loss(method(query, key, value, context).float(), exact.float()))
        rows = _draw_rows(method, query, query_blocks, generator)
        labels = method.block_map(query, key, context).labels
        mass = []
        for row in rows:  # one at a time: the weights of a row are block_q x N a head
            tokens = method.row_tokens(row[None], query.shape[2])
            scores = query[:, :, tokens].float() @ key.float().transpose(-1, -2)
            weights = torch.softmax(scores * method.head_dim**-0.5, dim=-1)
            critical = (labels[:, :, row] == 1).repeat_interleave(method.config.block_kv, dim=-1)
            critical = critical[:, :, None, : key.shape[2]]
            mass.append((weights * critical).sum(dim=-1).flatten())
        recalls.append(torch.cat(mass).mean())
    return Quality(torch.stack(errors).mean().item(), torch.stack(recalls).mean().item())


def train_routers(
    experiment: Experiment, resolved: Mapping[str, Any]
) -> tuple[Path, list[RouterReport]]:
    """Stage 1 of a whole model: capture under full attention, train each layer, write the file.

    Args:
        experiment: with `attention.name=sla2` and `run.init_weights`; `router` has the numbers.
        resolved: the same as plain values, kept in the file.

    Returns:
        The file written, `router.safetensors` in the run's folder (with `router.json`, a report),
        and the report of each layer.

    Raises:
        RunError: another attention method, or no pretrained weights.
        CaptureError: the samples would exceed `router.max_gib`.
    """
    if not isinstance(experiment.attention, SLA2Config):
        raise RunError(
            f"attention.name is {experiment.attention.name!r}; stage 1 trains the router of 'sla2'"
        )
    if not experiment.run.init_weights:
        raise RunError("run.init_weights is empty; routers are trained on a pretrained model")
    model, samples = capture_samples(experiment)
    model.set_attention(experiment.attention)
    reports = []
    for method in model.attention_modules():
        assert isinstance(method, SLA2Attention)
        of_layer = [sample for sample in samples if sample.layer == method.layer_index]
        reports.append(train_router(method, of_layer, experiment.router, seed=experiment.run.seed))
    folder = Path(experiment.run.dir) / experiment.run.name
    path = folder / DEFAULT_NAME
    save_router(path, model, metadata={"experiment": dict(resolved)})
    report = {"layers": [asdict(layer) for layer in reports]}
    write_text(path.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    return path, reports


@torch.no_grad()
def capture_samples(experiment: Experiment) -> tuple[VideoModel, list[QKVSample]]:
    """Queries, keys and values of the pretrained model under full attention, and the model.

    `router.clips` training clips, each at a timestep of its own, evenly spread over the density
    that training draws from. Tokens are in the order of the experiment's attention.
    """
    config, seed = experiment.router, experiment.run.seed
    full = FullConfig(tile=experiment.attention.tile)
    model, text_encoder = build_networks(experiment, full, experiment.run.init_weights)
    module = build_module(experiment, model, text_encoder).eval()
    module.to(sampling_device(experiment.trainer))
    data = build_data(replace(experiment, data=replace(experiment.data, batch_size=1)))
    batches = iter(data.train_dataloader())
    limit = int(config.max_gib * 2**30)
    with capture_qkv(model, per_layer=config.clips, max_bytes=limit) as samples:
        for clip in range(config.clips):
            batch = next(batches)
            batch["video"] = batch["video"].to(module.device)
            noise, u = per_sample_noise(
                batch["sample_index"], seed, batch["video"].shape[1:], module.device
            )
            sigma = module.flow.sample_sigma((clip + u) / config.clips)
            module.losses(batch, sigma, noise)
    return model, samples


def save_router(
    path: str | os.PathLike[str], model: VideoModel, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write routers and mixing ratios of all layers to a `.safetensors` file.

    Raises:
        RunError: the model's attention is not SLA2.
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in _router_state(model).items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "attention": asdict(model.attention_config),
        "metadata": dict(metadata or {}),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER_KEY: json.dumps(header)})


def load_router(path: str | os.PathLike[str], model: VideoModel) -> None:
    """Load what `save_router` wrote into a model with SLA2. Everything fits or nothing is changed.

    Other numbers of the method may differ, such as its critical fraction; what a router was trained
    to see may not: block sizes, smoothing, token order.

    Raises:
        RunError: no such file, not such a file, damaged, or not of this model; lists what is wrong.
    """
    source = Path(path)
    expected = _router_state(model)
    if not source.is_file():
        raise RunError(
            f"run.router_weights is {str(path)!r}, which is no file; make it with "
            "`python -m sla router`"
        )
    try:
        with safe_open(source, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER_KEY, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise RunError(f"{source} is not a readable router file: {error}") from error
    if header.get("format") != FORMAT or header.get("version", math.inf) > VERSION:
        raise RunError(
            f"{source} has format {header.get('format')!r} version {header.get('version')}; this "
            f"code reads {FORMAT!r} up to version {VERSION}"
        )
    wrong = [
        f"{name}: {'absent' if name not in tensors else tuple(tensors[name].shape)} in the file, "
        f"{'absent' if name not in expected else tuple(expected[name].shape)} in the model"
        for name in sorted({*tensors, *expected})
        if name not in tensors
        or name not in expected
        or tensors[name].shape != expected[name].shape
    ]
    stored = header.get("attention", {})
    now = json.loads(json.dumps(asdict(model.attention_config)))
    wrong += [
        f"attention.{name}: {stored.get(name)!r} in the file, {now[name]!r} in the model"
        for name in ("block_q", "block_kv", "smooth_key", "mixing", "tile")
        if stored.get(name) != now[name]
    ]
    if wrong:
        raise RunError("\n  ".join([f"{source} does not fit the model:", *wrong]))
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)


def _router_state(model: VideoModel) -> dict[str, Tensor]:
    """Live parameters of stage 1 by name: layers.0.router.proj_q, layers.0.mixing.logit, ..."""
    state: dict[str, Tensor] = {}
    for method in model.attention_modules():
        if not isinstance(method, SLA2Attention):
            raise RunError(
                f"attention.name is {method.config.name!r}; routers belong to 'sla2' alone"
            )
        for part, module in (("router", method.router), ("mixing", method.mixing)):
            for name, parameter in module.named_parameters():
                state[f"layers.{method.layer_index}.{part}.{name}"] = parameter
    return state


def _check_choice(method: SLA2Attention, sample: QKVSample, config: RouterConfig) -> None:
    tokens, block = sample.key.shape[1], method.config.block_kv
    blocks, forced = num_blocks(tokens, block), num_blocks(sample.always_critical, block)
    for fraction in config.critical:
        chosen, _ = block_counts(fraction, 0.0, blocks, forced)
        if not forced < chosen < blocks:
            raise ValueError(
                f"samples of layer {method.layer_index} have {tokens} tokens, {blocks} key blocks "
                f"of {block}: with {chosen} of them critical at router.critical {fraction:g} there "
                "is nothing to choose"
            )


def _batch(sample: QKVSample, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The sample as a batch of one, (1, H, N, D) each."""
    query, key, value = (t.to(device)[None] for t in (sample.query, sample.key, sample.value))
    return query, key, value


def _draw_rows(
    method: SLA2Attention, query: Tensor, wanted: int, generator: torch.Generator
) -> Tensor:
    """Up to `wanted` different query blocks in ascending order, int64 on the query's device."""
    blocks = math.ceil(query.shape[2] / method.config.block_q)
    order = torch.randperm(blocks, generator=generator)
    return order[:wanted].sort().values.to(query.device)
