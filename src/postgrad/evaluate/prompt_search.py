"""Tuning the rival: prompts tried on validation rows within a budget, the best of them kept.

A tuned model had validation rows to choose its weights by; a prompt gets the same chance before it
is compared with it. Test rows are not looked at. Variants are tried in a seeded order (Bergstra and
Bengio 2012): a budget that ends early was then spent on all choices alike.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from postgrad.config import PromptSearchConfig, Recipe
from postgrad.evaluate.compare import measure
from postgrad.evaluate.cost import tuning_seconds
from postgrad.evaluate.evidence import write_evidence
from postgrad.progress import Display
from postgrad.run import Run, read_jsonl
from postgrad.types import Evidence, Example

BEST = "base/best-prompt"
"""The arm of the prompt that was best on validation rows."""
LEDGER = "prompt-search"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of prompting."""

    name: str
    shots: int
    kind: str
    """`static`, `retrieved` or `embedded`; `static` without examples."""
    draw: int
    """Which static draw, from 0; the first is that of the arm base/few-shot-K."""
    system: str | None
    """System prompt in place of the rows' own; None = theirs."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A variant and what it reached on the validation rows: a line of the ledger."""

    name: str
    shots: int
    kind: str
    draw: int
    system: str | None
    value: float
    low: float
    high: float
    n: int
    prompt_tokens: float
    """Mean over the requests."""
    seconds: float
    """All it took, choosing examples included."""
    evidence: str
    errors: int = 0
    """Rows that could not be asked; they count as wrong."""

    @property
    def variant(self) -> Variant:
        """The way of prompting alone."""
        return Variant(self.name, self.shots, self.kind, self.draw, self.system)


@dataclass(frozen=True, slots=True)
class PromptSearch:
    """The `prompt_search` entry of measurements.json."""

    best: str
    """Name of the variant that became the arm base/best-prompt."""
    planned: int
    """Variants that the recipe asks for."""
    seconds: float
    """All variants together."""
    limit_seconds: float | None
    """The budget; None = no limit."""
    training_seconds: float | None
    """What tuning took, to hold it against; None where nothing was trained."""
    variants: tuple[Tried, ...]
    """Those that were tried, in order."""


Ask = Callable[[Variant, Sequence[Example], str], list[Evidence]]
"""Answers rows with a variant; the text is what progress calls it."""


def plan_variants(settings: PromptSearchConfig, seed: int) -> list[Variant]:
    """Return every variant once in a seeded order, at most `max_variants` of them."""
    found: list[Variant] = []
    for number, system in enumerate((None, *settings.systems)):
        ending = f"-system-{number}" if number else ""
        for shots in settings.fewshot:
            if not shots:
                found.append(Variant(f"zero-shot{ending}", 0, "static", 0, system))
                continue
            for kind in settings.examples:
                for draw in range(settings.draws if kind == "static" else 1):
                    label = f"-{kind}" if kind != "static" else f"-draw-{draw}" if draw else ""
                    name = f"few-shot-{shots}{label}{ending}"
                    found.append(Variant(name, shots, kind, draw, system))
    order = np.random.default_rng((seed, len(found))).permutation(len(found))
    return [found[place] for place in order.tolist()][: settings.max_variants]


def search_prompts(
    run: Run, recipe: Recipe, rows: Sequence[Example], ask: Ask, display: Display
) -> Variant:
    """Try variants on `rows`, all from VALIDATION, until the budget is spent; return the best.

    Of equals the one with fewer errors, then with the shorter prompts. The ledger is written after
    each variant, so that a search that was stopped goes on where it was.
    """
    settings = recipe.evaluate.prompt_search
    assert settings is not None
    plan = plan_variants(settings, recipe.data_seed)
    tried = read_tried(run, recipe.name)
    done, limit = {t.name for t in tried}, limit_seconds(run, settings)
    for number, variant in enumerate(plan, 1):
        spent = sum(t.seconds for t in tried)
        if tried and limit is not None and spent >= limit:
            display.note(f"prompt search: {len(tried)} of {len(plan)} variants in {spent:,.0f} s")
            break
        if variant.name in done:
            continue
        began = time.monotonic()
        arm = f"{LEDGER}/{variant.name}"
        found = ask(variant, rows, f"prompt {number} of {len(plan)}, {variant.name}")
        path = write_evidence(run, recipe.name, arm, found)
        tried.append(
            _tried(
                recipe, variant, found, str(path.relative_to(run.path)), time.monotonic() - began
            )
        )
        run.write_jsonl(run.evidence_path(recipe.name, LEDGER), map(dataclasses.asdict, tried))
    return best_of(tried).variant


def _tried(
    recipe: Recipe, variant: Variant, rows: Sequence[Evidence], evidence: str, seconds: float
) -> Tried:
    settings = recipe.evaluate
    measured = measure(
        rows, recipe.name, settings.scorer, LEDGER, settings.confidence, recipe.data_seed, evidence
    )
    return Tried(
        **dataclasses.asdict(variant),
        value=measured.value,
        low=measured.low,
        high=measured.high,
        n=measured.n,
        prompt_tokens=fmean(row.prompt_tokens for row in rows),
        seconds=round(seconds, 3),
        evidence=evidence,
        errors=measured.errors,
    )


def best_of(tried: Sequence[Tried]) -> Tried:
    """Return the best score; of equals fewest errors, then the shorter prompt, then the name."""
    return min(tried, key=lambda t: (-t.value, t.errors, t.prompt_tokens, t.name))


def read_tried(run: Run, task: str) -> list[Tried]:
    """Return the ledger of a search, in the order in which variants were tried."""
    return [Tried(**line) for line in read_jsonl(run.evidence_path(task, LEDGER))]


def limit_seconds(run: Run, settings: PromptSearchConfig) -> float | None:
    """Return the budget; None = no limit."""
    if settings.minutes == "auto":
        return tuning_seconds(run.record)
    return None if settings.minutes is None else 60 * settings.minutes


def search_outcome(run: Run, recipe: Recipe) -> PromptSearch | None:
    """Return what a search came to; None where nothing was searched."""
    settings = recipe.evaluate.prompt_search
    tried = read_tried(run, recipe.name)
    if settings is None or not tried:
        return None
    return PromptSearch(
        best=best_of(tried).name,
        planned=len(plan_variants(settings, recipe.data_seed)),
        seconds=round(sum(t.seconds for t in tried), 3),
        limit_seconds=limit_seconds(run, settings),
        training_seconds=tuning_seconds(run.record),
        variants=tuple(tried),
    )
