"""The keys of a configuration tree: what each takes, and what is wrong with a given value.

Works on any pydantic model; `postgrad.config` holds the one model there is. The descriptions come
from the docstrings under the fields, so that the reference cannot drift from the code.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

_TYPE_NAMES = {str: "text", int: "integer", float: "number", bool: "true | false"}

_RULES = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be finite",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must be letters, digits and . _ - only",
    "adapter_kind": "must be {{kind: lora, ...}} or {{kind: full}}",
}
"""Kinds of pydantic errors that say more than the type of the key does."""

_ELSEWHERE = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "batch_size": "train.tokens_per_batch",
    "per_device_train_batch_size": "train.tokens_per_batch",
    "gradient_accumulation_steps": "train.tokens_per_batch",
    "micro_batch_size": "train.micro_batch_tokens",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "sample_packing": "train.packing",
    "model_name_or_path": "model.base",
    "base_model": "model.base",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "val_set_size": "data.validation",
    "bf16": "model.precision",
    "fp16": "model.precision",
    "lora_r": "model.adapt.r",
    "lora_target_modules": "model.adapt.target_modules",
    "warmup_steps": "train.warmup_ratio",
    "early_stopping_patience": "train.early_stopping.patience",
}
"""What the same thing is called in TRL, Transformers, PEFT and Axolotl."""


def describe(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return every dotted key of a model -> {type, default, meaning}, in order of definition."""
    found: dict[str, dict[str, Any]] = {}
    _collect(model, "", found)
    return found


def problems(
    error: ValidationError, known: Mapping[str, Any], where: str, lines: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return (key, sentence) for every wrong key; the branches of a union become one sentence."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors():
        by_key.setdefault(_key(item, known), []).append(item)
    found = []
    for key, items in by_key.items():
        place = f"{where}:{lines[key]}" if key in lines else where
        found.append((key, f"{place}: {_sentence(key, items, known)}"))
    return found


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like `word`, or None when nothing is close.

    >>> nearest("evalute", ["evaluate", "explain"])
    'evaluate'
    """
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """Return the known dotted key that was probably meant, or None.

    A name that another section or another tool uses wins over a similar spelling.

    >>> known = ["train", "train.learning_rate", "model.adapt.r"]
    >>> [nearest_key(key, known) for key in ("train.lr", "train.learing_rate", "train.r", "zzz")]
    ['train.learning_rate', 'train.learning_rate', 'model.adapt.r', None]
    """
    section, _, tail = key.rpartition(".")
    by_tail: dict[str, str] = {}
    for name in known:
        beside = name.rpartition(".")[0] == section
        if not key.startswith(name + ".") and (beside or name.rsplit(".", 1)[-1] not in by_tail):
            by_tail[name.rsplit(".", 1)[-1]] = name
    if tail in by_tail:
        return by_tail[tail]
    if _ELSEWHERE.get(tail) in by_tail.values():
        return _ELSEWHERE[tail]
    beside_it = [name for name, whole in by_tail.items() if whole.rpartition(".")[0] == section]
    near = nearest(tail, beside_it) or nearest(tail, by_tail)
    return by_tail[near] if near else None


def _collect(section: type[BaseModel], prefix: str, found: dict[str, dict[str, Any]]) -> None:
    for name, info in section.model_fields.items():
        key = prefix + name
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json")
        meaning = " ".join((info.description or "").split())
        entry: dict[str, Any] = {
            "type": _type_name(info.annotation),
            "default": default,
            "meaning": meaning,
        }
        if key in found and found[key]["type"] != entry["type"]:  # the same key of two variants
            found[key]["type"] = f"{found[key]['type']} | {entry['type']}"
        found.setdefault(key, entry)
        for child in _sections(info.annotation):
            _collect(child, key + ".", found)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif hasattr(annotation, "__metadata__"):
        yield from _sections(annotation.__origin__)
    else:
        for argument in getattr(annotation, "__args__", None) or ():
            yield from _sections(argument)


def _type_name(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):
        return _type_name(annotation.__origin__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    arguments: tuple[Any, ...] = getattr(annotation, "__args__", None) or ()
    origin = getattr(annotation, "__origin__", None)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is dict:
        return f"{_type_name(arguments[1])} by name"
    if origin is tuple:
        return "list of " + _type_name(arguments[0])
    if arguments:
        return " | ".join(dict.fromkeys(_type_name(argument) for argument in arguments))
    if annotation is type(None):
        return "null"
    return _TYPE_NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _key(item: Any, known: Mapping[str, Any]) -> str:
    """Return the dotted key of an error; pydantic puts the names of union branches in between."""
    *parents, last = item["loc"] or ("",)
    key = ""
    for part in parents:
        longer = f"{key}.{part}" if key else str(part)
        key = longer if longer in known else key
    longer = f"{key}.{last}" if key else str(last)
    return longer if longer in known or item["type"] in ("extra_forbidden", "missing") else key


def _sentence(key: str, items: Sequence[Any], known: Mapping[str, Any]) -> str:
    kinds = {item["type"]: item for item in items}
    if not key:
        return str(items[0]["msg"]).removeprefix("Value error, ")
    if "extra_forbidden" in kinds:
        return _unknown(key, kinds["extra_forbidden"]["loc"][-1], known)
    if "missing" in kinds:
        return f"{key} is required"
    for kind, item in kinds.items():
        if kind in _RULES:
            return f"{key} {_RULES[kind].format(**item.get('ctx', {}))}, not {_show(item['input'])}"
    takes = str(known[key]["type"]) if key in known else "of another kind"
    if takes.startswith("section"):
        inside = [name.removeprefix(key + ".") for name in known if name.startswith(key + ".")]
        takes = f"a section of keys ({', '.join(inside[:3])} ...)"
    return f"{key} must be {takes.replace(' | ', ' or ')}, not {_show(items[0]['input'])}"


def _unknown(key: str, given: str, known: Mapping[str, Any]) -> str:
    if "." in given and key in known:
        *parents, last = key.split(".")
        nested = "".join(f"{parent}: {{" for parent in parents) + f"{last}: ..."
        return f"{key} must be nested: {nested}{'}' * len(parents)}"
    if key in known:
        return f"{key} is not read by this kind of {key.rpartition('.')[0]}"
    near = nearest_key(key, known)
    return f"unknown key {key}" + (f" (did you mean {near}?)" if near else "")


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
