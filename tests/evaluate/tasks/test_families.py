"""Prompts are lm-evaluation-harness's, whatever published form the rows come in.

The expected texts were written by hand from its task files (0.4.13).
"""

from dataclasses import replace

import pytest

from postgrad.errors import ConfigError
from postgrad.evaluate.tasks import Kind, preamble, shot_text
from postgrad.evaluate.tasks.registry import find_task, tasks
from postgrad.evaluate.tasks.rows import index, lettered


def read(name, row):
    return find_task(name).read(row)


def from_wheel(name, row, number=0):
    task = find_task(name)
    return task.read(task.samples.wheel_row(row, number))


def test_every_task_says_where_it_comes_from_and_what_guessing_gets():
    assert len(tasks()) >= 10
    for name, task in tasks().items():
        assert task.name == name
        assert task.samples.standard > 0
        assert task.samples.names
        assert "lm-evaluation-harness 0.4.13" in task.origin
        assert (task.generation is not None) == (task.kind is Kind.GENERATION)


def test_hellaswag_is_cleaned_of_marks():
    row = {
        "activity_label": "Removing ice from car",
        "ctx_a": "[header] How to clear a windscreen [title] Warm it. [step] Start the engine.",
        "ctx_b": "then, a man",
        "endings": ["scrapes [substeps] the ice.", "sings.", "swims.", "sleeps."],
        "label": "0",
    }
    item = read("hellaswag", row)
    assert item.prompt == (
        "Removing ice from car: How to clear a windscreen. Warm it. Start the engine. Then, a man"
    )
    assert item.options[0] == item.reference == "scrapes the ice."
    whole = {**row, "ctx": f"{row['ctx_a']} {row['ctx_b']}"}
    del whole["ctx_a"], whole["ctx_b"]
    assert read("hellaswag", whole) == item


def test_hellaswag_without_an_unfinished_sentence_keeps_its_end():
    row = {
        "activity_label": "Tea",
        "ctx": "Boil water. Pour it.",
        "endings": ["a", "b"],
        "label": 1,
    }
    assert read("hellaswag", row).prompt == "Tea: Boil water. Pour it."


def test_arc_in_both_forms():
    hub = {
        "question": "What melts?",
        "choices": {"text": ["ice", "stone", "sand"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    }
    foundry = {
        "query": "Question: What melts?\n",
        "choices": ["ice", "stone", "sand"],
        "gold": 0,
    }
    assert read("arc_easy", hub) == read("arc_challenge", foundry)
    assert read("arc_easy", hub).prompt == "Question: What melts?\nAnswer:"


def test_piqa_in_three_forms():
    hub = {"goal": "cut bread", "sol1": "a knife", "sol2": "a spoon ", "label": 0}
    wheel = {
        "question": "cut bread",
        "options": "A. a knife\nB. a spoon ",
        "answer": "A. a knife",
    }
    foundry = {
        "query": "Question: cut bread\n",
        "choices": ["a knife", "a spoon "],
        "gold": 0,
    }
    assert read("piqa", hub) == from_wheel("piqa", wheel) == read("piqa", foundry)
    assert read("piqa", hub).prompt == "Question: cut bread\nAnswer:"


def test_winogrande_puts_the_options_into_the_context():
    hub = {
        "sentence": "Ann beat Eve because _ was faster.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "1",
    }
    item = read("winogrande", hub)
    assert item.contexts == ("Ann beat Eve because Ann", "Ann beat Eve because Eve")
    assert item.options == ("was faster.",)
    assert item.gold == 0
    foundry = {
        "context_options": list(item.contexts),
        "continuation": "was faster.",
        "gold": 0,
    }
    assert read("winogrande", foundry) == item
    assert shot_text(find_task("winogrande"), item) == "Ann beat Eve because Ann was faster."


def test_boolq_has_the_title_before_the_passage():
    hub = {"passage": "Tea -- Tea is hot.", "question": "is tea hot", "label": 1}
    wheel = {
        "title": "Tea",
        "passage": "Tea is hot.",
        "question": "is tea hot",
        "answer": "True",
    }
    assert read("boolq", hub) == from_wheel("boolq", wheel)
    assert read("boolq", hub).prompt == "Tea -- Tea is hot.\nQuestion: is tea hot?\nAnswer:"
    assert read("boolq", hub).reference == "yes"
    other = read("boolq", {**hub, "question": "is tea cold", "label": "False"})
    assert (other.group, other.gold) == (read("boolq", hub).group, 0)


def test_openbookqa_loses_the_space_that_the_wheel_adds():
    hub = {
        "question_stem": "The sun is",
        "choices": {"text": ["hot", "cold", "wet", "new"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    }
    wheel = {
        "question": "The sun is ",
        "options": "A. hot\nB. cold\nC. wet\nD. new",
        "answer": "A. hot",
    }
    assert read("openbookqa", hub) == from_wheel("openbookqa", wheel)
    assert read("openbookqa", hub).prompt == "The sun is"


def test_commonsense_qa_is_answered_by_letter():
    hub = {
        "question": " Where is a bank? ",
        "choices": {"text": list("vwxyz"), "label": list("ABCDE")},
        "answerKey": "C",
    }
    item = read("commonsense_qa", hub)
    assert item.prompt == "Question: Where is a bank?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:"
    assert (item.options, item.gold) == (tuple("ABCDE"), 2)
    wheel = {
        "question": "Where is a bank?",
        "options": "\nA. v\nB. w\nC. x\nD. y\nE. z",
        "answer": "C. x",
    }
    assert from_wheel("commonsense_qa", wheel) == item


def test_lambada_continues_with_the_last_word():
    item = read("lambada_openai", {"text": "She looked at the stars"})
    assert (item.prompt, item.options) == ("She looked at the", (" stars",))
    foundry = {"context": "She looked at the", "continuation": "stars"}
    assert read("lambada_openai", foundry) == item


def test_mmlu_names_the_subject_and_shows_examples_of_it():
    row = {
        "subject": "high_school_physics",
        "question": "What falls?",
        "choices": ["all", "none", "some", "few"],
        "answer": "A",
    }
    item = read("mmlu", row)
    assert item.prompt == "What falls?\nA. all\nB. none\nC. some\nD. few\nAnswer:"
    assert item.description == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
    )
    other = read("mmlu", {**row, "subject": "anatomy", "answer": 3})
    task = replace(find_task("mmlu"), shots=1)
    assert preamble(task, item, [other, item, item]) == (f"{item.description}{item.prompt} A\n\n")


def test_the_wheels_mmlu_rows_get_their_subject_back():
    row = {"question": "q", "options": "A. 1\nB. 2\nC. 3\nD. 4", "answer": "B. 2"}
    groups = [from_wheel("mmlu", row, number).group for number in range(2850)]
    assert len(set(groups)) == 57
    assert all(groups.count(name) == 50 for name in set(groups))


@pytest.mark.parametrize("value", ["x", "", None])
def test_an_answer_that_means_no_option_is_an_error(value):
    with pytest.raises(ValueError, match="neither"):
        index(value)


def test_options_of_several_lines_stay_whole():
    row = {"question": "q", "options": "A. one\nand a half\nB. two", "answer": "A. one\nand a half"}
    assert lettered(row)["choices"] == ["one\nand a half", "two"]


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="no task hellaswagg") as error:
        find_task("hellaswagg")
    assert "did you mean hellaswag?" in error.value.remedy
