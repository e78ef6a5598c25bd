"""Every registered attention method, through the one interface."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sla.attention import (
    AttentionConfig,
    AttentionContext,
    AttentionMethod,
    FullConfig,
    SLAConfig,
    SparseOnlyConfig,
    UnsupportedAttentionError,
    attention_config_class,
    attention_config_from_dict,
    available_attention,
    build_attention,
    register_attention,
)

HEADS, HEAD_DIM, GRID = 2, 16, (4, 6, 8)
TOKENS = 4 * 6 * 8


def hidden_states(batch: int) -> torch.Tensor:
    shape = (batch, TOKENS, HEADS * HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


CONTEXT = AttentionContext(grid=GRID, hidden_states=hidden_states(2))
# Numbers that suit so few tokens, and those at which a method is exact attention.
_BLOCKS: dict[str, object] = {"block_q": 16, "block_kv": 8, "critical": 0.1}
SMALL: dict[str, dict[str, object]] = {
    "sparse_only": _BLOCKS,
    "sparse_pooled": _BLOCKS,
    "sla": _BLOCKS,
    "sla2": _BLOCKS,
    "linear_plus_sparse": _BLOCKS,
    "sparge": {**_BLOCKS, "selection": "density"},
    "vsa": {"cube": (2, 2, 2), "fine_gate": "learned"},
    "vmoba": {"temporal": 1, "threshold": 0.27, "block_q": 8, "block_kv": 8},
}
EXACT: dict[str, dict[str, object]] = {
    "full": {},
    "sparse_only": {"critical": 1.0},
    "sparse_pooled": {"critical": 1.0},
    "sla": {"critical": 1.0, "negligible": 0.0},
    "sla2": {"critical": 1.0},
    "sparge": {"critical": 1.0},
    "vsa": {"critical": 1.0},
    "vmoba": {"threshold": 1.0},
}
# Parameters that fine-tuning does not train: a hard top-k gives a learned router no gradient.
FROZEN: dict[str, set[str]] = {"sla2": {"router.proj_q", "router.proj_k"}}

# Parameters with a head axis, which go with the heads: their rows are (heads, head_dim).
HEAD_ROWS: dict[str, tuple[str, ...]] = {"vsa": ("to_gate_compress.", "to_gate_fine.")}


def build(name: str, **numbers: object) -> AttentionMethod:
    config = attention_config_class(name)(**{**SMALL.get(name, {}), **numbers})
    return build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)


def inputs(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, TOKENS, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def shake(method: AttentionMethod) -> None:
    """Move learnable parts off their initial values, so that they matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_full_density_is_exact_attention(name: str) -> None:
    method = build(name, **EXACT[name])
    query, key, value = (t.requires_grad_() for t in inputs())
    exact = scaled_dot_product_attention(query, key, value)
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad((exact * weight).sum(), (query, key, value))
    output = method(query, key, value, CONTEXT)
    found = torch.autograd.grad((output * weight).sum(), (query, key, value))
    torch.testing.assert_close(output, exact, atol=2e-6, rtol=1e-5)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert method.density(GRID) in (1.0, None)
    assert method.exact_fraction(query, key, CONTEXT) == 1.0


@pytest.mark.parametrize("name", sorted(set(available_attention()) - {"full"}))
def test_low_density_is_not_exact_attention(name: str) -> None:
    query, key, value = inputs()
    exact = scaled_dot_product_attention(query, key, value)
    output = build(name)(query, key, value, CONTEXT)
    assert (output - exact).norm() > 0.1 * exact.norm()
    assert build(name).exact_fraction(query, key, CONTEXT) < 0.3


