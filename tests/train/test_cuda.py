"""Training on a CUDA device: the host waits once in a step, and the losses are the CPU's."""

import warnings

import pytest
import torch

from postgrad.config import LoraConfig
from postgrad.model import attention, fp8, lora
from postgrad.model.transfer import on_device
from postgrad.train import fit as fit_module
from postgrad.train.graphs import Graphs
from postgrad.train.optimizer import make_optimizer
from training import load_model, make_rows, make_training

STEPS = 6


def losses(training):
    training.go(eval_steps=10**6)
    return [line["train/loss"] for line in training.run.read_metrics() if "train/loss" in line]


READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_nothing_is_read_back_while_gradients_are_made(
    tiny_model_dir, tmp_path, monkeypatch, packed
):
    """Each of these makes the host wait for a device; on a CPU they can be counted as well."""
    training = make_training(
        tiny_model_dir, tmp_path / "run", max_steps=STEPS, capacity=40, packed=packed
    )
    assert all(len(training.stream.step(step)) > 1 for step in range(STEPS))
    monkeypatch.setattr(attention, "works_ahead", lambda model: True)
    monkeypatch.setattr(attention, "bucketed_attention", None)
    monkeypatch.setattr(attention, "BUCKET_LIMIT", 0)
    accumulate, steps = fit_module._accumulate, []

    def strict(*arguments):
        steps.append(arguments)
        with pytest.MonkeyPatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
            return accumulate(*arguments)

    monkeypatch.setattr(fit_module, "_accumulate", strict)
    training.go(eval_steps=10**6)
    assert len(steps) == STEPS


def test_arrays_arrive_as_they_are():
    rows = make_rows(1)[0]
    cpu, turned = torch.device("cpu"), rows.ids[::-1]
    assert on_device(turned, cpu).tolist() == turned.tolist()
    assert on_device(rows.weights, cpu).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_host_waits_once_in_a_step(cuda, tiny_model_dir, tmp_path, monkeypatch, packed):
    training = make_training(
        tiny_model_dir, tmp_path / "run", max_steps=STEPS, capacity=40, packed=packed
    )
    training.model.to(cuda)
    waits = []

    def watched(function, mode):
        def run(*arguments):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    return function(*arguments)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    waits.extend(w for w in caught if "called a synchronizing" in str(w.message))

        return run

    for name, mode in (("_accumulate", "error"), ("_update", "warn")):
        monkeypatch.setattr(fit_module, name, watched(getattr(fit_module, name), mode))
    training.go(eval_steps=10**6)
    assert len(waits) == STEPS


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_losses_are_those_of_the_cpu(cuda, tiny_model_dir, tmp_path, packed, full):
    found = []
    for device in (torch.device("cpu"), cuda):
        training = make_training(
            tiny_model_dir, tmp_path / device.type, max_steps=STEPS, packed=packed, full=full
        )
        training.model.to(device)
        found.append(losses(training))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_losses_in_float8_are_nearly_those_of_bf16(cuda, tiny_model_dir, tmp_path, packed):
    if fp8.why_not(cuda):
        pytest.skip(fp8.why_not(cuda))
    found, graphs = {}, Graphs(40, 96)
    for name in ("bf16", "fp8", "recorded"):
        training = make_training(
            tiny_model_dir, tmp_path / name, epochs=3, max_steps=3 * STEPS, packed=packed
        )
        training.model = load_model(tiny_model_dir, LoraConfig(r=4), torch.bfloat16).to(cuda)
        training.optimizer = make_optimizer(training.model, training.recipe.train, 1e-3)
        if name != "bf16":
            lora.use_eight_bit(training.model, "fp8")
        training.go(eval_steps=10**6, backward=graphs if name == "recorded" else None)
        found[name] = [
            line["train/loss"] for line in training.run.read_metrics() if "train/loss" in line
        ]
    assert found["bf16"] != found["fp8"]
    for name in ("bf16", "recorded"):
        assert found[name][:STEPS] == pytest.approx(found["fp8"][:STEPS], rel=2e-2)
        assert found[name] == pytest.approx(found["fp8"], rel=1e-1)  # differences grow
    assert graphs.reason == ""
    assert (graphs.replayed > 0) == packed
