"""What must not change the result: micro-batches, packing, the number of processes, a stop."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postgrad.config import LoraConfig
from postgrad.data.batches import micro_batches
from postgrad.errors import Interrupted
from postgrad.model import lora
from postgrad.model.attention import training_attention
from postgrad.parallel import World
from postgrad.train.checkpoint import resume
from postgrad.train.optimizer import trainable
from postgrad.train.sft import SupervisedFineTuning
from training import load_model, make_rows, make_training, stop_at, timeless, weights_of
from world import measure_as_one_of

ROWS = make_rows(14, seed=6, longest=60, weights=(1.0, 0.5))
SRC, TESTS = Path(__file__).parents[2] / "src", Path(__file__).parents[1]


def one_step(model, batches):
    """Loss and gradient of one optimizer step made of these micro-batches."""
    model.zero_grad()
    weight = sum(batch.supervised for batch in batches)
    total = 0.0
    with training_attention(model):
        for batch in batches:
            loss = SupervisedFineTuning()(model, batch)
            (loss.total / weight).backward()
            total += float(loss.total.detach())
    return total / weight, {name: p.grad.clone() for name, p in trainable(model).items()}


@pytest.fixture(scope="module", params=["lora", "full"])
def model(request, tiny_model_dir):
    made = load_model(tiny_model_dir, LoraConfig(r=4) if request.param == "lora" else None).train()
    for layer in lora.lora_layers(made).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return made


@pytest.fixture(scope="module")
def whole(model):
    """Everything in one padded batch."""
    return one_step(model, micro_batches(ROWS, 10_000, packed=False))


def assert_same(found, wanted, tolerance=1e-5):
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    norm = torch.cat([value.flatten() for value in wanted[1].values()]).norm()
    for name, value in wanted[1].items():
        assert float((found[1][name] - value).norm()) <= tolerance * float(norm), name


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(capacity=st.integers(1, 800), packed=st.booleans(), order=st.permutations(range(14)))
def test_any_split_into_micro_batches_packed_or_padded(model, whole, capacity, packed, order):
    rows = [ROWS[index] for index in order]
    batches = micro_batches(rows, capacity, packed)
    assert_same(one_step(model, batches), whole)


def test_one_row_each_is_everything_at_once(model, whole):
    batches = [micro_batches([row], 1, packed)[0] for row in ROWS for packed in (True,)]
    assert len(batches) == 14
    assert_same(one_step(model, batches), whole)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_whole_training_is_the_same_packed_or_padded_in_large_or_small_pieces(
    tiny_model_dir, tmp_path, full
):
    def train(name, **layout):
        training = make_training(tiny_model_dir, tmp_path / name, max_steps=6, full=full, **layout)
        training.go(eval_steps=3)
        return training

    wanted = train("reference", packed=False, capacity=10_000)
    for name, packed, capacity in (("packed", True, 60), ("large", True, 9999), ("one", False, 1)):
        found = train(name, packed=packed, capacity=capacity)
        for one, other in zip(timeless(found.run), timeless(wanted.run), strict=True):
            assert one.keys() == other.keys()
            for key, value in other.items():
                assert one[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (key, other["step"])
        losses = [
            [line["train/loss"] for line in timeless(t.run) if "train/loss" in line]
            for t in (found, wanted)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize("step", [1, 4, 5])
@pytest.mark.parametrize(
    "kind", [{"dropout": 0.2}, {"full": True}, {"packed": False}], ids=["dropout", "full", "padded"]
)
def test_a_stopped_and_resumed_training_is_bit_identical(tiny_model_dir, tmp_path, kind, step):
    def prepare(name, run=None):
        return make_training(tiny_model_dir, tmp_path / name, max_steps=8, run=run, **kind)

    straight = prepare("straight")
    straight.go()
    first = prepare("stopped")
    with pytest.raises(Interrupted):
        first.go(probes=[stop_at(step)])
    torch.rand(17)
    second = prepare("stopped", run=first.run)
    start = resume(second.run, second.model, second.optimizer)
    assert start.step == step
    end = second.go(start=start)
    assert timeless(second.run) == timeless(straight.run)
    ours, theirs = weights_of(second.model), weights_of(straight.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert end.supervised_tokens == straight.stream_supervised()


def test_patience_survives_a_stop(tiny_model_dir, tmp_path):
    other = make_rows(12, seed=2, first=100, name="held-out")

    def prepare(name, run=None):
        return make_training(tiny_model_dir, tmp_path / name, epochs=4.0, held_out=other, run=run)

    straight = prepare("straight")
    end = straight.go(eval_steps=2, patience=3)
    assert end.stopping.stopped
    first = prepare("stopped")
    with pytest.raises(Interrupted):
        first.go(eval_steps=2, patience=3, probes=[stop_at(end.step - 2)])
    second = prepare("stopped", run=first.run)
    start = resume(second.run, second.model, second.optimizer)
    assert start.stopping.waited == 2
    again = second.go(start=start, eval_steps=2, patience=3)
    assert again.step == end.step
    assert timeless(second.run) == timeless(straight.run)


def run_workers(base, out, size):
    """Start processes as torchrun would; returns what each measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(SRC), str(TESTS)]),
    }
    command = [sys.executable, str(TESTS / "world.py"), str(base), str(out)]
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in started:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors[-2000:]
    return [torch.load(out / f"{rank}-of-{size}.pt") for rank in range(size)]


def test_two_processes_train_as_one(tiny_model_dir, tmp_path):
    one = measure_as_one_of(World(), tiny_model_dir, tmp_path)
    first, second = run_workers(tiny_model_dir, tmp_path, 2)
    assert one["micro"] >= 3
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key])
    for rank in (first, second):
        assert rank["world"] == 2
        assert rank["flags"] == [True, False]
        assert rank["total"] == pytest.approx(one["total"], rel=1e-6)
        assert rank["held_out"] == pytest.approx(one["held_out"], rel=1e-6)
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                limit = 2e-6 * max(1.0, float(value.norm()))
                assert float((rank[key] - value).norm()) <= limit, key
        for ours, theirs in zip(rank["metrics"], one["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
