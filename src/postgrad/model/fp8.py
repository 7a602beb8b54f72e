"""Products with a frozen weight in float8: twice the rate of bf16 on the GPUs that have it.

Values are float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433) with a float32 scale for each
row, so that the largest of a row becomes 448 and an outlier costs its own row alone. Activations
and gradients get their scales as they come. A weight is quantised once, and twice: by output for
x Wᵀ, by input for the gradient g W, because torch._scaled_mm wants the second matrix column by
column and scales along what is not summed over.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.model.compiled import realised
from postgrad.model.frozen import SharedInput

LARGEST = 448.0
"""Largest value of float8_e4m3fn."""
LEAST = 1e-30
"""A row's largest value counts as at least this: a row of zeros stays one, and no gradient is so
small."""
MULTIPLE = 16
"""Both widths of a weight must be multiples of this for torch._scaled_mm; rows are padded."""
LEAST_CAPABILITY = (8, 9)
"""Compute capability with float8 products: Ada; then Hopper and Blackwell."""


def why_not(device: torch.device) -> str:
    """Return why float8 products cannot be had on this device; "" when they can."""
    if device.type != "cuda":
        return "there is no CUDA device here"
    if torch.version.hip is not None:
        return "this is an AMD GPU, whose float8 is another format"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}"
    return ""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix whose rows have a scale each: row i is scales[i] values[i]."""

    values: Tensor
    """[R, K] float8_e4m3fn, row by row in memory."""
    scales: Tensor
    """[R, 1] float32."""

    def product(self, other: "Quantised") -> Tensor:
        """Return self otherᵀ [R, N] in bf16, `other` [N, K].

        Sums are kept in the tensor cores' own precision (fast accumulation): the row-wise kernels
        are slow without, and what it loses is far below the rounding of the values.
        """
        return torch._scaled_mm(
            self.values,
            other.values.t(),
            scale_a=self.scales,
            scale_b=other.scales.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


def quantised(x: Tensor) -> Quantised:
    """Quantise the rows of x [R, K]."""
    return Quantised(*realised(quantise_definition, x)(x.detach().contiguous()))


def quantise_definition(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and scales; in a row with NaN or infinity neither is finite."""
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(LEAST) / LARGEST
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def padded_rows(x: Tensor) -> Quantised:
    """Quantise the rows of x [R, K], rows of zeros added up to a multiple of 16."""
    return quantised(_padded(x))


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A frozen weight W [out, in], quantised by output and by input."""

    by_output: Quantised
    """W."""
    by_input: Quantised
    """Wᵀ."""
    inputs: SharedInput[Quantised]
    """Shared by the layers of a model."""

    @classmethod
    def of(cls, weight: Tensor, inputs: SharedInput[Quantised]) -> "Fp8Weight | None":
        """Quantise a weight [out, in]; None where its widths are not multiples of 16."""
        if any(width % MULTIPLE for width in weight.shape):
            return None
        weight = weight.detach()
        return cls(quantised(weight), quantised(weight.t()), inputs)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b [T, out] for x [..., in] of T rows in all."""
        y = self.inputs(x, padded_rows).product(self.by_output)[: x.numel() // x.shape[-1]]
        return y if bias is None else y.add_(bias)

    def backward(self, grad: Tensor) -> Tensor:
        """Return grad W [T, in] for grad [T, out]."""
        return quantised(_padded(grad)).product(self.by_input)[: len(grad)]


def _padded(x: Tensor) -> Tensor:
    """Return x [R, K] with rows of zeros up to a multiple of 16."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % MULTIPLE)) if len(x) % MULTIPLE else x
