"""The tasks that can be named in `evaluate.retention`. To add a family, name its module here."""

import difflib
from functools import cache
from importlib import import_module

from postgrad.errors import ConfigError
from postgrad.evaluate.tasks import Task

FAMILIES = (
    "arc",
    "boolq",
    "commonsense_qa",
    "gsm8k",
    "hellaswag",
    "ifeval",
    "lambada",
    "mmlu",
    "openbookqa",
    "piqa",
    "winogrande",
)
"""Modules of this package with a tuple `TASKS`."""


@cache
def tasks() -> dict[str, Task]:
    """Return every built-in task by name."""
    modules = (import_module(f"postgrad.evaluate.tasks.{family}") for family in FAMILIES)
    return {task.name: task for module in modules for task in module.TASKS}


def find_task(name: str) -> Task:
    """Return a built-in task; raises ConfigError that names the nearest one."""
    known = tasks()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        remedy = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"evaluate.retention: there is no task {name}",
            f"{remedy}choose from {', '.join(sorted(known))}, or give a task file (*.yaml)",
        )
    return known[name]
