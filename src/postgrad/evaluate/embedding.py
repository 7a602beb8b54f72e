"""Texts as vectors of the model's own: the mean of its last hidden states over their tokens.

No other model is needed, and none could know the user's words better than the one that is prompted.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from postgrad.data.batches import micro_batches
from postgrad.model.attention import training_attention
from postgrad.model.decode import can_share
from postgrad.progress import Display
from postgrad.train.sft import model_inputs
from postgrad.types import Batch, FloatArray, Tokens

LONGEST = 1024
"""Tokens of a text that are read."""
PASS_TOKENS = {"cpu": 2048}
"""Tokens of one forward pass by kind of device, `MOST_PASS_TOKENS` elsewhere."""
MOST_PASS_TOKENS = 16384


class Embedder:
    """Turns texts into vectors; the model is loaded when it is first asked."""

    def __init__(
        self,
        open_model: Callable[[], AbstractContextManager[Any]],
        tokenizer: Callable[[], Any],
        display: Display,
    ) -> None:
        """Take what gives the model, for as long as it is used, and its tokenizer."""
        self._open, self._tokenizer, self._display = open_model, tokenizer, display
        self._known: dict[str, FloatArray] = {}

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Return vectors [texts, H]; each text is read once, however often it is asked for."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            with self._open() as model:
                vectors = embed(model, self._tokenizer(), new, self._display)
            self._known |= zip(new, vectors, strict=True)
        return np.stack([self._known[text] for text in texts])


def embed(model: Any, tokenizer: Any, texts: Sequence[str], display: Display) -> FloatArray:
    """Return the mean last hidden state of each text, [texts, H] in float32; zeros for no tokens.

    Texts are packed where the model's attention is one that can be packed, and padded on the right
    elsewhere: no token sees what stands after it, so neighbours change nothing beyond rounding.
    """
    config = model.config.get_text_config()
    limit = min(getattr(config, "max_position_embeddings", None) or LONGEST, LONGEST)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:limit] for text in texts]
    found = np.zeros((len(rows), config.hidden_size), np.float32)
    kept = [
        Tokens(np.array(row, np.int64), np.zeros(len(row), np.float32), str(number))
        for number, row in enumerate(rows)
        if row
    ]
    packed, was_training = can_share(model), model.training
    most = PASS_TOKENS.get(next(model.parameters()).device.type, MOST_PASS_TOKENS)
    model.eval()
    try:
        with (
            torch.inference_mode(),
            training_attention(model) if packed else nullcontext(),
            display.track("reading questions", len(kept), unit="rows") as bar,
        ):
            for batch in micro_batches(kept, most, packed):
                found[[int(number) for number in batch.example_ids]] = _means(model, batch)
                bar.advance(len(batch.example_ids))
    finally:
        model.train(was_training)
    return found


def _means(model: Any, batch: Batch) -> FloatArray:
    """Return the mean last hidden state of each document of a batch, [documents, H]."""
    device = next(model.parameters()).device
    if batch.packed:
        inputs, _ = model_inputs(batch, device)
    else:
        inputs = {"input_ids": torch.from_numpy(batch.ids).to(device), "use_cache": False}
    hidden = model.base_model(**inputs).last_hidden_state[:, : batch.ids.shape[1]]
    documents = torch.from_numpy(batch.documents).to(device)
    real = documents >= 0
    sums = torch.zeros(len(batch.example_ids), hidden.shape[-1], device=device)
    sums.index_add_(0, documents[real], hidden[real].float())
    means: FloatArray = (sums / torch.tensor(batch.lengths, device=device)[:, None]).cpu().numpy()
    return means
