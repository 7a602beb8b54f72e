"""The retention floor in whole trainings of the tiny model: decided, recorded, resumed, refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from postgrad import cli, stages
from postgrad.config import load_recipe
from postgrad.errors import ConfigError, DataError, Interrupted, PreflightError
from postgrad.evaluate.benchmarks import load_benchmark, load_benchmarks, unreported
from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.floor import load_floors
from postgrad.evaluate.retention import score_continuations
from postgrad.report.collect import collect
from postgrad.run import Run, read_json
from postgrad.train import fit as fit_module
from training import WORDS, WORDS_TASK, events, load_model, timeless, write_rows

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT on Transformers 5
)
ITEMS = 200


def write_benchmark(folder, model_dir):
    """A benchmark whose right answers are those of the base model: training can only lose."""
    items = [
        {"n": 7919 * n, "options": [WORDS[(n + i) % 8] for i in range(4)], "gold": 0}
        for n in range(ITEMS)
    ]
    (folder / "words.yaml").write_text(WORDS_TASK, encoding="utf-8")

    def write():
        text = "".join(json.dumps(item) + "\n" for item in items)
        (folder / "words.jsonl").write_text(text, encoding="utf-8")

    write()
    benchmark = load_benchmark(str(folder / "words.yaml"), None, None, 7)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    said = score_continuations(load_model(model_dir).eval(), tokenizer, benchmark)
    for item, row in zip(items, said, strict=True):
        item["gold"] = item["options"].index(row.completion)
    write()


@pytest.fixture(scope="module")
def files(tiny_model_dir, tmp_path_factory):
    """A folder with rows, a benchmark and its task file."""
    folder = tmp_path_factory.mktemp("floor")
    write_rows(folder / "rows.jsonl", 200)
    write_benchmark(folder, tiny_model_dir)
    return folder


def write_recipe(files, folder, model, adapt=None, train=(), floor=6.0, items=60, **evaluate):
    """A recipe with a benchmark of 200 items, 60 of them reported."""
    stopping = {"retention_floor": {"words": floor}, "retention_items": items} if floor else {}
    train = {"early_stopping": {"patience": 2, **stopping}, **dict(train)}
    tree = {
        "name": "tiny",
        "model": {"base": str(model), "precision": "fp32", "adapt": adapt or {"r": 4}},
        "data": {"train": str(files / "rows.jsonl"), "validation": 0.2, "test": 0.2},
        "train": {
            "max_steps": 12, "threads": 1, "learning_rate": 0.001, "eval_steps": 2,
            "attention_bucket_tokens": 64, "micro_batch_tokens": 1024, **train,
        },
        "evaluate": {
            "fewshot": [0], "limit": 8, "scorer": "f1", "max_new_tokens": 3,
            "retention": [str(files / "words.yaml")], "retention_limit": 60, **evaluate,
        },
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def trained(files, folder, model, out="out", **settings):
    path = write_recipe(files, folder, model, **settings)
    stages.train(load_recipe(path), stages.Options(out=folder / out))
    return Run(folder / out)


def watched(run):
    """Step -> (held-out loss, accuracy, difference)."""
    return {
        line["step"]: (
            line["validation/loss"],
            line["retention/words"],
            line["retention/words/difference"],
        )
        for line in run.read_metrics()
        if "validation/loss" in line
    }


@pytest.fixture(scope="module")
def finished(files, tiny_model_dir, tmp_path_factory):
    """(folder, run, document) of a whole run that its floor stopped."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(files, folder, tiny_model_dir)
    document = stages.run(load_recipe(path), stages.Options(out=folder / "out"))
    return folder, Run(folder / "out"), document


def test_the_floor_decides_which_step_is_best_and_stops(finished, files, tiny_model_dir, tmp_path):
    _, run, document = finished
    found, facts = watched(run), document["train"]
    assert found[0][1:] == (1.0, 0.0)
    above = {step: loss for step, (loss, _, change) in found.items() if change >= -0.06}
    assert facts["best_step"] == min(above, key=above.get) > 0
    assert facts["stopped"] == "early"
    assert "below retention_floor (in the last one words lost" in facts["stop_reason"]
    lowest = min(found, key=lambda step: found[step][0])
    assert lowest not in above
    free = trained(files, tmp_path, tiny_model_dir, floor=None)
    assert free.record["train"]["best_step"] >= lowest > facts["best_step"]
    kept = facts["retention"]["words"]
    assert (kept["accuracy"], kept["difference"]) == found[facts["best_step"]][1:]
    assert (kept["items"], kept["margin"]) == (60, 6.0)


