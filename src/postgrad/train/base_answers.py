"""The base model's own answers to general requests: the probe measures on them, replay trains."""

from collections.abc import Sequence

from postgrad.data.render import Renderer
from postgrad.model.generate import generate
from postgrad.model.load import Loaded
from postgrad.model.lora import disabled
from postgrad.types import Conversation, Example, Message, Split, StopReason, content_id

BATCH_TOKENS = 8192
"""Prompt and answer tokens that are generated from at once."""


def renderer_of(loaded: Loaded) -> Renderer:
    """Return the renderer of a loaded model, which knows the tokens that end its answers."""
    eos = loaded.model.generation_config.eos_token_id
    eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
    return Renderer(loaded.tokenizer, eos_token_ids=eos_ids)


def answer_as_base(
    loaded: Loaded, renderer: Renderer, prompts: Sequence[str], max_new_tokens: int
) -> list[Example]:
    """Return each prompt with the greedy answer of the model, adapters switched off.

    An answer that reaches `max_new_tokens` is kept as unfinished; an empty one is left out. Ids are
    content hashes; the source is `base:N`, the number of the prompt from 1.
    """
    requests = [Conversation((Message("user", prompt),)) for prompt in prompts]
    with disabled(loaded.model):
        completions = generate(
            loaded.model,
            [renderer.prompt_ids(request) for request in requests],
            max_new_tokens=max_new_tokens,
            stop_ids=renderer.stop_ids,
            batch_tokens=BATCH_TOKENS,
            tokenizer=loaded.tokenizer,
        )
    found = []
    for number, (request, completion) in enumerate(zip(requests, completions, strict=True), 1):
        text = completion.text.strip()
        if not text:
            continue
        conversation = Conversation((*request.messages, Message("assistant", text)))
        cut = completion.stop_reason is StopReason.LENGTH
        name = content_id(conversation)
        found.append(
            Example(name, conversation, f"base:{number}", split=Split.TRAIN, unfinished=cut)
        )
    return found
