"""A recipe counted without its model equals what a session counts with it."""

import itertools

import pytest

from postgrad.data.dataset import load_dataset
from postgrad.errors import DataError
from postgrad.estimate import flops
from postgrad.model import fp8, int8
from postgrad.model.light_tokenizer import load_light_tokenizer
from postgrad.model.lora import eight_bit_weights
from postgrad.train.forecast import document, forecast
from postgrad.train.optimizer import trainable
from postgrad.train.probe import Timing, dry_run, probe, time_session
from postgrad.train.session import open_session
from training import make_recipe, write_rows


def prepared(base, folder, **sections):
    rows = write_rows(folder / "rows.jsonl", 200)
    data = {"train": str(rows), "validation": 0.2, "test": 0.2, **sections.pop("data", {})}
    train = {"threads": 1, "eval_rows": None, **sections.pop("train", {})}
    recipe = make_recipe(base, data=data, train=train, **sections)
    return recipe, load_dataset(recipe.data, recipe.seed)


@pytest.mark.parametrize(
    "adapt", [{"r": 4}, {"r": 2, "target_modules": ["q_proj"]}, {"kind": "full"}]
)
def test_counting_without_the_model_equals_counting_with_it(tiny_model_dir, tmp_path, adapt):
    recipe, dataset = prepared(tiny_model_dir, tmp_path, model={"adapt": adapt})
    counted = forecast(recipe, dataset, tiny_model_dir, load_light_tokenizer(tiny_model_dir))
    session = open_session(recipe, dataset)
    known = dry_run(session, dataset)
    resolved, train = counted.recipe.train, session.recipe.train
    for name in ("learning_rate", "tokens_per_batch", "micro_batch_tokens", "eval_steps"):
        assert getattr(resolved, name) == getattr(train, name)
    stream = session.stream(packed=True)
    assert (counted.steps, counted.training.tokens) == (len(stream), stream.tokens)
    assert counted.method.trainable == sum(p.numel() for p in trainable(session.model).values())
    assert (
        counted.parameters + (0 if counted.method.full else counted.method.trainable)
        == known["total_parameters"]
    )
    assert known["flops"] == flops(
        counted.shape, counted.method, counted.training, counted.held_out
    )
    assert known["peak_memory_source"] == "measured"
    assert known["time_source"] == "micro-batch"


def test_copies_in_float8_are_counted(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8, "why_not", lambda device: "")
    adapt = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    recipe, dataset = prepared(
        tiny_model_dir,
        tmp_path,
        model={"adapt": adapt, "precision": "bf16"},
        train={"base_precision": "fp8"},
    )
    counted = forecast(recipe, dataset, tiny_model_dir, load_light_tokenizer(tiny_model_dir))
    assert counted.method.eight_bit_bytes == 2 * 2 * (64 * 64 + 64 * 128)
    known = dry_run(open_session(recipe, dataset), dataset)
    assert known["memory"]["eight_bit_copies_bytes"] == counted.method.eight_bit_bytes


def test_both_models_of_a_probe_are_timed_in_one_precision(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SMALLEST", 1)
    turn = itertools.cycle([True, False])
    monkeypatch.setattr(int8, "pays", lambda weight: next(turn))
    recipe, dataset = prepared(tiny_model_dir, tmp_path, model={"precision": "bf16"})
    seen = []
    monkeypatch.setattr(
        "postgrad.train.probe.time_session",
        lambda session: (
            seen.append((session.recipe.train.base_precision, eight_bit_weights(session.model) > 0))
            or time_session(session)
        ),
    )
    work = forecast(recipe, dataset, tiny_model_dir, load_light_tokenizer(tiny_model_dir))
    probe(work, dataset, tiny_model_dir)
    assert seen == [("int8", True)] * 2


def test_a_dry_run_moves_nothing(tiny_model_dir, tmp_path):
    recipe, dataset = prepared(tiny_model_dir, tmp_path)
    session = open_session(recipe, dataset)
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    timing = time_session(session)
    assert timing.seconds > 0
    assert timing.tokens <= session.recipe.train.micro_batch_tokens
    assert all((p == before[n]).all() for n, p in session.model.named_parameters())
    assert all(p.grad is None for p in session.model.parameters())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_probe_times_few_layers_of_the_shape(tiny_model_dir, tmp_path, kind):
    recipe, dataset = prepared(tiny_model_dir, tmp_path, model={"adapt": {"kind": kind}})
    counted = forecast(recipe, dataset, tiny_model_dir, load_light_tokenizer(tiny_model_dir))
    speed = probe(counted, dataset, tiny_model_dir)
    assert speed.source == "probe"
    assert "1 and 2 layers" in speed.detail
    found = document(counted, speed)
    assert found["train_seconds"] > 0
    assert found["peak_memory_source"] == "formula"
    assert found["peak_memory_bytes"] == sum(found["memory"].values())


def test_a_timing_on_a_busy_machine_says_so():
    quiet = Timing(100, 1.0, 0.1, 10**9, processor_share=0.95).speed("probe", "it", 2.0, 0.1)
    assert (quiet.tokens_per_second, quiet.busy, quiet.detail) == (50.0, False, "it")
    busy = Timing(100, 1.0, 0.1, 10**9, processor_share=0.2).speed("probe", "it", 2.0, 0.1)
    assert busy.busy
    assert "BUSY machine, 20% of the processor" in busy.detail


def test_the_limits_of_a_recipe_are_counted(tiny_model_dir, tmp_path):
    tokenizer = load_light_tokenizer(tiny_model_dir)
    recipe, dataset = prepared(tiny_model_dir, tmp_path, train={"max_steps": 3, "eval_rows": 10})
    counted = forecast(recipe, dataset, tiny_model_dir, tokenizer)
    assert (counted.steps, counted.evaluations) == (3, 5)
    assert counted.training.tokens < counted.epoch.tokens
    mean = counted.held_out.tokens / counted.evaluations / 10
    assert 10 < mean < 100
    dropping = {"max_length": 2, "on_overlength": "drop"}
    recipe, dataset = prepared(tiny_model_dir, tmp_path, data=dropping)
    with pytest.raises(DataError, match="no train row is left"):
        forecast(recipe, dataset, tiny_model_dir, tokenizer)