def test_every_answer_is_evidence_and_the_figures_follow_from_it(finished):
    _, run, _ = finished
    base = {r.example_id: r for r in read_evidence(run, "stopping/words", "base")}
    for step, (_, accuracy, change) in watched(run).items():
        arm = "base" if step == 0 else f"step-{step:06d}"
        rows = read_evidence(run, "stopping/words", arm)
        assert [row.example_id for row in rows] == list(base)
        metric = next(iter(rows[0].scores))
        assert sum(row.scores[metric].value for row in rows) / 60 == pytest.approx(accuracy)
        assert accuracy - 1.0 == pytest.approx(change)
    assert run.changed_files() == []


def test_the_items_are_not_those_that_are_reported(finished):
    _, run, document = finished
    reported = {row.example_id for row in read_evidence(run, "words", "base")}
    seen = {row.example_id for row in read_evidence(run, "stopping/words", "base")}
    assert (len(reported), len(seen)) == (60, 60)
    assert not reported & seen
    general = [m for m in document["measurements"] if (m["task"], m["arm"]) == ("words", "tuned")]
    assert {m["n"] for m in general} == {60}


def test_nor_those_of_the_dial_and_no_item_repeats_another(files, tiny_model_dir, tmp_path):
    shutil.copy(files / "words.yaml", tmp_path)
    lines = (files / "words.jsonl").read_text(encoding="utf-8")
    (tmp_path / "words.jsonl").write_text(lines * 2, encoding="utf-8")  # every question twice
    write_rows(tmp_path / "rows.jsonl", 200)
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, tiny_model_dir, dial={"items": 60}))
    [benchmark] = load_benchmarks(recipe)
    [dial], _ = unreported([benchmark], 60, recipe.data_seed)
    [floor] = load_floors(recipe)
    parts = [
        {item.id.removesuffix("-2") for item in part}
        for part in (benchmark.items, dial.items, floor.benchmark.items)
    ]
    assert len(floor.benchmark.items) == 60
    assert not parts[0] & parts[1]
    assert not parts[2] & (parts[0] | parts[1])
    recipe = load_recipe(tmp_path / "tiny.yaml", ["evaluate.dial.items=null"])
    with pytest.raises(ConfigError, match=r"0 items besides .* and the \d+ of evaluate\.dial"):
        load_floors(recipe)


@pytest.mark.parametrize("adapt", [{"r": 4}, {"kind": "full"}], ids=["lora", "full"])
def test_watching_changes_nothing_of_the_training(files, tiny_model_dir, tmp_path, adapt):
    train = {"max_steps": 4}
    found = []
    for name, floor in (("with", 100.0), ("without", None)):
        run = trained(files, tmp_path, tiny_model_dir, name, adapt=adapt, floor=floor, train=train)
        found.append(
            [
                {k: v for k, v in line.items() if not k.startswith("retention/")}
                for line in timeless(run)
            ]
        )
        assert ("retention" in run.record["train"]) == bool(floor)
        assert (run.path / "evidence" / "stopping").exists() == bool(floor)
    assert found[0] == found[1]


