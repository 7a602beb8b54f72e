"""A run directory as a real run leaves it, made from seeded numbers."""

import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from postgrad.config import Recipe, parse_recipe
from postgrad.evaluate.compare import compare, measure
from postgrad.evaluate.cost import measure_costs
from postgrad.evaluate.evidence import write_evidence
from postgrad.evaluate.learning_curve import LearningCurve, Share, finding
from postgrad.evaluate.prompt_search import PromptSearch, Tried
from postgrad.run import Run, create_run, read_json, write_atomic
from postgrad.train.plan import TriedRate
from postgrad.types import (
    Check,
    Dropped,
    Evidence,
    Score,
    StopReason,
)

TASK = "licence"
LABELS = ("mit", "apache-2.0", "bsd-3-clause", "gpl-2.0-or-later", "lgpl-2.1", "mpl-2.0", "zlib")
TEXTS = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this "
    "software and associated documentation files, to deal in the Software without restriction.",
    "Licensed under the Apache License, Version 2.0. You may not use this file except in "
    "compliance with the License.",
    "Redistribution and use in source and binary forms, with or without modification, are "
    "permitted provided that the following conditions are met.",
    "This program is free software; you can redistribute it and/or modify it under the terms of "
    "the GNU General Public License, either version 2 or (at your option) any later version.",
    "This library is distributed under the GNU Lesser General Public License, version 2.1.",
    "This Source Code Form is subject to the terms of the Mozilla Public License, v. 2.0.",
    "This software is provided 'as-is', without any express or implied warranty.",
)
CHATTER = (
    "The text is a software licence. It grants permission to use, copy, modify and distribute the "
    "software, provided that the copyright notice is kept. It is commonly known as the MIT "
    "License, and you should consult a lawyer before relying on this answer in production."
)


