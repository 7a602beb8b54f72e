"""The learning rate that a probe takes; the training after it is as if it had been given."""

import json
import math

import numpy as np
import pytest

from postgrad import cli, stages
from postgrad.config import load_recipe
from postgrad.data.dataset import load_dataset
from postgrad.errors import TrainingError
from postgrad.run import Run
from postgrad.train import rate_probe
from postgrad.train.plan import PROBE_FACTORS, choose_rate
from postgrad.train.probe import dry_run
from postgrad.train.session import open_session
from postgrad.train.stopping import HeldOut
from training import write_rows

WEIGHTS = np.ones(50)


def held_out(loss, noise=0.0, seed=0):
    """Fifty rows of one token with this mean loss, and so much spread from row to row."""
    spread = np.random.default_rng(seed).normal(size=50) * noise
    return HeldOut(loss + spread - spread.mean(), WEIGHTS)


def test_the_best_is_taken_when_it_is_clearly_best():
    for best in range(3):
        found = [(rate, held_out(1.0 + (n != best))) for n, rate in enumerate((1.0, 3.0, 9.0))]
        chosen, tried = choose_rate(found)
        assert chosen == found[best][0]
        assert tried[best].behind == 0
        assert [t.loss for t in tried] == pytest.approx([1.0 + (n != best) for n in range(3)])


def test_of_rates_within_a_standard_error_the_smaller_is_taken():
    near = [(1.0, held_out(1.01, 0.5, 1)), (3.0, held_out(1.0, 0.5, 2)), (9.0, held_out(2.0))]
    chosen, tried = choose_rate(near)
    assert chosen == 1.0
    assert 0 < tried[0].behind <= tried[0].error
    # The same means, but row by row the same difference: no noise in it, so the best is taken.
    assert choose_rate([(1.0, held_out(1.01, 0.5, 1)), (3.0, held_out(1.0, 0.5, 1))])[0] == 3.0


def test_a_rate_that_breaks_down_is_not_taken():
    chosen, tried = choose_rate([(1.0, held_out(2.0)), (3.0, held_out(1.0)), (9.0, None)])
    assert chosen == 3.0
    assert tried[2].loss is None
    one = HeldOut(np.array([2.0]), np.array([1.0]))
    assert choose_rate([(1.0, one), (3.0, HeldOut(np.array([1.0]), np.array([1.0])))])[0] == 3.0


def write_recipe(folder, model, **train):
    write_rows(folder / "rows.jsonl", 200)
    tree = {
        "name": "tiny",
        "model": {"base": str(model), "precision": "fp32", "adapt": {"r": 4, "lora_dropout": 0.1}},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2, "test": 0.2},
        "train": {"threads": 1, "learning_rate": "probe", "num_train_epochs": 4, **train},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def timeless(run):
    return [{**line, "seconds": 0} for line in run.read_metrics()]


@pytest.fixture(scope="module")
def probed(tiny_model_dir, tmp_path_factory):
    """(recipe file, run) of a training whose rate was probed."""
    folder = tmp_path_factory.mktemp("probed")
    path = write_recipe(folder, tiny_model_dir)
    stages.train(load_recipe(path), stages.Options(out=folder / "out"))
    return path, Run(folder / "out")


def test_the_choice_is_recorded_and_resolved(probed):
    _, run = probed
    probe = run.record["learning_rate_probe"]
    assert [t["rate"] for t in probe["tried"]] == pytest.approx([f * 1e-3 for f in PROBE_FACTORS])
    assert probe["chosen"] == run.config.train.learning_rate == run.record["train"]["learning_rate"]
    assert probe["chosen"] in [t["rate"] for t in probe["tried"]]
    assert run.recipe.train.learning_rate == "probe"
    assert probe["steps"] == 20 <= run.record["train"]["steps"]
    assert run.record["seconds"]["learning_rate_probe"] > 0
    for tried in probe["tried"]:
        lines = run.inside("learning-rate", f"{tried['rate']:.3g}").read_metrics()
        assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 21))
        assert lines[-1]["validation/loss"] == tried["loss"]
    assert not list(run.inside("learning-rate").path.rglob("*.safetensors"))
    assert "was probed for 20 steps each" in run.report_path.read_text(encoding="utf-8")


def test_batches_and_schedule_are_those_of_the_whole_run(probed):
    _, run = probed
    own = [line for line in run.read_metrics() if "train/loss" in line][:20]
    for tried in run.record["learning_rate_probe"]["tried"]:
        lines = run.inside("learning-rate", f"{tried['rate']:.3g}").read_metrics()[:20]
        assert [line["tokens"] for line in lines] == [line["tokens"] for line in own]
        scale = tried["rate"] / run.config.train.learning_rate
        rates = [scale * line["train/learning_rate"] for line in own]
        assert [line["train/learning_rate"] for line in lines] == pytest.approx(rates)
        assert lines[0]["train/loss"] == own[0]["train/loss"]
        if scale == 1:
            losses = [line["train/loss"] for line in own]
            assert [line["train/loss"] for line in lines] == losses


