"""The plan of a training: tokens and steps counted, memory and time measured on one real batch."""

import time
from typing import Any

from postgrad.model.load import device
from postgrad.train.memory import available_bytes, peak_memory
from postgrad.train.optimizer import trainable
from postgrad.train.session import Session


def estimate_session(session: Session) -> dict[str, Any]:
    """Return what training this session takes, without training.

    Time is that of one real micro-batch, forward and backward, scaled to all tokens of training and
    of the held-out evaluations (a third of the cost per token); evaluation by generation is extra.
    """
    train = session.recipe.train
    stream = session.stream(packed=True)
    validation = session.held_out(packed=True)
    assert isinstance(train.eval_steps, int)
    evaluations = len(stream) // train.eval_steps + 2
    batch = stream.step(0)[0]
    session.model.train()
    with session.attention(), peak_memory(device()) as memory:
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            session.objective(session.model, batch).total.backward()
            seconds.append(time.perf_counter() - began)
    session.model.zero_grad(set_to_none=True)
    rate = batch.tokens / min(seconds)
    parameters = sum(p.numel() for p in trainable(session.model).values())
    return {
        "tokens": stream.tokens,
        "steps": len(stream),
        "tokens_per_batch": train.tokens_per_batch,
        "micro_batch_tokens": train.micro_batch_tokens,
        "learning_rate": train.learning_rate,
        "gradient_checkpointing": train.gradient_checkpointing,
        "threads": train.threads,
        "attention_bucket_tokens": train.attention_bucket_tokens,
        "evaluations": evaluations,
        "validation_tokens": validation.tokens,
        "trainable_parameters": parameters,
        "total_parameters": session.loaded.parameters,
        "tokens_per_second": round(rate, 1),
        "train_seconds": round(
            stream.tokens / rate + evaluations * validation.tokens / (3 * rate), 1
        ),
        "peak_memory_bytes": memory.bytes + 8 * parameters,
        "available_memory_bytes": available_bytes(device()),
    }
