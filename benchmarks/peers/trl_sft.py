"""TRL's SFTTrainer as a contender: runs in its own environment, knows nothing of postgrad.

Usage: python trl_sft.py SPEC.json. Appends one JSON line per optimizer step to the file that the
spec names, until its rows are used up or whoever started it ends it. The spec:

    model       local model directory
    rows        JSONL: {prompt: [...], completion: [...]}, or {input_ids, labels} when tokenized
    metrics     the file to append to: step, tokens (so far, no padding), seconds, loss,
                supervised (tokens of this step that count in the loss)
    output      a folder for the trainer
    sft         arguments of SFTConfig; everything else is TRL's default
    dtype       precision of the weights; null = TRL's default, float32
    lora        arguments of peft.LoraConfig, or
    adapter     a PEFT directory to start from; with neither all weights are trained
    threads     CPU threads; null = torch's default
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Recorder(TrainerCallback):
    """Writes a line per optimizer step; counts tokens in the batches themselves."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")
        self.counts: list[tuple[int, int]] = []
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        self.began = 0.0
        self.tokens = 0

    def write(self, **line: Any) -> None:
        """Append a line."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def watch(self, trainer: SFTTrainer) -> None:
        """Count what the collator makes and keep what the loss function returns."""
        collate, compute_loss = trainer.data_collator, trainer.compute_loss

        def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(examples)
            mask = batch.get("attention_mask")
            real = batch["input_ids"].numel() if mask is None else int(mask.sum())
            self.counts.append((real, int((batch["labels"][:, 1:] != -100).sum())))
            return batch

        def recorded(*arguments: Any, **keywords: Any) -> Any:
            loss = compute_loss(*arguments, **keywords)
            self.losses.append(float(loss.detach()))
            return loss

        trainer.data_collator, trainer.compute_loss = counted, recorded

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        """Write the facts and start the clock."""
        # Only here has the trainer decided on checkpointing.
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        self.write(**self.facts, checkpointing=checkpointing)
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the step."""
        # The loader may have made the next batch already: the step number says which is this one.
        tokens, supervised = self.counts[state.global_step - 1]
        self.tokens += tokens
        self.write(
            step=state.global_step,
            tokens=self.tokens,
            seconds=time.monotonic() - self.began,
            supervised=supervised,
            loss=self.losses[-1],
        )


def load_model(spec: dict[str, Any]) -> Any:
    """Return the model as the spec wants it; with `adapter` a PeftModel to go on training."""
    dtype = getattr(torch, spec["dtype"] or "float32")
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    if "adapter" in spec:
        return PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True)
    return model


def facts(trainer: SFTTrainer) -> dict[str, Any]:
    """Return what the trainer really does, whatever its arguments were taken to mean."""
    model = trainer.model
    return {
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "autocast": trainer.accelerator.mixed_precision,
        "frozen_dtypes": sorted({str(p.dtype) for p in model.parameters() if not p.requires_grad}),
        "trained_dtypes": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rows_per_step": trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        "optimizer": str(trainer.args.optim.value),
        "packing": trainer.args.packing,
        "isolated": packed_documents_are_isolated(trainer) if trainer.args.packing else None,
    }


def packed_documents_are_isolated(trainer: SFTTrainer) -> bool:
    """Perturb the first token of a packed row; nothing in its second document may move."""
    row = next(row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1)
    batch = trainer.data_collator([row])
    model, boundary = trainer.model.eval(), row["seq_lengths"][0]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits[0, boundary:]
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][0, 0] += 1
        after = model(**inputs, use_cache=False).logits[0, boundary:]
    model.train()
    return bool(torch.equal(before, after))


def read_spec() -> dict[str, Any]:
    """Read the spec named on the command line and set the threads."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    return spec


def train(spec: dict[str, Any], model: Any, adapter: LoraConfig | None) -> None:
    """Train `model` as the spec says."""
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text("utf-8").splitlines()]
    settings = SFTConfig(
        output_dir=spec["output"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **spec["sft"],
    )
    recorder = Recorder(Path(spec["metrics"]))
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=adapter,
        callbacks=[recorder],
    )
    if settings.train_sampling_strategy == "group_by_length":
        shuffle_batches(trainer)
    recorder.facts = facts(trainer)
    recorder.watch(trainer)
    transformers.logging.set_verbosity_error()
    trainer.train()


def shuffle_batches(trainer: SFTTrainer) -> None:
    """Give the batches of rows of similar length a random order.

    The sampler sorts blocks of 50 steps from long to short, so that a short measurement would see
    the longest rows only.
    """
    size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    rows = list(trainer._get_train_sampler(trainer.train_dataset))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    random.Random(trainer.args.seed).shuffle(batches)
    order = [row for batch in batches for row in batch]
    trainer._get_train_sampler = lambda *_: order


def main() -> None:
    """Train with TRL."""
    spec = read_spec()
    train(spec, load_model(spec), LoraConfig(**spec["lora"]) if "lora" in spec else None)


if __name__ == "__main__":
    main()