@pytest.mark.parametrize("name", available_attention())
def test_heads_and_samples_do_not_mix(name: str) -> None:
    method = build(name)
    shake(method)
    query, key, value = inputs(batch=3)
    hidden = hidden_states(3)
    output = method(query, key, value, AttentionContext(grid=GRID, hidden_states=hidden))
    order = [2, 0, 1]
    flipped = [t[order].flip(1) for t in (query, key, value)]
    with torch.no_grad():
        for what, parameter in method.named_parameters():
            if what.startswith(HEAD_ROWS.get(name, ())):
                parameter.copy_(parameter.unflatten(0, (HEADS, HEAD_DIM)).flip(0).flatten(0, 1))
    context = AttentionContext(grid=GRID, hidden_states=hidden[order])
    torch.testing.assert_close(
        method(*flipped, context), output[order].flip(1), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", available_attention())
def test_saved_parameters_restore_the_output_bit_by_bit(name: str) -> None:
    method = build(name)
    shake(method)
    query, key, value = inputs()
    restored = build(name)
    restored.load_state_dict(method.state_dict(), strict=True)
    assert torch.equal(method(query, key, value, CONTEXT), restored(query, key, value, CONTEXT))


@pytest.mark.parametrize("name", available_attention())
def test_every_parameter_and_input_gets_a_gradient(name: str) -> None:
    method = build(name)
    shake(method)
    query, key, value = (t.requires_grad_() for t in inputs())
    method(query, key, value, CONTEXT).square().sum().backward()
    frozen = {what for what, tensor in method.named_parameters() if not tensor.requires_grad}
    assert frozen == FROZEN.get(name, set())
    trained = [(what, t) for what, t in method.named_parameters() if what not in frozen]
    for what, tensor in [("q", query), ("k", key), ("v", value), *trained]:
        assert tensor.grad is not None, what
        assert tensor.grad.isfinite().all(), what
        assert tensor.grad.abs().sum() > 0, what


@pytest.mark.parametrize("name", available_attention())
def test_config_round_trips_through_plain_values(name: str) -> None:
    config = attention_config_class(name)()
    assert config.name == name
    assert attention_config_from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize("name", available_attention())
def test_cross_attention_is_refused_with_a_reason(name: str) -> None:
    query, key, value = inputs()
    with pytest.raises(UnsupportedAttentionError, match="self-attention"):
        build(name)(query[:, :, :32], key, value, CONTEXT)
    with pytest.raises(UnsupportedAttentionError, match="1 heads"):
        build(name)(query[:, :1], key[:, :1], value[:, :1], CONTEXT)


def test_sla_starts_as_sparse_only() -> None:
    query, key, value = inputs()
    sparse = build("sparse_only")(query, key, value, CONTEXT)
    torch.testing.assert_close(build("sla")(query, key, value, CONTEXT), sparse)
    identity = build("sla", proj_init="identity")(query, key, value, CONTEXT)
    assert (identity - sparse).norm() > 0.01 * sparse.norm()


def test_block_map_has_the_three_classes_in_the_configured_shares() -> None:
    query, key, _ = inputs()
    labels = build("sla", critical=0.125, negligible=0.25).block_map(query, key, CONTEXT).labels
    blocks = TOKENS // 8
    assert (labels == 1).sum(-1).eq(blocks // 8).all()
    assert (labels == -1).sum(-1).eq(blocks // 4).all()


def test_leading_tokens_can_be_attended_always() -> None:
    query, key, _ = inputs()
    context = AttentionContext(grid=GRID, always_critical=10)
    labels = build("sla").block_map(query, key, context).labels
    assert (labels[..., :, :2] == 1).all()
    assert (labels[..., :1, :] == 1).all()


def test_projection_stays_float32_when_the_model_is_cast() -> None:
    method = build("sla", proj_init="identity")
    with torch.no_grad():
        method.proj_l.weight += 1e-4
    before = method.proj_l.weight.clone()
    method.to(torch.bfloat16)
    assert method.proj_l.weight.dtype == torch.float32
    assert torch.equal(method.proj_l.weight, before)
    output = method(*inputs(dtype=torch.bfloat16), CONTEXT)
    assert output.dtype == torch.bfloat16


def test_hedgehog_runs_in_low_precision() -> None:
    method = build("linear_only", feature_map="hedgehog").to(torch.bfloat16)
    assert method(*inputs(dtype=torch.bfloat16), CONTEXT).isfinite().all()


def test_unknown_name_fails_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'sparse_only'"):
        build_attention(AttentionConfig(name="sparse_onli"), 2, 16, 32, 0)
    with pytest.raises(ValueError, match="did you mean 'critical'"):
        attention_config_from_dict({"name": "sla", "critcal": 0.1})
    with pytest.raises(TypeError, match="takes a SLAConfig, got a FullConfig"):
        build_attention(FullConfig(name="sla"), 2, 16, 32, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SLAConfig(critical=0.0), "critical is 0.0"),
        (SLAConfig(critical=1.2), "critical is 1.2"),
        (SLAConfig(critical=0.5, negligible=0.6), "negligible is 0.6"),
        (SparseOnlyConfig(block_q=0), "block_q is 0"),
        (SLAConfig(proj_init="ones"), "proj_init is 'ones'"),
        (SLAConfig(feature_map="softmx"), "softm"),
    ],
)
def test_numbers_out_of_range_are_named(config: AttentionConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_attention(config, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)


def test_a_method_can_be_added_from_outside() -> None:
    full = type(build("full"))

    @dataclasses.dataclass
    class DoubleConfig(AttentionConfig):
        name: str = "test_double"

    @register_attention("test_double", DoubleConfig)
    class Double(full):  # type: ignore[misc, valid-type]
        def attend(self, query, key, value, context):  # type: ignore[no-untyped-def]
            return 2 * super().attend(query, key, value, context)

    try:
        method = build_attention(DoubleConfig(), HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)
        query, key, value = inputs()
        expected = 2 * scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(method(query, key, value, CONTEXT), expected)
        with pytest.raises(ValueError, match="is taken by"):
            register_attention("test_double", FullConfig)(full)
    finally:
        from sla.attention.registry import _METHODS

        del _METHODS["test_double"]


def test_flops_follow_the_density() -> None:
    full = build("full").flops(GRID)
    assert full == 4 * HEADS * TOKENS**2 * HEAD_DIM
    sparse, sla = build("sparse_only"), build("sla")
    assert sparse.density(GRID) * full < sparse.flops(GRID) < sla.flops(GRID)
