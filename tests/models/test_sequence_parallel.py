"""Sequence parallelism on two processes against one, in a tiny Wan of diffusers.

The processes run this file once for all tests; what they find is checked here.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sla.attention import (
    AttentionConfig,
    FullConfig,
    LinearOnlyConfig,
    LinearPlusSparseConfig,
    SLA2Config,
    SLAConfig,
    SpargeConfig,
    SparseOnlyConfig,
    SparsePooledConfig,
    UnsupportedAttentionError,
    VMoBAConfig,
    VSAConfig,
)
from sla.models.cogvideox import CogVideoXAdapter
from sla.models.injection import (
    apply_attention,
    attention_config,
    attention_modules,
    remove_attention,
)
from sla.models.pretrained import load_model
from sla.models.sequence_parallel import (
    average_gradients,
    disable_sequence_parallel,
    enable_sequence_parallel,
    sequence_parallel_group,
)
from sla.models.testing import open_branches
from sla.models.wan import WAN_CONFIGS, build_wan

RANKS = 2
BLOCKS: dict[str, Any] = {"block_q": 8, "block_kv": 8}
METHODS: dict[str, AttentionConfig] = {
    "full": FullConfig(),
    "linear_only": LinearOnlyConfig(feature_map="hedgehog"),
    "sparse_only": SparseOnlyConfig(critical=0.3, **BLOCKS),
    "sparse_only in tiles": SparseOnlyConfig(critical=0.3, tile=(2, 2, 3), **BLOCKS),
    "linear_plus_sparse": LinearPlusSparseConfig(critical=0.3, **BLOCKS),
    "sparse_pooled": SparsePooledConfig(critical=0.3, **BLOCKS),
    "sla": SLAConfig(critical=0.3, negligible=0.2, **BLOCKS),
    "sla of all keys": SLAConfig(critical=0.3, linear_scope="all", **BLOCKS),
    "sla2": SLA2Config(critical=0.3, **BLOCKS),
    "sla2 by head": SLA2Config(critical=0.3, mixing="head", **BLOCKS),
    "sla2 by block": SLA2Config(critical=0.3, mixing="block", mixing_blocks=9, **BLOCKS),
    "sparge": SpargeConfig(selection="density", critical=0.3, **BLOCKS),
    "vsa": VSAConfig(critical=0.5, cube=(2, 2, 2)),
    "vsa, both gates": VSAConfig(critical=0.5, cube=(2, 2, 2), fine_gate="learned"),
    "vsa in tiles": VSAConfig(critical=0.5, cube=(2, 2, 3), tile=(2, 2, 3)),
    "vmoba": VMoBAConfig(threshold=0.4, temporal=1, spatial=(2, 2), spatio_temporal=(2, 2, 2)),
}


def four_heads() -> Any:
    """The tiny Wan with two heads for each of two ranks."""
    torch.manual_seed(0)
    return WanTransformer3DModel(**WAN_CONFIGS["tiny"] | {"num_attention_heads": 4}).eval()


def prepared(config: AttentionConfig) -> Any:
    model = apply_attention(four_heads(), config)
    for method in attention_modules(model):
        open_branches(method)
    return model


def inputs(height: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of 3 x 4 x 6 patches, timesteps and text."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, height, 12, generator=generator)
    return latents, torch.tensor([900.0, 100.0]), torch.randn(2, 7, 16, generator=generator)


def step(model: nn.Module, *arguments: Tensor) -> dict[str, Tensor]:
    """The output, and after a backward the gradient of every parameter."""
    model.zero_grad()
    latents, *others = arguments or inputs()
    latents = latents.clone().requires_grad_()
    output = model(latents, *others, return_dict=False)[0]
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (weights * output + output.square()).mean().backward()
    average_gradients(getattr(model, "module", model))
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {"output": output.detach(), **{n: g.clone() for n, g in found.items() if g is not None}}


def both(model: Any, *arguments: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process finds, and what two do."""
    alone = step(model, *arguments)
    return alone, step(enable_sequence_parallel(model, RANKS), *arguments)


# In the processes


def every_method(folder: Path) -> Any:
    return {name: both(prepared(config)) for name, config in METHODS.items()}


def timesteps_of_tokens(folder: Path) -> Any:
    latents, _, text = inputs()
    timestep = torch.linspace(0, 900, 72).expand(2, -1)
    config = SparseOnlyConfig(critical=0.3, tile=(2, 2, 3), **BLOCKS)
    return both(prepared(config), latents, timestep, text)


