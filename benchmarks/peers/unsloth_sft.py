"""Unsloth's CPU backend as a contender: runs in its own environment, knows nothing of postgrad.

Usage: python unsloth_sft.py SPEC.json, the spec of trl_sft.py: Unsloth loads the model, attaches
the adapter and patches TRL's trainer, which trains and is watched as TRL is. `dtype` null =
Unsloth's choice; weights are not quantised; `sft.gradient_checkpointing` defaults to Unsloth's own.
"""

# isort: skip_file
from unsloth import FastLanguageModel  # before TRL and Transformers: it patches both
from trl_sft import read_spec, train


def main() -> None:
    """Train with Unsloth."""
    spec = read_spec()
    checkpointing = "unsloth" if spec["sft"].get("gradient_checkpointing", True) else False
    model, _ = FastLanguageModel.from_pretrained(
        spec["model"],
        dtype=spec["dtype"],
        load_in_4bit=False,
        full_finetuning="lora" not in spec,
        use_gradient_checkpointing=checkpointing,
    )
    if "lora" in spec:
        lora = spec["lora"]
        model = FastLanguageModel.get_peft_model(
            model,
            r=lora["r"],
            lora_alpha=lora["lora_alpha"],
            target_modules=lora["target_modules"],
            use_gradient_checkpointing=checkpointing,
        )
    train(spec, model, None)


if __name__ == "__main__":
    main()
