"""Replay: general chats among the training rows, from a file or from the base model itself."""

import json

import numpy as np
import pytest

from postgrad import stages
from postgrad.data import replay as replay_data
from postgrad.data.dataset import load_dataset, read_dataset, save_dataset
from postgrad.data.generic_prompts import all_replay_prompts
from postgrad.errors import DataError
from postgrad.model.light_tokenizer import load_light_tokenizer
from postgrad.run import Run, create_run, read_jsonl
from postgrad.stages import Options
from postgrad.train import base_answers
from postgrad.train import replay as replay_module
from postgrad.train.base_answers import answer_as_base, renderer_of
from postgrad.train.forecast import forecast
from postgrad.train.replay import add_own_answers
from postgrad.train.session import open_session
from postgrad.types import Split
from training import events, make_recipe, timeless, write_rows

SHARE = 0.25


def recipe_of(directory, tmp_path, replay="self", **sections):
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, 120)
    data = {"train": str(rows), "validation": 0.2, "test": 0.3, "replay": replay}
    data |= {"replay_share": SHARE} if replay else {}
    train = {"max_steps": 6, "eval_steps": 2, "threads": 1, "learning_rate": 1e-2}
    train |= {"kl_probe": None, **sections.pop("train", {})}
    data |= sections.pop("data", {})
    return make_recipe(directory, data=data, train=train, **sections)


def chats(path, count=40, first=0, answer="that is a general answer"):
    rows = [
        {"prompt": f"general request {first + n * 9973}", "completion": f"{answer} {n}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def quick(monkeypatch):
    """Short answers of the base model, which is not trained to end any."""
    monkeypatch.setattr(replay_data, "ANSWER_TOKENS", 12)
    monkeypatch.setattr(replay_module, "ANSWER_TOKENS", 12)


def generated(directory, tmp_path, name="run", **sections):
    recipe = recipe_of(directory, tmp_path, **sections)
    run = create_run(recipe, "train", tmp_path / name)
    dataset = load_dataset(recipe.data, recipe.data_seed)
    save_dataset(dataset, run)
    return run, dataset, *add_own_answers(run, dataset)


def test_a_file_of_chats_is_drawn_from(tiny_model_dir, tmp_path):
    path = chats(tmp_path / "general.jsonl")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path))
    dataset = load_dataset(recipe.data, 7)
    training = dataset.of(Split.TRAIN)
    assert len(dataset.replay) == round(SHARE * len(training))
    assert not {row.id for row in dataset.replay} & {row.id for row in dataset.examples}
    assert all("general request" not in row.conversation.messages[0].content for row in training)
    check = dataset.checks[-1]
    assert (check.name, check.passed, check.data["rows"]) == ("replay", True, len(dataset.replay))
    again = load_dataset(recipe.data, 7)
    assert again == dataset
    other = load_dataset(recipe.data, 8)
    assert [row.id for row in other.replay] != [row.id for row in dataset.replay]


def test_a_smaller_share_is_a_part_of_a_larger_one(tiny_model_dir, tmp_path):
    path = chats(tmp_path / "general.jsonl")
    found = []
    for share in (0.1, 0.2):
        recipe = recipe_of(tiny_model_dir, tmp_path, str(path), data={"replay_share": share})
        found.append([row.id for row in load_dataset(recipe.data, 7).replay])
    assert found[0] == found[1][: len(found[0])]


def test_it_survives_the_run_directory(tiny_model_dir, tmp_path):
    path = chats(tmp_path / "general.jsonl")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path))
    run, dataset = create_run(recipe, "train", tmp_path / "run"), load_dataset(recipe.data, 7)
    save_dataset(dataset, run)
    assert read_dataset(run) == dataset
    assert len(read_jsonl(run.replay_path)) == len(dataset.replay)
    splits = {x["split"]: x["rows"] for x in read_jsonl(run.manifest_path) if "split" in x}
    assert splits["replay"] == len(dataset.replay)


@pytest.mark.parametrize("change", [str, lambda text: text + "!"], ids=["same", "near"])
def test_what_is_held_out_is_never_replayed(tiny_model_dir, tmp_path, change):
    plain = recipe_of(tiny_model_dir, tmp_path, None)
    dataset = load_dataset(plain.data, 7)
    leaks = [row.conversation.messages[0].content for row in dataset.held_out]
    path = chats(tmp_path / "general.jsonl", 5)
    with path.open("a", encoding="utf-8") as file:
        for text in leaks:
            file.write(json.dumps({"prompt": change(text), "completion": "other"}) + "\n")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path), data={"replay_share": 1.0})
    found = load_dataset(recipe.data, 7)
    requests = [row.conversation.messages[0].content for row in found.replay]
    assert len(requests) == 5
    assert all(text.startswith("general request") for text in requests)
    dropped = [row for row in found.dropped if row.step == "overlap"]
    assert len(dropped) == len(leaks)
    assert all("row of test" in row.reason or "row of validation" in row.reason for row in dropped)
    assert found.checks[-1].data["overlaps"] == len(leaks)
    assert "were asked for" in found.checks[-1].detail


