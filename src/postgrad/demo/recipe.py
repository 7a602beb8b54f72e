"""The embedded recipe, sized to a time budget."""

import os
from pathlib import Path

from postgrad.config import Recipe, load_recipe
from postgrad.demo.licences import licence_rows_file
from postgrad.errors import ConfigError

FULL_MINUTES = 6.0
"""The budget for which recipe.yaml is written, on two CPU cores."""
FEWEST_MINUTES = 1.0


def demo_recipe(minutes: float = FULL_MINUTES) -> Recipe:
    """Return recipe.yaml with its rows scaled to `minutes`; fetches the data the first time.

    Rows of training and evaluation grow with the budget; more than the full recipe is used for a
    larger budget, up to all rows.
    """
    if minutes < FEWEST_MINUTES:
        raise ConfigError(f"--minutes {minutes:g} is too short", "give it at least one minute")
    share = minutes / FULL_MINUTES
    full = load_recipe(Path(__file__).with_name("recipe.yaml"))
    assert full.data.limit is not None
    assert full.evaluate.limit is not None
    assert full.evaluate.retention_limit is not None
    overrides = [f"data.train={os.fspath(licence_rows_file())}"]
    if share != 1:
        overrides += [
            f"data.limit={max(300, round(full.data.limit * share))}",
            f"evaluate.limit={max(100, min(1000, round(full.evaluate.limit * share)))}",
            f"evaluate.retention_limit={max(30, round(full.evaluate.retention_limit * share))}",
        ]
    return load_recipe(Path(__file__).with_name("recipe.yaml"), overrides)
