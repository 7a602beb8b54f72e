"""YAML as people expect it: YAML 1.2 scalars, no duplicate keys, errors with a line and a remedy.

PyYAML reads YAML 1.1, where `packing: on` is true, `language: no` is false, `1e-4` is text, `010`
is eight and `12:30` is 750. Here only true/false are booleans, only null, ~ and nothing are null,
and 1e-4 is a number (YAML 1.2.2, core schema, section 10.3.2). What is dumped reads back the same.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import yaml

from postgrad.errors import ConfigError

_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_SCALARS: tuple[tuple[str, str, str], ...] = (
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_NULL, r"~|null|Null|NULL|", "~nN\0"),
    (_INT, r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """Reads the core schema and refuses duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this loader or a YAML 1.1 reader would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in _SCALARS:
    _expression = re.compile(rf"(?:{_pattern})$")
    for _class in (_Loader, _Dumper):
        _letters = [letter.replace("\0", "") for letter in _first]
        _class.add_implicit_resolver(_tag, _expression, _letters)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value).replace("_", "")
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(node.value).replace("_", "").lower()
    if text.endswith((".inf", ".nan")):
        return math.nan if "nan" in text else -math.inf if text.startswith("-") else math.inf
    return float(text)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(key_node.value)
        problem = None
        if not isinstance(key_node, yaml.ScalarNode):
            problem = "a key must be text"
        elif key in seen and key != "<<":
            problem = f"duplicate key {key!r}"
        if problem:
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    values = loader.construct_pairs(node, deep=True)
    return {str(key): value for key, value in values}


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    breaks = any(mark in text for mark in "\x85\u2028\u2029\ufeff")
    style = '"' if breaks else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Loader.add_constructor(_INT, _integer)
_Loader.add_constructor(_FLOAT, _float)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    r"""Parse YAML; a `ConfigError` names `where`, the line, and the usual remedies.

    >>> parse_yaml("packing: on\nlearning_rate: 1e-4", "recipe")
    {'packing': 'on', 'learning_rate': 0.0001}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or str(error).splitlines()[0])
        remedy = "fix the YAML at that line"
        if "\\t" in problem:
            problem, remedy = "a tab character", "indent with spaces; YAML does not allow tabs"
        elif "duplicate key" in problem:
            remedy = "keep one of the two"
        elif "a key must be text" in problem:
            remedy = "put text that begins with { or [ in quotes"
        elif "mapping values are not allowed" in problem:
            remedy = "indent like the lines around it, or put text that contains `: ` in quotes"
        line = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError(f"{line}: {problem}", remedy) from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}", "put the value in quotes") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply", "flatten it") from None


def dump_yaml(tree: Any) -> str:
    """Return YAML that `parse_yaml` reads back to the same tree, keys in order.

    >>> print(dump_yaml({"name": "no", "packing": "on", "learning_rate": 1e-4}), end="")
    name: 'no'
    packing: 'on'
    learning_rate: 0.0001
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def key_lines(text: str) -> dict[str, int]:
    r"""Return dotted key -> line number (from 1) of valid YAML, for error messages.

    >>> key_lines("name: a\ntrain:\n  seed: 1")
    {'name': 1, 'train': 2, 'train.seed': 3}
    """
    found: dict[str, int] = {}
    root = yaml.compose(text, Loader=_Loader)

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                found[name] = key.start_mark.line + 1
                walk(value, name + ".")

    walk(root, "")
    return found


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `tree` with each `a.b=value` set; the value is YAML, or else plain text.

    >>> apply_overrides({"train": {}}, ["train.learning_rate=1e-4", "data.system=Answer: yes"])
    {'train': {'learning_rate': 0.0001}, 'data': {'system': 'Answer: yes'}}
    """
    result: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    for override in overrides:
        key, equals, raw = override.partition("=")
        *parents, last = key.split(".")
        if not equals or not all((*parents, last)):
            raise ConfigError(
                f"override {override!r} is not KEY=VALUE", "write section.field=value"
            )
        node = result
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"override {key}: {parent} is not a section", "check the key")
            node = child
        node[last] = _override_value(raw, key)
    return result


def _override_value(raw: str, key: str) -> Any:
    bracketed = raw.lstrip()[:1] in ("{", "[", '"', "'")
    try:
        value = parse_yaml(raw, f"override {key}")
    except ConfigError:
        if bracketed:
            raise
        return raw
    return raw if isinstance(value, dict | list) and not bracketed else value
