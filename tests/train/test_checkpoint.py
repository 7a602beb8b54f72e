"""A checkpoint brings back everything that the next step depends on, or is not used."""

import math

import numpy as np
import pytest
import torch

from postgrad.errors import CheckpointError
from postgrad.run import verify_checksums
from postgrad.train import checkpoint
from postgrad.train.checkpoint import (
    Progress,
    checkpoint_path,
    load_checkpoint,
    load_weights,
    newest_valid,
    prune,
    save_checkpoint,
)
from postgrad.train.stopping import HeldOut, StoppingState
from training import events, make_training, weights_of


def stopping(best_step, loss=math.pi, waited=2):
    reference = HeldOut(np.array([0.1, 1 / 3, 2.0]), np.array([1.0, 2.0, 0.5]))
    return StoppingState(best_step, loss, reference, waited, False)


def stir(training, seed=0):
    """One optimizer step on made-up gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in training.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    training.optimizer.step()


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_everything_comes_back_bit_by_bit(tiny_model_dir, tmp_path, full):
    one = make_training(tiny_model_dir, tmp_path / "one", full=full)
    stir(one)
    progress = Progress(17, 1234, 56.5, 7.25, stopping(17))
    folder = save_checkpoint(one.run, one.model, one.optimizer, progress)
    expected = torch.rand(5)
    other = make_training(tiny_model_dir, tmp_path / "other", full=full, run=one.run)
    stir(other, seed=9)
    verify_checksums(folder)
    found = load_checkpoint(folder, other.model, other.optimizer)
    assert torch.equal(torch.rand(5), expected)
    assert (found.step, found.tokens, found.supervised_tokens, found.seconds) == (
        17,
        1234,
        56.5,
        7.25,
    )
    assert found.stopping.best_loss == math.pi
    assert (found.stopping.best_step, found.stopping.waited, found.stopping.stopped) == (
        17,
        2,
        False,
    )
    for name in ("sums", "weights"):
        assert np.array_equal(
            getattr(found.stopping.reference, name), getattr(progress.stopping.reference, name)
        )
    for training in (one, other):
        stir(training, seed=3)
    ours, theirs = weights_of(one.model), weights_of(other.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_full_checkpoint_holds_tied_weights_once(tiny_model_dir, tmp_path):
    training = make_training(tiny_model_dir, tmp_path / "run", full=True)
    folder = save_checkpoint(training.run, training.model, training.optimizer, Progress())
    from safetensors.torch import load_file

    saved = load_file(folder / checkpoint.FULL_WEIGHTS)
    assert "model.embed_tokens.weight" in saved
    assert "lm_head.weight" not in saved


def test_a_checkpoint_of_another_method_is_refused(tiny_model_dir, tmp_path):
    full = make_training(tiny_model_dir, tmp_path / "full", full=True)
    folder = save_checkpoint(full.run, full.model, full.optimizer, Progress())
    adapted = make_training(tiny_model_dir, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_weights(adapted.model, folder)


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    """A training with checkpoints at steps 0, 4, 8 and 12, the best at step 4."""
    training = make_training(tiny_model_dir, tmp_path / "run")
    for step in (0, 4, 8, 12):
        best = stopping(min(step, 4))
        save_checkpoint(
            training.run, training.model, training.optimizer, Progress(step, 0, 0, 0, best)
        )
    return training


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir() if not path.is_symlink())


def test_pointers_follow_the_newest_and_the_best(saved):
    run = saved.run
    assert run.pointed("last") == checkpoint_path(run, 12).resolve()
    assert run.pointed("best") == checkpoint_path(run, 4).resolve()
    assert names(run) == ["step-000000", "step-000004", "step-000008", "step-000012"]


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [4, 12]), (2, [4, 8, 12]), (3, [4, 8, 12]), (4, [0, 4, 8, 12])]
)
def test_pruning_keeps_the_newest_and_the_best(saved, keep, left):
    prune(saved.run, keep)
    assert names(saved.run) == [f"step-{step:06d}" for step in left]
    assert saved.run.pointed("best") is not None
    assert newest_valid(saved.run) == checkpoint_path(saved.run, 12)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no-checksums"])
def test_a_damaged_checkpoint_is_passed_over_and_recorded(saved, damage):
    folder = checkpoint_path(saved.run, 12)
    file = folder / checkpoint.OPTIMIZER if damage != "no-checksums" else folder / "checksums.json"
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-1])
    elif damage == "changed":
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    else:
        file.unlink()
    assert newest_valid(saved.run) == checkpoint_path(saved.run, 8)
    [event] = events(saved.run, "damaged-checkpoint")
    assert event["checkpoint"] == "step-000012"
    assert file.name in event["reason"]


def test_without_a_whole_checkpoint_there_is_none(saved):
    for folder in saved.run.checkpoints.glob("step-*"):
        (folder / checkpoint.STATE).unlink()
    assert newest_valid(saved.run) is None
    assert len(events(saved.run, "damaged-checkpoint")) == 4


def test_an_unfinished_checkpoint_is_never_seen(saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        save_checkpoint(saved.run, saved.model, saved.optimizer, Progress(16))
    assert names(saved.run) == ["step-000000", "step-000004", "step-000008", "step-000012"]
    assert saved.run.pointed("last") == checkpoint_path(saved.run, 12).resolve()
