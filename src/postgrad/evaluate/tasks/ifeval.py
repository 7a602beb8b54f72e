"""IFEval: does a response do what can be checked by a program (Zhou et al. 2023, arXiv 2311.07911).

541 prompts with 834 instructions of 25 kinds. Four metrics: the share of prompts with every
instruction followed and the share of instructions followed, each strictly and loosely. The
instructions of one prompt are not independent: their errors are clustered by prompt.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from postgrad.errors import ConfigError
from postgrad.evaluate.tasks import Generation, Item, Kind, Row, Samples, Task
from postgrad.evaluate.tasks.instructions import (
    DetectLanguage,
    follows_loosely,
    follows_strictly,
    instruction,
    needs,
)
from postgrad.evaluate.tasks.rows import ORIGIN
from postgrad.evaluate.tasks.segmentation import PUNKT_ENGLISH, Punkt, read_punkt
from postgrad.sources import resolve
from postgrad.types import Evidence, Score

SEED = 0
"""Of langdetect, which guesses by chance unless it gets one."""
CRITERIA = {"strict": follows_strictly, "loose": follows_loosely}


def read(row: Row) -> Item:
    """Return the item of a row; what its checkers need is fetched now, not after the answers."""
    names = [str(name) for name in row["instruction_id_list"]]
    pairs = zip(names, row["kwargs"], strict=True)
    wanted = tuple(instruction(name, arguments) for name, arguments in pairs)
    _tools(names)
    return Item(
        id=str(row["key"]),
        prompt=row["prompt"],
        reference=json.dumps(names),
        row={"instructions": wanted},
    )


def score(completion: str, item: Item) -> dict[str, Score]:
    """Return the four metrics, and 0 or 1 for each instruction under its number and name.

    The value of an `inst_level` metric is the share of this prompt's instructions; the accuracy
    over all instructions comes from `units`.
    """
    wanted = item.row["instructions"]
    tools = _tools([one.name for one in wanted])
    scores: dict[str, Score] = {}
    for criterion, follows in CRITERIA.items():
        verdicts = [follows(completion, one, **tools) for one in wanted]
        failed = ", ".join(
            one.name for one, passed in zip(wanted, verdicts, strict=True) if not passed
        )
        why = failed and f"not followed: {failed}"
        share = sum(verdicts) / len(verdicts)
        scores[f"prompt_level_{criterion}_acc"] = Score(float(not failed), not failed, why)
        scores[f"inst_level_{criterion}_acc"] = Score(share, not failed, why)
        for number, (one, passed) in enumerate(zip(wanted, verdicts, strict=True)):
            scores[_name(criterion, number, one.name)] = Score(float(passed), passed)
    return scores


def units(rows: Sequence[Evidence], metric: str) -> Sequence[Evidence]:
    """Return the rows whose mean is the metric: prompts, or instructions for an `inst_level` one.

    Instructions hold the metric as 0 or 1 and stand in the group of their prompt. A prompt that
    ended in an error failed all its instructions.
    """
    level, _, criterion = metric.removesuffix("_acc").rpartition("_")
    if level != "inst_level":
        return rows
    return [
        dataclasses.replace(
            row,
            example_id=f"{row.example_id}#{number + 1}",
            reference=name,
            scores={metric: row.scores.get(_name(criterion, number, name), Score(0.0, False))},
            group=row.example_id,
        )
        for row in rows
        for number, name in enumerate(json.loads(row.reference))
    ]


def _name(criterion: str, number: int, name: str) -> str:
    return f"{criterion} {number + 1} {name}"


def _tools(names: Sequence[str]) -> Mapping[str, Any]:
    """Return what the checkers of these instructions need, loaded once."""
    loaders = {"punkt": english_punkt, "detect": language_detector}
    return {
        tool: load() for tool, load in loaders.items() if any(needs(name, tool) for name in names)
    }


@cache
def english_punkt() -> Punkt:
    """Return the parameters that split English into sentences; fetched the first time."""
    return read_punkt(resolve(PUNKT_ENGLISH, "data"))


@cache
def language_detector() -> DetectLanguage:
    """Return langdetect's detector with a fixed seed.

    Raises:
        ConfigError: langdetect is not installed.
    """
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError:
        raise ConfigError(
            "ifeval asks for the language of answers, and langdetect is not installed",
            "pip install 'postgrad[ifeval]'",
        ) from None
    DetectorFactory.seed = SEED

    def detect_language(text: str) -> str | None:
        try:
            return str(detect(text))
        except LangDetectException:
            return None

    return detect_language


TASKS = (
    Task(
        name="ifeval",
        kind=Kind.GENERATION,
        metrics=(
            "prompt_level_strict_acc",
            "inst_level_strict_acc",
            "prompt_level_loose_acc",
            "inst_level_loose_acc",
        ),
        chance=None,
        origin=f"{ORIGIN} ifeval 4.0",
        samples=Samples(
            names=("ifeval", "input_data"),
            hub="google/IFEval#config=default&split=train",
            standard=541,
            split="train",
        ),
        read=read,
        units=units,
        chat=True,
        generation=Generation(score=score, max_new_tokens=1280),
    ),
)
