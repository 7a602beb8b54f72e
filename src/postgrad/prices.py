"""List prices, electricity and power: the shipped prices.toml, or the user's own. No torch."""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import NonNegativeFloat, PositiveFloat, ValidationError

from postgrad.config import Section
from postgrad.errors import ConfigError
from postgrad.keys import describe, problems

VARIABLE = "POSTGRAD_PRICES"
SHIPPED = Path(__file__).with_name("prices.toml")
_REMEDY = f"compare with the file that comes with postgrad, {SHIPPED}"


class Hour(Section):
    """What an hour of a machine is rented for."""

    machine: str
    """Part of the name of its GPU, or of its processor."""
    price: NonNegativeFloat
    """Amount for an hour."""
    source: str
    """Who says so."""
    url: str
    """Where."""
    date: str
    """When."""


class Hosted(Section):
    """The list price of a hosted fine-tuning service."""

    service: str
    """Its name."""
    model: str
    """Which models the price is for."""
    price_per_million_tokens: NonNegativeFloat
    """Amount for a million training tokens."""
    smallest_parameters: NonNegativeFloat = 0
    """Models above this size (open models)."""
    largest_parameters: PositiveFloat | None = None
    """Models up to this size (open models); without it: the service's own model."""
    bills_validation: bool = False
    """Whether held-out losses are billed like training."""
    closed: str | None = None
    """Why a new user cannot train there."""
    source: str
    """Who says so."""
    url: str
    """Where."""
    date: str
    """When."""


class Prices(Section):
    """A prices.toml."""

    currency: str
    """Of every amount in the file."""
    price_per_kwh: NonNegativeFloat | None = None
    """Electricity."""
    watts: PositiveFloat | None = None
    """Power while training; None = the limit that GPU or processor reports."""
    hour: tuple[Hour, ...] = ()
    """Rented machines."""
    hosted: tuple[Hosted, ...] = ()
    """Hosted services."""

    def hour_of(self, machine: str) -> Hour | None:
        """Return the first list price whose name stands in the name of this machine."""
        return next((h for h in self.hour if h.machine.lower() in machine.lower()), None)

    def hosted_for(self, parameters: int) -> tuple[Hosted, ...]:
        """Return what is offered for a model of this size, and the services' own models."""
        return tuple(
            offer
            for offer in self.hosted
            if offer.largest_parameters is None
            or offer.smallest_parameters < parameters <= offer.largest_parameters
        )


def load_prices(path: str | None = None) -> Prices:
    """Read the recipe's file, else $POSTGRAD_PRICES, else the shipped one.

    Raises:
        ConfigError: No such file, not TOML, or a wrong key; names line and key.
    """
    chosen = path or os.environ.get(VARIABLE)
    file = Path(chosen).expanduser() if chosen else SHIPPED
    try:
        text = file.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}", _REMEDY) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        where = "report.prices" if path else VARIABLE
        raise ConfigError(f"{where}: {file}: {reason}", "give the path of a prices.toml") from None
    try:
        return Prices.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_sentences(error, str(file), key_lines(text))), _REMEDY
        ) from None


def _sentences(error: ValidationError, where: str, lines: Mapping[str, int]) -> list[str]:
    """Name every wrong key with its line; pydantic counts the entries of a list from 0."""
    known, found = describe(Prices), []
    for item in error.errors(include_url=False):
        location = ".".join(map(str, item["loc"]))
        line = lines.get(location) or lines.get(location.rpartition(".")[0])
        detail = {name: item[name] for name in ("type", "loc", "input", "ctx") if name in item}
        alone = ValidationError.from_exception_data(error.title, [cast(Any, detail)])
        place = f"{where}:{line}" if line else where
        found += [sentence for _, sentence in problems(alone, known, place, {})]
    return found


def key_lines(text: str) -> dict[str, int]:
    r"""Return dotted key -> line number (from 1); the n-th entry of a list is counted from 0.

    >>> key_lines('currency = "USD"\n[[hour]]\nprice = 1\n[[hour]]\nprice = 2')
    {'currency': 1, 'hour.0': 2, 'hour.0.price': 3, 'hour.1': 4, 'hour.1.price': 5}
    """
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if entry := re.match(r"\s*\[\[\s*([\w-]+)\s*\]\]", line):
            name = entry[1]
            counts[name] = counts.get(name, -1) + 1
            prefix = f"{name}.{counts[name]}."
            found[prefix[:-1]] = number
        elif key := re.match(r"\s*([\w-]+)\s*=", line):
            found[f"{prefix}{key[1]}"] = number
    return found
