"""Licence notices and their SPDX expressions, from the rules of ScanCode (licensedcode-data).

34,859 rules written by people, CC-BY-4.0, AboutCode and others. A rule is a text with YAML in
front; its licence keys are mapped to SPDX identifiers through the licence files beside it.
"""

import json
import re
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

import yaml

from postgrad.run import write_atomic
from postgrad.sources import cache_directory, resolve

PACKAGE = (
    "pypi:licensedcode-data==32.1.0#wheel="
    "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"
)
ATTRIBUTION = (
    "Licence notices: ScanCode licence rules, licensedcode-data 32.1.0, "
    "(c) nexB Inc., AboutCode and contributors, CC-BY-4.0."
)
SHORTEST, LONGEST = 20, 400
"""Characters of a notice that is used."""
FEWEST = 15
"""Rows that a label must have."""
RULES = "licensedcode/data/rules/"
LICENCES = "licensedcode/data/licenses/"
VERSION = 1
"""Part of the file name: raise it when the rows change."""


def licence_rows_file() -> Path:
    """Return a JSONL file {text, spdx}; downloads and converts the package the first time."""
    target = cache_directory() / f"licence-notices-32.1.0-v{VERSION}.jsonl"
    if not target.exists():
        with ZipFile(resolve(PACKAGE, "data")) as wheel:
            rows = licence_rows(wheel)
        lines = (
            json.dumps({"text": text, "spdx": spdx}, ensure_ascii=False) for text, spdx in rows
        )
        write_atomic(target, "".join(line + "\n" for line in lines).encode())
    return target


def licence_rows(wheel: ZipFile) -> list[tuple[str, str]]:
    """Return (notice, SPDX expression) for every usable rule, in the order of file names."""
    keys = _spdx_keys(wheel)
    rows: list[tuple[str, str]] = []
    for name in sorted(n for n in wheel.namelist() if n.startswith(RULES) and n.endswith(".RULE")):
        head, text = _front_matter(wheel.read(name).decode("utf-8"))
        expression = head.get("license_expression")
        if not expression or head.get("is_false_positive"):
            continue
        spdx = to_spdx(str(expression), keys)
        text = text.strip()
        if spdx and SHORTEST <= len(text) <= LONGEST:
            rows.append((text, spdx))
    counts = Counter(spdx for _, spdx in rows)
    return [(text, spdx) for text, spdx in rows if counts[spdx] >= FEWEST]


def to_spdx(expression: str, keys: dict[str, str]) -> str | None:
    """Map ScanCode keys to SPDX identifiers; None when one has none.

    >>> to_spdx("gpl-2.0 OR mit", {"gpl-2.0": "GPL-2.0-only", "mit": "MIT"})
    'GPL-2.0-only OR MIT'
    """
    parts = re.findall(r"[()]|[^\s()]+", expression)
    mapped = [p if p in ("AND", "OR", "WITH", "(", ")") else keys.get(p) for p in parts]
    if not all(mapped):
        return None
    return " ".join(str(p) for p in mapped).replace("( ", "(").replace(" )", ")")


def _spdx_keys(wheel: ZipFile) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name in wheel.namelist():
        if name.startswith(LICENCES) and name.endswith(".LICENSE"):
            head, _ = _front_matter(wheel.read(name).decode("utf-8"))
            spdx = str(head.get("spdx_license_key") or "")
            if spdx and not spdx.startswith("LicenseRef"):
                keys[str(head["key"])] = spdx
    return keys


def _front_matter(content: str) -> tuple[dict[str, object], str]:
    parts = re.split(r"^---[ ]*$", content, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3:
        return {}, content
    loaded = yaml.load(parts[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded or {}, parts[2]
