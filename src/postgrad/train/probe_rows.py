"""The chats that forgetting is watched on: read and checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace

from postgrad.config import DataConfig, Recipe, TrainConfig
from postgrad.data.files import data_files
from postgrad.data.render import Renderer
from postgrad.data.rows import read_file, refuse_or_drop
from postgrad.errors import DataError
from postgrad.sources import resolve
from postgrad.types import Example, Tokens

_SHOWN = 20


def given_chats(config: TrainConfig) -> list[Example]:
    """Read the chats of the file that `train.kl_probe` names; none when it names no file.

    Raises:
        SourceError: There is no such file.
        DataError: Malformed rows, or no rows.
    """
    uri = config.kl_probe
    if uri is None or uri == "auto":
        return []
    examples: list[Example] = []
    for path in data_files(resolve(uri, "data"), uri):
        found = read_file(path, DataConfig(train=uri))
        refuse_or_drop(found.problems, "refuse")
        examples += found.examples
    if not examples:
        raise DataError(f"train.kl_probe: {uri} has no rows", "give a file of chats")
    return examples


def check_given_chats(renderer: Renderer, recipe: Recipe) -> None:
    """Refuse a file of `train.kl_probe` of which a row cannot be used; does nothing without one."""
    usable_chats(renderer, given_chats(recipe.train), recipe.data.max_length, given=True)


def usable_chats(
    renderer: Renderer, examples: Sequence[Example], max_length: int, *, given: bool
) -> list[Tokens]:
    """Render the chats; those that teach nothing are left out, or refused when they were `given`.

    Raises:
        DataError: Rows of the user's file that cannot be used, each with the reason.
    """
    rows, wrong = [], []
    for number, rendering in enumerate(renderer.inspect_all(examples)):
        tokens, source = rendering.tokens, rendering.example.source
        if tokens is None:
            wrong.append(f"{source}: {rendering.problems[0].detail}")
        elif len(tokens) > max_length:
            wrong.append(f"{source}: {len(tokens)} tokens, data.max_length is {max_length}")
        elif tokens.supervised == 0:
            wrong.append(f"{source}: nothing in it is an answer")
        else:
            rows.append(replace(tokens, example_id=f"probe-{number}"))
    if wrong and given:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise DataError(
            "\n".join(["rows of train.kl_probe cannot be used", *wrong[:_SHOWN], *more]),
            "correct them, or leave them out",
        )
    return rows
