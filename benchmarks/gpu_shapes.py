"""Models by their sizes alone and rows of random tokens: nothing is fetched."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from postgrad.types import Tokens

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "smollm2-360m": {
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""From the config.json that each model is published with; `tiny` proves that the script runs."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FULL_ROW = 4096
MEAN_CHAT, LONGEST_CHAT = 170, 1024


def write_shape(directory: Path, name: str) -> Path:
    """Write config.json and a tokenizer of single bytes with a chat template."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(special),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[0]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    config = LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    return directory


def make_rows(kind: str, count: int, vocabulary: int, seed: int = 7) -> list[Tokens]:
    """Return rows of random tokens.

    `full`: 4,096 tokens, all of them supervised, as the published figure was measured. `chat`:
    about 170 tokens (log-normal, at most 1,024), the second half supervised.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = FULL_ROW
        if kind == "chat":
            drawn = generator.lognormal(np.log(MEAN_CHAT) - 0.18, 0.6)
            length = int(np.clip(drawn, 8, LONGEST_CHAT))
        weights = np.ones(length, np.float32)
        weights[: 1 if kind == "full" else length // 2] = 0
        ids = generator.integers(3, vocabulary, size=length)
        rows.append(Tokens(ids, weights, f"{kind}-{number}"))
    return rows


def write_tokens(path: Path, rows: Sequence[Tokens]) -> Path:
    """Write rows as {input_ids, labels}, -100 where a label does not count."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            labels = np.where(row.weights > 0, row.ids, -100)
            line = {"input_ids": row.ids.tolist(), "labels": labels.tolist()}
            file.write(json.dumps(line) + "\n")
    return path
