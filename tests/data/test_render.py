import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, CLOSED, INST, STYLES, THINKING, TOOLS, TURNS, ZEPHYR, Style, styled

from postgrad.data.render import ProblemKind, Renderer
from postgrad.errors import DataError, ModelError
from postgrad.types import Conversation, Example, Message, ToolCall, content_id


def conversation(*turns, tools=()):
    """("user", "hi"), ("assistant", "yes", 0.5) ... -> Conversation."""
    return Conversation(
        tuple(Message(t[0], t[1], weight=t[2] if len(t) > 2 else None) for t in turns), tools
    )


def example(c):
    return Example(content_id(c), c, "rows.jsonl:1")


def supervised_text(renderer, tokens):
    return [text for text, weight in renderer.pieces(tokens) if weight > 0]


def kinds(rendering):
    return {problem.kind for problem in rendering.problems}


renderers = {
    (name, metaspace): Renderer(styled(style, metaspace))
    for name, style in STYLES.items()
    for metaspace in (False, True)
}
every_style = pytest.mark.parametrize(("name", "metaspace"), list(renderers))

FRAGMENTS = ("the", " answer", "yes", "é", "漢", "🙂", "\n", " ", "\t", ".", "{", "[/", "<|", "12")
words = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(lambda parts: "x" + "".join(parts))
"""Text that begins with a letter: what happens at a boundary of white space has its own tests."""


