"""Everyday requests to a general assistant, made from templates and topics: for probe and replay.

They stand for what a base model can do that the training rows say nothing about. Deterministic, in
our own words, and in two halves that share no template, topic, sentence or numbers: the probe
measures with one, replay trains on the other.
"""

import hashlib
from functools import cache

PROBE_ABOUT = (
    "Explain {} in two sentences.",
    "What is a common mistake that people make about {}?",
    "Write one question about {} for a quiz, and its answer.",
    "Write a title and an opening sentence for an article about {}.",
    "Answer with a numbered list: which four things should I know about {}?",
    "Suggest a weekend activity that involves {}.",
    "Which jobs have to do with {}?",
    "How would you convince a friend to take an interest in {}?",
)
REPLAY_ABOUT = (
    "Tell me briefly about {}.",
    "Explain {} to a ten-year-old child.",
    "How can knowing about {} help in everyday life?",
    "Give me three facts about {}.",
    "List five words that have to do with {}.",
    "Write a short poem about {}.",
    "I am new to {}. Where should I start?",
    "What would a historian find interesting about {}?",
    "How has what people know about {} changed in the last hundred years?",
    "Name one advantage and one disadvantage of {}.",
    "Describe {} without using the letter z.",
    "Give a definition of {} in fewer than fifteen words.",
    "Reply in JSON with the keys topic and summary. The topic is {}.",
    "Make a table with two columns, word and meaning, for three terms from {}.",
    "Tell me a short story that has to do with {}.",
    "What do people often ask about {}?",
    "Write a polite e-mail that invites a colleague to a talk about {}.",
    "Give me a short plan for learning about {} in one week.",
)
"""Requests about a topic."""

PROBE_TOPICS = (
    *("the tides", "baking bread", "chess", "earthquakes", "the heart", "postage stamps"),
    *("wind turbines", "job interviews", "bees", "the Roman Empire", "insurance", "shadows"),
)
REPLAY_TOPICS = (
    *("volcanoes", "gardening", "football", "the moon", "vaccines", "libraries", "bicycles"),
    *("solar panels", "public speaking", "dolphins", "ancient Egypt", "taxes", "rainbows"),
    *("coffee", "sleep", "photography", "rivers", "the alphabet", "trains", "music theory"),
    *("recycling", "first aid", "elephants", "the Renaissance", "saving money", "thunderstorms"),
    *("tea", "exercise", "painting", "deserts", "dictionaries", "aeroplanes", "the violin"),
    *("composting", "nutrition", "owls", "the printing press", "mortgages", "glaciers"),
    *("cheese", "memory", "architecture", "islands", "translation", "ships", "dancing"),
    *("electric cars", "allergies", "wolves", "the Silk Road", "pensions", "fog", "chocolate"),
    *("dreams", "sculpture", "forests", "proverbs", "bridges", "choirs", "batteries"),
    *("the immune system", "spiders", "the Vikings", "budgets", "gravity", "rice"),
    *("habits", "theatre", "coral reefs", "handwriting", "lighthouses", "jazz", "magnets"),
    *("blood pressure", "horses", "castles", "trade", "friction", "soup", "patience"),
    *("cinema", "mountains", "poetry", "tunnels", "folk songs", "telescopes", "teeth"),
    *("ants", "democracy", "inflation", "atoms", "spices", "teamwork", "fashion", "caves"),
)

PROBE_REWRITE = (
    "Put this sentence into the past tense: {}",
    "Make this sentence more polite: {}",
    "Say the opposite of this sentence: {}",
)
REPLAY_REWRITE = (
    "Rewrite this sentence in simpler words: {}",
    "Turn this sentence into a question: {}",
    "Shorten this sentence as much as you can: {}",
    "What is the main verb of this sentence? {}",
    "Say whether this sentence sounds happy, sad or neutral, in one word: {}",
    "Translate this sentence into French: {}",
    "Write the next sentence of a story that begins like this: {}",
    "Write this sentence in capital letters: {}",
    "How many words does this sentence have? {}",
)
"""Requests about a sentence."""

