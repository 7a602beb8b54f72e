"""Every arm of an evaluation answers in one precision."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from postgrad.evaluate.models import Models, Weights
from postgrad.run import create_run
from postgrad.train.checkpoint import save_weights
from training import load_model, make_recipe

IDS = torch.randint(3, 256, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_with_full_tuning_the_base_answers_as_precisely_as_the_others(
    tiny_model_dir, tmp_path, precision
):
    model = {"precision": precision, "adapt": {"kind": "full"}}
    recipe = make_recipe(tiny_model_dir, model=model)
    run = create_run(recipe, "train", tmp_path / "run")
    tuned = load_model(tiny_model_dir)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    step = run.checkpoints / "step-000002"
    step.mkdir(parents=True)
    save_weights(tuned, step, str(tiny_model_dir), recipe.model.adapt)
    exported = run.export / "model"
    tuned.save_pretrained(exported)
    models = Models(run, recipe)
    for name, weights in {
        "zero": Weights(exported, 0.0),
        "half": Weights(exported, 0.5),
        "one": Weights(exported, 1.0),
        "step": Weights(step),
    }.items():
        models.define(name, weights)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    logits = {}
    for arm in ("base", "tuned", "zero", "half", "one", "step"):
        with torch.no_grad(), models.arm(arm) as model:
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}
            assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
            logits[arm] = model(IDS).logits
    for arm, other in (("zero", "base"), ("one", "tuned"), ("step", "tuned")):
        assert torch.equal(logits[arm], logits[other])
    wholly = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    own = dict(base.named_parameters())
    half = models.interpolated(Weights(exported, 0.5))
    for (name, end), (_, middle) in zip(
        wholly.named_parameters(), half.named_parameters(), strict=True
    ):
        assert middle.dtype == torch.float32
        torch.testing.assert_close(middle, (own[name] + end) / 2, atol=1e-6, rtol=0)