def recipe(**changes: Any) -> Recipe:
    tree = {
        "name": "licence-notices",
        "model": {"base": "pypi:tiny-model==1.0/tiny/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "data": {"train": "licences.jsonl", "prompt_template": "Name the licence.\n\n{prompt}"},
        "train": {"num_train_epochs": 2},
        "evaluate": {"fewshot": [0, 8], "limit": 300},
        "report": {"price_per_hour": 0.4, "license": "apache-2.0"},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        tree.setdefault(section, {})[field] = value
    return parse_recipe(tree)


def evidence(arm: str, right: float, n: int, seed: int) -> list[Evidence]:
    random_state = random.Random(f"{arm}-{seed}")
    rows = []
    for i in range(n):
        label = i % len(LABELS)
        good = random_state.random() < right
        wrong = LABELS[(label + 1 + i % 3) % len(LABELS)] if i % 4 else CHATTER
        answer = LABELS[label] if good else wrong
        rows.append(
            Evidence(
                example_id=f"{(i * 2654435761) % 2**32:016x}",
                prompt=f"Name the licence.\n\nCopyright (c) {1990 + i % 35} Example {i}. "
                + " ".join(TEXTS[label : label + 1 + i % 3]),
                reference=LABELS[label],
                completion=answer,
                scores={"exact_match": Score(float(good), good)},
                stop_reason=StopReason.LENGTH if answer == CHATTER else StopReason.STOP,
                prompt_tokens=60 + 480 * ("few-shot" in arm),
                completion_tokens=8,
                seconds=0.1 + 0.4 * ("few-shot" in arm),
            )
        )
    return rows


def write_evaluation(
    run: Run, arms: dict[str, list[Evidence]], metric: str = "exact_match", reference: float = 0.8
) -> None:
    """Write evidence, measurements and comparisons the way the evaluation stage does."""
    measured = []
    for arm, rows in arms.items():
        path = write_evidence(run, TASK, arm, rows)
        place = str(path.relative_to(run.path))
        measured.append(measure(rows, TASK, metric, arm, evidence_path=place))
    bases = [arm for arm in arms if arm != "tuned"] if "tuned" in arms else []
    compared = [compare(arms[a], arms["tuned"], TASK, metric, a, "tuned") for a in bases]
    svm = {"name": "Linear SVM", "value": reference, "n": 300, "source": "TF-IDF, same rows"}
    tree = {
        "task": TASK,
        "metric": metric,
        "measurements": [asdict(m) for m in measured],
        "comparisons": [asdict(c) for c in compared],
        "references": [svm],
        "costs": asdict(measure_costs(arms, "tuned", 371.0)),
    }
    run.write_json(run.measurements_path, tree)


def write_training(run: Run, steps: int = 160, every: int = 16) -> None:
    random_state = random.Random(3)
    for step in range(steps + 1):
        tokens, seconds = step * 2700, step * 2.25
        if step:
            loss = 0.22 + 2.1 * math.exp(-step / 22) + random_state.gauss(0, 0.05)
            rate = 1e-3 * min(step / 5, 1 - (step - 5) / (steps - 5))
            run.metrics(
                step,
                tokens,
                seconds,
                **{
                    "train/loss": loss,
                    "train/learning_rate": rate,
                    "train/grad_norm": 0.8 + 3 * math.exp(-step / 9) + random_state.random() * 0.4,
                    "train/supervised_tokens": 130,
                },
            )
        if step % every == 0:
            held = 0.31 + 2.0 * math.exp(-step / 20) + 0.0004 * max(0, step - 96)
            values = {"validation/loss": held, "validation/best": float(step <= 112)}
            run.metrics(step, tokens, seconds, **values, **{"validation/se": 0.011})
    losses = {
        line["step"]: line["validation/loss"]
        for line in run.read_metrics()
        if "validation/loss" in line
    }
    train = {
        "best_step": 112,
        "best_loss": losses[112],
        "start_loss": losses[0],
        "last_step": steps,
        "stopped": "early",
        "steps": steps,
        "epochs": 0.86,
        "tokens": steps * 2700,
        "supervised_tokens": steps * 130.0,
        "tokens_per_second": 1203.4,
        "peak_memory_bytes": 2_310_000_000,
        "trainable_parameters": 4_884_480,
        "total_parameters": 139_399_488,
        "learning_rate": 1e-3,
        "tokens_per_batch": 2700,
        "micro_batch_tokens": 1350,
        "threads": 2,
        "precision": "bf16",
        "packed": True,
        "restored_loss": losses[112],
    }
    merge = {
        "loss_before": losses[112],
        "loss_after": losses[112] + 0.0004,
        "max_logit_difference": 0.11,
        "tolerance": 0.02,
        "greedy_agreement": 0.98,
        "refused": False,
    }
    run.update(train=train, merge=merge)


def write_data(run: Run) -> None:
    manifest: list[dict[str, Any]] = [
        {
            "file": "licences.jsonl",
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "format": "prompt-completion",
            "rows": 3720,
        },
        {"split": "train", "rows": 3000},
        {"split": "validation", "rows": 300},
        {"split": "test", "rows": 380},
    ]
    run.write_jsonl(run.manifest_path, manifest)
    dropped = [
        Dropped(f"d{i}", f"licences.jsonl:{i + 9}", "duplicate", "same request", "licences.jsonl:3")
        for i in range(31)
    ]
    dropped += [
        Dropped(f"o{i}", f"licences.jsonl:{i + 90}", "overlength", f"{1100 + i} tokens > 1024")
        for i in range(9)
    ]
    run.write_jsonl(run.dropped_path, (asdict(row) for row in dropped))


CHECKS = (
    Check("rows", True, "3,720 rows read, none malformed"),
    Check("template", True, "training, evaluation and serving render equal tokens"),
    Check("end-token", True, "the stop token is a label exactly once in each of 3,000 rows"),
    Check(
        "lengths",
        True,
        "longest row 412 tokens, limit 1,024",
        data={
            "median": 92,
            "p95": 268,
            "longest": 412,
            "max_length": 1024,
            "lengths": {
                "edges": [0, 50, 100, 150, 200, 250, 300, 350, 400, 450],
                "counts": [310, 1020, 760, 420, 240, 130, 70, 32, 18],
            },
        },
    ),
    Check(
        "supervised-fraction",
        False,
        "4.8% of tokens are supervised, outside 5-95%",
        remedy="shorten the prompts, or waive this check",
        rows=("licences.jsonl:14", "licences.jsonl:15"),
        failures=112,
        waived=True,
    ),
    Check("overlap", True, "no test row is like a training row (Jaccard below 0.8)"),
)


def write_checks(run: Run, checks: tuple[Check, ...] = CHECKS) -> None:
    passed = all(check.passed or check.waived for check in checks)
    tree = {"passed": passed, "checks": [asdict(check) for check in checks]}
    run.write_json(run.preflight_path, tree)


SHARES = {"base/zero-shot": 0.0, "base/few-shot-8": 0.07, "tuned": 0.86}


def answered(shares: dict[str, float], n: int = 300) -> dict[str, list[Evidence]]:
    """Evidence of each arm with its true accuracy, the same rows in every arm."""
    return {arm: evidence(arm, share, n, seed=1) for arm, share in shares.items()}


def build_run(
    path: Path, *, shares: dict[str, float] | None = None, n: int = 300, **changes: Any
) -> Run:
    """A finished run; `shares` are the arms' true accuracies, `changes` recipe fields."""
    asked = recipe(**changes)
    run = create_run(asked, "run", out=path)
    resolved = asked.model_copy(
        update={"train": asked.train.model_copy(update={"learning_rate": 1e-3})}
    )
    write_atomic(run.config_path, resolved.to_yaml().encode())
    run.update(
        created="2026-11-24T09:30:00+00:00",
        seconds={"data": 9.1, "preflight": 14.2, "train": 371.0, "evaluate": 402.5, "report": 0.4},
        hardware={
            "system": "Linux-6.12-x86_64",
            "processor": "Example CPU @ 2.0GHz",
            "features": ["amx_bf16", "avx512_bf16"],
            "cores": 2,
            "memory_bytes": 16_500_000_000,
        },
    )
    write_data(run)
    write_checks(run)
    write_training(run)
    write_evaluation(run, answered(shares or SHARES, n))
    return run


def add_rivals(run: Run) -> None:
    """Add a prompt search, a learning curve and a probed learning rate to a finished run."""
    tried = [
        Tried(
            "few-shot-8-retrieved", 8, "retrieved", 0, None, 0.55, 0.45, 0.64, 100, 540.0, 61.0, "a"
        ),
        Tried("few-shot-8-draw-1", 8, "static", 1, None, 0.2, 0.13, 0.29, 100, 542.0, 22.5, "b"),
        Tried("zero-shot-system-1", 0, "static", 0, "Name <it>.", 0.1, 0.05, 0.17, 100, 72, 8, "c"),
        Tried("few-shot-4-embedded", 4, "embedded", 0, None, 0.6, 0.5, 0.69, 100, 300.0, 44.0, "d"),
    ]
    search = PromptSearch("few-shot-4-embedded", 11, 135.5, 371.0, 371.0, tuple(tried))
    shares = [
        Share(0.25, 750, 0.62, 0.56, 0.67, 300, 42, 95.0, "e"),
        Share(0.5, 1500, 0.79, 0.74, 0.83, 300, 83, 188.0, "f"),
        Share(1.0, 3000, 0.86, 0.82, 0.9, 300, 160, 371.0, "g"),
    ]
    rows = evidence("tuned", 0.79, 300, seed=2), evidence("tuned", 0.86, 300, seed=1)
    c = compare(*rows, TASK, "exact_match", "tuned on 50% of the rows", "tuned")
    curve = LearningCurve(tuple(shares), c, finding(shares[1], shares[2], c, 0.95))
    tree = read_json(run.measurements_path)
    tree |= {"prompt_search": asdict(search), "learning_curve": asdict(curve)}
    run.write_json(run.measurements_path, tree)
    probed = [
        TriedRate(1e-3 / 3, 0.61, 0.2, 0.03),
        TriedRate(1e-3, 0.41, 0.0, 0.0),
        TriedRate(3e-3, None, problem="the loss is not finite"),
    ]
    probe = {"chosen": 1e-3, "auto": 1e-3, "steps": 20, "rows": 300, "seconds": 120.0}
    run.update(learning_rate_probe={**probe, "tried": [asdict(t) for t in probed]})
