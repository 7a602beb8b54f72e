"""The loop: what it records, when it stops, saves, evaluates and refuses to go on."""

import math
import signal
import threading
from itertools import pairwise

import pytest
import torch

from postgrad.data.batches import micro_batches
from postgrad.errors import Interrupted, TrainingError
from postgrad.model.attention import training_attention
from postgrad.train.checkpoint import checkpoint_path, resume
from postgrad.train.fit import Probe
from training import RARE, events, make_rows, make_training, stop_at, timeless, weights_of

STEP = {"train/loss", "train/grad_norm", "train/learning_rate", "train/supervised_tokens"}
EVALUATION = {"validation/loss", "validation/se", "validation/best"}
ALWAYS = {"step", "tokens", "seconds"}


@pytest.fixture
def training(tiny_model_dir, tmp_path):
    return make_training(tiny_model_dir, tmp_path / "run", max_steps=8)


def with_rare_token(count=12, at=5):
    """Rows of which number `at` alone holds the rare token, in its prompt."""
    rows = make_rows(count, seed=4, longest=30)
    rows[at].ids[1] = RARE
    return rows


def spoil(model, value=math.nan):
    """Make the model trip over the rare token, and over no other."""

    def hook(_, inputs, output):
        return output.masked_fill((inputs[0] == RARE).unsqueeze(-1), value)

    model.get_input_embeddings().register_forward_hook(hook)


def worsening(directory, out, **settings):
    """Training on answers that the held-out rows never give: the more, the worse."""
    other = make_rows(12, seed=2, first=100, name="held-out")
    return make_training(directory, out, held_out=other, **settings)


def test_every_step_and_every_evaluation_is_a_line(training):
    progress = training.go()
    lines = training.run.read_metrics()
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "validation/loss" in line]
    assert len(lines) == len(steps) + len(evaluations)
    assert all(set(line) == ALWAYS | STEP for line in steps)
    assert all(set(line) == ALWAYS | EVALUATION for line in evaluations)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert lines[0]["tokens"] == 0
    assert steps[-1]["tokens"] == progress.tokens == training.stream.tokens
    assert [line["train/learning_rate"] for line in steps][:3] == [0.005, 0.01, 0.01 * 6 / 7]
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(lines))
    assert progress.supervised_tokens == sum(line["train/supervised_tokens"] for line in steps)
    assert evaluations[-1]["validation/loss"] < evaluations[0]["validation/loss"]
    assert evaluations[0]["validation/se"] == 0
    assert 0 < evaluations[-1]["validation/se"] < 1
    assert [event["step"] for event in events(training.run, "best")] == [0, 4, 8]