@pytest.mark.parametrize("count", [20, 90])
def test_a_system_prompt_of_the_recipe_hides_no_leak(tiny_model_dir, tmp_path, count):
    """However many chats there are: lines that most requests share depend on their number."""
    data = {"system": "Name the intent.", "near_duplicate": None}
    dataset = load_dataset(recipe_of(tiny_model_dir, tmp_path, None, data=data).data, 7)
    assert dataset.held_out[0].conversation.messages[0].role == "system"
    leaks = [row.conversation.messages[1].content for row in dataset.held_out]
    path = chats(tmp_path / "general.jsonl", 5)
    with path.open("a", encoding="utf-8") as file:
        for number in range(count):
            chat = {"prompt": leaks[number % len(leaks)], "completion": f"other {number}"}
            file.write(json.dumps(chat) + "\n")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path), data=data | {"replay_share": 10})
    found = load_dataset(recipe.data, 7)
    assert len(found.replay) == 5
    assert found.checks[-1].data["overlaps"] == count


def test_nothing_left_is_refused(tiny_model_dir, tmp_path):
    plain = load_dataset(recipe_of(tiny_model_dir, tmp_path, None).data, 7)
    row = plain.of(Split.TEST)[0].conversation.messages[0].content
    path = tmp_path / "general.jsonl"
    path.write_text(json.dumps({"prompt": row, "completion": "x"}) + "\n", encoding="utf-8")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path))
    with pytest.raises(DataError, match="all 1 are like validation or test rows"):
        load_dataset(recipe.data, 7)
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError):
        load_dataset(recipe.data, 7)


def test_chats_are_trained_on_but_not_validated(tiny_model_dir, tmp_path):
    path = chats(tmp_path / "general.jsonl")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path))
    dataset = load_dataset(recipe.data, recipe.data_seed)
    opened = open_session(recipe, dataset)
    replayed = {row.id for row in dataset.replay}
    assert replayed < {row.example_id for row in opened.training}
    assert len(opened.training) == len(dataset.of(Split.TRAIN)) + len(replayed)
    assert not replayed & {row.example_id for row in opened.validation}
    for packed in (True, False):
        stream = opened.stream(packed)
        seen = {n for s in range(len(stream)) for b in stream.step(s) for n in b.example_ids}
        assert seen & replayed
    assert {r.example.id for r in opened.renderings} >= replayed


def test_chats_that_cannot_be_trained_on_are_left_out(tiny_model_dir, tmp_path):
    path = chats(tmp_path / "general.jsonl", 30)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "long", "completion": "yes " * 2000}) + "\n")
        file.write(json.dumps({"prompt": "control", "completion": "a <|im_end|> b"}) + "\n")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path), data={"replay_share": 10})
    opened = open_session(recipe, load_dataset(recipe.data, recipe.data_seed))
    lost = {row.source.rpartition(":")[2]: row.reason for row in opened.dropped}
    assert set(lost) == {"31", "32"}
    assert "data.max_length is 1024" in lost["31"]
    assert "special token" in lost["32"]
    assert all(row.step == "replay" for row in opened.dropped)
    path = chats(tmp_path / "general.jsonl", 3, answer="yes " * 2000)
    with pytest.raises(DataError, match=r"no row of data\.replay can be trained on"):
        open_session(recipe, load_dataset(recipe.data, recipe.data_seed))


def test_the_base_answers_for_itself_once(tiny_model_dir, tmp_path, quick, monkeypatch):
    run, before, dataset, loaded = generated(tiny_model_dir, tmp_path)
    wanted = round(SHARE * len(before.of(Split.TRAIN)))
    assert before.replay == ()
    assert loaded is not None
    assert 0 < len(dataset.replay) <= wanted
    prompts = [row.conversation.messages[0].content for row in dataset.replay]
    assert set(prompts) <= set(all_replay_prompts())
    assert events(run, "replay-generated")[0]["rows"] == len(dataset.replay)
    assert read_dataset(run) == dataset
    monkeypatch.setattr(replay_module, "answer_as_base", None)
    assert add_own_answers(run, read_dataset(run)) == (dataset, None)


def test_own_answers_are_what_the_base_says(tiny_model_dir, tmp_path, quick):
    import torch

    _, _, dataset, loaded = generated(tiny_model_dir, tmp_path)
    row = dataset.replay[0]
    prompt = renderer_of(loaded).prompt_ids(row.conversation.prompt)
    made = loaded.model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0
    )[0, len(prompt) :]
    said = loaded.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert row.conversation.answer == said


def test_an_answer_that_was_cut_off_does_not_teach_to_stop(tiny_model_dir, tmp_path, quick):
    run, _, dataset, loaded = generated(tiny_model_dir, tmp_path)
    cut = [row for row in dataset.replay if row.unfinished]
    assert cut, "the tiny model goes on and on"
    assert any(row.get("unfinished") for row in read_jsonl(run.replay_path))
    opened = open_session(run.config, dataset, loaded)
    stops = list(opened.renderer.stop_ids)
    by_id = {row.example_id: row for row in opened.training}
    for row in cut:
        tokens = by_id[row.id]
        assert not np.isin(tokens.ids[tokens.weights > 0], stops).any()
        assert tokens.supervised > 0
    assert all(check.passed for check in opened.checks(()) if check.name != "held-out-size")


