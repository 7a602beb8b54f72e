"""Twenty steps on the tiny model: the figures of today are those of the day they were recorded.

Bit-equal on the kind of machine that recorded them (same processor, torch and Transformers), within
1e-4 on any other. After a change that is meant to move rounding, record them again and say so in
the commit:

    POSTGRAD_GOLDEN=write python -m pytest tests/train/test_golden.py
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch
import transformers

from training import make_training, timeless

GOLDEN = Path(__file__).parents[1] / "golden" / "sft_20_steps.json"


def processor():
    """The processor's name, for rounding differs between processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "model\t", "stepping")
    return " / ".join(
        sorted({line.partition(":")[2].strip() for line in lines if line.startswith(wanted)})
    )


def signature():
    """What equal bits can be expected of."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@pytest.fixture(scope="module")
def figures(tiny_model_dir, tmp_path_factory):
    """The 20 steps: LoRA, float32, one thread, packed."""
    training = make_training(
        tiny_model_dir, tmp_path_factory.mktemp("golden") / "run", epochs=3.0, max_steps=20
    )
    training.go(eval_steps=10)
    return timeless(training.run)


def test_the_losses_of_twenty_steps_are_as_recorded(figures):
    if os.environ.get("POSTGRAD_GOLDEN") == "write":
        content = {"signature": signature(), "metrics": figures}
        GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert sum("train/loss" in line for line in golden["metrics"]) == 20
    if golden["signature"] == signature():
        assert figures == golden["metrics"]
        return
    for ours, recorded in zip(figures, golden["metrics"], strict=True):
        assert ours == pytest.approx(recorded, rel=1e-4, abs=1e-7)


def test_the_record_is_of_a_training_that_learns():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    losses = [line["train/loss"] for line in golden["metrics"] if "train/loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert set(golden["signature"]) == set(signature())
