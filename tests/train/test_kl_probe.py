"""The distance to the base is the sum over whole distributions, exactly, on fixed answers."""

import json

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from postgrad import stages
from postgrad.config import LoraConfig
from postgrad.data.dataset import load_dataset
from postgrad.data.generic_prompts import probe_prompts
from postgrad.errors import DataError, SourceError, TrainingError
from postgrad.model import lora
from postgrad.model.attention import training_attention
from postgrad.progress import SilentDisplay
from postgrad.run import Run, create_run, read_jsonl
from postgrad.stages import Options
from postgrad.train import kl_probe
from postgrad.train import session as session_module
from postgrad.train.base_answers import answer_as_base
from postgrad.train.kl_probe import KlProbe, open_kl_probe
from postgrad.train.session import open_session
from postgrad.train.sft import SupervisedFineTuning, has_plain_head
from postgrad.train.workflow import train_model
from training import events, load_model, make_recipe, make_rows, timeless, write_rows

WEIGHTS = (1.0, 0.25, 3.0)


def logits_of(model, rows):
    """[positions that predict something] logits and weights of each row, alone, unpacked."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.from_numpy(row.ids)[None]).logits[0, :-1].double()
            found.append((logits, torch.from_numpy(row.weights[1:]).double()))
    return found


def plain_kl(base, tuned, rows):
    """The definition: sum_i w_i sum_v p_iv (log p_iv - log q_iv), divided by the sum of w."""
    total = weight = 0.0
    pairs = zip(logits_of(base, rows), logits_of(tuned, rows), strict=True)
    for (a, w), (b, _) in pairs:
        p, q = a.softmax(-1), b.softmax(-1)
        total += float(((p * (p.log() - q.log())).sum(-1) * w).sum())
        weight += float(w.sum())
    return total / weight


def move(model, by=0.05):
    """Change what is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def probe_of(model, rows, packed=True, fused=True, full=False, autocast=False):
    objective = SupervisedFineTuning(fused, autocast)
    return KlProbe(
        model, objective, rows, micro_batch_tokens=64, packed=packed, frozen_head=not full
    )


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("fused", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_equals_the_definition(tiny_model_dir, packed, fused, full):
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    base = load_model(tiny_model_dir).eval()
    tuned = load_model(tiny_model_dir, None if full else LoraConfig(r=4))
    with training_attention(tuned):
        probe = probe_of(tuned, rows, packed, fused, full)
        assert probe(tuned) == 0.0
        move(tuned)
        found = [probe(tuned.train()), probe(tuned)]
        assert tuned.training
    wanted = plain_kl(base, tuned.eval(), rows)
    assert wanted > 1e-3
    assert found[0] == found[1] == pytest.approx(wanted, rel=1e-5)


def test_chunks_change_nothing(tiny_model_dir, monkeypatch):
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    tuned = load_model(tiny_model_dir, LoraConfig(r=4))
    found = []
    for chunk in (3, 1000):
        monkeypatch.setattr(kl_probe, "CHUNK", chunk)
        with training_attention(tuned):
            probe = probe_of(tuned, rows)
            move(tuned)
            found.append(probe(tuned))
            move(tuned, -0.05)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_head_that_scales_its_logits_is_obeyed():
    torch.manual_seed(0)
    small = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(**small, **layers, initializer_range=0.2, logits_scaling=4.0)
    model = GraniteForCausalLM(config)
    base = GraniteForCausalLM(config)
    base.load_state_dict(model.state_dict())
    lora.add_lora(model, LoraConfig(r=4), 7)
    rows = make_rows(5, seed=3)
    assert not has_plain_head(model)
    with training_attention(model):
        probe = probe_of(model, rows, fused=has_plain_head(model))
        move(model)
        found = probe(model)
    assert found == pytest.approx(plain_kl(base.eval(), model.eval(), rows), rel=1e-5)


def test_full_tuning_in_bfloat16_compares_what_is_computed_in_it(tiny_model_dir):
    rows = make_rows(9, seed=3)
    base, tuned = load_model(tiny_model_dir).eval(), load_model(tiny_model_dir)
    with training_attention(tuned):
        probe = probe_of(tuned, rows, full=True, autocast=True)
        assert probe._base[0].dtype == torch.bfloat16
        assert probe(tuned) == 0.0
        move(tuned)
        found = probe(tuned)
    assert found == pytest.approx(plain_kl(base, tuned.eval(), rows), rel=0.05)


def test_logits_that_would_take_too_much_memory_are_refused(tiny_model_dir, monkeypatch):
    model = load_model(tiny_model_dir)
    monkeypatch.setattr(kl_probe, "MOST_BYTES", 10_000)
    with pytest.raises(TrainingError, match="logits on them would take") as error:
        probe_of(model, make_rows(9), full=True)
    assert "at most 8 supervised tokens" in error.value.remedy
    lora.add_lora(model, LoraConfig(r=4), 7)
    assert probe_of(model, make_rows(9)).tokens > 0


# --- in a training ------------------------------------------------------------------------------


def prepare(directory, tmp_path, name="run", adapt=None, **train):
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    settings = {"max_steps": 6, "eval_steps": 2, "threads": 1, "learning_rate": 1e-2}
    settings |= {"attention_bucket_tokens": 64, "micro_batch_tokens": 1024, **train}
    data = {"train": str(rows), "validation": 0.2}
    recipe = make_recipe(directory, model={"adapt": adapt or {"r": 4}}, data=data, train=settings)
    session = open_session(recipe, load_dataset(recipe.data, recipe.seed))
    return session, create_run(recipe, "train", tmp_path / name)


@pytest.mark.parametrize("adapt", [{"r": 4}, {"kind": "full"}], ids=["lora", "full"])
def test_every_evaluation_has_the_distance(tiny_model_dir, tmp_path, adapt):
    session, run = prepare(tiny_model_dir, tmp_path, adapt=adapt)
    facts = train_model(session, run, True, SilentDisplay())
    lines = [line for line in run.read_metrics() if "validation/loss" in line]
    found = {line["step"]: line["probe/kl"] for line in lines}
    assert list(found) == [0, 2, 4, 6]
    assert found[0] == 0.0
    assert all(value > 0 for step, value in found.items() if step)
    assert facts["probe_kl"] == found[facts["best_step"]]
    rows = read_jsonl(run.probe_path)
    assert 0 < len(rows) <= 24
    assert all(row["messages"][1]["content"] for row in rows)


def test_the_probe_is_made_of_the_base_models_own_answers(tiny_model_dir, tmp_path):
    session, run = prepare(tiny_model_dir, tmp_path)
    probe = open_kl_probe(session, run, True)
    first = read_jsonl(run.probe_path)
    again, other = prepare(tiny_model_dir, tmp_path, "other")
    move(again.model)
    open_kl_probe(again, other, True)
    assert read_jsonl(other.probe_path) == first
    assert (
        0 < probe.weight <= sum(len(row["messages"][1]["content"].encode()) for row in first) + 24
    )


@pytest.mark.parametrize(("share", "asked"), [(0.0, 8), (0.5, None), (100.0, 24)])
def test_a_short_training_asks_fewer_requests(tiny_model_dir, tmp_path, monkeypatch, share, asked):
    """Six steps of a few hundred tokens afford the fewest; a larger share of them affords more."""
    session, _ = prepare(tiny_model_dir, tmp_path)
    assert kl_probe.affordable_prompts(session, True) == probe_prompts()[:8]
    monkeypatch.setattr(kl_probe, "SHARE_OF_TRAINING", share)
    prompts = kl_probe.affordable_prompts(session, True)
    assert asked in (None, len(prompts))
    count = -(-len(session.stream(True)) // session.recipe.train.eval_steps) + 1
    ids = session.renderer.tokenizer
    cost = sum(len(ids(prompt)["input_ids"]) + kl_probe.ANSWER_TOKENS for prompt in prompts)
    if len(prompts) > 8:
        assert cost * count * kl_probe.FORWARD_SHARE <= share * session.stream(True).tokens


def test_a_resumed_run_reads_its_probe(tiny_model_dir, tmp_path, monkeypatch):
    session, run = prepare(tiny_model_dir, tmp_path)
    before = open_kl_probe(session, run, True)
    monkeypatch.setattr(kl_probe, "answer_as_base", None)
    assert open_kl_probe(session, run, True).weight == before.weight


def test_a_file_of_chats_is_the_probe(tiny_model_dir, tmp_path):
    path = tmp_path / "general.jsonl"
    chats = [{"messages": [{"role": "user", "content": f"question {n}"},
                           {"role": "assistant", "content": "yes, number " * n}]}
             for n in (1, 3)]  # fmt: skip
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    session, run = prepare(tiny_model_dir, tmp_path, kl_probe=str(path))
    train_model(session, run, True, SilentDisplay())
    assert [row["source"] for row in read_jsonl(run.probe_path)] == [f"{path}:1", f"{path}:2"]
    assert run.read_metrics()[-1]["probe/kl"] > 0


def test_rows_of_the_file_that_cannot_be_used_are_named(tiny_model_dir, tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "yes " * 2000}) + "\n", "utf-8")
    session, run = prepare(tiny_model_dir, tmp_path, kl_probe=str(path))
    with pytest.raises(DataError, match=r"general\.jsonl:1: \d+ tokens, data\.max_length is 1024"):
        open_kl_probe(session, run, True)
    path.write_text("{}\n", "utf-8")
    session, run = prepare(tiny_model_dir, tmp_path, "other", kl_probe=str(path))
    with pytest.raises(DataError):
        open_kl_probe(session, run, True)


