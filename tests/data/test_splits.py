from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.config import DataConfig
from postgrad.data.near_duplicates import normalise
from postgrad.data.splits import divide, request_texts
from postgrad.errors import ConfigError, DataError
from postgrad.types import Conversation, Example, Message, Split, content_id

SUBJECTS = ["card", "loan", "fee", "refund", "rate", "limit", "pin", "top-up", "transfer", "cash"]
VERBS = ["lost", "broke", "stole", "forgot", "changed", "wanted", "cancelled", "opened"]
TRAIN, VALIDATION, TEST = Split.TRAIN, Split.VALIDATION, Split.TEST


def example(request, answer="yes", group=None, source="rows.jsonl:0", system=None):
    messages = [Message("user", request), Message("assistant", answer)]
    if system is not None:
        messages.insert(0, Message("system", system))
    conversation = Conversation(tuple(messages))
    return Example(content_id(conversation), conversation, source, group)


def distinct(count, start=0):
    """Rows with nothing in common but a few letters."""
    digits = str.maketrans("0123456789", "qwxzjkvybg")
    texts = [str((n + 1) * 7_368_787) for n in range(count)]
    return [
        example(f"{text.translate(digits)} {text[::-1].translate(digits)}", source=f"a:{n + start}")
        for n, text in enumerate(texts[start:], start)
    ]


def config(**options):
    return DataConfig(**{"train": "rows.jsonl", **options})


def by_split(division):
    return {
        split: [row for row in division.examples if row.split is split]
        for split in (TRAIN, VALIDATION, TEST)
    }


def sizes(division):
    return {split: len(rows) for split, rows in by_split(division).items()}


def check(division, name):
    return next(check for check in division.checks if check.name == name)


def request(row):
    return request_texts([row])[0]


def jaccard(a, b):
    x, y = ({t[i : i + 5] for i in range(len(t) - 4)} or {t} for t in (a, b))
    return len(x & y) / len(x | y)


@st.composite
def pools(draw):
    """Sentences from templates: likeness of every degree, repeats, other answers, groups."""
    sentence = st.builds(
        "{} {} my {}{}".format,
        st.sampled_from(["I", "we", "hello, I just"]),
        st.sampled_from(VERBS),
        st.sampled_from(SUBJECTS),
        st.sampled_from(["", "!", " yesterday", " in the big shop"]),
    )
    group = st.sampled_from([None, "g1", "g2", "g3"])
    row = st.tuples(sentence, st.sampled_from(["a", "b"]), group)
    rows = draw(st.lists(row, min_size=1, max_size=40))
    return [
        example(text, answer, group, source=f"rows.jsonl:{number}")
        for number, (text, answer, group) in enumerate(rows, 1)
    ]


@settings(deadline=None, max_examples=150)
@given(pools(), st.integers(0, 5), st.sampled_from([0.3, 0.8, None]), st.randoms())
def test_splits_are_leak_free_complete_and_deterministic(pool, seed, threshold, random):
    options = config(near_duplicate=threshold, test=0.2, validation=0.2, group_by="g")
    try:
        division = divide(pool, {}, options, seed)
    except DataError:
        return
    assert divide(pool, {}, options, seed) == division
    parts = by_split(division)
    assert all(parts.values())
    kept = [row.source for row in division.examples]
    gone = [row.source for row in division.dropped]
    assert sorted(kept + gone) == sorted(row.source for row in pool)
    assert {row.step for row in division.dropped} <= {"duplicate"}
    assert len({row.id for row in division.examples}) == len(kept)
    for one in (TRAIN, VALIDATION, TEST):
        for other in (TRAIN, VALIDATION, TEST):
            if one is other:
                continue
            assert not {r.group for r in parts[one]} & {r.group for r in parts[other]} - {None}
            for a in parts[one]:
                for b in parts[other]:
                    assert request(a) != request(b)
                    if threshold is not None:
                        assert jaccard(request(a), request(b)) < threshold
    shuffled = random.sample(pool, len(pool))
    again = divide(shuffled, {}, options, seed)
    assert {row.id: row.split for row in again.examples} == {
        row.id: row.split for row in division.examples
    }


