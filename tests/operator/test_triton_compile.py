"""The fused kernels inside PyTorch: operators, torch.compile, checkpointing, autocast."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from sla_kernels import classify_blocks, sparse_attention
from sla_kernels import sparse_linear_attention as sla
from sla_kernels.testing import (
    Case,
    random_inputs,
    random_projection,
    relative_error,
    with_gradients,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

operators = pytest.importorskip("sla_kernels.triton.operators")
GPU = os.environ.get("SLA_TEST_GPU") == "1"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # log2(0) in NumPy
COMPILER = "inductor" if GPU else "aot_eager"
LOW = torch.bfloat16 if GPU else torch.float16
# Whole blocks: no filling in the tables or the log-sum-exp, which opcheck would compare.
CASE = Case("whole", 32, 48, block_q=16, block_kv=16, critical=0.4, negligible=0.34, batch=1)


def inputs(case: Case, device: str, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    tensors = random_inputs(case, dtype, device=device)
    return [*tensors, *random_projection(case.head_dim, dtype, device)]


def leaves_of(case: Case, device: str, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [t.requires_grad_() for t in inputs(case, device, dtype)]


def test_opcheck_route(device: str) -> None:
    query, key, *_ = inputs(CASE, device)
    for scale in (0.25, -1.0):
        torch.library.opcheck(operators.route, (query, key, None, 0.4, 0.34, 16, 16, 0, scale))


def test_opcheck_row_table(device: str) -> None:
    labels = torch.randint(-1, 2, (1, 2, 3, 5), device=device).to(torch.int8)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.row_table, (labels,), test_utils=utils)


@pytest.mark.parametrize("projected", [True, False])
def test_opcheck_sparse_linear_attention(projected: bool, device: str) -> None:
    tensors: list[Any] = leaves_of(CASE, device)
    if not projected:
        tensors[3:] = [None, None]
    numbers = (0.4, 0.34, 16, 16, 0, "softmax", 0.25)
    torch.library.opcheck(operators.sparse_linear_attention, (*tensors, None, *numbers))


@pytest.mark.parametrize("branches", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("padded", [False, True])
def test_opcheck_attend(branches: tuple[bool, bool], padded: bool, device: str) -> None:
    if not GPU and padded and not all(branches):
        pytest.skip("padding with one branch is left to the GPU")
    tensors: list[Any] = leaves_of(CASE, device)
    if not all(branches):
        tensors[3:] = [None, None]
    lengths = torch.tensor([33], dtype=torch.int32, device=device) if padded else None
    routing = {**CASE.routing(device), "key_lengths": lengths}
    block_map = classify_blocks(*tensors[:2], **routing, backend="eager")
    tables = (block_map.labels, block_map.critical_blocks, block_map.critical_counts)
    numbers = (16, 16, "softmax", 0.25, *branches)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    if branches[0]:  # else nothing writes the log-sum-exp, which this compares
        utils += ("test_aot_dispatch_dynamic",)
    arguments = (*tensors, lengths, None, *tables, *numbers)
    torch.library.opcheck(operators.attend, arguments, test_utils=utils)


def test_opcheck_attend_backward(device: str) -> None:
    tensors = inputs(CASE, device)
    block_map = classify_blocks(*tensors[:2], **CASE.routing(device), backend="eager")
    tables = (block_map.labels, block_map.critical_blocks, block_map.critical_counts)
    numbers = (16, 16, "softmax", 0.25, True, True)
    output, lse = operators.attend(*tensors, None, None, *tables, *numbers)
    grads = (torch.randn_like(output), torch.randn_like(lse))
    backward = (*grads, *tensors, None, None, output, lse, *tables, 16, 16, 0)
    torch.library.opcheck(operators.attend_backward, (*backward, "softmax", 0.25, True, True))


def test_opcheck_merge_pooled(device: str) -> None:
    """The gradients too: Dynamo's and AOTAutograd's views of them must be those of eager mode."""
    query, key, value = random_inputs(CASE, torch.float16, device=device)
    block_map = classify_blocks(query, key, **CASE.routing(device), backend="eager")
    sparse, lse = sparse_attention(query, key, value, block_map, backend="eager", return_lse=True)
    tensors = [t.requires_grad_() for t in (query, key, value, sparse, lse)]
    lengths = torch.tensor([33], dtype=torch.int32, device=device)
    for key_lengths in (None, lengths):
        arguments = (*tensors, key_lengths, block_map.labels, 16, 16, 0.25)
        torch.library.opcheck(operators.merge_pooled, arguments)
    given = (*(t.detach() for t in tensors), lengths, block_map.labels)
    results = operators.merge_pooled(*given, 16, 16, 0.25)
    backward = (torch.randn_like(given[0]), *given, *results, 16, 16, 0.25)
    torch.library.opcheck(operators.merge_pooled_backward, backward)


class Attention(nn.Module):
    """Projections to heads, the operator, and one out, as a model has them."""

    def __init__(self, case: Case, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = case.heads * case.head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(case.head_dim, case.head_dim)
        self.out = nn.Linear(width, width)
        self.heads, self.options = case.heads, options

    def forward(self, hidden: Tensor) -> Tensor:
        packed = self.qkv(hidden).unflatten(2, (3, self.heads, -1))
        query, key, value = packed.transpose(1, 3).unbind(2)
        output = sla(
            query,
            key,
            value,
            self.proj.weight,
            self.proj.bias,
            backend="triton",
            **self.options,  # type: ignore[arg-type]
        )
        return self.out(output.transpose(1, 2).flatten(2))


def model_of(case: Case, device: str, dtype: torch.dtype, **options: object) -> Attention:
    return Attention(case, **case.routing(device), **options).to(device, dtype)


def hidden_states(case: Case, device: str, dtype: torch.dtype, tokens: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, tokens or case.tokens_q, case.heads * case.head_dim)
    return torch.randn(shape, generator=generator).to(device, dtype)


def results(model: nn.Module, parameters: list[Tensor], hidden: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters."""
    hidden = hidden.detach().requires_grad_()
    output = model(hidden)
    return [
        output.detach(),
        *torch.autograd.grad(output.float().sin().sum(), [hidden, *parameters]),
    ]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal where the compiler changes nothing; else to a few roundings of the linear layers."""
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        if COMPILER == "aot_eager":
            assert torch.equal(got, want)
        else:
            assert relative_error(got, want) < 8 * torch.finfo(got.dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (LOW, {}),
        (torch.float32, {}),
        (LOW, {"key_lengths": (17, 40)}),
        (LOW, {"always_critical": 5}),
    ],
    ids=["low", "float32", "lengths", "text"],
)
def test_compiled_without_a_graph_break(
    dtype: torch.dtype, changes: dict[str, Any], device: str
) -> None:
    torch._dynamo.reset()
    case = replace(CASE, tokens_q=40, tokens_kv=40, batch=2, **changes)
    model = model_of(case, device, dtype)
    parameters = list(model.parameters())
    hidden = hidden_states(case, device, dtype)
    expected = results(model, parameters, hidden)
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    assert_same(results(compiled, parameters, hidden), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [LOW, torch.float32], ids=["low", "float32"])
def test_one_compilation_for_any_number_of_tokens(dtype: torch.dtype, device: str) -> None:
    torch._dynamo.reset()
    model = model_of(CASE, device, dtype)
    parameters = list(model.parameters())
    counter = CompileCounterWithBackend(COMPILER)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (80, 90, 112):  # whether one is 1 modulo the block may be guarded on
        hidden = hidden_states(CASE, device, dtype, tokens)
        torch._dynamo.mark_dynamic(hidden, 1)
        with torch.no_grad():
            found, expected = compiled(hidden), model(hidden)
        assert_same([found], [expected])
    assert counter.frame_count == 1
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER, dynamic=True)
    for tokens in (40, 33):
        hidden = hidden_states(CASE, device, dtype, tokens)
        assert_same(results(compiled, parameters, hidden), results(model, parameters, hidden))


def test_checkpointed_gradients_are_equal(device: str) -> None:
    tensors, options = inputs(CASE, device), {**CASE.routing(device), "backend": "triton"}

    def recomputed(*leaves: Tensor) -> Tensor:
        output: Tensor = checkpoint(sla, *leaves, use_reentrant=False, **options)
        return output

    found, expected = with_gradients(recomputed, tensors), with_gradients(sla, tensors, **options)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_autocast_works_in_its_dtype(device: str) -> None:
    tensors, options = inputs(CASE, device, torch.float32), CASE.routing(device)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast(device, LOW):
        found = sla(*leaves, **options, backend="triton")
    assert found.dtype == LOW
    grads = torch.autograd.grad(found.float().sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)
    low = [t.detach().to(LOW).requires_grad_() for t in tensors]
    expected = sla(*low, **options, backend="triton")
    assert torch.equal(found, expected)
    for got, want in zip(grads, torch.autograd.grad(expected.float().sum(), low), strict=True):
        assert torch.equal(got.to(LOW), want)


class Watch(TorchDispatchMode):
    """Keeps the names of our operators that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "sla_kernels":
            self.seen.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [False, True])
