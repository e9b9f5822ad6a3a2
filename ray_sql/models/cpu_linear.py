"""4-bit linear layers and their LoRA on a CPU: weights expanded once, and no pass over a whole output that a product can do on its way.

bitsandbytes expands a layer's weights at every call, and peft copies a layer's output, scales its adapter's and adds the two: each a pass
over as many numbers as the layer has outputs, forward and backward, which on a CPU takes as long as the adapter's products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel


def dequantise_once(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let every 4-bit layer multiply with its weights as NF4 stands for them, expanded once instead of at every call.

    The numbers are the same, to the bit of the expanded weight; the memory is that of the unquantised model, which a CPU has.
    There it also keeps bitsandbytes from repacking weights for AVX512-BF16: that happens at the first forward in eval mode and is
    never undone, rounds the scales, and has no backward, so that after a validation in the middle of training no gradient
    passes a base layer any more (0.50.2; autograd warns of it, and the losses differ).
    """
    import bitsandbytes.functional
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).to(dtype)
            module.forward = partial(_linear, weight=weight, bias=module.bias)


def fuse(model: PreTrainedModel) -> None:
    """Let layers with expanded weights (`dequantise_once`) and an adapter compute both in the products that both need, for training.

    Loss and gradients are peft's but for rounding; what is more than a product of two matrices (DoRA, biases) stays peft's.
    """
    for layer, base, names in _adapted(model):
        bias = base["bias"]
        if len(names) == 1 and (bias is None or not bias.requires_grad):
            layer.forward = partial(_with_adapter, layer=layer, name=names[0], **base)


@contextmanager
def merged(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, layers with expanded weights (`dequantise_once`) multiply with weight and LoRA adapter in one product.

    For answering; it takes the memory of the expanded weights once more. The sum is rounded to the layer's type once, where the
    layer's and the adapter's outputs are rounded each; in float32 answers are the same.
    """
    with ExitStack() as apart_again:
        for layer, base, names in _adapted(model):
            weight = base["weight"].float()
            for name in names:
                down, up = (
                    each[name].weight.detach().float() for each in (layer.lora_A, layer.lora_B)
                )
                weight = weight + layer.scaling[name] * (up @ down)
            if "forward" in vars(layer):  # that of `fuse`
                apart_again.callback(setattr, layer, "forward", layer.forward)
            else:
                apart_again.callback(delattr, layer, "forward")
            layer.forward = partial(
                _linear, weight=weight.to(base["weight"].dtype), bias=base["bias"]
            )
        yield


def _adapted(
    model: PreTrainedModel,
) -> Iterator[tuple[LoraLayer, dict[str, torch.Tensor], list[str]]]:
    """LoRA layers over expanded weights whose adapters are products of two matrices: layer, weight and bias, adapters in use."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
            continue
        base = getattr(module.get_base_layer().forward, "keywords", {})
        names = [name for name in module.active_adapters if name in module.lora_A]
        if "weight" in base and not any(
            name in module.lora_variant or module.lora_bias[name] for name in names
        ):
            yield module, base, names


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(
        x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
    )


def _with_adapter(
    x: torch.Tensor, layer: LoraLayer, name: str, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if layer.disable_adapters:
        return _linear(x, weight, bias)
    dropout = layer.lora_dropout[name]
    dropped = None if isinstance(dropout, torch.nn.Identity) else dropout(x)
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    out: torch.Tensor = _Product.apply(x, dropped, down, up, layer.scaling[name], weight, bias)
    return out


class _Product(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed by mypy
    """x weight' + bias + scaling dropped down' up' for x `[..., in]`, `dropped` alike (None: it is x), down `[r, in]`, up `[out, r]`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype = weight.dtype
        inputs = x.flatten(0, -2).to(dtype)
        seen = inputs if dropped is None else dropped.flatten(0, -2).to(dtype)
        narrow, wide = down.to(dtype), (scaling * up).to(dtype)
        inner = seen @ narrow.t()
        ctx.save_for_backward(seen, inner, narrow, wide, weight)
        ctx.scaling, ctx.types, ctx.shape, ctx.apart = (
            scaling,
            (x.dtype, down.dtype, up.dtype),
            x.shape,
            dropped is not None,
        )
        return _linear(inputs, weight, bias).addmm_(inner, wide.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        seen, inner, narrow, wide, weight = ctx.saved_tensors
        of_x, of_down, of_up = ctx.types
        out = gradient.flatten(0, -2).to(weight.dtype)
        of_inner = out @ wide
        for_x = for_dropped = None
        if ctx.needs_input_grad[0]:
            for_x = out @ weight
            if not ctx.apart:
                for_x.addmm_(of_inner, narrow)
            for_x = for_x.view(ctx.shape).to(of_x)
        if ctx.needs_input_grad[1]:
            for_dropped = (of_inner @ narrow).view(ctx.shape).to(of_x)
        for_down, for_up = (
            (of_inner.t() @ seen).to(of_down),
            (out.t() @ inner).to(of_up) * ctx.scaling,
        )
        return for_x, for_dropped, for_down, for_up, None, None, None