def test_the_first_loss_is_that_of_the_base_on_the_first_batch(training):
    batches = training.stream.step(0)
    with torch.no_grad(), training_attention(training.model):
        sums = [float(training.objective(training.model, batch).total) for batch in batches]
    weight = sum(batch.supervised for batch in batches)
    training.go()
    first = next(line for line in training.run.read_metrics() if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(sum(sums) / weight, rel=1e-6)
    assert first["train/supervised_tokens"] == weight


def test_the_last_step_is_evaluated_even_between_intervals(tiny_model_dir, tmp_path):
    training = make_training(tiny_model_dir, tmp_path / "run", max_steps=6)
    training.go(eval_steps=4)
    found = [line["step"] for line in training.run.read_metrics() if "validation/loss" in line]
    assert found == [0, 4, 6]
    assert training.run.pointed("last") == checkpoint_path(training.run, 6).resolve()


def test_training_learns(tiny_model_dir, tmp_path):
    training = make_training(tiny_model_dir, tmp_path / "run", epochs=3.0)
    progress = training.go(eval_steps=10)
    start = training.run.read_metrics()[0]["validation/loss"]
    assert progress.stopping.best_loss < 0.8 * start


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_loss_that_is_not_finite_names_the_example(tiny_model_dir, tmp_path, packed, full):
    rows = with_rare_token()
    training = make_training(
        tiny_model_dir, tmp_path / "run", rows=rows, per_step=10_000, packed=packed, full=full
    )
    spoil(training.model)
    before = weights_of(training.model)
    with pytest.raises(TrainingError, match="the loss is not finite at") as error:
        training.go()
    assert error.value.message.endswith("at example row-5")
    assert "data/kept.jsonl" in error.value.remedy
    after = weights_of(training.model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any("train/loss" in line for line in training.run.read_metrics())


def test_a_gradient_that_is_not_finite_names_the_examples_of_the_step(training):
    parameter = next(p for p in training.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"gradient .* is not finite at examples row-") as error:
        training.go()
    step = [name for batch in training.stream.step(0) for name in batch.example_ids]
    assert all(name in error.value.message for name in step)
    assert "learning_rate" in error.value.remedy


def test_a_held_out_loss_that_is_not_finite_stops_at_once(tiny_model_dir, tmp_path):
    rows = with_rare_token()
    training = make_training(tiny_model_dir, tmp_path / "run", held_out=rows)
    spoil(training.model)
    with pytest.raises(TrainingError, match="the held-out loss is nan after step 0"):
        training.go()
    assert not training.run.checkpoints.exists()


@pytest.mark.parametrize("limit", [0.5, 1e9, None])
def test_clipping_bounds_the_update_and_records_the_norm_before(tiny_model_dir, tmp_path, limit):
    training = make_training(tiny_model_dir, tmp_path / "run", max_steps=1)
    moved = [p for p in training.model.parameters() if p.requires_grad]
    training.optimizer = torch.optim.SGD(moved)
    before = [p.detach().clone() for p in moved]
    training.go(max_grad_norm=limit)
    line = next(line for line in training.run.read_metrics() if "train/loss" in line)
    update = torch.cat([(p - b).flatten() for p, b in zip(moved, before, strict=True)])
    norm = float(update.detach().norm()) / line["train/learning_rate"]
    assert line["train/grad_norm"] > 0.5
    expected = min(line["train/grad_norm"], limit or math.inf)
    assert norm == pytest.approx(expected, rel=1e-4)


def test_a_run_that_gets_worse_stops_early_and_keeps_its_best(tiny_model_dir, tmp_path):
    training = worsening(tiny_model_dir, tmp_path / "run", epochs=6.0)
    progress = training.go(eval_steps=2, patience=3)
    assert progress.stopping.stopped
    assert progress.step < len(training.stream)
    assert progress.stopping.waited == 3
    [event] = events(training.run, "stopped")
    assert event["step"] == progress.step
    lines = [line for line in training.run.read_metrics() if "validation/loss" in line]
    best = min(lines, key=lambda line: line["validation/loss"])
    assert best["step"] == progress.stopping.best_step
    assert lines[-1]["validation/loss"] > best["validation/loss"]
    pointed = training.run.pointed("best")
    assert pointed == checkpoint_path(training.run, progress.stopping.best_step).resolve()


def test_old_checkpoints_go_but_the_best_and_the_newest_stay(tiny_model_dir, tmp_path):
    training = worsening(tiny_model_dir, tmp_path / "run", max_steps=10)
    progress = training.go(eval_steps=1, save_total_limit=2)
    assert progress.stopping.best_step < 8
    left = sorted(training.run.checkpoints.glob("step-*"))
    best = progress.stopping.best_step
    assert left == [checkpoint_path(training.run, step) for step in (best, 9, 10)]
    assert not list(training.run.checkpoints.glob(".*"))


def test_time_between_checkpoints_is_bounded(training):
    training.go(eval_steps=100, save_seconds=0.0, save_total_limit=100)
    assert len(list(training.run.checkpoints.glob("step-*"))) == 9


def test_probes_run_at_their_own_interval(training):
    calls = []

    def measure(step):
        calls.append(step)
        return {"probe/value": step / 2}

    training.go(probes=[Probe("value", 3, measure), Probe("never", 100, measure)])
    assert calls == [3, 6]
    found = [line for line in training.run.read_metrics() if "probe/value" in line]
    assert [(line["step"], line["probe/value"]) for line in found] == [(3, 1.5), (6, 3.0)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_so(training, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="interrupted after step 3; the checkpoint is saved") as e:
        training.go(probes=[stop_at(3, number)])
    assert e.value.exit_code == 130
    assert "--resume" in e.value.remedy
    assert training.run.pointed("last") == checkpoint_path(training.run, 3).resolve()
    assert [event["step"] for event in events(training.run, "interrupted")] == [3]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait(training):
    def twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.go(probes=[Probe("stop", 2, twice)])
    assert training.run.pointed("last") == checkpoint_path(training.run, 0).resolve()


def test_a_signal_at_the_last_step_loses_nothing(training):
    with pytest.raises(Interrupted):
        training.go(probes=[stop_at(8)])
    progress = resume(training.run, training.model, training.optimizer)
    before = timeless(training.run)
    assert training.go(start=progress).step == 8
    assert timeless(training.run) == before


def test_it_runs_outside_the_main_thread(training):
    done = []
    thread = threading.Thread(target=lambda: done.append(training.go()))
    thread.start()
    thread.join()
    assert done[0].step == 8


def test_a_damaged_newest_checkpoint_costs_only_time(tiny_model_dir, tmp_path):
    whole = make_training(tiny_model_dir, tmp_path / "whole", max_steps=8)
    whole.go()
    first = make_training(tiny_model_dir, tmp_path / "broken", max_steps=8)
    with pytest.raises(Interrupted):
        first.go(probes=[stop_at(6)])
    file = checkpoint_path(first.run, 6) / "state.json"
    file.write_bytes(file.read_bytes()[:10])
    again = make_training(tiny_model_dir, tmp_path / "broken", max_steps=8, run=first.run)
    progress = resume(again.run, again.model, again.optimizer)
    assert progress.step == 4
    assert not checkpoint_path(again.run, 6).exists()
    assert [event["checkpoint"] for event in events(again.run, "damaged-checkpoint")] == [
        "step-000006"
    ]
    again.go(start=progress)
    assert timeless(again.run) == timeless(whole.run)
    ours, theirs = weights_of(again.model), weights_of(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pointers_lost_in_a_kill_are_set_again(training):
    training.go()
    run = training.run
    assert run.pointed("best") == checkpoint_path(run, 8).resolve()
    run.point("best", checkpoint_path(run, 4))
    (run.checkpoints / "last").unlink()
    progress = resume(run, training.model, training.optimizer)
    assert progress.step == progress.stopping.best_step == 8
    assert run.pointed("best") == run.pointed("last") == checkpoint_path(run, 8).resolve()


def test_resuming_nothing_starts_afresh(training):
    training.run.metrics(3, 10, 1.0, **{"train/loss": 1.0})
    assert resume(training.run, training.model, training.optimizer) is None
    assert training.run.read_metrics() == []


def test_rows_without_labels_in_a_step_are_refused_by_name(tiny_model_dir, tmp_path):
    rows = make_rows(4, weights=(0.0,))
    assert sum(batch.supervised for batch in micro_batches(rows, 100, True)) == 0
    training = make_training(tiny_model_dir, tmp_path / "run", rows=rows)
    with pytest.raises(TrainingError, match="row-"):
        training.go()
