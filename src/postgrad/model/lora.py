"""LoRA: low-rank updates of frozen linear layers; on disk a PEFT directory, both ways.

W' = W + (alpha / r) B A with A [r, in] and B [out, r] (Hu et al. 2021, arXiv 2106.09685). The layer
is our own so that the backward pass keeps only its input and x Aᵀ; the directory is PEFT's.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from postgrad.config import LoraConfig
from postgrad.errors import ModelError
from postgrad.model import fp8, frozen, int8
from postgrad.model.frozen import EightBit

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
WIDE = 2048
"""Inputs of a layer from which cuBLAS multiplies by A much faster when A lies column by column: on
an H100 43 us against 21 for the same bytes (4,096 tokens, LOG.md)."""
_NOTHING: tuple[Any, ...] = (None, False, [], {})
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            "use_dora",
            "use_qalora",
            "use_bdlora",
            "lora_bias",
            "fan_in_fan_out",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "alora_invocation_tokens",
            "trainable_token_indices",
            "target_parameters",
            "layer_replication",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "velora_config",
        ),
        _NOTHING,
    ),
}
"""Settings of PEFT that change what is computed, and their values in plain LoRA. Which layers have
an adapter is read from the weights, so that every way of choosing them is understood."""


class _LoraFunction(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W frozen: saves x and x Aᵀ only.

    On a CUDA device the small product comes first and the large one adds to it: what the small one
    alone would have to read again is read while the large one multiplies. With `eight_bit` the two
    products of W are made with that copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        eight_bit: EightBit | None,
        cast: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a_cast, b_cast = cast or (a.to(x.dtype), (b * scale).to(x.dtype))
        low = flat @ a_cast.t()
        if eight_bit is not None:
            y = eight_bit.forward(x, bias).addmm_(low, b_cast.t())
        elif flat.is_cuda and bias is None:
            y = (low @ b_cast.t()).addmm_(flat, weight.t())
        else:
            y = functional.linear(flat, weight, bias)
            y.addmm_(low, b_cast.t())
        ctx.save_for_backward(flat, low, weight, a_cast, b_cast)
        ctx.scale, ctx.shape, ctx.dtype, ctx.eight_bit = scale, x.shape, a.dtype, eight_bit
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = grad @ b
        grad_b = product(grad.t(), low, ctx.dtype).mul_(ctx.scale)
        grad_a = product(grad_low.t(), flat, ctx.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, grad_low, weight, a, ctx.eight_bit).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _input_gradient(
    grad: Tensor, grad_low: Tensor, weight: Tensor, a: Tensor, eight_bit: EightBit | None
) -> Tensor:
    """Return grad W + grad_low A [T, in]."""
    if eight_bit is not None:
        return eight_bit.backward(grad).addmm_(grad_low, a)
    if not grad.is_cuda:
        return (grad @ weight).addmm_(grad_low, a)
    return (grad_low @ wide_enough(a)).addmm_(grad, weight)


def wide_enough(a: Tensor) -> Tensor:
    """Return A [r, in] as it is multiplied by fastest."""
    return a if a.shape[1] < WIDE else a.t().contiguous().t()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in `dtype`; a CUDA device need not round it to the factors' precision first."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update in float32."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        """Wrap `base`; A is Kaiming-uniform, B zero, so the layer starts as `base` exactly.

        A is drawn on the CPU: a seed means the same numbers on every device.
        """
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        a = torch.empty(config.r, base.in_features, device="cpu")
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5)).to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device))
        self.scale = update_scale(config)
        self.dropout = config.lora_dropout
        self.enabled = True
        self.cast: tuple[Tensor, Tensor] | None = None
        """A and s B in the precision of the frozen weight, inside `cast_once`."""
        self.eight_bit: EightBit | None = None
        """The frozen weight in 8 bits, which training mode computes with (`use_eight_bit`)."""

    @property
    def weight(self) -> Tensor:
        """The frozen weight [out, in]."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) plus the scaled update; x [..., in] -> [..., out]."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        if self.cast is not None and not torch.is_grad_enabled():
            flat = x.reshape(-1, x.shape[-1])
            y = functional.linear(flat, self.base.weight, self.base.bias)
            return y.addmm_(flat @ self.cast[0].t(), self.cast[1].t()).view(*x.shape[:-1], -1)
        eight_bit = self.eight_bit if self.training else None
        if self.dropout and self.training:
            dropped = functional.dropout(x, self.dropout).to(x.dtype)
            low = dropped @ self.lora_A.to(x.dtype).t()
            bias = self.base.bias
            y = self.base(x) if eight_bit is None else frozen.linear(x, bias, eight_bit)
            return y + low @ (self.lora_B * self.scale).to(x.dtype).t()
        return _LoraFunction.apply(  # type: ignore[no-untyped-call,no-any-return]
            x,
            self.base.weight,
            self.base.bias,
            self.lora_A,
            self.lora_B,
            self.scale,
            eight_bit,
            self.cast,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it computes x Wᵀ + s (x Aᵀ) Bᵀ now, and nothing more."""
        noisy = self.training and bool(self.dropout)
        eight_bit = self.training and self.eight_bit is not None
        return self.enabled and not noisy and not eight_bit and self.base.bias is None

    def low_precision(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and s B in `dtype`."""
        return self.lora_A.to(dtype), (self.lora_B * self.scale).to(dtype)

    def delta(self) -> Tensor:
        """Return the update (alpha / r) B A [out, in] in float32."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scale


def update_scale(config: LoraConfig) -> float:
    """Return what B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def add_lora(model: Any, config: LoraConfig, seed: int) -> list[str]:
    """Freeze the model, wrap the target layers in place and return their names.

    Raises ModelError when a named target matches no linear layer.
    """
    model.requires_grad_(False)
    names = target_layers(model, config)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoraLinear(getattr(owner, child), config))
    torch.set_rng_state(generator_state)
    return names


