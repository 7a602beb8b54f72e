"""The dial in whole runs of the tiny model: measured, resumed, chosen, exported, reported."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from postgrad import cli, console, stages
from postgrad.config import load_recipe
from postgrad.data.dataset import read_dataset
from postgrad.errors import CheckpointError, ConfigError
from postgrad.evaluate.benchmarks import load_benchmarks, unreported
from postgrad.evaluate.compare_runs import collect_frontiers, compare_runs
from postgrad.evaluate.dial import kept_checkpoints
from postgrad.evaluate.evidence import read_evidence, write_evidence
from postgrad.evaluate.models import Models, Weights
from postgrad.evaluate.seeds import reuse_base_evidence
from postgrad.evaluate.workflow import evaluate_run
from postgrad.progress import SilentDisplay
from postgrad.report.collect import collect
from postgrad.report.model_card import card
from postgrad.run import Run, read_json, verify_checksums
from postgrad.strict_yaml import parse_yaml
from postgrad.types import Score, Split
from training import WORDS, WORDS_TASK, write_rows

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT on Transformers 5
)
POINTS = ["base", "lambda-0.25", "lambda-0.5", "tuned", "lambda-1.5"]
IDS = torch.randint(3, 256, (2, 17), generator=torch.Generator().manual_seed(1))


def write_recipe(folder, model, adapt=None, train=(), **evaluate):
    """A recipe with a benchmark of 90 items, 30 of them reported."""
    write_rows(folder / "rows.jsonl", 200)
    items = [
        {"n": n, "options": [WORDS[(n + i) % 8] for i in range(3)], "gold": n % 3}
        for n in range(90)
    ]
    text = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "words.jsonl").write_text(text, encoding="utf-8")
    (folder / "words.yaml").write_text(WORDS_TASK, encoding="utf-8")
    dial = {"lambdas": [1.5, 0.5, 0.25], "checkpoints": 2, "rows": 30, "margin": 100}
    tree = {
        "name": "tiny",
        "model": {"base": str(model), "precision": "fp32", "adapt": adapt or {"r": 4}},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2, "test": 0.2},
        "train": {
            "max_steps": 6, "threads": 1, "learning_rate": 0.03, "eval_steps": 2,
            "save_total_limit": 3, "early_stopping": None, **dict(train),
        },
        "evaluate": {
            "fewshot": [0],
            "limit": 8,
            "scorer": "f1",
            "max_new_tokens": 3,
            "retention": [str(folder / "words.yaml")],
            "retention_limit": 30,
            "dial": {**dial, **evaluate.pop("dial", {})},
            **evaluate,
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """(folder, run, document) of a whole run with a dial."""
    folder = tmp_path_factory.mktemp("dial")
    recipe = load_recipe(write_recipe(folder, tiny_model_dir))
    document = stages.run(recipe, stages.Options(out=folder / "out"))
    return folder, Run(folder / "out"), document


@pytest.fixture
def copied(finished, tmp_path):
    return Run(shutil.copytree(finished[1].path, tmp_path / "copy", symlinks=True))


def points(run):
    return {p["place"]["name"]: p for p in read_json(run.measurements_path)["dial"]["points"]}


def favour(run, name):
    """Let one point have answered every validation row rightly, the others none."""
    for point in points(run):
        right = point == name
        score = {"f1": Score(float(right), right)}
        rows = read_evidence(run, "dial/tiny", point)
        write_evidence(
            run, "dial/tiny", point, [replace(r, scores=score, error=None) for r in rows]
        )


def again(run):
    evaluate_run(run, read_dataset(run), SilentDisplay())
    return read_json(run.measurements_path)


def test_every_point_answers_the_same_unreported_rows_and_items(finished):
    _, run, document = finished
    best = run.pointed("best").name
    names = [p["place"]["name"] for p in document["dial"]["points"]]
    assert names[:5] == POINTS
    steps = [f"step-{step:06d}" for step in (2, 4, 6) if f"step-{step:06d}" != best]
    assert names[5:] == steps[:2]
    asked = {
        task: {
            tuple(row.example_id for row in read_evidence(run, f"dial/{task}", name))
            for name in names
        }
        for task in ("tiny", "words")
    }
    [rows], [items] = asked["tiny"], asked["words"]
    validation = {e.id for e in read_dataset(run).of(Split.VALIDATION)}
    assert len(rows) == 30
    assert set(rows) <= validation
    reported = {row.example_id for row in read_evidence(run, "words", "base")}
    assert (len(reported), len(items)) == (30, 60)
    assert not reported & set(items)
    assert document["dial"]["items"] == {"words": 60}
    assert document["dial"]["n"] == 30


def test_the_ends_are_the_base_and_the_tuned_model(finished, tiny_model_dir):
    _, run, _ = finished
    recipe = run.config
    models = Models(run, recipe)
    models.define("lambda-0", Weights(run.export / "adapter", 0.0))
    models.define("lambda-1", Weights(run.export / "adapter", 1.0))
    best = run.pointed("best")
    earlier = next(path for path in run.checkpoints.glob("step-*") if path.resolve() != best)
    models.define("step", Weights(earlier))
    found = {}
    with torch.no_grad():
        for arm in ("base", "tuned", "lambda-0", "lambda-1", "step", "tuned", "base"):
            with models.arm(arm) as model:
                logits = model(IDS).logits
            assert torch.equal(found.setdefault(arm, logits), logits)  # in whatever order
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
        expected = plain(IDS).logits
    torch.testing.assert_close(found["base"], expected, atol=1e-5, rtol=0)
    assert torch.equal(found["lambda-0"], found["base"])
    assert torch.equal(found["lambda-1"], found["tuned"])
    assert (found["step"] - found["tuned"]).abs().max() > 1e-4
    with pytest.raises(AssertionError), models.arm("lambda-0.3"):
        pass


def test_evaluating_again_asks_nothing_and_says_the_same(copied, finished, monkeypatch):
    monkeypatch.setattr("postgrad.evaluate.models.load", lambda *_: pytest.fail("loaded a model"))
    document = stages.evaluate(copied, stages.Options())
    for key in ("dial", "measurements", "comparisons"):
        assert document[key] == finished[2][key]
    assert copied.changed_files() == []


def test_only_a_missing_point_is_asked_again(copied, finished):
    lost = [copied.evidence_path(f"dial/{task}", "lambda-0.5") for task in ("tiny", "words")]
    kept = copied.evidence_path("dial/words", "lambda-0.25")
    for path in lost:
        path.unlink()
    stamp = kept.stat().st_mtime_ns
    assert again(copied)["dial"] == finished[2]["dial"]
    assert kept.stat().st_mtime_ns == stamp
    assert all(path.exists() for path in lost)


def test_the_chosen_point_is_exported_for_peft_and_measured_beside_the_tuned(
    copied, finished, tiny_model_dir
):
    favour(copied, "lambda-0.5")
    document = again(copied)
    dial = document["dial"]
    assert (dial["chosen"], dial["exported"]) == ("lambda-0.5", "export/dialled")
    folder = copied.export / "dialled"
    verify_checksums(folder)
    assert read_json(folder / "dial.json") == {"point": "lambda-0.5", "lambda": 0.5, "step": None}
    assert read_json(folder / "adapter_config.json")["lora_alpha"] == 16
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    models = Models(copied, copied.config)
    models.define("half", Weights(copied.export / "adapter", 0.5))
    with torch.no_grad(), models.arm("half") as scaled:
        torch.testing.assert_close(model(IDS).logits, scaled(IDS).logits, atol=1e-5, rtol=0)
    arms = [(m["task"], m["arm"]) for m in document["measurements"]]
    assert ("tiny", "dialled") in arms
    assert ("words", "dialled") in arms
    test_rows = [row.example_id for row in read_evidence(copied, "tiny", "tuned")]
    assert [r.example_id for r in read_evidence(copied, "tiny", "dialled")] == test_rows
    compared = [(c["task"], c["a"], c["b"]) for c in document["comparisons"]]
    assert compared == [
        ("tiny", "base/zero-shot", "tuned"),
        ("tiny", "base/zero-shot", "dialled"),
        ("tiny", "tuned", "dialled"),
        ("words", "base", "tuned"),
        ("words", "base", "dialled"),
        ("words", "tuned", "dialled"),
    ]
    assert "dialled" not in [c["arm"] for c in document["costs"]["arms"]]
    assert copied.record["verdict"] == finished[1].record["verdict"]


def test_another_choice_leaves_nothing_of_the_first_behind(copied):
    favour(copied, "lambda-0.5")
    again(copied)
    stamp = (copied.export / "dialled" / "adapter_config.json").stat().st_mtime_ns
    again(copied)
    assert (copied.export / "dialled" / "adapter_config.json").stat().st_mtime_ns == stamp
    step = next(name for name in points(copied) if name.startswith("step"))
    favour(copied, step)
    assert again(copied)["dial"]["exported"] == "export/dialled"
    assert read_json(copied.export / "dialled" / "dial.json")["point"] == step
    weights = (copied.export / "dialled" / "adapter_model.safetensors").read_bytes()
    assert weights == (copied.checkpoints / step / "adapter_model.safetensors").read_bytes()
    favour(copied, "tuned")
    document = again(copied)
    assert (document["dial"]["chosen"], document["dial"]["exported"]) == ("tuned", None)
    assert not (copied.export / "dialled").exists()
    assert "dialled" not in {m["arm"] for m in document["measurements"]}
    assert not list((copied.path / "evidence").glob("*.dialled.jsonl"))


def test_the_report_draws_it_and_the_console_and_card_say_it(copied):
    favour(copied, "lambda-0.5")
    again(copied)
    document = stages.report(copied)
    page = copied.report_path.read_text(encoding="utf-8")
    section = page[page.index('id="dial"') : page.index('id="training"')]
    assert section.count("<svg") == 2
    assert section.count('class="ring"') == 2
    assert "The dialled model" in section
    assert "margin \N{MINUS SIGN}100" in section
    evaluation = collect(copied).evaluation
    assert [m.arm for m in evaluation.main] == ["base/zero-shot", "tuned", "dialled"]
    assert evaluation.decisive.b == "tuned"
    assert evaluation.dial.point("lambda-0.5").place.scale == 0.5
    said = console.result_text(document)
    assert "dial: 30 validation rows, 60 of words" in said
    assert "exported to export/dialled" in said
    assert "step 2" in said or "step 4" in said
    text = card(collect(copied))
    assert "How much of the tuning to keep" in text
    assert "`export/dialled` is the model at \N{GREEK SMALL LETTER LAMDA} = 0.5" in text


def test_two_runs_stand_in_one_table_when_they_asked_the_same(copied, finished, capsys):
    first = finished[1]
    assert cli.call(["compare", str(first.path), str(copied.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["frontiers"]
    assert [entry["run"] for entry in found] == ["out", "copy"]
    assert cli.call(["compare", str(first.path), str(copied.path)]) == 0
    printed = capsys.readouterr().out
    assert "dials, measured on the same validation rows" in printed
    assert printed.count("lambda 0.25") == 2
    rows = read_evidence(copied, "dial/words", "base")
    write_evidence(copied, "dial/words", "base", rows[1:])
    assert collect_frontiers((first, copied), ("a", "b")) == []


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"base": "another/model"}),
        ("model", {"revision": "main"}),
        ("evaluate", {"retention_template": "raw"}),
    ],
)
def test_dials_of_other_models_or_templates_stand_apart(copied, finished, section, change):
    tree = parse_yaml(copied.recipe_path.read_text(encoding="utf-8"), "recipe")
    tree[section] |= change
    copied.recipe_path.write_text(json.dumps(tree), encoding="utf-8")
    assert len(collect_frontiers((copied, copied), ("a", "b"))) == 2
    assert collect_frontiers((finished[1], copied), ("a", "b")) == []


def test_runs_are_compared_without_a_dial_that_is_gone(copied, finished):
    copied.evidence_path("dial/words", "base").unlink()
    found = compare_runs(finished[1], copied)
    assert found["frontiers"] == []
    assert {c["difference"] for c in found["comparisons"]} == {0}


def test_the_dials_of_runs_are_drawn_in_one_picture(copied, finished, tmp_path, capsys):
    first, picture = finished[1], tmp_path / "dials.html"
    runs = [str(first.path), str(copied.path), str(first.path)]
    assert cli.call(["compare", *runs[:2], "--picture", str(picture)]) == 0
    assert "dials.html" in capsys.readouterr().out
    page = picture.read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert page.count('class="ring"') == 4
    assert "<h3>out</h3>" in page
    assert "<h3>copy</h3>" in page
    assert cli.call(["compare", *runs, "--picture", str(picture)]) == 0
    assert picture.read_text(encoding="utf-8").count('class="ring"') == 6
    picture.unlink()
    write_evidence(copied, "dial/words", "base", read_evidence(copied, "dial/words", "base")[1:])
    assert cli.call(["compare", *runs[:2], "--picture", str(picture)]) == 2
    assert "the same base model, scorer, validation rows and" in capsys.readouterr().err
    assert not picture.exists()


def test_checkpoints_are_spread_evenly_and_outlive_their_folders(copied, tmp_path):
    run = Run(tmp_path / "many")
    for step in (0, 10, 20, 30, 40, 50, 60, 70):
        (run.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    run.point("best", run.checkpoints / "step-000040")
    chosen = {
        n: [step for step, _ in kept_checkpoints(run, n, ["tiny"], SilentDisplay())]
        for n in (0, 1, 2, 3, 9)
    }
    assert chosen[0] == []
    assert chosen[1] in ([30], [50])
    assert chosen[2] == [10, 70]
    assert chosen[3] in ([10, 30, 70], [10, 50, 70])
    assert chosen[9] == [10, 20, 30, 50, 60, 70]
    before = again(copied)["dial"]
    for folder in copied.checkpoints.glob("step-*"):
        shutil.rmtree(folder)
    assert again(copied)["dial"] == before


def test_a_checkpoint_that_is_gone_counts_only_with_all_its_answers(copied):
    step = next(name for name in points(copied) if name.startswith("step"))
    shutil.rmtree(copied.checkpoints / step)
    copied.evidence_path("dial/words", step).unlink()
    notes = []

    class Noting(SilentDisplay):
        def note(self, text):
            notes.append(text)

    evaluate_run(copied, read_dataset(copied), Noting())
    assert step not in points(copied)
    assert f"dial: left out, {step} is gone and its answers are not complete" in notes


def test_a_damaged_checkpoint_is_refused(copied):
    step = next(name for name in points(copied) if name.startswith("step"))
    weights = copied.checkpoints / step / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        again(copied)


def test_seeds_share_only_what_the_base_model_answered(copied, tmp_path):
    favour(copied, "lambda-0.5")
    again(copied)
    other = Run(tmp_path / "other")
    reuse_base_evidence(copied, other)
    found = sorted(str(p.relative_to(other.path)) for p in other.path.rglob("*.jsonl"))
    assert found == [
        "evidence/dial/tiny.base.jsonl",
        "evidence/dial/words.base.jsonl",
        "evidence/tiny.base-zero-shot.jsonl",
        "evidence/words.base.jsonl",
    ]


def test_full_tuning_interpolates_the_weights(tiny_model_dir, tmp_path):
    path = write_recipe(
        tmp_path, tiny_model_dir, adapt={"kind": "full"}, train={"learning_rate": 1e-2}
    )
    stages.run(load_recipe(path), stages.Options(out=tmp_path / "out"))
    run = Run(tmp_path / "out")
    favour(run, "lambda-0.25")
    document = again(run)
    assert document["dial"]["chosen"] == "lambda-0.25"
    folders = {"base": tiny_model_dir, "tuned": run.export / "model"}
    folders["dialled"] = run.export / "dialled"
    state = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for name, path in folders.items()
    }
    moved = 0.0
    for name, weight in state["base"].items():
        expected = weight + 0.25 * (state["tuned"][name] - weight)
        torch.testing.assert_close(state["dialled"][name], expected, atol=1e-6, rtol=0)
        moved = max(moved, float((state["tuned"][name] - weight).abs().max()))
    assert moved > 1e-3
    models = Models(run, run.config)
    models.define("zero", Weights(run.export / "model", 0.0))
    models.define("one", Weights(run.export / "model", 1.0))
    logits = {}
    with torch.no_grad():
        for arm in ("base", "zero", "tuned", "one"):
            with models.arm(arm) as model:
                logits[arm] = model(IDS).logits
    assert torch.equal(logits["zero"], logits["base"])
    assert torch.equal(logits["one"], logits["tuned"])
    step = next(name for name in points(run) if name.startswith("step"))
    favour(run, step)
    assert again(run)["dial"]["exported"] == "export/dialled"
    other = AutoModelForCausalLM.from_pretrained(run.export / "dialled", dtype=torch.float32)
    models.define("step", Weights(run.checkpoints / step))
    with torch.no_grad(), models.arm("step") as model:
        torch.testing.assert_close(other.eval()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


def test_without_items_to_choose_on_it_is_refused_before_training(tiny_model_dir, tmp_path):
    path = write_recipe(tmp_path, tiny_model_dir, retention_limit=None)
    with pytest.raises(ConfigError, match="words has 0 items besides") as error:
        stages.run(load_recipe(path), stages.Options(out=tmp_path / "out"))
    assert "evaluate.retention_limit" in error.value.remedy
    assert not (tmp_path / "out").exists()
    recipe = load_recipe(path, ["evaluate.retention_limit=50"])
    with pytest.raises(ConfigError, match="40 items besides the 50 reported ones, fewer than 50"):
        stages.run(recipe, stages.Options(out=tmp_path / "out", dry_run=True))


def test_a_benchmark_without_enough_items_is_left_out_by_name(tiny_model_dir, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_model_dir))
    [benchmark] = load_benchmarks(recipe)
    [found], missing = unreported([benchmark], 55, 7)
    assert (len(found.items), len(found.rest), missing) == (55, 5, [])
    assert unreported([benchmark], 55, 8)[0][0].items != found.items
    small = load_recipe(tmp_path / "tiny.yaml", ["evaluate.retention_limit=45"])
    _, [reason] = unreported([benchmark, *load_small(small)], None, 7)
    assert reason.startswith("words has 45 items besides the 45 reported ones")


def load_small(recipe):
    evaluate = recipe.evaluate.model_copy(update={"dial": None})
    return load_benchmarks(recipe.model_copy(update={"evaluate": evaluate}))


def test_a_base_model_alone_has_no_dial(tiny_model_dir, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_model_dir))
    document = stages.evaluate(recipe, stages.Options(out=tmp_path / "out"))
    assert document["dial"] is None
    assert "no tuned model was evaluated" in Run(tmp_path / "out").report_path.read_text("utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["evaluate.retention=[]"], "name benchmarks in evaluate.retention"),
        (["evaluate.dial.checkpoints=4"], "train.save_total_limit keeps 3: raise it"),
        (["evaluate.dial.lambdas=[0.5, 0.5]"], "the same scale twice"),
        (["evaluate.dial.lambdas=[1]"], "always measured; leave it out"),
        (["evaluate.dial.lambdas=[0]"], "must be greater than 0"),
        (["evaluate.dial.lambdas=[2.1]"], "must be at most 2"),
        (["evaluate.dial={lambdas: []}"], "neither lambdas nor checkpoints"),
        (["evaluate.dial.margin=-1"], "must be at least 0"),
        (["evaluate.dial.lamdas=[0.5]"], "did you mean evaluate.dial.lambdas"),
    ],
)
def test_a_dial_that_cannot_be_measured_is_refused(tiny_model_dir, tmp_path, changes, message):
    path = write_recipe(tmp_path, tiny_model_dir)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, changes)