def test_who_looks_on_sees_the_operators_and_the_same_numbers(given: bool, device: str) -> None:
    tensors, options = inputs(CASE, device), {**CASE.routing(device), "backend": "triton"}
    if given:
        options = {"block_map": classify_blocks(*tensors[:2], **options), "backend": "triton"}
    expected = with_gradients(sla, tensors, **options)
    with Watch() as watch:
        found = with_gradients(sla, tensors, **options)
    assert watch.seen[-2:] == ["attend" if given else "sparse_linear_attention", "attend_backward"]
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
def test_a_second_derivative_is_refused(dtype: torch.dtype, device: str) -> None:
    leaves = leaves_of(CASE, device, dtype)
    output = sla(*leaves, **CASE.routing(device), backend="triton")
    (grad,) = torch.autograd.grad(output.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", [[0], [2], [3], [4], [1, 4]], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: list[int], device: str) -> None:
    tensors, options = inputs(CASE, device), {**CASE.routing(device), "backend": "triton"}
    expected = with_gradients(sla, tensors, **options)[1:]
    leaves = [t.clone().requires_grad_(index in wanted) for index, t in enumerate(tensors)]
    output = sla(*leaves, **options)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    (output * weight).sum().backward()
    for index, (leaf, want) in enumerate(zip(leaves, expected, strict=True)):
        if index in wanted:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, want)
        else:
            assert leaf.grad is None


def test_without_gradients(device: str) -> None:
    leaves, options = leaves_of(CASE, device), {**CASE.routing(device), "backend": "triton"}
    expected = sla(*leaves, **options)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = sla(*leaves, **options)
        assert not found.requires_grad
        assert torch.equal(found, expected)


def test_an_output_that_is_not_used(device: str) -> None:
    leaves = leaves_of(CASE, device)
    sla(*leaves, **CASE.routing(device), backend="triton")
    block_map = classify_blocks(*leaves[:2], **CASE.routing(device), backend="triton")
    assert not block_map.labels.requires_grad
    assert block_map.row_table is not None