def target_layers(model: Any, config: LoraConfig) -> list[str]:
    """Return the names of the linear layers that get an adapter, in model order."""
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if config.target_modules == "all-linear":
        return list(linear)
    chosen: list[str] = []
    for target in config.target_modules:
        matches = [n for n in linear if n == target or n.endswith("." + target)]
        if not matches:
            endings = sorted({name.rpartition(".")[2] for name in linear})
            raise ModelError(
                f"model.adapt.target_modules: no linear layer is called {target}",
                f"choose from {', '.join(endings)} or all-linear",
            )
        chosen += matches
    return [name for name in linear if name in set(chosen)]


def lora_layers(model: Any) -> dict[str, LoraLinear]:
    """Return name -> adapter layer."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def use_eight_bit(
    model: Any, kind: Literal["int8", "fp8"], largest: Mapping[str, Tensor] | None = None
) -> None:
    """Give the adapted layers their frozen weight in 8 bits: training mode computes with it.

    Evaluation mode goes on in the model's precision, which is served. Layers whose widths the
    format does not take keep that in both. `largest` is for int8: by layer, the largest value of
    each input channel (`int8.watched_inputs`), so that the few that stand out are kept apart.
    """
    layers = lora_layers(model)
    if kind == "fp8":
        of_fp8: frozen.SharedInput[fp8.Quantised] = frozen.SharedInput()
        for layer in layers.values():
            layer.eight_bit = fp8.Fp8Weight.of(layer.base.weight, of_fp8)
        return
    of_int8: frozen.SharedInput[int8.Rows] = frozen.SharedInput()
    split = whole = int8.Split()
    for name, layer in layers.items():
        found = (largest or {}).get(name)
        split = whole if found is None else int8.split_of(found, split)
        layer.eight_bit = int8.Int8Weight.of(layer.base.weight, of_int8, split)


def eight_bit_weights(model: Any) -> int:
    """Return how many frozen weights training mode multiplies with in 8 bits."""
    layers = lora_layers(model).values()
    return sum(layer.weight.numel() for layer in layers if layer.eight_bit is not None)


def drop_eight_bit(model: Any) -> None:
    """Compute in the model's precision from now on."""
    for layer in lora_layers(model).values():
        layer.eight_bit = None


