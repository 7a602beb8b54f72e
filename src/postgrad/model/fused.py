"""The element-wise parts of a decoder layer, each in one pass: RMS norm, SwiGLU, rotary embedding.

Every operation is an autograd function whose gradient is written out, with three realisations: the
definition in tensor operations, which runs anywhere, one for CPUs (kernels.c), and one for a CUDA
device: the definition compiled (compiled.py) or a kernel in Triton (triton_kernels.py). The
gradient keeps as little as it can: a norm its input and one number a row, an activation its inputs.

`fused_layers` puts them into any Transformers model whose layers are proved, on numbers, to compute
exactly these functions; layers that compute something else keep their own code.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgrad.model import lora_joint
from postgrad.model.compiled import available, realised
from postgrad.model.kernels import call, usable

ROWS_PER_BLOCK = 64
"""Rows whose contributions to the gradient of a norm's weight are summed together."""
ROTARY = "apply_rotary_pos_emb"
"""What Transformers' modeling modules call their rotary embedding."""


class _RmsNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x²) + eps) w, row by row (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        if usable(x, weight):
            y, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
            call("rms_norm", x.dtype, x, weight, y, scale, eps, rows, width)
        else:
            y, scale = realised(norm_forward, x)(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        of_weight = ctx.needs_input_grad[1]
        dy = dy.to(x.dtype).contiguous()
        if usable(x, weight, dy):
            blocks = -(-rows // ROWS_PER_BLOCK)
            sums = torch.zeros(blocks, width) if of_weight else None
            dx = torch.empty_like(x)
            call("rms_norm_backward", x.dtype, dy, x, weight, scale, dx, sums, rows, width,
                 ROWS_PER_BLOCK)  # fmt: skip
            return dx, sums.sum(0).to(weight.dtype) if sums is not None else None, None
        return *realised(norm_backward, x)(dy, x, weight, scale, of_weight), None


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and what each was multiplied by, [rows]."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + eps).view(-1)
    return weight * (wide * scale.view(*x.shape[:-1], 1)).to(x.dtype), scale


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, when asked for, of the weight."""
    scale = scale.view(*x.shape[:-1], 1)
    normed, wide = x.float() * scale, dy.float()
    g = wide * weight.float()
    dx = scale * (g - normed * (g * normed).mean(-1, keepdim=True))
    dw = (wide * normed).view(-1, x.shape[-1]).sum(0).to(weight.dtype) if of_weight else None
    return dx.to(x.dtype), dw


class _SwiGlu(torch.autograd.Function):
    """y = silu(gate) up (Shazeer 2020, arXiv 2002.05202); keeps its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if not usable(gate, up):
            return realised(swiglu_forward, gate)(gate, up)  # type: ignore[no-any-return]
        y, width = torch.empty_like(gate), gate.shape[-1]
        call("swiglu", gate.dtype, gate, up, y, gate.numel() // width, width)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = dy.to(gate.dtype).contiguous()
        if usable(gate, up, dy):
            dgate, dup, width = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
            rows = gate.numel() // width
            call("swiglu_backward", gate.dtype, dy, gate, up, dgate, dup, rows, width)
            return dgate, dup
        return realised(swiglu_backward, gate)(dy, gate, up)  # type: ignore[no-any-return]


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) up."""
    return functional.silu(gate) * up


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    g, grad = gate.float(), dy.float()
    s = torch.sigmoid(g)
    return (grad * up * s * (1 + g * (1 - s))).to(gate.dtype), (grad * g * s).to(up.dtype)


class _Rotary(torch.autograd.Function):
    """y = x cos + rotate_half(x) sin for x [T, H, D], cos and sin [T, D] whose halves are equal.

    Rotary position embedding (Su et al. 2021, arXiv 2104.09864); the gradient turns back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy.contiguous(), cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if usable(x, cos, sin):
        y = torch.empty_like(x)
        call("rotary", x.dtype, x, cos, sin, y, sign, *x.shape)
        return y
    if x.is_cuda and available():
        from postgrad.model.triton_kernels import rotate as by_triton

        return by_triton(x, cos, sin, sign)
    return rotate(x, cos, sin, sign)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return x cos + sign rotate_half(x) sin."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1) * sign
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the rows of x [..., H] by their root mean square; weight [H]."""
    return _RmsNorm.apply(x.contiguous(), weight, eps)  # type: ignore[no-untyped-call,no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; both [..., I]."""
    return _SwiGlu.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-untyped-call,no-any-return]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, H, D] by the angles in cos and sin [T, D]."""
    return _Rotary.apply(  # type: ignore[no-untyped-call,no-any-return]
        x.contiguous(), cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous()
    )


def cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return -log softmax(logits)[label] [N] and, when asked for, weight (softmax - onehot) [N, V].

    Logits [N, V] may be written over; labels [N] int64, weights [N] and the losses float32.
    """
    if usable(logits):
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        call("cross_entropy", logits.dtype, logits, labels, weights, losses, int(gradient),
             *logits.shape)  # fmt: skip
        return losses, logits if gradient else None
    found = realised(cross_entropy_definition, logits)(logits, labels, weights, gradient)
    return found  # type: ignore[no-any-return]


def cross_entropy_definition(
    logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute what `cross_entropy` says."""
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
    losses = (log_sum - wide.gather(1, labels.unsqueeze(1))).squeeze(1)
    if not gradient:
        return losses, None
    delta = wide.sub_(log_sum).exp_()
    delta.scatter_add_(1, labels.unsqueeze(1), torch.full_like(log_sum, -1.0))
    return losses, delta.mul_(weights.unsqueeze(1)).to(logits.dtype)


def log_sum_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(sum(e^logits)) of each row [N] float32 and the place of its highest value [N]."""
    if usable(logits):
        sums = logits.new_empty(len(logits), dtype=torch.float32)
        best = logits.new_empty(len(logits), dtype=torch.int64)
        call("log_sum_exp", logits.dtype, logits, sums, best, *logits.shape)
        return sums, best
    return realised(log_sum_exp_definition, logits)(logits)  # type: ignore[no-any-return]


def log_sum_exp_definition(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `log_sum_exp` says."""
    return torch.logsumexp(logits.float(), dim=-1), logits.argmax(-1)


@dataclass(frozen=True, slots=True)
class _Fused:
    """A forward that stands in for a module's own."""

    compute: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.compute(x)


@contextmanager
def fused_layers(model: Any) -> Iterator[Counter[str]]:
    """Run the model's norms, activations and rotary embeddings fused inside the block.

    Yields how many of each were replaced. A layer is replaced only if its own forward and the fused
    one agree on made numbers; that is tried once for each class of layer. Adapters that read the
    same input are joined without a trial (lora_joint.py): their layers are our own.
    """
    forwards = {} if any(_overrides(model)) else _replacements(model)
    home, own = _rotation(model)
    rotation = None if own is None or _is_ours(own) else functools.partial(_rotary_pair, own)
    if rotation is not None and not _same_rotation(rotation):
        rotation = None
    count = Counter(name for name, _ in forwards.values())
    count["rotary"] += rotation is not None
    for module, (_, forward) in forwards.items():
        module.forward = forward
    if rotation is not None:
        setattr(home, ROTARY, rotation)
    try:
        yield count
    finally:
        for module in forwards:
            del module.forward
        if rotation is not None:
            setattr(home, ROTARY, own)


@contextmanager
def own_layers(model: Any) -> Iterator[None]:
    """Run the model's own norms, activations and rotary embeddings inside the block."""
    forwards = dict(_overrides(model))
    home, rotation = _rotation(model)
    for module in forwards:
        del module.forward
    if isinstance(rotation, functools.partial) and _is_ours(rotation):
        setattr(home, ROTARY, rotation.args[0])
    try:
        yield
    finally:
        for module, forward in forwards.items():
            module.forward = forward
        if rotation is not None:
            setattr(home, ROTARY, rotation)


def _overrides(model: Any) -> Iterator[tuple[nn.Module, _Fused]]:
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _Fused):
            yield module, forward


def _rotation(model: Any) -> tuple[Any, Callable[..., Any] | None]:
    """Return the module of Transformers that the model comes from and its rotary embedding."""
    home = sys.modules[type(model).__module__]
    return home, getattr(home, ROTARY, None)


def _is_ours(rotation: Callable[..., Any]) -> bool:
    return isinstance(rotation, functools.partial) and rotation.func is _rotary_pair


def _replacements(model: Any) -> dict[nn.Module, tuple[str, _Fused]]:
    verdicts: dict[type, bool] = {}
    found: dict[nn.Module, tuple[str, _Fused]] = {}
    for module in model.modules():
        for name, candidate in (("rms_norm", _norm), ("swiglu", _mlp)):
            compute = candidate(module)
            if compute is None:
                continue
            kind = type(module)
            if kind not in verdicts:
                weight = getattr(module, "gate_proj", module).weight
                verdicts[kind] = _agree(module, compute, weight)
            if verdicts[kind]:
                found[module] = (name, _Fused(compute))
        layers = lora_joint.attention_layers(module)
        if layers and layers[0].weight.device.type in lora_joint.DEVICES:
            ahead = lora_joint.Ahead(layers)
            found |= {n: ("joint", _Fused(ahead.of(i))) for i, n in enumerate(layers)}
    return found


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the fused forward of what looks like an RMS norm."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
        return None
    return lambda x: rms_norm(x, weight, eps)


def _mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the fused forward of what looks like a gated MLP with a SiLU."""
    parts = module._modules
    if not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(parts):
        return None
    gate, up, down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
    assert gate is not None
    assert up is not None
    assert down is not None

    def compute(x: Tensor) -> Tensor:
        gated, raised = lora_joint.together((gate, up), x) or (gate(x), up(x))
        return down(swiglu(gated, raised))  # type: ignore[no-any-return]

    return compute


def _agree(module: nn.Module, forward: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """Whether both compute the same, on rows of usual size and on rows small enough to feel eps.

    `weight` [..., H] says how wide a row is, and in which precision.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, weight.shape[-1], generator=generator)
    x = torch.cat([x, 1e-3 * x]).unsqueeze(0).to(weight)
    training = module.training
    module.eval()
    with torch.no_grad():
        try:
            own, ours = module(x), forward(x)
        except (RuntimeError, TypeError, ValueError):
            return False  # it wants something else than hidden states
        finally:
            module.train(training)
    close = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
    return own.shape == ours.shape and all(
        bool((a - b).norm() <= close * a.norm())
        for a, b in zip(own[0].float().chunk(2), ours[0].float().chunk(2), strict=True)
    )


def _same_rotation(rotation: functools.partial[Any]) -> bool:
    """Whether a model's apply_rotary_pos_emb is the usual one, with halves (not interleaved)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2))
    angles = torch.randn(1, 5, 4, generator=generator).repeat(1, 1, 2)
    try:
        theirs = rotation.args[0](q, k, angles.cos(), angles.sin())
    except (RuntimeError, TypeError, ValueError):
        return False
    ours = rotation(q, k, angles.cos(), angles.sin())
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours, strict=True))


def _rotary_pair(
    own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """Fused apply_rotary_pos_emb: q [B, H, T, D], k [B, K, T, D], cos and sin [B, T, D]."""
    batch, length, width = cos.shape
    if rest or more or q.shape[0] != batch or q.shape[-1] != width:
        return own(q, k, cos, sin, *rest, **more)  # type: ignore[no-any-return]
    cos, sin = cos.reshape(-1, width), sin.reshape(-1, width)

    def turned(x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).reshape(batch * length, -1, width)
        return rotary(rows, cos, sin).view(batch, length, -1, width).transpose(1, 2)

    return turned(q), turned(k)
