"""Training from a recipe to delivered weights, each claim about them measured again."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteConfig, GraniteForCausalLM

from postgrad.data.dataset import load_dataset
from postgrad.errors import TrainingError
from postgrad.model import compiled, fp8, int8, lora
from postgrad.model.attention import training_attention
from postgrad.model.attention_probe import CERTAIN, AttentionProbe
from postgrad.progress import SilentDisplay
from postgrad.run import create_run, verify_checksums
from postgrad.train import session as session_module
from postgrad.train import workflow
from postgrad.train.checkpoint import resume
from postgrad.train.graphs import Graphs
from postgrad.train.held_out import Validation
from postgrad.train.plan import evaluation_tokens
from postgrad.train.preflight.measured import Tolerance
from postgrad.train.session import open_session
from postgrad.train.workflow import export_model, restore_best, train_model
from training import events, make_recipe, weights_of, write_rows

FACTS = {
    "best_step",
    "best_loss",
    "start_loss",
    "last_step",
    "stopped",
    "steps",
    "epochs",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "trainable_parameters",
    "total_parameters",
    "learning_rate",
    "tokens_per_batch",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "torch_compile",
    "cuda_graphs",
    "base_precision",
    "threads",
    "attention_bucket_tokens",
    "precision",
    "packed",
    "restored_loss",
    "probe_kl",
    "stop_reason",
}


def prepare(directory, tmp_path, adapt=None, model=None, **train):
    """(session, run) of a small recipe."""
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = {"max_steps": 6, "eval_steps": 2, "threads": 1, "learning_rate": 1e-2, **train}
    recipe = make_recipe(
        directory,
        model={"adapt": adapt or {"r": 4}, **(model or {})},
        data={"train": str(rows), "validation": 0.2},
        train=settings,
    )
    session = open_session(recipe, load_dataset(recipe.data, recipe.seed))
    return session, create_run(recipe, "train", tmp_path / "run")


@pytest.fixture
def trained(tiny_model_dir, tmp_path):
    session, run = prepare(tiny_model_dir, tmp_path)
    return session, run, train_model(session, run, True, SilentDisplay())


def restore(session, run):
    """Restore the best checkpoint of `run` as a resumed run would."""
    from postgrad.train.optimizer import make_optimizer

    progress = resume(run, session.model, make_optimizer(session.model, session.recipe.train, 0.1))
    with session.attention():
        return restore_best(session, run, session.held_out(True), progress)


def test_the_facts_of_a_training(trained):
    session, run, facts = trained
    assert set(facts) == FACTS
    lines = [line for line in run.read_metrics() if "validation/loss" in line]
    losses = {line["step"]: line["validation/loss"] for line in lines}
    assert list(losses) == [0, 2, 4, 6]
    assert facts["best_loss"] == min(losses.values()) == losses[facts["best_step"]]
    assert facts["restored_loss"] == facts["best_loss"] < facts["start_loss"] == losses[0]
    assert (facts["steps"], facts["last_step"], facts["stopped"]) == (6, 6, "end")
    assert facts["trainable_parameters"] == sum(
        p.numel() for p in session.model.parameters() if p.requires_grad
    )
    assert facts["tokens"] == session.stream(True).tokens
    assert (facts["precision"], facts["packed"], facts["learning_rate"]) == ("float32", True, 1e-2)
    json.dumps(facts)


def test_on_a_cpu_nothing_is_compiled_for_a_device(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    session, _ = prepare(tiny_model_dir, tmp_path)
    assert session.recipe.train.torch_compile is False
    assert session.recipe.train.gradient_checkpointing is False
    (tmp_path / "again").mkdir()
    with pytest.raises(TrainingError, match="no CUDA device with Triton"):
        prepare(tiny_model_dir, tmp_path / "again", torch_compile=True)
    assert session.recipe.train.cuda_graphs is False
    with pytest.raises(TrainingError, match="cuda_graphs is true, but there is no CUDA device"):
        prepare(tiny_model_dir, tmp_path / "again", cuda_graphs=True)
    with pytest.raises(TrainingError, match=r"cuda_graphs is true, but train\.packing is off"):
        prepare(tiny_model_dir, tmp_path / "again", cuda_graphs=True, packing="off")


def test_float8_is_refused_where_it_cannot_be_had(tiny_model_dir, tmp_path, monkeypatch):
    bf16 = {"precision": "bf16"}
    with pytest.raises(TrainingError, match=r"base_precision is fp8, but .* no CUDA device"):
        prepare(tiny_model_dir, tmp_path, model=bf16, base_precision="fp8")
    monkeypatch.setattr(fp8, "why_not", lambda device: "")
    monkeypatch.setattr("postgrad.model.load.has_native_bf16", lambda: False)
    with pytest.raises(TrainingError, match=r"computes in torch\.float32"):
        prepare(tiny_model_dir, tmp_path, model={"precision": "auto"}, base_precision="fp8")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_steps_in_8_bits_and_everything_else_in_bf16(
    tiny_model_dir, tmp_path, monkeypatch, kind, dropout
):
    monkeypatch.setattr(fp8, "why_not", lambda device: "")
    monkeypatch.setattr(int8, "SMALLEST", 1)
    found = {}
    for choice in ("model", kind):
        (tmp_path / choice).mkdir()
        session, run = prepare(
            tiny_model_dir,
            tmp_path / choice,
            adapt={"r": 4, "lora_dropout": dropout},
            model={"precision": "bf16"},
            base_precision=choice,
        )
        checks = {check.name: check for check in session.checks(())}
        assert all(check.passed for check in checks.values())
        assert ("eight-bit-near" in checks) == (choice == kind)
        session = session.settled(tuple(checks.values()))
        facts = train_model(session, run, True, SilentDisplay())
        assert facts["base_precision"] == choice
        found[choice] = [line for line in run.read_metrics() if "train/loss" in line]
        held_out = [line for line in run.read_metrics() if "validation/loss" in line]
        found[choice + " start"] = held_out[0]["validation/loss"]
    assert found["model start"] == found[kind + " start"]
    losses = [[line["train/loss"] for line in found[choice]] for choice in ("model", kind)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    (event,) = events(run, "eight-bit-products")
    assert (event["precision"], event["layers"], event["others"]) == (kind, 14, [])
    limit = session.recipe.train.attention_bucket_tokens
    lora.use_eight_bit(session.model, kind)
    with lora.without_eight_bit(session.model), session.attention():
        plain = session.held_out(True)(session.model, session.objective).loss
    assert limit != "auto"
    assert plain == facts["restored_loss"]


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("near", [True, False])
def test_int8_is_chosen_where_it_is_faster_and_near(
    tiny_model_dir, tmp_path, monkeypatch, pays, near
):
    asked = []
    monkeypatch.setattr(int8, "SMALLEST", 1)
    monkeypatch.setattr(int8, "pays", lambda weight: asked.append(weight.numel()) or pays)
    if not near:
        nowhere = Tolerance(0.0, 0.0, 0.0)
        monkeypatch.setattr("postgrad.train.preflight.device.EIGHT_BITS", nowhere)
    session, run = prepare(tiny_model_dir, tmp_path, model={"precision": "bf16"})
    assert asked == [64 * 128]  # the largest layer
    assert session.recipe.train.base_precision == "auto"
    checks = session.checks(())
    assert all(check.passed for check in checks)
    assert any(check.name == "eight-bit-near" for check in checks) == pays
    session = session.settled(checks)
    assert session.settled(checks).recipe == session.recipe
    chosen = "int8" if pays and near else "model"
    assert session.recipe.train.base_precision == chosen
    assert (lora.eight_bit_weights(session.model) > 0) == (chosen == "int8")
    assert train_model(session, run, True, SilentDisplay())["base_precision"] == chosen
    assert bool(events(run, "eight-bit-products")) == (chosen == "int8")
    (event,) = events(run, "base-precision")
    assert event["setting"] == chosen
    if not pays:
        assert "does not show int8 faster" in event["reason"]
    else:
        assert ("eight-bit-near" in event["reason"]) == (not near)


@pytest.mark.parametrize(
    "sections",
    [{"model": {"precision": "fp32"}}, {"kl_weight": 0.1}, {"adapt": {"kind": "full"}}],
)
def test_int8_is_not_tried_where_the_recipe_excludes_it(
    tiny_model_dir, tmp_path, monkeypatch, sections
):
    monkeypatch.setattr(int8, "pays", lambda weight: pytest.fail("tried"))
    session, _ = prepare(tiny_model_dir, tmp_path, **sections)
    session = session.settled(())
    assert session.recipe.train.base_precision == "model"
    assert session.not_eight_bit.startswith("int8 ")


def test_int8_is_refused_where_no_layer_is_large_enough(tiny_model_dir, tmp_path):
    with pytest.raises(TrainingError, match="is int8, but no layer with an adapter has a size"):
        prepare(tiny_model_dir, tmp_path, base_precision="int8", model={"precision": "bf16"})


def test_int8_is_refused_where_its_sums_are_wrong(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "why_not", lambda device: "this processor's int8 sums overflow")
    monkeypatch.setattr(int8, "pays", lambda weight: True)
    with pytest.raises(TrainingError, match=r"base_precision is int8, but .* overflow"):
        prepare(tiny_model_dir, tmp_path, base_precision="int8", model={"precision": "bf16"})
    session, _ = prepare(tiny_model_dir, tmp_path, model={"precision": "bf16"})
    assert session.settled(()).recipe.train.base_precision == "model"


def test_a_training_says_why_it_could_not_use_graphs(tiny_model_dir, tmp_path, monkeypatch):
    """On a CPU there is no kernel that reads the ends of documents from the device."""
    notes = []

    class Noted(SilentDisplay):
        def note(self, text):
            notes.append(text)

    monkeypatch.setattr(workflow, "open_graphs", lambda session, packed: Graphs(512, 512))
    session, run = prepare(tiny_model_dir, tmp_path)
    train_model(session, run, True, Noted())
    [event] = events(run, "cuda-graphs")
    assert (event["recorded"], event["replayed"]) == (0, 0)
    assert any(n.endswith(event["reason"]) and "not as graphs" in n for n in notes)


@pytest.mark.parametrize(("seconds", "expected"), [(10.0, False), (36_000.0, True)])
def test_a_long_training_is_compiled_and_a_short_one_is_not(
    tiny_model_dir, tmp_path, monkeypatch, seconds, expected
):
    monkeypatch.setattr(compiled, "available", lambda: True)
    monkeypatch.setattr(session_module, "predicted_seconds", lambda session: seconds)
    try:
        session, _ = prepare(tiny_model_dir, tmp_path)
    finally:
        compiled.switch(False)
    assert session.recipe.train.torch_compile is expected


def test_the_time_of_training_is_predicted_from_a_micro_batch(tiny_model_dir, tmp_path):
    session, _ = prepare(tiny_model_dir, tmp_path)
    before = weights_of(session.model)
    assert 0 < session_module.predicted_seconds(session) < 600
    assert all(torch.equal(before[n], w) for n, w in weights_of(session.model).items())
    assert all(p.grad is None for p in session.model.parameters())


def test_recomputed_activations_change_nothing(tiny_model_dir, tmp_path):
    found = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        session, run = prepare(
            tiny_model_dir, folder, gradient_checkpointing=checkpointing, max_steps=2
        )
        assert session.model.is_activation_checkpointing == checkpointing
        found.append(train_model(session, run, True, SilentDisplay())["best_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_best_weights_are_in_the_model_and_in_the_export(trained, tiny_model_dir):
    session, run, facts = trained
    best = load_file(run.pointed("best") / lora.WEIGHTS)
    now = lora.adapter_state(session.model)
    assert all(torch.equal(best[name], now[name]) for name in best)
    assert export_model(session, run, True) is None
    verify_checksums(run.export / "adapter")
    exported = load_file(run.export / "adapter" / lora.WEIGHTS)
    assert all(torch.equal(best[name], exported[name]) for name in best)
    assert events(run, "restored")[0]["loss"] == facts["best_loss"]


@pytest.mark.parametrize("value", [1.5, math.nan])
def test_weights_that_are_not_those_recorded_are_refused(trained, value):
    session, run, facts = trained
    assert restore(session, run) == facts["best_loss"]
    path = run.pointed("best") / lora.WEIGHTS
    weights = load_file(path)
    first = next(name for name in weights if "lora_B" in name)
    weights[first][0] = value
    save_file(weights, path)
    with session.attention(), pytest.raises(TrainingError, match="restored best weights give"):
        restore_best(session, run, session.held_out(True), progress_of(run, facts))


def progress_of(run, facts):
    from postgrad.train.checkpoint import Progress
    from postgrad.train.stopping import HeldOut, StoppingState

    reference = HeldOut(torch.ones(2).numpy(), torch.ones(2).numpy())
    stopping = StoppingState(facts["best_step"], facts["best_loss"], reference)
    return Progress(facts["last_step"], stopping=stopping)


def test_a_best_checkpoint_that_is_gone_is_told(trained):
    session, run, facts = trained
    (run.checkpoints / "best").unlink()
    with session.attention(), pytest.raises(TrainingError, match=r"best checkpoint .* is gone"):
        restore_best(session, run, session.held_out(True), progress_of(run, facts))


def test_a_merged_model_is_measured(tiny_model_dir, tmp_path):
    session, run = prepare(tiny_model_dir, tmp_path, merge=True)
    facts = train_model(session, run, True, SilentDisplay())
    before = weights_of(session.model)
    drift = export_model(session, run, True)
    assert drift["loss_before"] == pytest.approx(facts["best_loss"], rel=1e-6)
    assert abs(drift["loss_after"] - drift["loss_before"]) < 1e-5
    assert drift["max_logit_difference"] < 1e-4
    assert drift["greedy_agreement"] == 1.0
    assert (drift["tolerance"], drift["refused"]) == (0.02, False)
    verify_checksums(run.export / "merged")
    after = weights_of(session.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_held_out_loss_that_is_known_is_not_measured_again(tiny_model_dir, tmp_path):
    session, run = prepare(tiny_model_dir, tmp_path, merge=True)
    facts = train_model(session, run, True, SilentDisplay())
    drift = export_model(session, run, True, facts["restored_loss"] + 1e-3)
    assert drift["loss_before"] == facts["restored_loss"] + 1e-3
    assert drift["loss_after"] == pytest.approx(facts["restored_loss"], abs=1e-5)


def test_held_out_rows_are_measured_in_larger_passes(tiny_model_dir, tmp_path):
    session, _ = prepare(tiny_model_dir, tmp_path, micro_batch_tokens=50)
    micro = session.recipe.train.micro_batch_tokens
    assert micro < 100
    held_out = session.held_out(True)
    sizes = [batch.ids.size for batch in held_out.batches]
    assert micro < max(sizes) <= evaluation_tokens(micro, on_gpu=False)
    small = Validation(session.validation, micro, True)
    assert len(small.batches) > len(sizes)
    with session.attention():
        losses = [rows(session.model, session.objective).loss for rows in (held_out, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_merge_that_moves_the_loss_is_refused_and_not_written(tiny_model_dir, tmp_path):
    session, run = prepare(tiny_model_dir, tmp_path, merge=True, merge_tolerance=1e-12)
    train_model(session, run, True, SilentDisplay())
    with torch.no_grad():
        for layer in lora.lora_layers(session.model).values():
            layer.scale *= 1.01
    with pytest.raises(TrainingError, match="merging moves the held-out loss") as error:
        export_model(session, run, True)
    assert "export/adapter" in error.value.remedy
    assert not (run.export / "merged").exists()
    assert (run.export / "adapter").exists()
    assert run.record["merge"]["refused"] is True


def test_full_tuning_delivers_a_model(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    session, run = prepare(tiny_model_dir, tmp_path, adapt={"kind": "full"}, learning_rate=1e-3)
    facts = train_model(session, run, True, SilentDisplay())
    assert facts["trainable_parameters"] == facts["total_parameters"]
    assert export_model(session, run, True) is None
    plain = AutoModelForCausalLM.from_pretrained(run.export / "model").eval()
    with training_attention(plain):
        loss = session.held_out(True)(plain, session.objective).loss
    assert loss == pytest.approx(facts["best_loss"], rel=1e-6)


def test_a_model_that_scales_its_logits_is_trained_through_its_own_head(tiny_model_dir, tmp_path):
    from postgrad.train.preflight import failed

    directory = shutil.copytree(tiny_model_dir, tmp_path / "granite")
    small = json.loads((directory / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "num_key_value_heads", "initializer_range")
    torch.manual_seed(0)
    config = GraniteConfig(**{key: small[key] for key in keys}, logits_scaling=4.0)
    GraniteForCausalLM(config).save_pretrained(directory)
    session, run = prepare(directory, tmp_path)
    assert not session.objective.fused
    assert failed(session.checks(())) == []
    facts = train_model(session, run, True, SilentDisplay())
    assert facts["best_loss"] < facts["start_loss"]
    assert len(events(run, "logits-kept")) == 1


def test_a_session_resolves_every_auto(tiny_model_dir, tmp_path):
    session, _ = prepare(
        tiny_model_dir, tmp_path, learning_rate="auto", eval_steps="auto", threads="auto"
    )
    train = session.recipe.train
    assert "auto" not in {
        train.learning_rate,
        train.tokens_per_batch,
        train.micro_batch_tokens,
        train.eval_steps,
        train.eval_rows,
        train.threads,
        train.attention_bucket_tokens,
    }
    assert len(session.stream(True)) == 6
    assert session.attention_probe == AttentionProbe(CERTAIN, {}), "rows too short to measure"
    assert session.attention_probe.limit == train.attention_bucket_tokens
    assert all(p.grad is None for p in session.model.parameters())


def test_without_int8_products_in_torch_training_goes_on(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "SMALLEST", 1)
    monkeypatch.delattr(torch, "_int_mm")
    session, _ = prepare(tiny_model_dir, tmp_path, model={"precision": "bf16"})
    assert session.settled(()).recipe.train.base_precision == "model"
    with pytest.raises(TrainingError, match="has no int8 products"):
        prepare(tiny_model_dir, tmp_path, base_precision="int8", model={"precision": "bf16"})