def test_a_base_that_says_nothing_cannot_be_watched(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(kl_probe, "answer_as_base", lambda *_: [])
    session, run = prepare(tiny_model_dir, tmp_path)
    facts = train_model(session, run, True, SilentDisplay())
    assert facts["probe_kl"] is None
    assert len(events(run, "probe-empty")) == 1
    limit = {"max_kl": 0.1}
    session, run = prepare(tiny_model_dir, tmp_path, "limited", early_stopping=limit)
    with pytest.raises(TrainingError, match="answers none of the probe's requests"):
        open_kl_probe(session, run, True)


def test_without_a_probe_nothing_is_measured_or_written(tiny_model_dir, tmp_path):
    session, run = prepare(tiny_model_dir, tmp_path, kl_probe=None)
    facts = train_model(session, run, True, SilentDisplay())
    assert facts["probe_kl"] is None
    assert not run.probe_path.exists()
    assert not any("probe/kl" in line for line in run.read_metrics())


def test_watching_changes_nothing_of_the_training(tiny_model_dir, tmp_path):
    found = []
    for name, probe in (("with", "auto"), ("without", None)):
        session, run = prepare(tiny_model_dir, tmp_path, name, kl_probe=probe)
        train_model(session, run, True, SilentDisplay())
        lines = timeless(run)
        found.append([{k: v for k, v in line.items() if k != "probe/kl"} for line in lines])
    assert found[0] == found[1]


def test_no_checkpoint_beyond_the_limit_is_the_best(tiny_model_dir, tmp_path):
    limit = {"max_kl": 1e-6, "patience": 2}
    session, run = prepare(tiny_model_dir, tmp_path, early_stopping=limit, max_steps=20)
    facts = train_model(session, run, True, SilentDisplay())
    assert (facts["best_step"], facts["last_step"], facts["stopped"]) == (0, 4, "early")
    reason = "the last 2 evaluations were further than max_kl=1e-06 nats per token from the base"
    assert facts["stop_reason"] == reason
    assert events(run, "stopped")[0]["reason"] == reason
    assert facts["probe_kl"] == 0.0


@pytest.mark.parametrize(
    "rows", [None, "", '{"prompt": "a", "completion": "%s"}\n' % ("yes " * 2000)]
)
def test_a_wrong_file_is_found_before_anything_is_tried(
    tiny_model_dir, tmp_path, rows, monkeypatch
):
    write_rows(tmp_path / "rows.jsonl", 200)
    path = tmp_path / "general.jsonl"
    if rows is not None:
        path.write_text(rows, "utf-8")
    recipe = make_recipe(
        tiny_model_dir,
        data={"train": str(tmp_path / "rows.jsonl"), "replay": "self"},
        train={"kl_probe": str(path), "learning_rate": "probe", "threads": 1},
    )
    monkeypatch.setattr(session_module.Session, "checks", lambda *_: pytest.fail("pre-flight"))
    monkeypatch.setattr("postgrad.train.replay.answer_as_base", quick_answers)
    out = tmp_path / "out"
    for verb in (
        lambda: stages.plan(recipe, Options()),
        lambda: stages.estimate(recipe, tmp_path, Options()),
        lambda: stages.doctor(recipe),
        lambda: stages.train(recipe, Options(out=out)),
    ):
        with pytest.raises((DataError, SourceError), match=r"general\.jsonl"):
            verb()
    run = Run(out)
    assert "learning_rate_probe" not in run.record["seconds"]
    assert ("replay" in run.record["seconds"]) == bool(rows)
    assert not run.probe_path.exists()


def quick_answers(loaded, renderer, prompts, most):
    return answer_as_base(loaded, renderer, prompts[:2], 4)


def test_the_file_may_go_once_the_run_has_it(tiny_model_dir, tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_text('{"prompt": "a question", "completion": "yes"}\n', "utf-8")
    session, run = prepare(tiny_model_dir, tmp_path, kl_probe=str(path))
    weight = open_kl_probe(session, run, True).weight
    path.unlink()
    assert open_kl_probe(session, run, True).weight == weight
