"""Supervised fine-tuning with LoRA in one file: plain PyTorch and Transformers, nothing else.

    python examples/sft_from_scratch.py MODEL_DIRECTORY rows.jsonl

Each line of the rows is {"prompt": ..., "completion": ...}; MODEL_DIRECTORY is a Transformers model
with a chat template. It does slowly and readably, a row at a time, what `postgrad train` does fast:
the test suite holds the losses of both against each other.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


class LoraLinear(nn.Module):
    """A frozen linear layer W plus a trainable low-rank update: W x + alpha / r B A x."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        """Start as `base` exactly: A is random, B is zero."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output."""
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def add_lora(model: nn.Module, r: int, alpha: float) -> list[nn.Parameter]:
    """Freeze the model, wrap every linear layer but the output head; return what is trained."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    for name in linear:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoraLinear(getattr(owner, child), r, alpha))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def encode(tokenizer: AutoTokenizer, row: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Return (ids, mask): the whole conversation, and 1 where a token is the model's to produce.

    The conversation is rendered and tokenised once. What the model must produce begins where the
    prompt ends, as a position in the text, and ends with the end token: the model must learn to
    stop, and must not learn the prompt.
    """
    user = {"role": "user", "content": row["prompt"]}
    assistant = {"role": "assistant", "content": row["completion"]}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert text.startswith(prompt), "the template shows the prompt differently in training"
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    first = next(i for i, (start, _) in enumerate(found["offset_mapping"]) if start >= len(prompt))
    end = ids.index(tokenizer.eos_token_id, first)
    mask = [float(first <= i <= end) for i in range(len(ids))]
    return torch.tensor(ids), torch.tensor(mask)


def loss_sum(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the next-token losses of one row at the tokens that the mask names."""
    logits = model(ids[None]).logits[0, :-1].float()
    losses = functional.cross_entropy(logits, ids[1:], reduction="none")
    return (losses * mask[1:]).sum()


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float = 0.03) -> float:
    """Return the rate of a step: a short rise to the peak, then a line down to zero."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 - (step - warmup) / max(1, steps - warmup))


def train(
    directory: Path,
    rows: list[dict[str, str]],
    *,
    steps: int,
    rows_per_step: int = 16,
    peak: float = 1e-3,
    r: int = 16,
    alpha: float = 32,
    max_grad_norm: float = 1.0,
    seed: int = 7,
) -> list[float]:
    """Train on the rows in order, `rows_per_step` a step, and return the loss of every step.

    A step's loss is the sum over all its tokens divided by their number. A mean of each row's mean
    would count the tokens of short answers more, and change with how the step is cut up.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(seed)
    parameters = add_lora(model, r, alpha)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    encoded = [encode(tokenizer, row) for row in rows]
    model.train()
    losses = []
    for step in range(steps):
        begin = step * rows_per_step
        batch = [encoded[index % len(encoded)] for index in range(begin, begin + rows_per_step)]
        weight = sum(float(mask[1:].sum()) for _, mask in batch)
        total = 0.0
        for ids, mask in batch:
            loss = loss_sum(model, ids, mask) / weight
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {step + 1:4d}  loss {total:.6f}", flush=True)
    return losses


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="MODEL_DIRECTORY")
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    lines = given.rows.read_text(encoding="utf-8").splitlines()
    train(
        given.directory,
        [json.loads(line) for line in lines if line.strip()],
        steps=given.steps,
        rows_per_step=given.rows_per_step,
        peak=given.learning_rate,
        seed=given.seed,
    )


if __name__ == "__main__":
    main()