@settings(deadline=None, max_examples=60)
@given(pools(), pools(), st.sampled_from(["refuse", "drop"]))
def test_given_files_are_checked_not_trusted(pool, held, action):
    half = len(held) // 2
    given_rows = {TEST: held[half:]} if not half else {VALIDATION: held[:half], TEST: held[half:]}
    options = config(
        near_duplicate=0.8,
        on_overlap=action,
        group_by="g",
        test="t.jsonl",
        validation="v.jsonl" if half else 0.2,
    )
    try:
        division = divide(pool, given_rows, options, 1)
    except DataError:
        return
    parts = by_split(division)
    assert [row.source for row in parts[TEST]] == [row.source for row in given_rows[TEST]]
    rows = [*pool, *held]
    assert Counter(row.source for row in [*division.examples, *division.dropped]) == Counter(
        row.source for row in rows
    )
    leaks = [
        (a, b)
        for one, others in ((TRAIN, (VALIDATION, TEST)), (VALIDATION, (TEST,)))
        for a in parts[one]
        for other in others
        for b in parts[other]
        if jaccard(request(a), request(b)) >= 0.8 or (a.group is not None and a.group == b.group)
    ]
    overlap = check(division, "split-overlap")
    assert overlap.passed == (not leaks)
    if action == "drop":
        assert overlap.passed
    else:
        assert overlap.failures == len({a.source + a.split for a, _ in leaks})


def test_sizes_are_what_was_asked_and_the_seed_matters():
    pool = distinct(1000)
    division = divide(pool, {}, config(test=0.1, validation=0.15), 7)
    assert sizes(division) == {TRAIN: 750, VALIDATION: 150, TEST: 100}
    other = divide(pool, {}, config(test=0.1, validation=0.15), 8)
    moved = {row.id for row in by_split(division)[TEST]} - {r.id for r in by_split(other)[TEST]}
    assert len(moved) > 70
    assert check(division, "split-overlap").passed
    assert check(division, "held-out-size").data["test_rows"] == 100


def test_new_rows_hardly_move_old_ones():
    before = divide(distinct(1000), {}, config(), 7)
    after = divide(distinct(1010), {}, config(), 7)
    splits = {row.id: row.split for row in before.examples}
    moved = sum(splits.get(row.id, row.split) is not row.split for row in after.examples)
    assert moved < 30


def test_exact_repeats_are_dropped_with_their_twin():
    pool = [*distinct(50), example("same?", "no", source="a:51"), example("same?", "no")]
    division = divide(pool, {}, config(), 7)
    (gone,) = division.dropped
    assert (gone.step, gone.source, gone.twin) == ("duplicate", "rows.jsonl:0", "a:51")
    assert gone.id == pool[-1].id


def test_same_request_with_other_answers_stays_together_and_is_reported():
    pool = [*distinct(50), *(example("Same?", f"answer {n}", source=f"b:{n}") for n in range(3))]
    division = divide(pool, {}, config(), 7)
    assert len({row.split for row in division.examples if row.source.startswith("b")}) == 1
    found = check(division, "split-overlap")
    assert found.data["conflicting_requests"] == 1
    assert found.data["conflicting_rows"] == ["b:0 / b:1"]
    assert "1 requests have more than one answer" in found.detail


def test_a_giant_cluster_goes_to_train_and_is_reported():
    giant = [
        example(f"please cancel my standing order number {n}", source=f"g:{n}") for n in range(90)
    ]
    division = divide([*distinct(110), *giant], {}, config(), 3)
    parts = by_split(division)
    assert sum(row.source.startswith("g") for row in parts[TRAIN]) == 90
    assert sizes(division) == {TRAIN: 160, VALIDATION: 20, TEST: 20}
    overlap = check(division, "split-overlap")
    assert overlap.data["largest_cluster"] == 90
    assert overlap.data["largest_cluster_split"] == "train"
    assert "the largest has 90 rows and is in train" in overlap.detail


def test_few_large_groups_are_dealt_as_near_to_the_shares_as_they_go():
    pool = [
        example(row.conversation.messages[0].content, group=f"customer {n % 8}", source=row.source)
        for n, row in enumerate(distinct(800))
    ]
    division = divide(pool, {}, config(test=0.1, validation=0.2, group_by="g"), 7)
    assert sizes(division) == {TRAIN: 500, VALIDATION: 200, TEST: 100}


