"""Adapted layers that read the same input, computed together on a CUDA device.

Query, key and value read one hidden state, gate and up another. Together their adapters read it
once, and the gradients of the input add up inside the large products instead of in passes of their
own. Where a layer needs more than that (dropout, float8, a bias), each computes by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.model.lora import LoraLinear, product, wide_enough

DEVICES = ("cuda",)
"""Where it pays: on a CPU these passes stay in the cache."""
ATTENTION = ("q_proj", "k_proj", "v_proj")
"""What Transformers calls the layers that read one input, the first of them first."""


class _Joint(torch.autograd.Function):
    """y_i = x W_iᵀ + s_i (x A_iᵀ) B_iᵀ; saves x and all x A_iᵀ only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[LoraLinear], *_: Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        casts = [layer.cast or layer.low_precision(x.dtype) for layer in layers]
        a, b = torch.cat([a for a, _ in casts]), [b for _, b in casts]
        weights = [layer.base.weight for layer in layers]
        low = flat @ a.t()
        parts = torch.split(low, [m.shape[1] for m in b], 1)
        ys = [
            (part @ m.t()).addmm_(flat, weight.t())
            for part, m, weight in zip(parts, b, weights, strict=True)
        ]
        ctx.save_for_backward(flat, low, a, *b, *weights)
        ctx.scales, ctx.shape = [layer.scale for layer in layers], x.shape
        ctx.dtype = layers[0].lora_A.dtype
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, low, a, *rest = ctx.saved_tensors
        b, weights = rest[: len(grads)], rest[len(grads) :]
        ranks = [m.shape[1] for m in b]
        grads = tuple(grad.reshape(-1, grad.shape[-1]) for grad in grads)
        grad_low = torch.cat([grad @ m for grad, m in zip(grads, b, strict=True)], 1)
        of_a = torch.split(product(grad_low.t(), flat, ctx.dtype), ranks)
        of_b = [
            product(grad.t(), part, ctx.dtype).mul_(scale)
            for grad, part, scale in zip(grads, torch.split(low, ranks, 1), ctx.scales, strict=True)
        ]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ wide_enough(a)
            for grad, weight in zip(grads, weights, strict=True):
                grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, *of_a, *of_b


def together(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    """Return what each layer makes of x [..., in]; None where they must be asked one by one."""
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear) and layer.is_plain]
    if (
        len(adapted) < len(layers)
        or x.device.type not in DEVICES
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or any(layer.base.weight.dtype != x.dtype for layer in adapted)
    ):
        return None
    parameters = [*(n.lora_A for n in adapted), *(n.lora_B for n in adapted)]
    return _Joint.apply(x, adapted, *parameters)  # type: ignore[no-untyped-call,no-any-return]


class Ahead:
    """Has the first layer that is asked for an input compute those of the others too."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Take the layers in the order in which a model asks them."""
        self.layers = layers
        self.own = [layer.forward for layer in layers]
        self.x: Tensor | None = None
        self.ready: dict[int, Tensor] = {}

    def of(self, number: int) -> Callable[[Tensor], Tensor]:
        """Return the forward of a layer."""

        def forward(x: Tensor) -> Tensor:
            if number and self.x is x and number in self.ready:
                return self._take(number)
            found = together(self.layers, x) if number == 0 else None
            if found is None:
                return self.own[number](x)  # type: ignore[no-any-return]
            self.x, self.ready = x, dict(enumerate(found))
            return self._take(number)

        return forward

    def _take(self, number: int) -> Tensor:
        """Hand a result over; nothing is kept when all are gone."""
        found = self.ready.pop(number)
        if not self.ready:
            self.x = None
        return found


def attention_layers(module: nn.Module) -> list[nn.Module]:
    """Return the query, key and value layers of a module if all have adapters."""
    found = [module._modules.get(name) for name in ATTENTION]
    adapted = [layer for layer in found if isinstance(layer, LoraLinear)]
    return [*adapted] if len(adapted) == len(found) else []
