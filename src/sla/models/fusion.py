"""What stands beside attention in a diffusers transformer, made faster for inference.

With attention at 5 % of its work the rest of Wan is three quarters of a denoising step. Compiling
its blocks fuses norms, modulation, rotary embedding and residuals; what it leaves is the GELU
between the two large products of the feed-forward, which reads and writes the widest tensor of the
block. The matrix product's own epilogue can do it. What is left between the kernels, and all of the
host's time, goes with a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("sla::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), tanh approximation: (..., K), (M, K), (M,) -> (..., M). No gradient.

    On a GPU one product of cuBLASLt with the GELU in its epilogue, applied before rounding.
    """
    if not x.is_cuda:  # there PyTorch's operator takes the exact GELU
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    rows = x.reshape(-1, x.shape[-1])
    product = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return product.view(*x.shape[:-1], weight.shape[0])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class FusedGELU(nn.Module):
    """diffusers' `GELU` (a linear layer and its activation) as one operator where no gradient is
    asked for; the same parameters by the same names."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., K) -> (..., M)."""
        proj: Any = self.proj
        # LoRA and quantisation put other modules there.
        plain = type(proj) is nn.Linear and proj.bias is not None
        if plain and not torch.is_grad_enabled() and proj.weight.dtype == hidden_states.dtype:
            output: Tensor = linear_gelu(hidden_states, proj.weight, proj.bias)
            return output
        return F.gelu(proj(hidden_states), approximate="tanh")


def compile_blocks(
    blocks: Iterable[nn.Module],
    *,
    fullgraph: bool = False,
    tune: bool = False,
    cuda_graphs: bool = False,
) -> None:
    """torch.compile a model's layers one by one, in place: they share one compilation.

    Args:
        blocks: the layers.
        fullgraph: a graph break is an error.
        tune: coordinate descent over the launch sizes of Inductor's own kernels, norms above all.
            It takes some seconds once and 2 % off a denoising step of Wan; of a training step it
            takes minutes.
        cuda_graphs: replay each layer's forward and backward as a CUDA graph, for models whose
            steps are bound by the host. `torch.compiler.cudagraph_mark_step_begin` must be called
            before each step.
    """
    options: dict[str, Any] = {
        # From PyTorch 2.10 on they leave the gradients of Wan's modulation tables unwritten,
        # whatever lies there, and under FSDP2 give one another shape (pytorch/pytorch issues 193061
        # and 178080).
        "triton.mix_order_reduction": False,
        "coordinate_descent_tuning": tune,
        "triton.cudagraphs": cuda_graphs,
    }
    for block in blocks:
        block.compile(fullgraph=fullgraph, options=options)


class CUDAGraphed:
    """A function of CUDA tensors, replayed as a CUDA graph from its second call at given shapes on.

    Captured once for each set of shapes, strides and dtypes; the memory of each capture stays in
    use. For inference: no gradients, and nothing that depends on values on the host.

    Args:
        function: tensors to a tensor.
        most: captures that are kept; further shapes run as they are.
    """

    def __init__(self, function: Callable[..., Tensor], most: int = 2) -> None:
        self.function = function
        self.most = most
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's result, in memory that no later call writes."""
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        if key not in self._captured:
            if len(self._captured) >= self.most or not all(t.is_cuda for t in tensors):
                return self.function(*tensors)
            self._captured[key] = self._capture(tensors)
        graph, inputs, output = self._captured[key]
        for inside, given in zip(inputs, tensors, strict=True):
            inside.copy_(given)
        graph.replay()
        return output.clone()

    def _capture(
        self, tensors: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        inputs = [t.clone(memory_format=torch.preserve_format) for t in tensors]
        # Compiling, autotuning and making cuBLAS's workspaces may not happen in a capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.function(*inputs)
        return graph, inputs, output


def fuse_feed_forward(transformer: nn.Module) -> int:
    """Replace every tanh-GELU layer of diffusers' feed-forwards by a `FusedGELU`, in place.

    State dict, training and LoRA stay as they are. Call it before compiling.

    Returns:
        How many were replaced; 0 where they had been before.
    """
    from diffusers.models.activations import GELU

    found = [
        (parent, name, child)
        for parent in transformer.modules()
        for name, child in parent.named_children()
        if isinstance(child, GELU) and child.approximate == "tanh"
    ]
    for parent, name, child in found:
        parent.set_submodule(name, FusedGELU(child.proj))
    return len(found)


__all__ = ["CUDAGraphed", "FusedGELU", "compile_blocks", "fuse_feed_forward", "linear_gelu"]