@pytest.mark.parametrize(
    ("pool", "problem"),
    [
        ([], "no usable training rows"),
        (distinct(1), "there is 1 row, but 3 splits"),
        (distinct(2), "there are 2 rows, but 3 splits"),
        ([example("a")] * 50, "all 50 rows are the same"),
        ([example("abcdefgh", str(n)) for n in range(9)], r"9 rows form 1 group\(s\)"),
    ],
)
def test_too_few_rows_say_what_to_do(pool, problem):
    with pytest.raises(DataError, match=problem) as caught:
        divide(pool, {}, config(), 7)
    assert "data." in caught.value.remedy


def test_shares_must_leave_something_to_train():
    with pytest.raises(ConfigError, match="leave no rows for training"):
        divide(distinct(50), {}, config(test=0.5, validation=0.5), 7)


def test_three_rows_are_one_each_and_fail_the_size_check():
    division = divide(distinct(3), {}, config(), 7)
    assert sizes(division) == {TRAIN: 1, VALIDATION: 1, TEST: 1}
    size = check(division, "held-out-size")
    assert not size.passed
    assert "1 test rows, at least 30 needed; 1 validation rows, at least 20 needed" in size.detail
    assert size.failures == 2


def test_held_out_size_states_the_precision():
    division = divide(
        distinct(30),
        {TEST: distinct(60, 30), VALIDATION: distinct(80, 60)},
        config(test="t", validation="v"),
        7,
    )
    size = check(division, "held-out-size")
    assert size.passed
    assert size.data["half_width"] == pytest.approx(0.1789, abs=1e-4)
    assert "30 test rows measure a rate to within 17.9 points" in size.detail


def test_limit_is_a_seeded_sample_of_train_in_the_ledger():
    pool = distinct(200)
    small = divide(pool, {}, config(limit=40), 7)
    large = divide(pool, {}, config(limit=90), 7)
    assert sizes(small) == {TRAIN: 40, VALIDATION: 20, TEST: 20}
    assert Counter(row.step for row in small.dropped) == {"limit": 120}
    ids = [{row.id for row in by_split(division)[TRAIN]} for division in (small, large)]
    assert ids[0] < ids[1]
    assert {r.id for r in by_split(small)[TEST]} == {r.id for r in by_split(large)[TEST]}
    assert ids[0] != {row.id for row in by_split(divide(pool, {}, config(limit=40), 8))[TRAIN]}


def labelled(counts):
    """Rows with answers of the given frequencies, no two of them alike."""
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    rows = zip(distinct(len(answers)), answers, strict=True)
    return [example(row.conversation.messages[0].content, answer) for row, answer in rows]


def test_a_varied_sample_holds_more_of_the_rare_answers():
    pool = labelled({"common": 400, "usual": 100, "rare": 20})
    options = {"limit": 100, "validation": 0.05, "test": 0.05}
    plain, varied = (
        Counter(
            row.conversation.answer
            for row in by_split(divide(pool, {}, config(limit_sampling=sampling, **options), 7))[
                TRAIN
            ]
        )
        for sampling in ("random", "varied")
    )
    assert sum(plain.values()) == sum(varied.values()) == 100
    assert varied["rare"] > 1.5 * plain["rare"]
    assert varied["common"] > varied["usual"] > varied["rare"] > 0
    # shares grow like n to the power 0.7: 66, 25 and 8 of 98.9
    assert abs(varied["common"] - 66) <= 3
    assert abs(varied["usual"] - 25) <= 3


def test_a_varied_sample_takes_near_duplicates_last():
    pool = labelled({"yes": 40})
    text = pool[0].conversation.messages[0].content
    pool += [example(f"{text}{end}", "yes") for end in "!?;:.,abcd"]
    options = config(limit=30, limit_sampling="varied", validation=0.1, test=0.1)
    kept = by_split(divide(pool, {}, options, 7))[TRAIN]
    assert len(kept) == 30
    assert sum(row.conversation.messages[0].content.startswith(text) for row in kept) <= 1


