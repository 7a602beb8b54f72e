"""A peer's fastest setting on this machine and these rows: one choice after the other, cheaply.

A trial is timed for some seconds after one warm-up step. It is broken off as hopeless when it runs
at less than half of the best rate so far; an ordered choice (more rows, fewer rows) ends at its
first option that is clearly slower than the best.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from contenders import BEST, UNSLOTH, Method, Setting, last_line
from harness import ContenderError, Measured, say

SEARCHED = (BEST, UNSLOTH)
"""Contenders whose fastest setting is looked for."""
HOPELESS = 0.5
"""A trial below this share of the best rate so far is broken off."""
SLOWER = 0.85
"""An ordered choice ends at an option below this share of the best rate so far."""

Change = Callable[[Setting], Setting]
Trial = Callable[[Setting, float], Measured]
"""Measures a setting; breaks off below so many tokens a second."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Options that exclude each other: each changes the best setting found so far."""

    name: str
    options: tuple[tuple[str, Change], ...]
    ordered: bool = False
    """Once an option is slower, those after it are too."""


def search(measure: Trial, start: Setting, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the fastest exact setting and every trial.

    Raises:
        ContenderError: not one setting trains.
    """
    trials: list[dict[str, Any]] = []
    best, fastest = start, 0.0
    for choice in choices:
        before = best
        for label, change in choice.options:
            setting = change(before)
            trial: dict[str, Any] = {"choice": choice.name, "option": label, **asdict(setting)}
            trials.append(trial)
            try:
                found = measure(setting, HOPELESS * fastest)
            except ContenderError as error:
                trial["error"] = last_line(error)
                say(f"  {choice.name}: {label}: {trial['error']}")
                if choice.ordered:
                    break
                continue
            trial |= found.row()
            exact = found.facts.get("isolated") is not False
            rate = found.tokens_per_second
            say(f"  {choice.name}: {label}: {rate:.0f} tokens/s{'' if exact else ', not exact'}")
            if exact and rate > fastest:
                best, fastest = setting, rate
            elif choice.ordered and rate < SLOWER * fastest:
                break
    if not fastest:
        raise ContenderError(trials[-1]["error"] if trials else "nothing was tried")
    return {"setting": asdict(best), "trials": trials}


def choices_of(
    contender: str,
    method: Method,
    longest: int,
    quick: bool,
    *,
    precision: Setting | None = None,
    layout: Setting | None = None,
) -> tuple[Setting, tuple[Choice, ...]]:
    """Return the setting to start from and what is tried.

    What is known is not looked for again: `precision`, found with this method on other rows
    (precision, checkpointing and threads depend on the machine and the method), and `layout`, found
    with LoRA on these rows (full tuning tries more rows only: its optimizer step costs more).
    """
    options = _trl_precisions(method) if contender == BEST else _unsloth_options()
    start = layout or _grouped(8)(Setting({"gradient_checkpointing": False}))
    choices = [options]
    if precision is not None:
        kept = {k: v for k, v in precision.sft.items() if k in ("bf16", "gradient_checkpointing")}
        start = replace(precision, sft={**start.sft, **kept})
        choices = [Choice("start", (("as found before", lambda s: s),))]
    if quick:
        return start, (Choice(choices[0].name, choices[0].options[:1]),)
    choices.append(_rows("more rows", (16, 32)))
    if layout is None:
        choices.append(_rows("fewer rows", (4, 2, 1)))
        row = -(-longest // 256) * 256
        packed = tuple((f"rows of {n} tokens", _packed(n)) for n in (row, 2 * row))
        if contender == BEST:
            choices.append(Choice("packing", packed, ordered=True))
    if precision is None and layout is None:
        choices.append(Choice("threads", (("1 thread", lambda s: replace(s, threads=1)),)))
    return start, tuple(choices)


def _trl_precisions(method: Method) -> Choice:
    def precision(dtype: str, autocast: bool) -> Change:
        return lambda s: replace(s.with_arguments(bf16=autocast), dtype=dtype)

    options = [
        ("bf16 autocast, fp32 weights", precision("float32", True)),
        ("bf16 autocast, bf16 weights", precision("bfloat16", True)),
        ("bf16 throughout", precision("bfloat16", False)),
        ("fp32 throughout", precision("float32", False)),
    ]
    # Weights that train stay in float32, as everywhere in this comparison: a step of AdamW at the
    # learning rates of full tuning is smaller than the rounding of bf16.
    kept = [option for option in options if method == "lora" or "fp32 weights" in option[0]
            or option[0].startswith("fp32")]  # fmt: skip
    return Choice("precision", tuple(kept))


def _unsloth_options() -> Choice:
    """Unsloth chooses the precision itself (bf16 where the processor has it)."""
    return Choice(
        "checkpointing",
        (
            ("off", lambda s: s),
            ("as by default", lambda s: s.with_arguments(gradient_checkpointing=True)),
        ),
    )


def _rows(name: str, sizes: tuple[int, ...]) -> Choice:
    """Return a choice of how many rows of similar length make a step."""
    return Choice(name, tuple((f"{n} rows", _grouped(n)) for n in sizes), ordered=True)


def _grouped(size: int) -> Change:
    return lambda s: s.with_arguments(
        packing=False, per_device_train_batch_size=size, train_sampling_strategy="group_by_length"
    )


def _packed(length: int) -> Change:
    return lambda s: s.with_arguments(
        packing=True,
        max_length=length,
        per_device_train_batch_size=1,
        train_sampling_strategy="random",
    )