PROBE_SENTENCES = (
    "The committee will postpone its decision until all reports have arrived.",
    "My neighbour walks her dog along the canal every morning.",
    "You have not sent me the documents yet.",
)
REPLAY_SENTENCES = (
    "The children are waiting for the bus in the rain.",
    "Our team finishes the project two weeks before the deadline.",
    "I want my money back.",
    "The museum on the corner opens at ten and closes at six.",
    "He forgets his umbrella whenever the sky is grey.",
    "The old bridge is no longer safe for heavy lorries.",
    "She teaches mathematics at a small school in the mountains.",
    "The company intends to reduce its expenditure on travel.",
    "The soup needs more salt and less pepper.",
    "Nobody at the meeting knows why the lights go out.",
    "A cat sleeps on the warm roof of the car.",
    "The train from the north arrives late because of snow.",
    "Please close the window, it is cold in here.",
    "The results of the experiment surprise even its authors.",
    "They plant a tree for every child that is born in the village.",
    "This chair is too small for me.",
    "The doctor explains the treatment slowly and clearly.",
    "We are happy to see so many guests tonight.",
    "The price of bread rises every winter.",
    "My brother repairs radios and sells them on the market.",
)

PROBE_COUNT = (
    "A train leaves at {c} o'clock and needs {b} minutes. When does it arrive?",
    "Which is larger, {a} or {b}?",
    "What is {a} minus {b}?",
)
REPLAY_COUNT = (
    "What is {a} plus {b}?",
    "What is {a} times {c}?",
    "I have {a} apples and give away {c}. How many are left?",
    "A ticket costs {c} euros. How much do {b} tickets cost?",
    "Is {a} an even or an odd number? Answer with one word.",
    "Count from {c} to 12, separated by commas.",
    "Write the number {a} in words.",
)
"""Requests with two-digit numbers a > b and a small number c."""

PROBE_NUMBERS = ((47, 18, 3), (83, 26, 7))
REPLAY_NUMBERS = tuple((20 + 7 * n % 79, 11 + 5 * n % 9, 2 + n % 8) for n in range(40))

PROBE_PROMPTS = 24
"""Requests of the fixed probe set."""


def probe_prompts() -> tuple[str, ...]:
    """Return the fixed probe set, always the same, every kind among the first eight.

    >>> len(probe_prompts())
    24
    """
    kinds = (
        _filled(PROBE_ABOUT, PROBE_TOPICS),
        _filled(PROBE_REWRITE, PROBE_SENTENCES),
        _counted(PROBE_COUNT, PROBE_NUMBERS),
    )
    shares = (PROBE_PROMPTS - 8, 5, 3)
    chosen: list[tuple[float, str]] = []
    for kind, share in zip(kinds, shares, strict=True):
        some = _shuffled(kind, seed=0)[:share]
        chosen += [((place + 0.5) / share, text) for place, text in enumerate(some)]
    return tuple(text for _, text in sorted(chosen))


@cache
def all_replay_prompts() -> tuple[str, ...]:
    """Return every request that replay can choose from."""
    kinds = (
        _filled(REPLAY_ABOUT, REPLAY_TOPICS),
        _filled(REPLAY_REWRITE, REPLAY_SENTENCES),
        _counted(REPLAY_COUNT, REPLAY_NUMBERS),
    )
    return tuple(dict.fromkeys(prompt for kind in kinds for prompt in kind))


def replay_prompts(count: int, seed: int) -> list[str]:
    """Return `count` different requests, or all there are; a smaller count is a beginning."""
    return _shuffled(list(all_replay_prompts()), seed)[:count]


def _filled(templates: tuple[str, ...], topics: tuple[str, ...]) -> list[str]:
    return [template.format(topic) for topic in topics for template in templates]


def _counted(templates: tuple[str, ...], numbers: tuple[tuple[int, int, int], ...]) -> list[str]:
    return [
        template.format(a=max(a, b + 1), b=b, c=c) for template in templates for a, b, c in numbers
    ]


def _shuffled(prompts: list[str], seed: int) -> list[str]:
    """Order prompts by a seeded hash: the same on every machine and version."""
    return sorted(prompts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
