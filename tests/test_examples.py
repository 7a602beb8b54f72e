"""The example trains as `fit` does: the same tokens, the same losses, without our code."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from postgrad.data.render import Renderer
from postgrad.types import Conversation, Example, Message, content_id
from training import make_training, write_rows

PATH = Path(__file__).parents[1] / "examples" / "sft_from_scratch.py"
STEPS, ROWS_PER_STEP, PEAK = 12, 4, 3e-3


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sft_from_scratch", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 30)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rendered(rows, tiny_model_dir):
    conversations = [
        Conversation((Message("user", row["prompt"]), Message("assistant", row["completion"])))
        for row in rows
    ]
    examples = [Example(content_id(c), c, f"rows:{n}") for n, c in enumerate(conversations)]
    return Renderer(AutoTokenizer.from_pretrained(tiny_model_dir)).render_all(examples)


def test_it_stands_alone_and_is_short():
    text = PATH.read_text(encoding="utf-8")
    assert "postgrad" not in [line.split()[1] for line in text.splitlines() if "import" in line[:6]]
    assert len(text.splitlines()) <= 200


def test_it_supervises_the_same_tokens(example, rows, rendered, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for row, tokens in zip(rows, rendered, strict=True):
        ids, mask = example.encode(tokenizer, row)
        assert np.array_equal(ids.numpy(), tokens.ids)
        assert np.array_equal(mask.numpy(), tokens.weights)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_its_losses_are_those_of_fit(example, rows, rendered, tiny_model_dir, tmp_path, packed):
    theirs = example.train(
        tiny_model_dir, rows, steps=STEPS, rows_per_step=ROWS_PER_STEP, peak=PEAK, r=4
    )
    training = make_training(
        tiny_model_dir,
        tmp_path / "run",
        rows=rendered,
        packed=packed,
        capacity=100,
        learning_rate=PEAK,
    )
    training.stream.plan = [
        [(step * ROWS_PER_STEP + row) % len(rows) for row in range(ROWS_PER_STEP)]
        for step in range(STEPS)
    ]
    training.go(eval_steps=100)
    lines = training.run.read_metrics()
    ours = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < 0.9 * ours[0]
    rates = [line["train/learning_rate"] for line in lines if "train/loss" in line]
    rate = partial(example.learning_rate, steps=STEPS, peak=PEAK)
    assert rates == pytest.approx([rate(step) for step in range(STEPS)], rel=1e-12)


def test_it_runs_from_the_command_line(example, tiny_model_dir, tmp_path, monkeypatch, capsys):
    path = write_rows(tmp_path / "rows.jsonl", 6)
    options = ["--steps", "2", "--rows-per-step", "3"]
    monkeypatch.setattr(sys, "argv", [PATH.name, str(tiny_model_dir), str(path), *options])
    example.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["step", "1"], ["step", "2"]]