@contextmanager
def without_eight_bit(model: Any) -> Iterator[None]:
    """Compute in the model's precision inside the block, in training mode too."""
    before = {layer: layer.eight_bit for layer in lora_layers(model).values()}
    drop_eight_bit(model)
    try:
        yield
    finally:
        for layer, eight_bit in before.items():
            layer.eight_bit = eight_bit


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Switch the adapters off: inside, the model *is* its base; no second copy is needed."""
    layers = list(lora_layers(model).values())
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def scaled(model: Any, factor: float) -> Iterator[None]:
    """Multiply every update by `factor`: inside, the model stands between its base (0) and 1."""
    layers = list(lora_layers(model).values())
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale *= factor
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scale = scale


@contextmanager
def cast_once(model: Any) -> Iterator[None]:
    """Cast the adapters once, all together, not in every forward pass; results are equal.

    The weights must not move inside the block.
    """
    layers = list(lora_layers(model).values())
    if not layers:
        yield
        return
    with torch.no_grad():
        update = torch._foreach_mul([n.lora_B for n in layers], [n.scale for n in layers])
        wide = [*(layer.lora_A for layer in layers), *update]
        low = [
            torch.empty_like(x, dtype=layer.base.weight.dtype)
            for x, layer in zip(wide, [*layers, *layers], strict=True)
        ]
        torch._foreach_copy_(low, wide)
    for layer, a, b in zip(layers, low, low[len(layers) :], strict=False):
        layer.cast = a, b
    try:
        yield
    finally:
        for layer in layers:
            layer.cast = None


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Return the adapter under PEFT's names, float32 on the CPU."""
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        state[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        state[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    return state


def save_adapter(model: Any, config: LoraConfig, directory: Path, base: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does."""
    targets = sorted({name.rpartition(".")[2] for name in lora_layers(model)})
    if not _endings_are_enough(model, targets):
        targets = sorted(lora_layers(model))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    save_file(adapter_state(model), directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def _endings_are_enough(model: Any, endings: list[str]) -> bool:
    """Whether PEFT, matching by ending, would wrap exactly our layers."""
    adapted = set(lora_layers(model))
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    named = {n.removesuffix(".base") for n in linear if n.rpartition(".")[2] in (*endings, "base")}
    return {n for n in named if n.rpartition(".")[2] in endings} == adapted


def read_adapter_config(directory: Path) -> LoraConfig:
    """Read a PEFT adapter_config.json; refuses what our layer does not compute."""
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory}: no readable {CONFIG} ({error})", "give a PEFT folder"
        ) from None
    bad = [name for name, usual in _PLAIN.items() if settings.get(name, usual[0]) not in usual]
    if bad:
        raise ModelError(
            f"{directory}: the adapter uses {', '.join(bad)}", "only plain LoRA and rsLoRA are read"
        )
    if not (directory / WEIGHTS).exists():
        raise ModelError(f"{directory} has no {WEIGHTS}", "save it again with a current PEFT")
    with safe_open(directory / WEIGHTS, "pt") as weights:
        names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in weights.keys()}  # noqa: SIM118
    return LoraConfig(
        r=settings.get("r", 8),
        lora_alpha=settings.get("lora_alpha", 8),
        lora_dropout=settings.get("lora_dropout", 0.0),
        use_rslora=settings.get("use_rslora", False),
        target_modules=tuple(sorted(names)),
    )


def load_adapter_weights(model: Any, directory: Path) -> None:
    """Copy an adapter's weights into the wrapped layers; every name and shape must agree."""
    state = load_file(directory / WEIGHTS)
    layers = lora_layers(model)
    wanted = {f"{PREFIX}{name}.lora_{part}.weight" for name in layers for part in "AB"}
    if set(state) != wanted:
        raise _misfit(directory, sorted(set(state) ^ wanted))
    with torch.no_grad():
        for name, layer in layers.items():
            for part, target in (("A", layer.lora_A), ("B", layer.lora_B)):
                source = state[f"{PREFIX}{name}.lora_{part}.weight"]
                if source.shape != target.shape:
                    raise ModelError(
                        f"{directory}: {name}.lora_{part} is {tuple(source.shape)}, "
                        f"the model needs {tuple(target.shape)}",
                        "check r and the base model",
                    )
                target.copy_(source)


def _misfit(directory: Path, names: list[str]) -> ModelError:
    return ModelError(
        f"{directory}: the adapter does not fit this model "
        f"({len(names)} names differ, the first: {names[0]})",
        "use the base model and target_modules it was trained with",
    )


def attach_adapter(model: Any, directory: Path) -> LoraConfig:
    """Wrap a plain model with a PEFT adapter made here or elsewhere; returns its settings."""
    config = read_adapter_config(directory)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    odd = sorted(set(config.target_modules) - linear)
    if odd:
        raise _misfit(directory, odd)
    add_lora(model, config, seed=0)
    load_adapter_weights(model, directory)
    return config


def replace_adapter(model: Any, directory: Path) -> None:
    """Put the weights and the scale of another adapter on the same layers into a wrapped model."""
    config = read_adapter_config(directory)
    load_adapter_weights(model, directory)
    for layer in lora_layers(model).values():
        layer.scale = update_scale(config)


def write_scaled(source: Path, target: Path, factor: float) -> None:
    """Copy a PEFT adapter with its update multiplied by `factor`, which PEFT reads from alpha.

    The weights are the same bytes; only lora_alpha differs.
    """
    read_adapter_config(source)
    settings = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    settings["lora_alpha"] = settings.get("lora_alpha", 8) * factor
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (target / CONFIG).write_text(text, encoding="utf-8")
