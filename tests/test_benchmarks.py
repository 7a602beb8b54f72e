import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


PRODUCTS = {
    "gflops": 900.0,
    "frozen_seconds_per_token": 3e-4,
    "adapter_seconds_per_token": 1e-4,
    "head_seconds_per_supervised_token": 2e-4,
    "weight_gradient_seconds_per_token": 2e-4,
    "head_weight_gradient_seconds_per_supervised_token": 2e-4,
}
CONTENDER = """
import json, sys, time
steps, pause = int(sys.argv[2]), float(sys.argv[3])
with open(sys.argv[1], "a") as file:
    file.write(json.dumps({"threads": 3}) + "\\n")
    for step in range(1, steps + 1):
        time.sleep(pause)
        line = {"step": step, "tokens": 100 * step, "seconds": 10.0 * step, "supervised": 7}
        file.write(json.dumps(line) + "\\n")
        file.flush()
if len(sys.argv) > 4:
    sys.exit(sys.argv[4])
"""


def watch(tmp_path, timing, *arguments):
    """Watch a small program that writes what a contender writes, with made-up times."""
    import harness

    program = tmp_path / "contender.py"
    program.write_text(CONTENDER)
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log"
    command = [sys.executable, program, metrics, *map(str, arguments)]
    return harness.watch(command, metrics, timing, log, harness.contender_environment())


def test_a_contender_is_timed_after_its_warm_up_and_then_ended(tmp_path):
    import harness

    timing = harness.Timing(warmup_steps=2, seconds=30, least_steps=3)
    found = watch(tmp_path, timing, 100_000, 0.05)
    assert 3 <= found.steps < 1000
    assert found.tokens == 100 * found.steps
    assert found.supervised == 7 * found.steps
    assert found.tokens_per_second == 10
    assert found.supervised_per_second == pytest.approx(0.7)
    assert found.peak_memory_bytes is None or found.peak_memory_bytes > 1_000_000
    assert found.row()["threads"] == 3


def test_a_contender_that_fails_is_reported_with_its_last_words(tmp_path):
    import harness

    timing = harness.Timing(warmup_steps=2, seconds=30, least_steps=3)
    with pytest.raises(harness.ContenderError, match=r"3 steps, exit code 1(.|\n)*out of rows"):
        watch(tmp_path, timing, 3, 0.0, "out of rows")


def test_a_contender_that_is_too_slow_is_given_up(tmp_path):
    import harness

    timing = harness.Timing(warmup_steps=1, seconds=1, least_steps=1, limit_seconds=0.5)
    with pytest.raises(harness.ContenderError, match="0 steps"):
        watch(tmp_path, timing, 1, 30.0)


def test_a_long_first_step_ends_the_warm_up(tmp_path):
    import harness

    lines = [{"step": n, "tokens": 100 * n, "seconds": 10.0 * n} for n in (1, 2, 3)]
    steps = harness.Timing(2, 5, 1)
    seconds = harness.Timing(2, 5, 1, warmup_seconds=10)
    assert [steps.uncounted(lines[:n]) for n in (0, 1, 2, 3)] == [None, None, 2, 2]
    assert [seconds.uncounted(lines[:n]) for n in (0, 1, 3)] == [None, 1, 1]
    assert [steps.enough(lines[:n]) for n in (1, 2, 3)] == [False, False, True]
    assert [seconds.enough(lines[:n]) for n in (1, 2, 3)] == [False, True, True]
    assert not harness.Timing(2, 15, 1).enough(lines)


def test_a_hopeless_contender_is_broken_off(tmp_path):
    import harness

    timing = harness.Timing(1, 1e6, 1, hopeless_rate=11.0)
    with pytest.raises(harness.HopelessError, match="broken off at 10 tokens/s"):
        watch(tmp_path, timing, 100_000, 0.05)