def checkpointed(folder: Path) -> Any:
    model = prepared(METHODS["vsa"])
    alone = step(model)
    model.enable_gradient_checkpointing()
    model.train()
    return alone, step(enable_sequence_parallel(model, RANKS))


def compiled(folder: Path) -> Any:
    """Blocks compiled and recomputed, as a run of Wan has them."""
    model = prepared(FullConfig())
    alone = step(model)
    enable_sequence_parallel(model, RANKS)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    model.enable_gradient_checkpointing()
    model.train()
    return alone, step(model)


def autocast(folder: Path) -> Any:
    model = prepared(METHODS["sla"])
    # Two dtypes in one layer: normalisation that autocast keeps in float32.
    for block in model.blocks:
        block.attn1.norm_q.register_forward_hook(lambda *args: args[2].float())
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    seen: list[list[torch.dtype]] = []
    for method in attention_modules(model):
        method.register_forward_pre_hook(lambda _, args: seen.append([x.dtype for x in args[:3]]))
    found = both(model)
    assert seen == [[torch.float32, torch.bfloat16, torch.bfloat16]] * 4, seen
    return found


def data_parallel(folder: Path) -> Any:
    """`DistributedDataParallel` averages, and nothing else does."""
    model = prepared(METHODS["sla2 by head"])
    alone = step(model)
    enable_sequence_parallel(model, dist.device_mesh.init_device_mesh("cpu", (RANKS,)))
    wrapped = DistributedDataParallel(model)
    again = step(wrapped)
    disable_sequence_parallel(model)
    return alone, again


def sharded(folder: Path) -> Any:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = prepared(METHODS["vsa"])
    alone = step(model)
    enable_sequence_parallel(model, dist.group.WORLD)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.zero_grad()
    latents, timestep, text = inputs()
    output = model(latents, timestep, text, return_dict=False)[0]
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (weights * output + output.square()).mean().backward()
    found = {"output": output.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            found[name] = parameter.grad.full_tensor()
    return alone, found


def what_methods_get(folder: Path) -> Any:
    model = enable_sequence_parallel(prepared(METHODS["sla"]), RANKS)
    seen: list[Any] = []

    def look(method: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        context = args[3]
        seen.append((tuple(args[0].shape), tuple(output.shape), context.grid))

    for method in attention_modules(model):
        method.register_forward_hook(look)
    with torch.inference_mode():
        model(*inputs())
    return seen


def messages(folder: Path) -> Any:
    """What is refused. Calls of one rank alone would wait for ever, did they communicate."""
    model = apply_attention(build_wan("tiny"), FullConfig())
    three = WanTransformer3DModel(**WAN_CONFIGS["tiny"] | {"num_attention_heads": 3})
    apply_attention(three, FullConfig())
    lost = apply_attention(build_wan("tiny"), FullConfig())
    lost.blocks[1].attn1.set_processor(lost.blocks[1].attn2.processor)
    second = dist.new_group([1])
    found = {
        "lost": refusal(lambda: enable_sequence_parallel(lost, RANKS)),
        "degree": refusal(lambda: enable_sequence_parallel(model, 3)),
        "heads": refusal(lambda: enable_sequence_parallel(three, RANKS)),
    }
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tokens"))
    found["mesh"] = refusal(lambda: enable_sequence_parallel(model, mesh))
    if dist.get_rank() == 0:
        found["group"] = refusal(lambda: enable_sequence_parallel(model, second))
    assert sequence_parallel_group(three) is None
    enable_sequence_parallel(model, RANKS)
    if dist.get_rank() == 0:
        latents, timestep, text = inputs()
        odd = latents[..., :10, :10][:, :, :, :6]
        found["tokens"] = refusal(lambda: model(odd, timestep, text))
    return found


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except (ValueError, TypeError) as error:
        return type(error).__name__, str(error)
    return "", ""


def switching(folder: Path) -> Any:
    model = prepared(METHODS["vsa"])
    first = copy.deepcopy(model.state_dict())
    before = model(*inputs()).sample.detach()
    on = enable_sequence_parallel(model, RANKS)(*inputs()).sample.detach()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0)
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    changed = copied(*inputs()).sample.detach()
    kept = model(*inputs()).sample.detach()
    same = {n: torch.equal(v, first[n]) for n, v in model.state_dict().items()}
    config = attention_config(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "saved")
    group = sequence_parallel_group(model)
    disable_sequence_parallel(model)
    off = model(*inputs()).sample.detach()
    disable_sequence_parallel(copied)
    changed_alone = copied(*inputs()).sample.detach()
    enable_sequence_parallel(model, group)
    remove_attention(model, discard=True)
    dense = four_heads()(*inputs()).sample.detach()
    removed = model(*inputs()).sample.detach()
    return {
        "before": before,
        "on": on,
        "kept": kept,
        "off": off,
        "changed": changed,
        "changed_alone": changed_alone,
        "dense": dense,
        "removed": removed,
        "same": same == dict.fromkeys(first, True),
        "config": config,
    }


JOBS = (
    every_method,
    timesteps_of_tokens,
    checkpointed,
    compiled,
    autocast,
    data_parallel,
    sharded,
    what_methods_get,
    messages,
    switching,
)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found = {}
    for job in JOBS:
        found[job.__name__] = job(folder)
        dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


# In pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def assert_same(alone: dict[str, Tensor], together: dict[str, Tensor], limit: float) -> None:
    """Every tensor, relative to its largest number."""
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        scale = expected.abs().max()
        assert scale > 0, name
        assert (together[name] - expected).abs().max() <= limit * scale, name


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_are_one(ranks: list[Any], name: str) -> None:
    for rank in ranks:
        alone, together = rank["every_method"][name]
        assert_same(alone, together, 1e-5)
    outputs = [rank["every_method"][name][1]["output"] for rank in ranks]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "job", ["timesteps_of_tokens", "checkpointed", "compiled", "data_parallel", "sharded"]
)
def test_ways_to_train(ranks: list[Any], job: str) -> None:
    for rank in ranks:
        assert_same(*rank[job], 1e-5)