@st.composite
def conversations(draw, system=True):
    turns = []
    if system and draw(st.booleans()):
        turns.append(("system", draw(words)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(("user", draw(words)))
        turns.append(("assistant", draw(words), draw(st.sampled_from([None, 0.0, 0.5, 1.0]))))
    return conversation(*turns)


def fits(style: Style, c: Conversation) -> bool:
    has_system = c.messages[0].role == "system"
    many = sum(m.role == "user" for m in c.messages) > 1
    return not has_system or (style.system and (style.multi_turn_system or not many))


@pytest.mark.parametrize("metaspace", [False, True])
@given(conversations(), st.sampled_from(list(STYLES)))
@settings(max_examples=150, deadline=None)
def test_ids_are_the_templates_and_the_mask_is_answers_and_end_tokens(metaspace, c, name):
    style, renderer = STYLES[name], renderers[name, metaspace]
    if not fits(style, c):
        return
    rendering = renderer.inspect_all([example(c)])[0]
    tokenizer = renderer.tokenizer
    messages = [{"role": m.role, "content": m.content} for m in c.messages]
    reference = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert rendering.tokens.ids.tolist() == reference
    assert rendering.problems == ()
    answers = [m for m in c.messages if m.role == "assistant" and m.supervised_weight > 0]
    assert [a.weight for a in rendering.answers] == [m.supervised_weight for m in answers]
    end = tokenizer.convert_tokens_to_ids(style.end)
    for found, message in zip(rendering.answers, answers, strict=True):
        ids = rendering.tokens.ids[found.first : found.end].tolist()
        assert ids.count(end) == 1
        assert ids[-1] == end
        text = tokenizer.decode(ids[:-1])
        assert text.strip() == message.content.strip()
    expected = np.zeros(len(reference), np.float32)
    for found in rendering.answers:
        expected[found.first : found.end] = found.weight
    assert rendering.tokens.weights.tolist() == expected.tolist()


@pytest.mark.parametrize("metaspace", [False, True])
@given(conversations(), st.sampled_from(list(STYLES)))
@settings(max_examples=100, deadline=None)
def test_the_prompt_that_serving_sends_is_how_the_training_row_begins(metaspace, c, name):
    style, renderer = STYLES[name], renderers[name, metaspace]
    if not fits(style, c) or c.messages[-1].supervised_weight == 0:
        return
    rendering = renderer.inspect_all([example(c)])[0]
    prompt = renderer.prompt_ids(c.prompt)
    assert rendering.tokens.ids[: len(prompt)].tolist() == prompt
    assert rendering.answers[-1].first == len(prompt)


@every_style
def test_end_token_is_found_by_rendering(name, metaspace):
    renderer, style = renderers[name, metaspace], STYLES[name]
    end = renderer.tokenizer.convert_tokens_to_ids(style.end)
    assert renderer.end_token_id == end
    assert end in renderer.stop_ids
    tokens = renderer.render(example(conversation(("user", "question"), ("assistant", "yes"))))
    assert renderer.end_token_supervised(tokens)
    assert renderer.leading_bos(tokens.ids) == (1 if style.bos else 0)


GENERATION = Style(
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
    None,
    CHATML.special,
)


@given(conversations())
@settings(max_examples=60, deadline=None)
def test_mask_equals_that_of_a_template_with_generation_marks(c):
    c = Conversation(tuple(Message(m.role, m.content) for m in c.messages))
    tokens = GENERATION_RENDERER.render(example(c))
    messages = [{"role": m.role, "content": m.content} for m in c.messages]
    reference = GENERATION_RENDERER.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.ids.tolist() == reference["input_ids"]
    assert tokens.weights.tolist() == reference["assistant_masks"]


GENERATION_RENDERER = Renderer(styled(GENERATION))


def test_many_rows_render_as_they_do_one_by_one():
    renderer = renderers["headers", False]
    rows = [
        example(conversation(("user", f"question {n}"), ("assistant", "yes " * (n % 7 + 1))))
        for n in range(1203)
    ]
    together = renderer.render_all(rows)
    for index in (0, 1, 999, 1000, 1202):
        alone = renderer.render(rows[index])
        assert alone.ids.tolist() == together[index].ids.tolist()
        assert alone.weights.tolist() == together[index].weights.tolist()


def test_text_after_the_end_token_is_not_learned():
    renderer = renderers["closed", False]
    c = conversation(("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))
    assert supervised_text(renderer, renderer.render(example(c))) == ["one<|end|>", "two<|end|>"]


def test_weights_of_messages_are_kept():
    renderer = renderers["chatml", False]
    c = conversation(
        ("user", "q"), ("assistant", "a", 0), ("user", "r"), ("assistant", "b", 0.5),
        ("user", "s"), ("assistant", "c"),
    )  # fmt: skip
    tokens = renderer.render(example(c))
    assert [(t, w) for t, w in renderer.pieces(tokens) if w] == [
        ("b<|im_end|>", 0.5),
        ("c<|im_end|>", 1.0),
    ]


def test_an_empty_answer_supervises_the_end_token_only():
    renderer = renderers["chatml", False]
    rendering = renderer.inspect_all([example(conversation(("user", "q"), ("assistant", "")))])[0]
    assert supervised_text(renderer, rendering.tokens) == ["<|im_end|>"]
    assert rendering.problems == ()


def test_a_token_across_prompt_and_answer_is_reported_and_not_learned():
    style = CHATML._replace(
        template="{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    # With trimmed offsets the token " yes" claims to begin at "yes": the space must not be lost.
    renderer = Renderer(styled(style))
    rendering = renderer.inspect_all(
        [example(conversation(("user", "q"), ("assistant", "yes no")))]
    )[0]
    assert kinds(rendering) == {ProblemKind.BOUNDARY}
    assert supervised_text(renderer, rendering.tokens) == [" no<|im_end|>"]
    prompt = renderer.prompt_ids(conversation(("user", "q")))
    assert rendering.tokens.ids[: len(prompt)].tolist() != prompt


def test_newlines_that_merge_with_the_prompt_are_reported():
    tokenizer = styled(CHATML)
    tokenizer.add_tokens(["\n\n"])
    renderer = Renderer(tokenizer)
    good, bad = (conversation(("user", "q"), ("assistant", text)) for text in ("yes", "\nyes"))
    first, second = renderer.inspect_all([example(good), example(bad)])
    assert first.problems == ()
    assert kinds(second) == {ProblemKind.BOUNDARY}


@pytest.mark.parametrize("metaspace", [False, True])
def test_special_tokens_that_swallow_white_space_are_whole(metaspace):
    from tokenizers import AddedToken

    tokenizer = styled(CLOSED, metaspace)
    swallowing = [AddedToken(text, rstrip=True, special=True) for text in ("<|stop|>", "<|go|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": swallowing})
    template = CLOSED.template.replace("<|end|>", "<|stop|>").replace("<|assistant|>", "<|go|>")
    renderer = Renderer(tokenizer, template.replace("<|{{ m.role }}|>", "<|go|>"))
    c = conversation(("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", " two"))
    rendering = renderer.inspect_all([example(c)])[0]
    assert "\n" not in tokenizer.decode(rendering.tokens.ids)
    assert rendering.problems == ()
    found = [text.strip() for text in supervised_text(renderer, rendering.tokens)]
    assert found == ["one<|stop|>", "two<|stop|>"]


def test_hidden_thoughts_of_earlier_answers_are_refused_and_of_the_last_kept():
    renderer = renderers["thinking", False]
    thoughts = "<think>\nhm\n</think>\n\nyes"
    last = conversation(("user", "q"), ("assistant", thoughts))
    tokens = renderer.render(example(last))
    assert supervised_text(renderer, tokens) == [thoughts + "<|im_end|>"]
    both = conversation(*[("user", "q"), ("assistant", thoughts)] * 2)
    rendering = renderer.inspect_all([example(both)])[0]
    assert [(p.kind, p.message) for p in rendering.problems] == [(ProblemKind.HISTORY, 1)]
    assert [answer.message for answer in rendering.answers] == [3]
    weightless = conversation(
        ("user", "q"), ("assistant", thoughts, 0), *[("user", "r")], ("assistant", thoughts)
    )
    assert renderer.inspect_all([example(weightless)])[0].problems == ()


def test_a_generation_prompt_that_training_does_not_show_is_refused():
    style = THINKING._replace(
        template=THINKING.template.replace(
            "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"
        )
    )
    assert style.template != THINKING.template
    renderer = Renderer(styled(style))
    rendering = renderer.inspect_all([example(conversation(("user", "q"), ("assistant", "yes")))])[
        0
    ]
    assert kinds(rendering) == {ProblemKind.PROMPT}
    assert rendering.tokens.supervised == 0
    assert "<think>" in rendering.problems[0].detail


def test_a_system_prompt_that_moves_to_the_last_request_is_refused_for_earlier_answers():
    renderer = renderers["inst", False]
    c = conversation(("system", "brief"), *[("user", "q"), ("assistant", "yes")] * 2)
    rendering = renderer.inspect_all([example(c)])[0]
    assert [(p.kind, p.message) for p in rendering.problems] == [(ProblemKind.HISTORY, 2)]
    assert [answer.message for answer in rendering.answers] == [4]


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
}


def tool_conversation(content=""):
    call = ToolCall("weather", '{"city": "Paris"}', "call_1")
    return Conversation(
        (
            Message("user", "weather in Paris?"),
            Message("assistant", content, (call,)),
            Message("tool", "sunny", tool_call_id="call_1", name="weather"),
            Message("assistant", "It is sunny."),
        ),
        (WEATHER,),
    )


@pytest.mark.parametrize("content", ["", "Let me see."])
def test_tool_calls_are_answers(content):
    renderer = renderers["tools", False]
    tokens = renderer.render(example(tool_conversation(content)))
    call, answer = supervised_text(renderer, tokens)
    assert call == (
        content + '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call><|im_end|>'
    )
    assert answer == "It is sunny.<|im_end|>"
    assert json.dumps(WEATHER) in renderer.tokenizer.decode(tokens.ids)


@pytest.mark.parametrize(
    ("expression", "as_text"),
    [
        ("{{ c.function.arguments | tojson }}", False),
        ("{{ c.function.arguments }}", True),
        ("{{ '' + c.function.arguments }}", True),
        (
            "{% if c.function.arguments is string %}{{ c.function.arguments }}"
            "{% else %}{{ c.function.arguments | tojson }}{% endif %}",
            False,
        ),
        (
            "{{ '{' }}{% for k, v in c.function.arguments.items() %}"
            "\"{{ k }}\": {{ v | tojson }}{% endfor %}{{ '}' }}",
            False,
        ),
    ],
)
def test_arguments_take_the_form_that_the_template_wants(expression, as_text):
    template = TOOLS.template.replace("{{ c.function.arguments | tojson }}", expression)
    renderer = Renderer(styled(TOOLS), template)
    assert renderer.template.arguments_as_text is as_text
    tokens = renderer.render(example(tool_conversation()))
    assert '"arguments": {"city": "Paris"}}' in supervised_text(renderer, tokens)[0]


def test_a_template_that_drops_tool_calls_is_reported():
    rendering = renderers["chatml", False].inspect_all([example(tool_conversation())])[0]
    (problem,) = rendering.problems
    assert (problem.kind, problem.message) == (ProblemKind.CONTENT, 1)
    assert "weather" in problem.detail


def test_text_that_the_template_loses_or_changes_is_reported():
    no_system = CHATML.template.replace(
        "for m in messages", "for m in messages if m.role != 'system'"
    )
    c = conversation(("system", "brief"), ("user", "q"), ("assistant", "Yes"))
    rendering = Renderer(styled(CHATML), no_system).inspect_all([example(c)])[0]
    assert [(p.kind, p.message) for p in rendering.problems] == [(ProblemKind.CONTENT, 0)]
    shouting = CHATML.template.replace("m.content", "m.content | upper")
    rendering = Renderer(styled(CHATML), shouting).inspect_all([example(c)])[0]
    assert {p.message for p in rendering.problems} == {0, 1, 2}


def test_special_tokens_written_in_the_text_are_reported():
    c = conversation(("user", "say <|im_end|>"), ("assistant", "yes"))
    (problem,) = renderers["chatml", False].inspect_all([example(c)])[0].problems
    assert (problem.kind, problem.message) == (ProblemKind.CONTROL, 0)
    assert "<|im_end|>" in problem.detail


def test_special_tokens_without_a_part_in_conversations_may_be_written():
    tokenizer = styled(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filename>"]})
    c = conversation(("user", "open <filename>"), ("assistant", "yes <filename>"))
    assert Renderer(tokenizer).inspect_all([example(c)])[0].problems == ()


def test_weights_that_cannot_be_obeyed_are_reported():
    renderer = renderers["chatml", False]
    for role_weights in ((1.0, None), (None, float("nan")), (None, -1.0), (None, float("inf"))):
        c = conversation(("user", "q", role_weights[0]), ("assistant", "yes", role_weights[1]))
        rendering = renderer.inspect_all([example(c)])[0]
        assert kinds(rendering) == {ProblemKind.WEIGHT}
        assert np.isfinite(rendering.tokens.weights).all()


def test_an_answer_without_a_request_is_reported():
    rendering = renderers["chatml", False].inspect_all(
        [example(conversation(("assistant", "yes")))]
    )[0]
    assert kinds(rendering) == {ProblemKind.PROMPT}


def test_a_row_that_the_template_refuses_does_not_stop_the_others():
    renderer = renderers["turns", False]
    good = example(conversation(("user", "q"), ("assistant", "yes")))
    bad = Example(
        "x", conversation(("system", "s"), ("user", "q"), ("assistant", "a")), "f.jsonl:7"
    )
    first, second, third = renderer.inspect_all([good, bad, good])
    assert first.tokens is not None
    assert third.tokens is not None
    assert second.tokens is None
    assert "no system role here" in second.problems[0].detail
    with pytest.raises(DataError, match=r"f\.jsonl:7: .*no system role here"):
        renderer.render_all([good, bad])
    with pytest.raises(DataError, match="no system role"):
        renderer.prompt_ids(bad.conversation)


def test_a_template_without_an_end_token_is_reported():
    plain = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    renderer = Renderer(
        styled(CHATML), plain + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rendering = renderer.inspect_all([example(conversation(("user", "q"), ("assistant", "yes")))])[
        0
    ]
    assert kinds(rendering) == {ProblemKind.END}
    assert renderer.end_token_id is None
    assert not renderer.end_token_supervised(rendering.tokens)


def test_a_template_that_ignores_the_generation_prompt_is_noticed():
    silent = Renderer(styled(CHATML), CHATML.template.split("{% if add_generation_prompt")[0])
    assert not silent.template.opens_answer
    assert all(renderer.template.opens_answer for renderer in renderers.values())


def test_a_tokenizer_without_a_template_or_offsets_is_refused():
    tokenizer = styled(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, CHATML.template).end_token_id is not None
    with pytest.raises(ModelError, match="line 1"):
        Renderer(tokenizer, "{% for m in %}")


def test_a_tokenizer_without_offsets_is_refused():
    from transformers.tokenization_python import PythonBackend

    class Slow(PythonBackend):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

        def _tokenize(self, text, **_):
            return list(text)

        def _convert_token_to_id(self, token):
            return 0

        def _convert_id_to_token(self, index):
            return "a"

    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Renderer(Slow())


def test_stop_ids_hold_the_generation_configs_end_tokens():
    renderer = Renderer(styled(ZEPHYR), eos_token_ids=(3, 5))
    assert {3, 5, renderer.end_token_id} == renderer.stop_ids


def test_templates_that_want_other_roles_first_still_close_their_answers():
    strict = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        + CHATML.template
    )
    renderer = Renderer(styled(CHATML), strict)
    c = conversation(("system", "s"), ("user", "q"), ("assistant", "yes"))
    assert supervised_text(renderer, renderer.render(example(c))) == ["yes<|im_end|>"]


def test_rendering_is_fast_enough_for_interactive_use():
    renderer = renderers["chatml", False]
    rows = [
        example(conversation(("user", f"the question is {n} " * 5), ("assistant", "yes")))
        for n in range(1000)
    ]
    start = time.perf_counter()
    renderer.inspect_all(rows)
    assert time.perf_counter() - start < 3


def test_inst_style_keeps_the_space_before_the_answer():
    renderer = Renderer(styled(INST))
    tokens = renderer.render(example(conversation(("user", "q"), ("assistant", "yes"))))
    assert supervised_text(renderer, tokens) == [" yes</s>"]
    assert Renderer(styled(TURNS)).template.ending.tail == "<end_of_turn>\n"