def test_rows_are_made_from_the_seed_alone_and_never_twice(tmp_path):
    import rows

    for kind in rows.KINDS:
        one = rows.write_rows(tmp_path / "one.jsonl", kind, 200, 7).read_text()
        assert rows.write_rows(tmp_path / "two.jsonl", kind, 200, 7).read_text() == one
        assert rows.write_rows(tmp_path / "two.jsonl", kind, 200, 8).read_text() != one
        assert len(set(one.splitlines())) == 200


def test_given_conversations_keep_their_last_answer_to_learn(tmp_path):
    import rows

    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps({"messages": turns, "id": 1}) + "\n\n")
    copied = json.loads(rows.copy_rows(source, tmp_path / "rows.jsonl").read_text())
    assert copied == {"prompt": turns[:3], "completion": turns[3:]}
    source.write_text(json.dumps({"text": "plain"}) + "\n")
    with pytest.raises(SystemExit, match=r"source\.jsonl:1: neither messages"):
        rows.copy_rows(source, tmp_path / "rows.jsonl")


def test_the_bound_counts_the_products_of_a_lora_step(tiny_model_dir):
    import machine_bound
    import torch

    counts, head = machine_bound.linear_shapes(tiny_model_dir)
    # Two layers: q and o 64x64, k and v 32x64, gate and up 128x64, down 64x128.
    assert counts == {(64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2}
    assert head[1] == 64
    found = machine_bound.measure(counts, head, torch.float32)
    weights = 4 * 64 * 64 + 4 * 32 * 64 + 6 * 128 * 64
    low_rank = 16 * (4 * 128 + 4 * 96 + 6 * 192)
    assert found["frozen_flops_per_token"] == 4 * weights
    assert found["adapter_flops_per_token"] == 6 * low_rank
    assert found["head_flops_per_supervised_token"] == 4 * 64 * head[0]
    assert found["weight_gradient_seconds_per_token"] > 0
    assert found["head_weight_gradient_seconds_per_supervised_token"] > 0
    seconds = found["frozen_seconds_per_token"]
    assert seconds == pytest.approx(4 * weights / found["gflops"] / 1e9)
    in_int8 = machine_bound.measure(counts, head, torch.bfloat16, torch.int8)
    assert in_int8["frozen_flops_per_token"] == 4 * weights
    assert in_int8["frozen_seconds_per_token"] > 0


def test_the_bound_falls_with_the_share_of_supervised_tokens():
    from speed_table import bound_tokens_per_second

    assert bound_tokens_per_second(PRODUCTS, 0.0) == pytest.approx(2500)
    assert bound_tokens_per_second(PRODUCTS, 0.5) == pytest.approx(2000)
    assert bound_tokens_per_second(PRODUCTS, 0.0, "full") == pytest.approx(2000)
    assert bound_tokens_per_second(PRODUCTS, 0.5, "full") == pytest.approx(1 / 7e-4)


def part_of(rates, method="lora"):
    """Return a part of a result: contender -> tokens per second of each repetition."""
    runs = [
        {
            "contender": contender,
            "repetition": repetition,
            "tokens": 1000,
            "supervised_tokens": 500,
            "tokens_per_second": rate,
            "supervised_tokens_per_second": rate / 2,
            "peak_memory_bytes": 2_000_000_000 if contender == "postgrad" else 5_000_000_000,
        }
        for contender, found in rates.items()
        for repetition, rate in enumerate(found)
    ]
    return {
        "method": method,
        "kind": "chat",
        "rows": {"mean_tokens": 170.0},
        "failed": {},
        "machine_bound": [{"bf16": PRODUCTS, "fp32": PRODUCTS}, {"bf16": PRODUCTS}],
        "runs": runs,
    }


def test_a_summary_gives_medians_spread_and_ratios():
    from contenders import BEST, DEFAULTS, OURS, UNSLOTH
    from speed_table import failures, goals_table, speed_table, summarise

    part = part_of({OURS: (900, 1000, 1300), DEFAULTS: (90, 100, 130), BEST: (180, 200, 260)})
    summary = part["summary"] = summarise(part)
    ours = summary["contenders"][OURS]
    assert (ours["lowest"], ours["tokens_per_second"], ours["highest"]) == (900, 1000, 1300)
    assert summary["bound_tokens_per_second"] == 2000
    assert ours["share_of_bound"] == 0.5
    assert [(goal["found"], goal["reached"]) for goal in summary["goals"]] == [
        (10.0, True), (5.0, False), (0.5, False), (0.4, True),
    ]  # fmt: skip
    line = next(line for line in speed_table([part]).splitlines() if BEST in line)
    assert line.split()[-5:] == ["GB", "10", "%", "5.0", "x"]
    assert [line.split()[-1] for line in goals_table([part]).splitlines()[2:]] == [
        "yes", "no", "no", "yes",
    ]  # fmt: skip
    # frozen weights twice as fast: the share is of that bound, for LoRA
    faster = {**PRODUCTS, "frozen_seconds_per_token": PRODUCTS["frozen_seconds_per_token"] / 2}
    reduced = {**part, "machine_bound": [{"bf16": PRODUCTS, "int8": faster}]}
    reduced["summary"] = summarise(reduced)
    assert reduced["summary"]["bound_tokens_per_second"] == 2000
    assert reduced["summary"]["int8_bound_tokens_per_second"] > 2000
    share = reduced["summary"]["goals"][2]
    assert share["found"] == 1000 / reduced["summary"]["int8_bound_tokens_per_second"]
    assert "GEMM bound, frozen int8" in speed_table([reduced])
    part["failed"] = {UNSLOTH: "it broke"}
    shown = failures({"missing": {"trl": "no wheel"}, "measured": [part]})
    assert shown == "trl: not installed: no wheel\nlora, chat: Unsloth CPU: it broke"


def test_goals_are_open_where_nothing_was_measured():
    from contenders import DEFAULTS, OURS
    from speed_table import goals_table, summarise

    for rates in ({}, {OURS: (1000,)}, {DEFAULTS: (100,)}):
        part = part_of(rates, "full")
        part["summary"] = summarise(part)
        reached = [goal["reached"] for goal in part["summary"]["goals"]]
        assert reached == [None, None, True if OURS in rates else None, None]
        assert goals_table([part]).count("not measured") == reached.count(None)


def test_the_search_keeps_the_fastest_exact_setting_and_breaks_off():
    from contenders import BEST, Setting
    from harness import ContenderError, HopelessError, Measured
    from peer_search import choices_of, search

    asked = []

    def measure(setting, least):
        sft, rate = setting.sft, 100
        rate *= {"bfloat16": 2}.get(setting.dtype, 1) * (1 if sft["bf16"] else 0.2)
        if sft.get("packing"):
            rate *= 9
        elif sft["per_device_train_batch_size"] == 16:
            rate *= 1.5
        elif sft["per_device_train_batch_size"] == 32:
            raise ContenderError("log\nout of memory")
        elif sft["per_device_train_batch_size"] == 4:
            rate *= 0.5
        asked.append((setting, least))
        if rate < least:
            raise HopelessError(f"broken off at {rate:.0f}")
        return Measured(1, rate, 1, 1.0, None, 0.0, {"isolated": not sft.get("packing")})

    start, choices = choices_of(BEST, "lora", 300, False)
    found = search(measure, start, choices)
    best = Setting(**found["setting"])
    assert (best.dtype, best.sft["bf16"], best.threads) == ("bfloat16", True, None)
    assert best.sft["per_device_train_batch_size"] == 16
    assert not best.sft["packing"]
    tried = [(trial["choice"], trial["option"]) for trial in found["trials"]]
    assert ("fewer rows", "4 rows") in tried
    assert ("fewer rows", "2 rows") not in tried
    assert "out of memory" in [trial.get("error") for trial in found["trials"]]
    assert all(least <= 150 for _, least in asked)
    _, known = choices_of(BEST, "lora", 300, False, precision=best)
    assert [choice.name for choice in known] == ["start", "more rows", "fewer rows", "packing"]
    start, known = choices_of(BEST, "full", 300, False, layout=best)
    assert [choice.name for choice in known] == ["precision", "more rows"]
    assert all(change(start).dtype == "float32" for _, change in known[0].options)


def test_a_peer_that_never_trains_is_an_error_with_its_reason():
    from contenders import UNSLOTH
    from harness import ContenderError
    from peer_search import choices_of, search

    def measure(setting, least):
        raise ContenderError("log\nno kernel for this processor")

    with pytest.raises(ContenderError, match="no kernel"):
        search(measure, *choices_of(UNSLOTH, "lora", 300, False))


def test_full_tuning_is_timed_for_a_shorter_time():
    from train_speed import plan_of

    lora, full = (plan_of(method, 3, 20, quick=False) for method in ("lora", "full"))
    assert (lora.repetitions, lora.timing.seconds) == (3, 20)
    assert (full.repetitions, full.timing.seconds) == (3, 10)
    assert plan_of("full", 3, 20, quick=True).repetitions == 1


def test_a_stopped_run_goes_on_only_as_the_same_measurement(tmp_path):
    from train_speed import found_before, resumed

    machine = {"processor": "Xeon", "features": ["amx_bf16"], "cores": 2, "memory_bytes": 1}
    new = {"benchmark": "train-speed", "hardware": machine, "model": "m", "quick": False,
           "settings": {"seconds": 20}, "commit": "a"}  # fmt: skip
    path = tmp_path / "result.json"
    old = {**new, "commit": "b", "found": {"k": {}}, "measured": [{"failed": {"TRL best": "?"}}]}
    path.write_text(json.dumps(old))
    assert resumed(path, new)["measured"] == [{"failed": {}}]
    with pytest.raises(SystemExit, match=r"settings was \{'seconds': 20\}, not"):
        resumed(path, {**new, "settings": {"seconds": 5}})
    assert found_before(path, {**machine, "memory_bytes": 2}) == {"k": {}}
    with pytest.raises(SystemExit, match="measured on other hardware"):
        found_before(path, {**machine, "cores": 4})
    with pytest.raises(SystemExit, match="measured on other hardware"):
        resumed(path, {**new, "hardware": {**machine, "features": []}})


def test_hardware_names_are_fit_for_file_names():
    from harness import hardware_slug

    xeon = {"processor": "Intel(R) Xeon(R) Processor @ 2.10GHz", "cores": 2}
    ryzen = {"processor": "AMD Ryzen 9 7950X 16-Core Processor", "cores": 32}
    assert hardware_slug(xeon) == "xeon-2-cores"
    assert hardware_slug(ryzen) == "ryzen-9-7950x-32-cores"


def test_error_rates_are_counted_with_the_methods_of_the_product(monkeypatch, tmp_path, capsys):
    import error_rates
    import numpy as np

    from postgrad.evaluate.statistics import bootstrap_mean, wilson

    monkeypatch.setattr(error_rates, "SIZES", (50,))
    monkeypatch.setattr(error_rates, "CLUSTERINGS", ((10, 5),))
    monkeypatch.setattr(error_rates, "BOOTSTRAP_RESAMPLES", 10_000)
    x = error_rates.f1_like(np.random.default_rng(1), (50, 3))
    counts = error_rates._resample_counts(50)
    assert (counts.sum(axis=1) == 50).all()
    for column, found in zip(x.T, error_rates._graded_intervals(x, counts, (0, 1)), strict=True):
        assert tuple(found) == pytest.approx(tuple(bootstrap_mean(column)), abs=0.008)
    exact = {cell["population"]: cell["coverage"] for cell in error_rates.share_cells()}
    rng = np.random.default_rng(2)
    ends = [wilson(int(k), 50) for k in rng.binomial(50, 0.3, 4000)]
    assert exact["rate 0.3"] == pytest.approx(np.mean([a <= 0.3 <= b for a, b in ends]), abs=0.015)
    cells = list(error_rates.paired_share_cells(4000))
    assert max(cell["false_verdicts"] or 0 for cell in cells) < 0.06
    assert max(cell["false_pass"] or 0 for cell in cells) < 0.07
    out = tmp_path / "rates.json"
    monkeypatch.setattr(sys, "argv", ["error_rates.py", "--quick", "--out", str(out)])
    error_rates.main()
    studies = {cell["study"] for cell in json.loads(out.read_text())["cells"]}
    assert len(studies) == 7
    printed = capsys.readouterr().out
    assert all(study in printed for study in studies)


def test_rows_for_a_gpu_are_full_or_like_a_chat():
    from gpu_shapes import FULL_ROW, MEAN_CHAT, make_rows

    full = make_rows("full", 2, 1000)
    assert [(len(row), row.supervised) for row in full] == [(FULL_ROW, FULL_ROW - 1)] * 2
    chat = make_rows("chat", 2000, 1000)
    mean = sum(len(row) for row in chat) / len(chat)
    assert mean == pytest.approx(MEAN_CHAT, rel=0.05)
    assert sum(row.supervised for row in chat) / sum(len(row) for row in chat) == pytest.approx(
        0.5, abs=0.01
    )


def test_the_labels_that_the_peer_gets_are_ours(tmp_path):
    from gpu_shapes import make_rows, write_tokens

    rows = make_rows("chat", 3, 1000)
    lines = write_tokens(tmp_path / "rows.jsonl", rows).read_text().splitlines()
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        assert line["input_ids"] == row.ids.tolist()
        assert sum(label != -100 for label in line["labels"]) == row.supervised


def test_a_measurement_that_failed_has_no_share_and_stands_in_the_table():
    from gpu_train_speed import share_of_bound, speed_table

    products = {
        "frozen_seconds_per_token": 3e-4,
        "adapter_seconds_per_token": 1e-4,
        "head_seconds_per_supervised_token": 2e-4,
    }
    assert share_of_bound({"failed": "out of memory"}, products, "full") == {}
    share = share_of_bound({"tokens_per_second": 1000.0}, products, "full")
    assert share["share_of_bound"] == pytest.approx(0.6, abs=1e-3)
    base = {"model": "llama-3-8b", "case": "full"}
    measured = [
        {**base, "trainer": "postgrad", "tokens_per_second": 15000.0, **share},
        {**base, "trainer": "TRL defaults", "failed": "out of memory"},
        {**base, "trainer": "TRL tuned", "tokens_per_second": 5000.0},
    ]
    checks = {"loss curves": {"passed": False, "failed": "no time left"}}
    text = speed_table({"measured": measured, "checks": checks, "peer": {}})
    ours, failed, *_ = text.splitlines()[2:]
    assert "15,000" in ours
    assert ours.split()[-3:] == ["3.0", "16,000", "tok/s"]
    assert "out of memory" in failed
    assert "loss curves: FAILED: no time left" in text


def test_generation_is_timed_on_the_models_of_a_run_as_an_evaluation_loads_them(
    tiny_model_dir, tmp_path
):
    import generation_speed
    import torch

    from postgrad.config import LoraConfig
    from postgrad.run import create_run
    from postgrad.train.checkpoint import save_weights
    from training import load_model, make_recipe

    recipe = make_recipe(tiny_model_dir)
    [(name, _, counts)] = generation_speed.models_of(None, recipe)
    assert (name, counts) == ("base", (0, generation_speed.SHOTS))
    run = create_run(recipe, "train", tmp_path / "run")
    tuned = load_model(tiny_model_dir, recipe.model.adapt)
    assert isinstance(recipe.model.adapt, LoraConfig)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    with run.publish(run.export / "adapter") as folder:
        save_weights(tuned, folder, str(tiny_model_dir), recipe.model.adapt)
    ids, logits = torch.arange(3, 20)[None], {}
    for name, model, _ in generation_speed.models_of(run, recipe):
        with torch.no_grad():
            logits[name] = model(ids).logits
    assert list(logits) == ["base", "tuned"]
    with torch.no_grad():
        torch.testing.assert_close(logits["tuned"], tuned.eval()(ids).logits, atol=1e-4, rtol=0)
    assert (logits["base"] - logits["tuned"]).abs().max() > 1e-2
