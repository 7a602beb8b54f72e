"""A model's local directory and what its small files say, read without torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from postgrad.errors import ModelError
from postgrad.run import sha256_file
from postgrad.sources import cache_directory, resolve

CONVERSION = 1
"""Part of the cache key of converted GGUF files: raise it when the conversion changes."""


def converted_directory(path: Path) -> Path:
    """Return where the cache keeps the conversion of a GGUF file, made or not."""
    key = hashlib.sha256(f"{sha256_file(path)}-{CONVERSION}".encode()).hexdigest()[:16]
    return cache_directory() / "models" / f"{path.stem}-{key}"


def find_directory(base: str, revision: str | None = None) -> Path | None:
    """Return the local directory of `base`, fetched when needed; None: a GGUF not yet converted.

    Raises:
        ModelError: `base` is a file of another kind.
    """
    path = resolve(base, "model", revision=revision)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        found = converted_directory(path)
        return found if (found / "config.json").exists() else None
    raise ModelError(f"{path} is not a model", "give a model directory, a .gguf file or a hub id")


def read_settings(directory: Path, name: str, required: bool = False) -> dict[str, Any]:
    """Return a JSON file of the directory; {} when it is absent and not required."""
    try:
        found = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise ModelError(f"{directory} has no {name}", "give a Transformers directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / name}: {error}", "fetch the model again") from None
    return found if isinstance(found, dict) else {}


def end_token_ids(directory: Path) -> list[int]:
    """Return the end tokens of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        found = read_settings(directory, name).get("eos_token_id")
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def template_text(chat_template: str) -> str:
    """Return model.chat_template as Jinja text: given as such, or read from the file it names."""
    path = Path(chat_template)
    if "\n" in chat_template or "{" in chat_template:
        return chat_template
    if not path.is_file():
        raise ModelError(
            f"model.chat_template: no file {chat_template}", "give Jinja text or a file"
        )
    return path.read_text(encoding="utf-8")
