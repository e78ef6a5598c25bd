"""Bad input is refused before anything is computed, naming the argument, its value, the cure."""

from collections.abc import Callable

import pytest
import torch
from sla_kernels import (
    Backend,
    BlockMap,
    classify_blocks,
    get_feature_map,
    linear_attention,
    register_backend,
    register_feature_map,
    sparse_attention,
    sparse_linear_attention,
)
from torch import Tensor


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (1, 2, 32, 8), dtype=dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": None}, TypeError, "query is a NoneType"),
        ({"query": tensor(2, 32, 8)}, ValueError, r"query has shape \(2, 32, 8\)"),
        ({"query": tensor(1, 2, 0, 8)}, ValueError, "query has shape"),
        ({"query": tensor().int()}, TypeError, "query is torch.int32; it must be float16"),
        ({"key": tensor().half()}, TypeError, "key is torch.float16, query torch.float32"),
        ({"key": tensor(1, 3, 32, 8)}, ValueError, r"key has shape \(1, 3, 32, 8\)"),
        ({"value": tensor(1, 2, 31, 8)}, ValueError, r"value has shape .* must be \(1, 2, 32, 8"),
        ({"value": tensor().to("meta")}, ValueError, "value is on meta, query on cpu"),
        ({"critical": 1.5}, ValueError, "critical is 1.5; it must be in"),
        ({"critical": float("nan")}, ValueError, "critical is nan"),
        ({"negligible": -0.1}, ValueError, "negligible is -0.1"),
        ({"critical": 0.6, "negligible": 0.6}, ValueError, "sum must be at most 1"),
        ({"block_q": 0}, ValueError, "block_q is 0"),
        ({"block_kv": 2.5}, ValueError, "block_kv is 2.5"),
        ({"always_critical": -1}, ValueError, "always_critical is -1"),
        ({"always_critical": 1.5}, TypeError, "always_critical is 1.5"),
        ({"scale": float("inf")}, ValueError, "scale is inf"),
        ({"backend": "tritn"}, ValueError, "backend is 'tritn'; it must be one of auto, eager"),
        ({"feature_map": "exp"}, ValueError, "feature_map is 'exp'; it must be one of elu"),
        ({"feature_map": 3}, TypeError, "feature_map is a int"),
        ({"proj_weight": tensor(8, 4)}, ValueError, r"proj_weight has shape \(8, 4\)"),
        ({"proj_bias": tensor(8)}, ValueError, "proj_bias is given without proj_weight"),
        ({"block_map": "map"}, TypeError, "block_map is a str"),
        ({"key_lengths": [32]}, TypeError, "key_lengths is a list; it must be a tensor"),
        ({"key_lengths": tensor(1)}, TypeError, "key_lengths is torch.float32; it must be int32"),
        ({"key_lengths": lengths(3, 4)}, ValueError, r"key_lengths has shape \(2,\); .* \(1,\)"),
        ({"key_lengths": lengths(33)}, ValueError, r"key_lengths is \[33\]; .* in \[0, 32\]"),
        ({"key_lengths": lengths(-1)}, ValueError, r"key_lengths is \[-1\]"),
        ({"key_lengths": lengths(3).to("meta")}, ValueError, "key_lengths is on meta, query on"),
    ],
)
def test_mistakes_are_named(changes: dict, error: type, message: str) -> None:
    arguments = {"query": tensor(), "key": tensor(), "value": tensor(), **changes}
    with pytest.raises(error, match=message):
        sparse_linear_attention(**arguments)


def test_a_block_map_of_other_inputs_is_refused() -> None:
    block_map = classify_blocks(tensor(), tensor(), block_q=8, block_kv=8)
    other = tensor(1, 2, 40, 8)
    with pytest.raises(ValueError, match=r"block_map is for .*\(1, 2, 32, 32\)"):
        sparse_attention(other, other, other, block_map)


def test_labels_of_the_wrong_shape_or_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(B, H, 2, 4\)"):
        BlockMap(torch.zeros(1, 1, 2, 3, dtype=torch.int8), 8, 8, 16, 32)
    with pytest.raises(TypeError, match=r"labels is torch\.int64"):
        BlockMap(torch.zeros(1, 1, 2, 4, dtype=torch.int64), 8, 8, 16, 32)