def test_a_smaller_varied_sample_is_part_of_a_larger_one():
    pool = labelled({"common": 200, "usual": 60, "rare": 20})
    given = {TEST: distinct(340, 300), VALIDATION: [*distinct(380, 340), pool[0]]}
    samples = []
    for limit in (30, 90):
        options = config(
            limit=limit, limit_sampling="varied", validation="v", test="t", on_overlap="drop"
        )
        division = divide(pool, given, options, 7)
        samples.append({row.id for row in by_split(division)[TRAIN]})
        assert Counter(row.step for row in division.dropped) == {"limit": 279 - limit, "overlap": 1}
    assert len(samples[0]) == 30
    assert samples[0] < samples[1]


def test_overlap_is_refused_with_the_rows_or_dropped_from_the_lesser_split():
    pool = [*distinct(40), example("Where is my card?", source="train:41")]
    test = [*distinct(80, 40), example("where is my CARD", source="test:41")]
    validation = [*distinct(120, 80), example("where is my card now", source="valid:41")]
    given_rows = {VALIDATION: validation, TEST: test}
    options = {"test": "t", "validation": "v", "near_duplicate": 0.7}
    refused = check(divide(pool, given_rows, config(**options), 7), "split-overlap")
    assert not refused.passed
    assert refused.failures == 2
    assert refused.rows == (
        "valid:41 (validation): 0.75 similar to test:41",
        "train:41 (train): same request as test:41",
    )
    assert "1 of train in test, 1 of validation in test" in refused.detail
    assert "data.on_overlap=drop" in refused.remedy
    division = divide(pool, given_rows, config(on_overlap="drop", **options), 7)
    assert sizes(division) == {TRAIN: 40, VALIDATION: 40, TEST: 41}
    assert [(row.source, row.step, row.twin) for row in division.dropped] == [
        ("valid:41", "overlap", "test:41"),
        ("train:41", "overlap", "test:41"),
    ]
    assert check(division, "split-overlap").passed
    exact = divide(pool, given_rows, config(test="t", validation="v", near_duplicate=None), 7)
    assert check(exact, "split-overlap").data["overlaps"] == {"exact": 1}


def test_a_given_test_file_keeps_its_repeats_with_own_ids():
    test = [*distinct(40), example("again?", source="t:1"), example("again?", source="t:2")]
    pool = [*distinct(140, 40), example("again?", source="pool:1")]
    division = divide(pool, {TEST: test}, config(test="t"), 7)
    ids = {row.source: row.id for row in division.examples}
    assert ids["t:2"] == ids["t:1"] + "-2"
    assert ids["pool:1"] == ids["t:1"] + "-3"
    assert not check(division, "split-overlap").passed


def test_dropping_everything_is_an_error():
    rows = distinct(40)
    with pytest.raises(DataError, match="every row of train also stands in"):
        divide(
            rows,
            {TEST: rows, VALIDATION: distinct(80, 40)},
            config(test="t", validation="v", on_overlap="drop"),
            7,
        )


def test_what_all_rows_share_does_not_make_them_alike():
    system = (
        "You are a careful assistant of a bank. Answer with one label from the list below. " * 3
    )
    rows = [
        example(
            f"Classify this message:\n{row.conversation.messages[0].content}\nLabel:",
            system=system,
            source=row.source,
        )
        for row in distinct(100)
    ]
    assert sizes(divide(rows, {}, config(), 7)) == {TRAIN: 80, VALIDATION: 10, TEST: 10}
    assert request_texts(rows)[0] == request(distinct(1)[0])
    template = "a very long text around the request that the recipe adds: {prompt} and says so"
    wrapped = [
        example(template.replace("{prompt}", row.conversation.messages[0].content))
        for row in distinct(3)
    ]
    assert request_texts(wrapped, template) == request_texts(distinct(3))
    same = [example("one line that all have", str(n)) for n in range(30)]
    assert set(request_texts(same)) == {"one line that all have"}


def test_very_long_requests_are_compared_by_both_ends(monkeypatch):
    monkeypatch.setattr("postgrad.data.splits._MOST_CHARACTERS", 30_000)
    words = [row.conversation.messages[0].content for row in distinct(2400)]
    texts = [" ".join(words[at : at + 40]) for at in range(0, 2400, 40)]
    pool = [example(text) for text in texts] + [example(texts[0] + " more", "x")]
    division = divide(pool, {}, config(), 7)
    assert check(division, "split-overlap").data["clusters"] == 60


def test_normalised_text_is_what_counts():
    assert request(example("Wo ist  meine KARTE?")) == normalise("wo ist meine karte")
