import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.errors import RunError
from postgrad.evaluate.evidence import from_row, read_evidence, to_row, write_evidence
from postgrad.run import Run
from postgrad.types import Evidence, Score, StopReason

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
scores = st.builds(Score, st.floats(0, 1), st.booleans(), texts)
evidences = st.builds(
    Evidence,
    example_id=texts,
    prompt=texts,
    reference=texts,
    completion=texts,
    scores=st.dictionaries(texts, scores, max_size=3),
    stop_reason=st.none() | st.sampled_from(StopReason),
    prompt_tokens=st.integers(0, 10**6),
    completion_tokens=st.integers(0, 10**6),
    seconds=st.floats(0, 1e4),
    error=st.none() | texts,
    group=st.none() | texts,
    logprobs=st.lists(st.floats(-1e6, 0), max_size=4).map(tuple),
)
ROW = Evidence(
    "a1",
    "Which licence?",
    "MIT",
    "The \u2028 MIT\nlicence ",
    {"exact_match": Score(0.0, False, "got the"), "f1": Score(0.5, False, "half")},
    StopReason.STOP,
    12,
    3,
    0.25,
)
FAILED = Evidence("b2", "?", "GPL", "", {}, error="out of memory")


@given(evidences)
def test_evidence_survives_json(evidence):
    assert from_row(json.loads(json.dumps(to_row(evidence)))) == evidence


def test_a_line_holds_every_field():
    row = to_row(ROW)
    assert list(row) == [field.name for field in dataclasses.fields(Evidence)]
    assert row["stop_reason"] == "stop"
    assert row["scores"]["f1"] == {"value": 0.5, "passed": False, "explanation": "half"}


def test_a_line_without_a_group_is_one_row_alone():
    row = to_row(ROW)
    del row["group"]
    assert from_row(row) == ROW


def test_files_are_written_whole_and_read_in_order(tmp_path):
    run = Run(tmp_path)
    path = write_evidence(run, "licences", "base/few-shot-8", [ROW, FAILED])
    assert path == tmp_path / "evidence" / "licences.base-few-shot-8.jsonl"
    assert path.read_bytes().count(b"\n") == 2
    assert read_evidence(run, "licences", "base/few-shot-8") == [ROW, FAILED]
    write_evidence(run, "licences", "base/few-shot-8", [FAILED])
    assert read_evidence(run, "licences", "base/few-shot-8") == [FAILED]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_rows_are_not_a_missing_file(tmp_path):
    write_evidence(Run(tmp_path), "t", "tuned", [])
    assert read_evidence(Run(tmp_path), "t", "tuned") == []
    with pytest.raises(RunError, match=r"t\.base-zero-shot\.jsonl is missing"):
        read_evidence(Run(tmp_path), "t", "base/zero-shot")


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_cut_off_file_is_refused_because_rows_would_be_missing(tmp_path, cut):
    path = write_evidence(Run(tmp_path), "t", "tuned", [ROW, FAILED])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RunError, match="cut off"):
        read_evidence(Run(tmp_path), "t", "tuned")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt": None}, "prompt: None is not str"),
        ({"prompt_tokens": True}, "prompt_tokens: True is not int"),
        ({"extra": 1}, "missing or unknown keys: extra"),
        ({"scores": {"f1": 0.5}}, "scores.f1: 0.5 is not a score"),
        ({"scores": {"f1": {"value": "1", "passed": True}}}, "scores.f1.value: '1'"),
        ({"stop_reason": "tired"}, "'tired' is not a valid StopReason"),
    ],
)
def test_a_line_that_is_not_evidence_is_named(tmp_path, change, why):
    run = Run(tmp_path)
    run.write_jsonl(run.evidence_path("t", "tuned"), [to_row(FAILED), {**to_row(ROW), **change}])
    with pytest.raises(RunError, match="row 2 is not evidence") as caught:
        read_evidence(run, "t", "tuned")
    assert why in caught.value.message


def test_a_missing_key_and_a_line_that_is_no_object_are_named(tmp_path):
    run = Run(tmp_path)
    path = run.evidence_path("t", "tuned")
    row = to_row(ROW)
    del row["completion"]
    run.write_jsonl(path, [row])
    with pytest.raises(RunError, match="missing or unknown keys: completion"):
        read_evidence(run, "t", "tuned")
    path.write_text("[1]\n")
    with pytest.raises(RunError, match="row 1 is not evidence"):
        read_evidence(run, "t", "tuned")