def test_under_autocast(ranks: list[Any]) -> None:
    for rank in ranks:
        assert_same(*rank["autocast"], 0.03)


def test_methods_get_all_tokens_of_some_heads(ranks: list[Any]) -> None:
    shape = (2, 2, 72, 16)
    for rank in ranks:
        assert rank["what_methods_get"] == [(shape, shape, (3, 4, 6))] * 2


def test_refusals_of_ranks(ranks: list[Any]) -> None:
    first, second = (rank["messages"] for rank in ranks)
    for found in (first, second):
        assert found["degree"] == ("ValueError", "group is 3, which does not divide the 2 ranks")
        kind, text = found["heads"]
        assert kind == "UnsupportedAttentionError"
        assert "3 heads, which do not divide by the sequence parallel degree 2" in text
        assert "1 of 2 layers have lost their method" in found["lost"][1]
        assert "2 dimensions" in found["mesh"][1]
    assert first["group"] == ("ValueError", "group does not have this rank, 0")
    kind, text = first["tokens"]
    assert kind == "UnsupportedAttentionError"
    assert "3 x 3 x 5 is 45 tokens, which do not divide" in text
    assert "degree 2" in text


def test_on_and_off(ranks: list[Any], folder: Path) -> None:
    for rank in ranks:
        found = rank["switching"]
        assert found["same"]
        assert found["config"] == METHODS["vsa"]
        torch.testing.assert_close(found["on"], found["before"], atol=1e-5, rtol=0)
        assert torch.equal(found["kept"], found["on"])
        assert torch.equal(found["off"], found["before"])
        torch.testing.assert_close(found["changed"], found["changed_alone"], atol=1e-5, rtol=1e-5)
        assert (found["changed"] - found["on"]).abs().max() > 1e-2
        assert torch.equal(found["removed"], found["dense"])
    loaded = load_model(folder / "saved")
    expected = ranks[0]["switching"]["before"]
    torch.testing.assert_close(loaded(*inputs()).sample, expected)


def test_one_rank_is_none() -> None:
    model = apply_attention(build_wan("tiny"), SLAConfig())
    expected = model(*inputs()).sample
    assert enable_sequence_parallel(model, 1) is model
    assert sequence_parallel_group(model) is None
    assert torch.equal(model(*inputs()).sample, expected)
    average_gradients(model)
    assert disable_sequence_parallel(model) is model


def test_refusals_of_one_process() -> None:
    model = build_wan("tiny")
    with pytest.raises(ValueError, match="apply_attention first"):
        enable_sequence_parallel(model, 2)
    assert disable_sequence_parallel(model) is model
    apply_attention(model, FullConfig())
    with pytest.raises(ValueError, match="init_process_group"):
        enable_sequence_parallel(model, 2)
    with pytest.raises(ValueError, match="group is 0"):
        enable_sequence_parallel(model, 0)
    with pytest.raises(TypeError, match="group is a str"):
        enable_sequence_parallel(model, "2")  # type: ignore[arg-type]
    shard: Any = None
    with pytest.raises(UnsupportedAttentionError, match="text in the sequence"):
        CogVideoXAdapter().split_sequence(model, shard)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
