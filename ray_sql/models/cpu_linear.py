"""4-bit linear layers and their LoRA on a CPU: weights expanded once, fewer passes over outputs.

bitsandbytes expands a layer's weights at every call. peft copies a layer's output, scales its
adapter's and adds the two. Each is a pass over as many numbers as the layer has outputs, forward
and backward. On a CPU such passes take as long as the adapter's products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel


class ExpandedLinear:
    """The forward of a linear layer with weights `[out, in]`, put over that of a 4-bit one."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x weight' + bias for x `[..., in]`, computed in the weights' type."""
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, bias)


class FusedLora:
    """The forward of a LoRA layer over `ExpandedLinear`, in the products that both need."""

    def __init__(self, layer: LoraLayer, name: str, base: ExpandedLinear) -> None:
        self._layer, self._name, self._base = layer, name, base

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of base and adapter, added, for x `[..., in]`."""
        layer, name = self._layer, self._name
        if layer.disable_adapters:
            return self._base(x)
        dropout = layer.lora_dropout[name]
        dropped = None if isinstance(dropout, torch.nn.Identity) else dropout(x)
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        out: torch.Tensor = _LoraProduct.apply(
            x, dropped, down, up, layer.scaling[name], self._base
        )
        return out


def dequantise_once(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let every 4-bit layer multiply with its NF4 weights, expanded once instead of at every call.

    The expanded weights are the same to the bit. They take the memory of the unquantised model,
    which a CPU has. This also keeps bitsandbytes from repacking weights for AVX512-BF16. It does so
    at the first forward in eval mode, never undoes it, and rounds the scales. Repacked weights have
    no backward. After a validation in the middle of training no gradient would pass a base layer
    (0.50.2; autograd warns of it, and the losses differ).
    """
    import bitsandbytes.functional
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
            module.forward = ExpandedLinear(weight.to(dtype), module.bias)


def fuse(model: PreTrainedModel) -> None:
    """Let LoRA layers over expanded weights compute base and adapter together, for training.

    Loss and gradients are peft's but for rounding. Peft still computes more than a product of two
    matrices (DoRA, biases). A training step took a sixth less time so on a Xeon, and as long on
    an EPYC with AVX512 (`benchmarks.ablation`). It stays, because adapters would change without it.
    """
    for layer, base, names in _lora_layers(model):
        if len(names) == 1 and (base.bias is None or not base.bias.requires_grad):
            layer.forward = FusedLora(layer, names[0], base)


@contextmanager
def merged(model: PreTrainedModel) -> Iterator[None]:
    """Let LoRA layers over expanded weights multiply once, with weight and adapter summed.

    It is for answering, and takes the memory of the expanded weights once more. The sum is rounded
    to the layer's type once, where the two outputs are rounded each. In float32 answers are the
    same.
    """
    with ExitStack() as undo:
        for layer, base, names in _lora_layers(model):
            weight = base.weight.float()
            for name in names:
                down = layer.lora_A[name].weight.detach().float()
                up = layer.lora_B[name].weight.detach().float()
                weight = weight + layer.scaling[name] * (up @ down)
            if "forward" in vars(layer):  # that of `fuse`
                undo.callback(setattr, layer, "forward", layer.forward)
            else:
                undo.callback(delattr, layer, "forward")
            layer.forward = ExpandedLinear(weight.to(base.weight.dtype), base.bias)
        yield


def _lora_layers(model: PreTrainedModel) -> Iterator[tuple[LoraLayer, ExpandedLinear, list[str]]]:
    """Yield LoRA layers, the expanded weights under each, and the names of its adapters in use.

    Layers whose adapter is more than a product of two matrices are left out.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
            continue
        base = module.get_base_layer().forward
        names = [name for name in module.active_adapters if name in module.lora_A]
        more = any(name in module.lora_variant or module.lora_bias[name] for name in names)
        if isinstance(base, ExpandedLinear) and not more:
            yield module, base, names


class _LoraProduct(torch.autograd.Function):  # type: ignore[misc]  # mypy does not follow torch
    """x weight' + bias + scaling dropped down' up'.

    Shapes: x `[..., in]`, `dropped` alike (None: it is x), down `[r, in]`, up `[out, r]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        base: ExpandedLinear,
    ) -> torch.Tensor:
        dtype = base.weight.dtype
        inputs = x.flatten(0, -2).to(dtype)
        seen = inputs if dropped is None else dropped.flatten(0, -2).to(dtype)
        narrow, wide = down.to(dtype), (scaling * up).to(dtype)
        inner = seen @ narrow.t()
        ctx.save_for_backward(seen, inner, narrow, wide, base.weight)
        ctx.scaling, ctx.shape, ctx.has_dropout = scaling, x.shape, dropped is not None
        ctx.dtypes = (x.dtype, down.dtype, up.dtype)
        return base(inputs).addmm_(inner, wide.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        seen, inner, narrow, wide, weight = ctx.saved_tensors
        x_dtype, down_dtype, up_dtype = ctx.dtypes
        out = gradient.flatten(0, -2).to(weight.dtype)
        for_inner = out @ wide
        for_x = for_dropped = None
        if ctx.needs_input_grad[0]:
            for_x = out @ weight
            if not ctx.has_dropout:
                for_x.addmm_(for_inner, narrow)
            for_x = for_x.view(ctx.shape).to(x_dtype)
        if ctx.needs_input_grad[1]:
            for_dropped = (for_inner @ narrow).view(ctx.shape).to(x_dtype)
        for_down = (for_inner.t() @ seen).to(down_dtype)
        for_up = (out.t() @ inner).to(up_dtype) * ctx.scaling
        return for_x, for_dropped, for_down, for_up, None, None
