"""Verdicts of lm-evaluation-harness's IFEval checkers; runs in the peer's environment.

Usage: python ifeval_verdicts.py CASES VERDICTS. CASES: a JSON line per prompt, its instructions and
`responses` (kind -> text). VERDICTS: a line per prompt, kind -> [strict, loose], each a list with a
verdict per instruction; and under `unsteady` how many language verdicts depend on chance.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from langdetect import DetectorFactory
from lm_eval.tasks.ifeval import utils

SEED = 0
OTHER_SEEDS = (1, 2, 3)
LANGUAGE = {
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
}


def strict(case: Any, response: str) -> list[bool]:
    """Return the strict verdict on each instruction."""
    return utils.test_instruction_following_strict(case, response).follow_instruction_list


def loose(case: Any, response: str) -> list[bool]:
    """Return the loose verdict on each instruction."""
    return utils.test_instruction_following_loose(case, response).follow_instruction_list


def unsteady(case: Any, response: str, verdicts: list[bool]) -> int:
    """Count the language verdicts that another seed of langdetect changes."""
    wanted = [i for i, name in enumerate(case.instruction_id_list) if name in LANGUAGE]
    changed = set()
    for seed in OTHER_SEEDS if wanted else ():
        DetectorFactory.seed = seed
        again = strict(case, response)
        changed |= {i for i in wanted if again[i] != verdicts[i]}
    DetectorFactory.seed = SEED
    return len(changed)


def main(cases: str, verdicts: str) -> None:
    """Read the cases, write the verdicts."""
    DetectorFactory.seed = SEED
    with Path(verdicts).open("w", encoding="utf-8") as target:
        for line in Path(cases).read_text(encoding="utf-8").split("\n")[:-1]:
            fields = json.loads(line)
            responses = fields.pop("responses")
            case = SimpleNamespace(**fields)
            found = {kind: [strict(case, r), loose(case, r)] for kind, r in responses.items()}
            changed = sum(unsteady(case, r, found[kind][0]) for kind, r in responses.items())
            row = {"key": case.key, "verdicts": found, "unsteady": changed}
            target.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
