"""IFEval and GSM8K as tasks: rows to items, completions to scores, instruction-level figures."""

import pytest

from postgrad.evaluate import compare
from postgrad.evaluate.tasks import gsm8k, ifeval, preamble
from postgrad.types import Evidence

ROW = {
    "key": 7,
    "prompt": "Name two colours. No commas, and a title.",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
    "kwargs": [{}, {"num_words": None}],
}


def evidence(completion, row=ROW, error=None):
    item = ifeval.read(row)
    scores = {} if error else ifeval.score(completion, item)
    return Evidence(item.id, item.prompt, item.reference, completion, scores, error=error)


def test_a_prompt_passes_when_every_instruction_is_followed():
    scores = ifeval.score("<<Colours>>\nred; blue", ifeval.read(ROW))
    assert set(ifeval.TASKS[0].metrics) <= scores.keys()
    assert all(score.value == 1 for score in scores.values())
    half = ifeval.score("<<Colours>>\nred, blue", ifeval.read(ROW))
    assert half["prompt_level_strict_acc"].value == 0
    assert half["inst_level_strict_acc"].value == 0.5
    assert half["inst_level_strict_acc"].explanation == "not followed: punctuation:no_comma"
    assert half["prompt_level_loose_acc"].value == 1  # without its last line there is no comma


def test_instruction_level_accuracy_counts_instructions_and_clusters_them_by_prompt():
    single = {**ROW, "key": 8, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rows = [evidence("red, blue"), evidence("fine", single), evidence("", single | {"key": 9}, "x")]
    found = ifeval.units(rows, "inst_level_strict_acc")
    assert [row.example_id for row in found] == ["7#1", "7#2", "8#1", "9#1"]
    assert [row.group for row in found] == ["7", "7", "8", "9"]
    measured = compare.measure(found, "ifeval", "inst_level_strict_acc", "tuned")
    assert (measured.value, measured.n, measured.errors) == (0.25, 4, 1)
    assert ifeval.units(rows, "prompt_level_loose_acc") is rows


def test_a_row_with_unequal_lists_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        ifeval.read({**ROW, "kwargs": [{}]})


def test_language_needs_langdetect_and_says_so_before_anything_is_generated():
    row = {**ROW, "instruction_id_list": ["language:response_language"],
           "kwargs": [{"language": "de"}]}  # fmt: skip
    try:
        import langdetect  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"postgrad\[ifeval\]"):
            ifeval.read(row)
        return
    item = ifeval.read(row)
    german = "Das Wetter war am Morgen schön und alle gingen hinaus in den Garten."
    assert ifeval.score(german, item)["prompt_level_strict_acc"].value == 1
    english = "The weather was fine in the morning and everybody went out."
    assert ifeval.score(english, item)["prompt_level_strict_acc"].value == 0


QUESTION = {"question": "How many?", "answer": "2 + 1,000 = <<2+1000=1002>>1,002\n#### 1,002"}


@pytest.mark.parametrize(
    ("completion", "strict", "flexible", "numeric"),
    [
        (" so\n#### 1002", 1, 1, 1),
        (" #### 1,002.", 1, 1, 1),
        (" The answer is $1002.", 0, 1, 1),
        (" #### 1002\n#### 5", 1, 0, 0),
        (" #### 1002.00", 0, 0, 1),
        (" #### 12", 0, 0, 0),
        (" none", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_the_two_filters_and_the_number(completion, strict, flexible, numeric):
    scores = gsm8k.score(completion, gsm8k.read(QUESTION))
    assert tuple(scores) == gsm8k.TASKS[0].metrics
    assert tuple(score.value for score in scores.values()) == (strict, flexible, numeric)


def test_the_prompt_of_gsm8k_holds_five_worked_examples():
    task, item = gsm8k.TASKS[0], gsm8k.read(QUESTION)
    shots = [
        gsm8k.read({"question": f"q{number}?", "answer": f"x\n#### {number}"})
        for number in range(7)
    ]
    text = preamble(task, item, shots) + item.prompt
    assert text.startswith(
        "Question: q0?\nAnswer: x\n#### 0\n\nQuestion: q1?\nAnswer: x\n#### 1\n\n"
    )
    assert text.endswith("#### 4\n\nQuestion: How many?\nAnswer:")


def test_an_answer_without_its_number_is_refused():
    with pytest.raises(ValueError, match="####"):
        gsm8k.read({"question": "q", "answer": "5"})
