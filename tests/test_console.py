from postgrad import console

MEASURED = {
    "task": "licences",
    "metric": "exact_match",
    "arm": "tuned",
    "value": 0.8633,
    "low": 0.82,
    "high": 0.9,
    "n": 1300,
}
COMPARED = {
    "a": "base/few-shot-8",
    "b": "tuned",
    "difference": 0.79,
    "low": 0.74,
    "high": 0.84,
    "p": 1e-9,
    "n": 300,
    "verdict": "improved",
    "detectable": 0.052,
}


def test_a_result_shows_the_verdict_first_and_every_figure_with_interval_and_n():
    document = {
        "run": "runs/x",
        "verdict": "improved",
        "measurements": [MEASURED],
        "comparisons": [COMPARED],
        "report": "runs/x/report.html",
    }
    text = console.result_text(document)
    assert text.startswith("verdict: improved\n")
    assert "tuned  86.3%  [82.0%, 90.0%]  1,300" in text
    assert (
        "tuned against base/few-shot-8: improved, +79.0 points [+74.0, +84.0], p < 0.001, n = 300; "
        "this n would have seen 5.2 points"
    ) in text
    assert text.endswith("run     runs/x\nreport  runs/x/report.html")


def test_checks_are_shown():
    text = console.result_text(
        {
            "checks": [
                {"name": "bos", "passed": True, "detail": "one per row"},
                {
                    "name": "overlap",
                    "passed": False,
                    "detail": "2 rows",
                    "remedy": "drop them",
                    "rows": ["a.jsonl:3"],
                },
                {
                    "name": "lengths",
                    "passed": False,
                    "waived": True,
                    "detail": "1 row",
                    "remedy": "",
                },
            ],
        }
    )
    assert "passed   bos: one per row" in text
    assert "REFUSED  overlap: 2 rows\n           a.jsonl:3\n           -> drop them" in text
    assert "waived   lengths: 1 row" in text


def test_the_training_and_figures_from_outside_are_shown():
    train = {"stopped": "early", "steps": 1200, "best_step": 800, "best_loss": 0.25}
    train |= {"start_loss": 1.5, "tokens_per_second": 512.3}
    linear = {"name": "linear SVM", "value": 0.8, "n": 300, "source": "same rows"}
    text = console.result_text({"train": train, "references": [linear]})
    assert "training stopped early: 1,200 steps, best at step 800 with held-out loss 0.2500" in text
    assert "for comparison: linear SVM 80.0%, n = 300 (same rows)" in text


def test_figures_have_the_unit_of_their_name():
    text = console.mapping_text(
        {"peak_memory_bytes": 4_200_000_000, "train_seconds": 371.2, "tokens": 123456, "lr": 1e-4}
    )
    assert [line.split(maxsplit=1)[1] for line in text.splitlines()] == [
        "4.20 GB",
        "6 min 11 s",
        "123,456",
        "0.0001",
    ]
    assert console.mapping_text({"exact": True, "name": "a"}) == "exact  true\nname   a"


def test_checks_are_coloured_only_when_asked():
    check = {"name": "bos", "passed": True, "detail": "ok"}
    assert "\x1b" not in console.checks_text([check])
    assert "\x1b[1;32mpassed \x1b[0m" in console.checks_text([check], colour=True)


def test_supervised_text_is_marked_with_or_without_colour():
    pieces = [("Q ", 0.0), ("A", 1.0), ("B", 0.5), (" C", 0.0), ("D", 1.0)]
    text = console.row_text(pieces, colour=False)
    assert text.startswith("Q [[A]][[B]] C[[D]]\n")
    assert "3 of 7 characters are supervised (43%)" in text
    coloured = console.row_text(pieces, colour=True)
    assert coloured.startswith("Q \x1b[1;32mA\x1b[0m\x1b[1;33mB\x1b[0m C\x1b[1;32mD\x1b[0m")


def test_data_cannot_send_commands_to_the_terminal():
    assert "\x1b" not in console.row_text([("\x1b]0;owned\x07", 1.0)], colour=False)


def test_an_empty_row_is_shown_as_empty():
    assert console.row_text([], colour=False) == "\n\n0 of 0 characters are supervised (0%)"


def test_the_table_of_runs_survives_missing_values():
    text = console.runs_text(
        [
            {"run": "runs/a", "status": "unreadable", "problem": "run.json is not JSON"},
            {
                "run": "runs/b",
                "name": "bot",
                "verb": "run",
                "status": "done",
                "created": "2026-11-24T10:11:12+00:00",
                "outcome": "improved",
                "tuned": MEASURED,
            },
        ],
        "runs",
    )
    lines = text.splitlines()
    assert lines[0].split() == [
        "run",
        "name",
        "verb",
        "status",
        "created",
        "(UTC)",
        "outcome",
        "tuned",
    ]
    assert "run.json is not JSON" in lines[1]
    assert "2026-11-24 10:11" in lines[2]
    assert lines[2].endswith("86.3% [82.0%, 90.0%] n 1,300")
    assert console.runs_text([], "here") == "no runs in here"


def test_a_run_says_whether_it_is_as_sealed():
    run = {"run": "runs/a", "status": "done", "seconds_by_stage": {"train": 371}}
    assert "not sealed" in console.run_text({**run, "changed": None})
    assert "as sealed" in console.run_text({**run, "changed": []})
    changed = console.run_text({**run, "changed": ["report.html"]})
    assert "CHANGED since the seal: report.html" in changed
    assert "time: train  6 min 11 s" in changed


def test_a_key_shows_type_default_and_meaning():
    text = console.key_text("seed", {"type": "integer", "default": 7, "meaning": "Seed. " * 30})
    assert text.startswith("seed\n  type     integer\n  default  7\n\n  Seed.")
    assert max(map(len, text.splitlines())) <= 78


def test_an_error_ends_with_what_to_do():
    assert console.error_text("bad", "mend it") == "error: bad\n  -> mend it"
    assert console.error_text("bad", "") == "error: bad"
    assert console.error_text("bad", "x", colour=True).startswith("\x1b[1;31merror\x1b[0m: bad")


def test_costs_are_a_table_and_a_sentence_for_each_prompt():
    any_tokens = {"mean": 41.6, "median": 40}
    arm = {"arm": "tuned", "n": 1200, "prompt_tokens": any_tokens, "completion_tokens": any_tokens}
    costs = {
        "arms": [{**arm, "seconds": {"mean": 0.1234, "median": 0.1}}],
        "break_even": [{"finding": "after 9 requests"}],
    }
    text = console.costs_text(costs).splitlines()
    assert text[1].split() == ["tuned", "42", "42", "0.123", "0.1", "1,200"]
    assert text[2] == "after 9 requests"
    assert console.costs_text({}) == ""