@pytest.mark.parametrize("adapt", [None, "{kind: full}"])
def test_the_training_is_the_one_with_the_number_given(probed, tiny_model_dir, tmp_path, adapt):
    path, run = probed
    options = stages.Options(out=tmp_path / "probed")
    change = [f"model.adapt={adapt}"] if adapt else []
    if adapt:
        stages.train(load_recipe(path, [*change, "train.max_steps=22"]), options)
        run, change = Run(options.out), [*change, "train.max_steps=22"]
    given = [*change, f"train.learning_rate={run.config.train.learning_rate!r}"]
    given.append(f"train.micro_batch_tokens={run.config.train.micro_batch_tokens}")
    given.append(f"train.attention_bucket_tokens={run.config.train.attention_bucket_tokens}")
    stages.train(load_recipe(path, given), stages.Options(out=tmp_path / "given"))
    assert timeless(Run(tmp_path / "given")) == timeless(run)


def test_a_resumed_training_does_not_probe_again(probed, monkeypatch):
    path, run = probed
    before = run.record["learning_rate_probe"]
    train = run.record["train"]
    record = {key: value for key, value in run.record.items() if key != "train"}
    run.write_json(run.record_path, record)

    def probing(*_):
        raise AssertionError("probed again")

    monkeypatch.setattr(rate_probe, "probe_learning_rate", probing)
    assert cli.call(["train", str(path), "--out", str(run.path), "--resume"]) == 0
    assert run.record["learning_rate_probe"] == before
    assert run.record["train"]["best_loss"] == train["best_loss"]


def test_one_rate_that_breaks_down_is_told_and_all_are_an_error(
    tiny_model_dir, tmp_path, monkeypatch
):
    path = write_recipe(tmp_path, tiny_model_dir, max_steps=2)
    usual = rate_probe._try

    def breaking(session, run, packed, rate, *rest):
        if rate > limit:
            raise TrainingError("the loss is not finite", "lower train.learning_rate")
        return usual(session, run, packed, rate, *rest)

    monkeypatch.setattr(rate_probe, "_try", breaking)
    limit = 2e-3
    stages.train(load_recipe(path), stages.Options(out=tmp_path / "one"))
    tried = Run(tmp_path / "one").record["learning_rate_probe"]["tried"]
    assert [t["problem"] for t in tried] == ["", "", "the loss is not finite"]
    assert tried[2]["loss"] is None
    limit = 0.0
    with pytest.raises(TrainingError, match="at every learning rate"):
        stages.train(load_recipe(path), stages.Options(out=tmp_path / "all"))
    assert Run(tmp_path / "all").config.train.learning_rate == "probe"


def test_a_rate_that_breaks_down_leaves_no_checkpoints(tiny_model_dir, tmp_path, monkeypatch):
    path, usual = write_recipe(tmp_path, tiny_model_dir, max_steps=2), rate_probe.fit

    def breaking(*arguments, run, **settings):
        usual(*arguments, run=run, **settings)
        assert list(run.checkpoints.rglob("*.safetensors"))
        if run.path.name == "0.003":
            raise TrainingError("the loss is not finite", "lower train.learning_rate")

    monkeypatch.setattr(rate_probe, "fit", breaking)
    stages.train(load_recipe(path), stages.Options(out=tmp_path / "out"))
    run = Run(tmp_path / "out")
    assert run.record["learning_rate_probe"]["tried"][2]["problem"] == "the loss is not finite"
    assert not list(run.inside("learning-rate").path.rglob("*.safetensors"))


def test_the_estimate_holds_the_probe_and_the_curve(tiny_model_dir, tmp_path):
    path = write_recipe(tmp_path, tiny_model_dir)
    with_curve = ["evaluate.learning_curve=[0.25, 0.5]"]
    probing, plain = load_recipe(path, with_curve), load_recipe(path, ["train.learning_rate=1e-3"])
    dataset = load_dataset(plain.data, plain.data_seed)
    session = open_session(probing, dataset)
    stream = session.stream(packed=True, most=20)
    found, without = dry_run(session, dataset), dry_run(open_session(plain, dataset), dataset)
    assert found["learning_rate_probe_tokens"] == 3 * stream.tokens
    assert "learning_rate_probe_tokens" not in without
    assert found["tokens"] == without["tokens"]
    assert found["evaluations"] == without["evaluations"] + 4
    assert found["flops"]["total"] > without["flops"]["total"]
    assert found["learning_curve_seconds"] > 0
    assert "learning_curve_seconds" not in without
    spent = found["train_seconds"] * found["tokens_per_second"]
    held = found["evaluations"] * found["validation_tokens"] / 3
    assert spent > 0.99 * (found["tokens"] + found["learning_rate_probe_tokens"] + held)
    assert math.isfinite(spent)
