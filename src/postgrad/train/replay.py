"""Replay of the base model's own answers: generated once, before anything is trained."""

from postgrad.config import Recipe
from postgrad.data.dataset import Dataset, save_dataset
from postgrad.data.replay import ANSWER_TOKENS, SELF, choose, self_prompts
from postgrad.errors import DataError
from postgrad.model.load import Loaded, load
from postgrad.run import Run
from postgrad.train.base_answers import answer_as_base, renderer_of
from postgrad.types import Split


def needs_own_answers(recipe: Recipe, dataset: Dataset) -> bool:
    """Whether the base model has yet to answer for itself."""
    done = any(check.name == "replay" for check in dataset.checks)
    return recipe.data.replay == SELF and not done


def add_own_answers(run: Run, dataset: Dataset) -> tuple[Dataset, Loaded | None]:
    """Return the data with the replay that `data.replay: self` asks for, and the model if loaded.

    The answers go to data/replay.jsonl with the rest of the data; a resumed run finds them there.
    That they are whole is said by the check `replay`, which is written last.

    Raises:
        DataError: The model answers none of the requests.
    """
    recipe = run.config
    if not needs_own_answers(recipe, dataset):
        return dataset, None
    loaded = load(recipe.model)
    rows = len(dataset.of(Split.TRAIN))
    prompts = self_prompts(recipe.data, rows, recipe.data_seed)
    answers = answer_as_base(loaded, renderer_of(loaded), prompts, ANSWER_TOKENS)
    if not answers:
        raise DataError(
            f"the base model gives no answer to any of {len(prompts)} requests",
            "name a file of general chats in data.replay",
        )
    found = choose(answers, rows, dataset.held_out, recipe.data, recipe.data_seed)
    dataset = dataset.with_replay(found)
    save_dataset(dataset, run)
    run.event("replay-generated", requests=len(prompts), rows=len(dataset.replay))
    return dataset, loaded