def test_a_base_that_answers_nothing_is_told(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(replay_module, "answer_as_base", lambda *_: [])
    with pytest.raises(DataError, match="gives no answer to any of"):
        generated(tiny_model_dir, tmp_path)


def test_empty_answers_are_left_out(tiny_model_dir, monkeypatch):
    from postgrad.config import ModelConfig
    from postgrad.model.load import load
    from postgrad.types import Completion, StopReason

    loaded = load(ModelConfig(base=str(tiny_model_dir), precision="fp32"))
    said = [Completion(" ", (5,), StopReason.STOP), Completion(" b ", (6,), StopReason.LENGTH)]
    monkeypatch.setattr(base_answers, "generate", lambda *_, **__: said)
    [found] = answer_as_base(loaded, renderer_of(loaded), ["one", "two"], 5)
    assert (found.source, found.conversation.answer, found.unfinished) == ("base:2", "b", True)


def test_a_kill_before_the_manifest_was_written_loses_no_check(tiny_model_dir, tmp_path, quick):
    run, before, dataset, _ = generated(tiny_model_dir, tmp_path)
    lines = [x for x in read_jsonl(run.manifest_path) if x.get("check", {}).get("name") != "replay"]
    run.write_jsonl(run.manifest_path, [x for x in lines if x.get("split") != "replay"])
    stopped = read_dataset(run)
    assert stopped.replay
    assert stopped.checks == before.checks
    resumed, loaded = add_own_answers(run, stopped)
    assert resumed == dataset == read_dataset(run)
    assert loaded is not None


def test_an_estimate_leaves_out_the_chats_that_training_does(tiny_model_dir, tmp_path):
    path = chats(tmp_path / "general.jsonl", 30)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "long", "completion": "yes " * 20_000}) + "\n")
        file.write(json.dumps({"prompt": "control", "completion": "a <|im_end|> b"}) + "\n")
    recipe = recipe_of(tiny_model_dir, tmp_path, str(path), data={"replay_share": 10})
    dataset = load_dataset(recipe.data, recipe.data_seed)
    assert len(dataset.replay) == 32
    tokenizer = load_light_tokenizer(tiny_model_dir)
    work = forecast(recipe, dataset, tiny_model_dir, tokenizer)
    session = open_session(recipe, dataset)
    assert work.epoch.tokens == sum(len(row) for row in session.training)
    assert work.recipe.train.micro_batch_tokens == session.recipe.train.micro_batch_tokens
    path = chats(tmp_path / "general.jsonl", 3, answer="yes " * 2000)
    dataset = load_dataset(recipe.data, recipe.data_seed)
    with pytest.raises(DataError, match=r"no row of data\.replay can be trained on"):
        forecast(recipe, dataset, tiny_model_dir, tokenizer)


def test_a_plan_counts_replay(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    found = {}
    for name, replay in (("none", None), ("self", "self")):
        recipe = recipe_of(tiny_model_dir, tmp_path, replay, train={"max_steps": None})
        found[name] = stages.plan(recipe, Options())["plan"]
        estimate = stages.estimate(recipe, tmp_path / "none", Options())["estimate"]
        assert estimate["rows"] == found[name]["rows"]
        assert estimate["tokens"] == found[name]["tokens"]
    rows = found["self"]["rows"]
    assert rows["replay"] == round(SHARE * rows["train"])
    assert "replay" not in found["none"]["rows"]
    more = found["self"]["tokens_per_epoch"] - found["none"]["tokens_per_epoch"]
    assert more > rows["replay"] * (replay_data.ANSWER_TOKENS - 1)


def test_a_whole_training_with_replay_resumes_exactly(tiny_model_dir, tmp_path, quick, monkeypatch):
    measured = {"attention_bucket_tokens": 64, "micro_batch_tokens": 1024}  # else two runs differ
    settings = {"kl_probe": "auto", "kl_weight": 0.1, "eval_steps": 2, **measured}
    recipe = recipe_of(tiny_model_dir, tmp_path, train=settings)
    straight = stages.train(recipe, Options(out=tmp_path / "straight"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("postgrad.train.workflow.restore_best", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, Options(out=tmp_path / "stopped"))
    stopped = Run(tmp_path / "stopped")
    assert stopped.record["seconds"]["replay"] > 0
    stopped.delete(stopped.checkpoints / "step-000006")
    stages.train(recipe, Options(out=stopped.path, resume=True))
    assert timeless(stopped) == timeless(Run(tmp_path / "straight"))
    assert stopped.record["train"]["probe_kl"] == straight["train"]["probe_kl"]
    assert events(stopped, "resumed")[-1]["step"] == 4
    files = [run.replay_path.read_bytes() for run in (stopped, Run(tmp_path / "straight"))]
    assert files[0] == files[1]
    page = stopped.report_path.read_text(encoding="utf-8")
    assert "KL in nats per token" in page
    assert "nats per token away from the base model" in page
