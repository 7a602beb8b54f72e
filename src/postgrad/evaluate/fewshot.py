"""Examples in the prompt of the base model: which rows of TRAIN, and how they are put there."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from postgrad.config import EvaluateConfig
from postgrad.errors import ConfigError
from postgrad.evaluate.embedding import Embedder
from postgrad.evaluate.retrieval import Bm25, nearest_rows
from postgrad.types import Conversation, Example, FloatArray, Message, Split


class ExampleFinder:
    """Chooses examples of a kind for each request; what a kind needs is computed once."""

    def __init__(self, train: Sequence[Example], embedder: Embedder, seed: int) -> None:
        """Take the rows of TRAIN, and no others; `seed` is that of the static draws.

        `embedder` is asked only when `embedded` examples are.
        """
        require_train(train)
        self._train, self._embedder, self._seed = tuple(train), embedder, seed

    def find(
        self, kind: str, count: int, rows: Sequence[Example], draw: int = 0
    ) -> list[tuple[Example, ...]]:
        """Return `count` examples for each of `rows`; the nearest comes last, beside the request.

        Only the request is looked at, never the reference. `draw` numbers the static draws.

        Raises ConfigError when TRAIN has fewer rows than asked for.
        """
        if kind == "static" or not count:
            seed = (self._seed, draw) if draw else self._seed
            return [choose_shots(self._train, count, seed)] * len(rows)
        _require_enough(self._train, count)
        asked = [question(row) for row in rows]
        if kind == "retrieved":
            found = [self._words.nearest(text, count) for text in asked]
        else:
            assert kind == "embedded", kind
            found = nearest_rows(self._vectors, self._embedder(asked), count)
        return [tuple(self._train[place] for place in reversed(places)) for places in found]

    @cached_property
    def _words(self) -> Bm25:
        return Bm25([question(example) for example in self._train])

    @cached_property
    def _vectors(self) -> FloatArray:
        """[rows of TRAIN, H]."""
        return self._embedder([question(example) for example in self._train])


def choose_shots(
    train: Sequence[Example], count: int, seed: int | tuple[int, ...]
) -> tuple[Example, ...]:
    """Return `count` examples for the prompt: a simple seeded sample of TRAIN, and of TRAIN only.

    Raises ConfigError when there are fewer rows than asked for.
    """
    require_train(train)
    _require_enough(train, count)
    return draw(train, count, seed)


def require_rows(settings: EvaluateConfig, train: Sequence[Example]) -> None:
    """Refuse a recipe that asks for more examples than TRAIN has, in any arm or prompt tried.

    Raises ConfigError.
    """
    search = settings.prompt_search
    wanted = [*settings.fewshot, *(search.fewshot if search else ())]
    _require_enough(train, max(wanted, default=0))


def _require_enough(train: Sequence[Example], count: int) -> None:
    if count > len(train):
        raise ConfigError(
            f"the recipe asks for {count} examples in the prompt, TRAIN has {len(train)} rows",
            "ask for fewer in evaluate.fewshot and evaluate.prompt_search.fewshot",
        )


def require_train(examples: Sequence[Example]) -> None:
    """Examples in a prompt from any other split would leak answers into the measurement."""
    assert all(example.split is Split.TRAIN for example in examples), "examples come from TRAIN"


def draw(
    examples: Sequence[Example], count: int, seed: int | tuple[int, ...]
) -> tuple[Example, ...]:
    """Return a simple seeded sample in the original order; all when there are fewer."""
    if count >= len(examples):
        return tuple(examples)
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(examples), count, replace=False)
    return tuple(examples[index] for index in sorted(chosen.tolist()))


def question(example: Example) -> str:
    """Return the last user message: what evidence shows and a linear model gets to see."""
    users = [m.content for m in example.conversation.messages if m.role == "user"]
    return users[-1] if users else ""


def with_shots(prompt: Conversation, shots: Sequence[Example]) -> Conversation:
    """Put examples between the system message and the request, as earlier turns."""
    turns = [
        message
        for shot in shots
        for message in shot.conversation.messages
        if message.role != "system"
    ]
    head = [message for message in prompt.messages[:1] if message.role == "system"]
    return Conversation((*head, *turns, *prompt.messages[len(head) :]), prompt.tools)


def with_system(prompt: Conversation, system: str | None) -> Conversation:
    """Put `system` in place of the system message, or before all where there is none."""
    if system is None:
        return prompt
    rest = prompt.messages[1:] if prompt.messages[0].role == "system" else prompt.messages
    return Conversation((Message("system", system), *rest), prompt.tools)