@pytest.mark.parametrize("function", [sparse_linear_attention, linear_attention])
def test_lengths_beside_a_block_map_are_refused(function: Callable[..., Tensor]) -> None:
    block_map = classify_blocks(tensor(), tensor(), block_q=8, block_kv=8)
    with pytest.raises(ValueError, match="key_lengths is given beside block_map"):
        function(tensor(), tensor(), tensor(), block_map=block_map, key_lengths=lengths(32))


def test_a_block_map_of_bad_lengths_or_tables_is_refused() -> None:
    labels = torch.zeros(1, 1, 2, 4, dtype=torch.int8)
    shape = (8, 8, 16, 32)
    with pytest.raises(TypeError, match=r"key_lengths is torch\.int64; it must be torch\.int32"):
        BlockMap(labels, *shape, lengths(3))
    with pytest.raises(ValueError, match=r"key_lengths has shape \(2,\); it must be \(1,\)"):
        BlockMap(labels, *shape, lengths(3, 4).int())
    with pytest.raises(ValueError, match="key_lengths is on meta, labels on cpu"):
        BlockMap(labels, *shape, lengths(3).int().to("meta"))
    wide, counts = torch.zeros(1, 1, 2, 5).int(), torch.zeros(1, 1, 2).int()
    with pytest.raises(ValueError, match=r"row_table\[0\] has shape \(1, 1, 2, 5\)"):
        BlockMap(labels, *shape, row_table=(wide, counts))
    with pytest.raises(TypeError, match=r"row_table\[1\] is torch\.int64"):
        BlockMap(labels, *shape, row_table=(wide[..., :4], counts.long()))
    query, key = tensor(1, 1, 16, 8), tensor(1, 1, 32, 8)
    with pytest.raises(ValueError, match=r"key_lengths is \[33\]"):
        sparse_attention(query, key, key, BlockMap(labels, *shape, lengths(33).int()))


@pytest.mark.parametrize(
    "register",
    [
        lambda: register_feature_map("softmax", torch.exp),
        lambda: register_backend("auto", None),  # type: ignore[arg-type]
        lambda: register_backend("eager", None),  # type: ignore[arg-type]
    ],
)
def test_taken_names_are_refused(register: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=r"taken|already"):
        register()


def test_a_backend_that_cannot_work_says_why() -> None:
    from sla_kernels import operator

    def never(query: Tensor, block_q: int, block_kv: int) -> str:
        return f"it is only a test of {block_q} by {block_kv}"

    register_backend("test_never", Backend(None, None, never, 99))  # type: ignore[arg-type]
    try:
        with pytest.raises(ValueError, match="it is only a test of 64 by 16"):
            sparse_linear_attention(tensor(), tensor(), tensor(), block_kv=16, backend="test_never")
        sparse_linear_attention(tensor(), tensor(), tensor(), backend="auto")
    finally:
        del operator._BACKENDS["test_never"]


def test_a_backend_may_route_and_fuse() -> None:
    from sla_kernels import block_map, eager, operator

    routed: list[object] = []
    calls: list[tuple[object, ...]] = []

    def route(*inputs: Tensor, **options: object) -> BlockMap:
        routed.append(options["block_q"])
        return block_map.route(*inputs, **options)  # type: ignore[arg-type]

    def fused(query: Tensor, *rest: object, **options: object) -> Tensor | None:
        calls.append((*rest[2:], options))
        return query + 1 if options["routing"] else None

    register_backend(
        "test_fused",
        Backend(
            eager.sparse_branch, eager.linear_branch, lambda *_: None, -2, fused=fused, route=route
        ),
    )
    options = {"scale": 0.5, "backend": "test_fused"}
    try:
        found = sparse_linear_attention(tensor(), tensor(), tensor(), block_q=8, **options)
        made = classify_blocks(tensor(), tensor(), block_q=8, **options)
        added = sparse_linear_attention(tensor(), tensor(), tensor(), block_map=made, **options)
    finally:
        del operator._BACKENDS["test_fused"]
    assert (found == 1).all()
    assert (added == 0).all(), "the branches are added where it does not fuse"
    assert routed == [8]
    weight, bias, phi, scale, given = calls[0]
    assert (weight, bias, scale) == (None, None, 0.5)
    assert callable(phi)
    assert given["block_map"] is None
    assert given["routing"]["block_q"] == 8
    assert calls[1][-1] == {"block_map": made, "routing": None}


def test_callables_are_feature_maps() -> None:
    assert get_feature_map(torch.exp) is torch.exp
