"""Compiled definitions compute what the definitions compute, and only where they pay."""

import pytest
import torch

from postgrad.model import compiled, fused, kernels

compiling = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself


def made(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cases(rows, dtype):
    """Name -> definition and arguments, on `rows` rows."""
    x, dy = (made(1, rows, 40, dtype=dtype, seed=s) for s in (1, 2))
    weight, scale = made(40, dtype=dtype, seed=3), made(rows, dtype=torch.float32, seed=4).abs()
    logits, labels = made(rows, 101, dtype=dtype, seed=7), torch.arange(rows) % 101
    return {
        "norm": (fused.norm_forward, (x, weight, 1e-5)),
        "norm gradient": (fused.norm_backward, (dy, x, weight, scale, True)),
        "frozen norm gradient": (fused.norm_backward, (dy, x, weight, scale, False)),
        "swiglu": (fused.swiglu_forward, (x, dy)),
        "swiglu gradient": (fused.swiglu_backward, (dy, x, x + 1)),
        "loss": (fused.cross_entropy_definition, (logits, labels, scale, False)),
        "loss gradient": (fused.cross_entropy_definition, (logits, labels, scale, True)),
    }


def results(function, arguments):
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    found = function(*copies)
    return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def agree(name, rows, dtype, device="cpu"):
    """Compare compiled and plain; a compiler may leave out roundings between two operations."""
    definition, arguments = cases(rows, dtype)[name]
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    close = 1e-5 if dtype == torch.float32 else 2e-2
    ours = results(compiled.compiled(definition), arguments)
    for one, other in zip(ours, results(definition, arguments), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= close * other.abs().max()


@pytest.mark.slow
@compiling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases(1, torch.float32))
def test_compiled_definitions_equal_the_definitions(name, dtype):
    for rows in (2, 7, 64, 130):
        agree(name, rows, dtype)


@pytest.mark.gpu
@compiling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases(1, torch.float32))
def test_compiled_definitions_equal_the_definitions_on_a_device(cuda, name, dtype):
    for rows in (2, 7, 64, 130, 4096):
        agree(name, rows, dtype, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (9, 64), (32, 128), (3, 80)])
def test_the_rotary_kernel_equals_the_definition(cuda, heads, width, dtype):
    triton_kernels = pytest.importorskip("postgrad.model.triton_kernels")
    for rows in (1, 7, 1000):
        x = made(rows, heads, width, dtype=dtype, seed=5).to(cuda)
        angles = made(rows, width // 2, dtype=torch.float32, seed=6).repeat(1, 2).to(cuda)
        for sign in (1.0, -1.0):
            ours = triton_kernels.rotate(x, angles.cos().to(dtype), angles.sin().to(dtype), sign)
            wide = fused.rotate(x.double(), angles.cos().to(dtype), angles.sin().to(dtype), sign)
            close = 1e-5 if dtype == torch.float32 else 1e-2
            assert (ours - wide).abs().max() <= close * wide.abs().max()


def test_tensors_of_a_cpu_never_go_to_the_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "compiled", lambda definition: pytest.fail("compiled"))
    monkeypatch.setattr(kernels, "kernels", lambda: kernels.Kernels(None, "off"))
    compiled.switch(True)
    try:
        fused.swiglu(torch.ones(2, 3), torch.ones(2, 3))
    finally:
        compiled.switch(False)


def test_on_a_device_definitions_are_compiled_when_switched_on(monkeypatch):
    class OnDevice:
        is_cuda = True

    monkeypatch.setattr(compiled, "compiled", lambda definition: ("compiled", definition))
    assert compiled.realised(fused.swiglu_forward, OnDevice()) is fused.swiglu_forward
    compiled.switch(True)
    try:
        assert compiled.realised(fused.swiglu_forward, OnDevice()) == (
            "compiled",
            fused.swiglu_forward,
        )
    finally:
        compiled.switch(False)