@pytest.mark.parametrize("adapt", [{"r": 4}, {"kind": "full"}], ids=["lora", "full"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    files, tiny_model_dir, tmp_path, adapt, monkeypatch
):
    path = write_recipe(files, tmp_path, tiny_model_dir, adapt=adapt)
    recipe = load_recipe(path)
    stages.train(recipe, stages.Options(out=tmp_path / "straight"))
    straight = Run(tmp_path / "straight")
    evaluate, seen = fit_module._evaluate, []

    def stop_at_the_third(*arguments):
        if len(seen) == 2:
            raise Interrupted("stopped", "go on with --resume")
        seen.append(evaluate(*arguments))
        return seen[-1]

    monkeypatch.setattr(fit_module, "_evaluate", stop_at_the_third)
    out = stages.Options(out=tmp_path / "resumed")
    with pytest.raises(Interrupted):
        stages.train(recipe, out)
    monkeypatch.setattr(fit_module, "_evaluate", evaluate)
    base = Run(tmp_path / "resumed").evidence_path("stopping/words", "base")
    stamp = base.stat().st_mtime_ns
    stages.train(recipe, stages.Options(out=tmp_path / "resumed", resume=True))
    resumed = Run(tmp_path / "resumed")
    assert base.stat().st_mtime_ns == stamp
    assert timeless(resumed) == timeless(straight)
    for key in ("best_step", "stop_reason", "retention"):
        assert resumed.record["train"][key] == straight.record["train"][key]
    last = [read_json(r.pointed("last") / "state.json")["stopping"] for r in (resumed, straight)]
    assert last[0] == last[1]


def test_a_base_that_was_lost_is_asked_again_and_other_items_are_refused(
    files, tiny_model_dir, tmp_path, monkeypatch
):
    for name in ("words.yaml", "words.jsonl", "rows.jsonl"):
        shutil.copy(files / name, tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, tiny_model_dir))
    evaluate = fit_module._evaluate
    calls = []

    def interrupt(*arguments):
        if calls:
            raise Interrupted("stopped", "go on with --resume")
        calls.append(1)
        return evaluate(*arguments)

    monkeypatch.setattr(fit_module, "_evaluate", interrupt)
    with pytest.raises(Interrupted):
        stages.train(recipe, stages.Options(out=tmp_path / "out"))
    run = Run(tmp_path / "out")
    path = run.evidence_path("stopping/words", "base")
    before = [{**json.loads(x), "seconds": 0} for x in path.read_text("utf-8").splitlines()]
    path.unlink()
    with pytest.raises(Interrupted):
        stages.train(recipe, stages.Options(out=run.path, resume=True))
    again = [{**json.loads(x), "seconds": 0} for x in path.read_text("utf-8").splitlines()]
    assert again == before
    lines = (tmp_path / "words.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "words.jsonl").write_text("\n".join(lines[10:]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="began with other items of words"):
        stages.train(recipe, stages.Options(out=run.path, resume=True))


def test_full_tuning_in_bfloat16_is_watched_in_its_precision(files, tiny_model_dir, tmp_path):
    path = write_recipe(
        files, tmp_path, tiny_model_dir, adapt={"kind": "full"}, floor=100.0,
        train={"max_steps": 4},
    )  # fmt: skip
    recipe = load_recipe(path, ["model.precision=bf16"])
    stages.train(recipe, stages.Options(out=tmp_path / "out"))
    found = watched(Run(tmp_path / "out"))
    assert found[0][2] == 0.0
    assert 0.8 <= found[0][1] <= 1.0
    assert all(accuracy - found[0][1] == pytest.approx(d) for _, accuracy, d in found.values())


def test_the_report_says_and_draws_what_was_watched(finished):
    _, run, _ = finished
    page = run.report_path.read_text(encoding="utf-8")
    training = page[page.index('id="training"') : page.index('id="answers"')]
    assert "below retention_floor" in training
    assert "On the items that early stopping watched the kept weights change words by" in training
    assert "words: points against the base, on watched items" in training
    assert "floor \N{MINUS SIGN}6" in training
    curves = collect(run).curves
    assert [step for step, _ in curves.retention["words"]] == list(watched(run))
    assert "retention-floor" in page


def test_doctor_and_preflight_say_what_is_watched(files, tiny_model_dir, tmp_path, capsys):
    path = write_recipe(files, tmp_path, tiny_model_dir)
    assert cli.call(["doctor", str(path), "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    found = checks["retention-floor"]
    assert found["passed"]
    assert found["detail"] == (
        "words on 60 items that are not reported: at most 6 points lost, an item is 1.7"
    )
    assert found["data"] == {"words": {"items": 60, "margin": 6.0}}
    fine = load_recipe(path, ["train.early_stopping.retention_floor={words: 1}"])
    with pytest.raises(PreflightError, match="a single item lost would break the floor") as error:
        stages.train(fine, stages.Options(out=tmp_path / "fine"))
    assert "retention_items" in error.value.message
    without = load_recipe(path, ["train.early_stopping=null"])
    names = [check["name"] for check in stages.doctor(without)["checks"]]
    assert "retention-floor" not in names


def test_what_it_takes_is_counted(files, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(write_recipe(files, tmp_path, tiny_model_dir))
    without = load_recipe(tmp_path / "tiny.yaml", ["train.early_stopping=null"])
    found = stages.estimate(recipe, tmp_path / "none", stages.Options())["estimate"]
    plain = stages.estimate(without, tmp_path / "none", stages.Options())["estimate"]
    dry = stages.plan(recipe, stages.Options())["plan"]
    tokens = found["retention_floor_tokens"]
    assert "retention_floor_tokens" not in plain
    assert dry["retention_floor_tokens"] == tokens
    assert found["validation_tokens"] == plain["validation_tokens"]
    assert found["train_seconds"] >= plain["train_seconds"]
    assert found["flops"]["held_out"] > plain["flops"]["held_out"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    [floor] = load_floors(recipe)
    once = sum(
        len(tokenizer(item.prompt)["input_ids"])
        + sum(len(tokenizer(f" {option}")["input_ids"]) for option in item.options)
        for item in floor.benchmark.items
    )
    assert tokens == 7 * once  # before the first of 12 steps and after every second one


def test_all_stands_for_benchmarks_that_are_not_named(files, tiny_model_dir, tmp_path):
    path = write_recipe(files, tmp_path, tiny_model_dir)
    recipe = load_recipe(path, ["train.early_stopping.retention_floor={all: 4, words: 3}"])
    assert [(f.name, f.margin) for f in load_floors(recipe)] == [("words", 3.0)]
    recipe = load_recipe(path, ["train.early_stopping.retention_floor={all: 4}"])
    assert [(f.name, f.margin) for f in load_floors(recipe)] == [("words", 4.0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.early_stopping.retention_floor={piqa: 2}"],
            "names piqa, which evaluate.retention",
        ),
        (["evaluate.retention_limit=null"], "words has 0 items besides the 200 reported ones"),
        (["evaluate.retention_limit=151"], "words has 49 items .*, fewer than 50"),
    ],
)
def test_what_could_not_be_watched_is_refused_before_anything_runs(
    files, tiny_model_dir, tmp_path, changes, message
):
    path = write_recipe(files, tmp_path, tiny_model_dir)
    recipe = load_recipe(path, changes)
    for verb in (stages.run, stages.train):
        with pytest.raises(ConfigError, match=message):
            verb(recipe, stages.Options(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=message):
        stages.doctor(recipe)


def test_a_benchmark_that_is_written_is_refused(files, tiny_model_dir, tmp_path):
    shutil.copy(files / "rows.jsonl", tmp_path)
    rows = "".join(json.dumps({"n": n, "gold": "yes"}) + "\n" for n in range(200))
    (tmp_path / "words.jsonl").write_text(rows, encoding="utf-8")
    task = "name: words\nfile: words.jsonl\nprompt: '{n}'\nanswer: gold\nscorer: contains\n"
    (tmp_path / "words.yaml").write_text(task, encoding="utf-8")
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, tiny_model_dir))
    with pytest.raises(ConfigError, match="words lets the model write its answers"):
        load_floors(recipe)


def test_shares_of_a_learning_curve_have_the_floor_too(files, tiny_model_dir, tmp_path):
    path = write_recipe(
        files, tmp_path, tiny_model_dir, learning_curve=[0.5], train={"max_steps": 4}, floor=60.0
    )
    stages.run(load_recipe(path), stages.Options(out=tmp_path / "out"))
    whole, share = Run(tmp_path / "out"), Run(tmp_path / "out" / "shares" / "50")
    assert share.record["train"]["retention"]["words"]["items"] == 60
    base = [read_evidence(run, "words", "base") for run in (whole, share)]
    assert base[0] == base[1]
    assert len(events(share, "stopped")) <= 1
