"""Pre-flight checks on the rendered rows: no model is needed, nothing is changed.

Each function looks at one thing that other tools let pass and returns a `Check` with the rows that
fail (`file:line`) and what to do about them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from postgrad.config import DataConfig
from postgrad.data.lengths import length_table
from postgrad.data.render import ProblemKind, Renderer, Rendering
from postgrad.types import Check, Split

SHOWN = 24
"""Rows named in a check."""
SAMPLE = 2000
"""Rows whose rendering is repeated by other means; evenly spaced when there are more."""
FRACTION_BAND = (0.005, 0.95)
"""Supervised share of the training tokens outside of which a mask is almost certainly wrong."""

SPLIT_REMEDY = (
    "give every answer a row of its own that ends with it, and weight 0 to the answers before it; "
    "or set model.chat_template to a template that shows all answers in one way"
)


def check_rows(
    renderer: Renderer, renderings: Sequence[Rendering], config: DataConfig
) -> tuple[Check, ...]:
    """Run every check on the rendered rows.

    Args:
        renderer: what made `renderings`.
        renderings: the rows of all splits that have a loss, as `Renderer.inspect_all` gives them,
            before `keep_usable`.
        config: the recipe's `data` section.
    """
    return (
        rows_render(renderings, config),
        render_matches_template(renderer, renderings),
        content_kept(renderings),
        control_tokens_in_text(renderings),
        message_weights(renderings),
        serving_sends_the_same_prompt(renderer, renderings),
        boundary_on_token(renderings),
        stop_token_supervised(renderer, renderings),
        bos_count(renderer, renderings),
        supervised_tokens_present(renderer, renderings),
        supervised_fraction(renderings),
        over_length(renderings, config),
    )


def rows_render(renderings: Sequence[Rendering], config: DataConfig) -> Check:
    """The chat template accepts every row."""
    refused = [rendering for rendering in renderings if rendering.tokens is None]
    if refused and config.on_invalid == "drop":
        detail = f"{len(refused)} rows that the chat template refuses are dropped"
        return Check("rows-render", True, detail, data={"dropped": len(refused)})
    return _by_rows(
        "rows-render",
        refused,
        f"the chat template accepts all {len(renderings)} rows",
        lambda n: f"the chat template refuses {n} rows: {refused[0].problems[0].detail}",
        "correct the rows (roles must come in the order that the template allows), or set "
        "data.on_invalid to drop",
    )


def render_matches_template(renderer: Renderer, renderings: Sequence[Rendering]) -> Check:
    """Our tokens are those of the tokenizer's own `apply_chat_template(tokenize=True)`."""
    sample = _sample([rendering for rendering in renderings if rendering.tokens is not None])
    different = []
    for rendering in sample:
        conversation = rendering.example.conversation
        ids = renderer.tokenizer.apply_chat_template(
            renderer.template.to_dicts(conversation.messages),
            tools=[dict(tool) for tool in conversation.tools] or None,
            chat_template=renderer.template.override,
            tokenize=True,
            return_dict=False,
            verbose=False,
        )
        if rendering.tokens is None or list(ids) != rendering.tokens.ids.tolist():
            different.append(rendering)
    note = "; it prints today's date" if renderer.template.prints_the_date else ""
    return _by_rows(
        "render-matches-template",
        different,
        f"{len(sample)} rows give the ids of the tokenizer's own chat template{note}",
        lambda n: f"{n} of {len(sample)} rows differ from the tokenizer's own chat template",
        "the template gives another text each time it is called; set model.chat_template to one "
        "that depends on the conversation alone",
        compared=len(sample),
    )


def content_kept(renderings: Sequence[Rendering]) -> Check:
    """The text of every message arrives in what the model reads."""
    return _by_problem(
        "content-kept",
        renderings,
        (ProblemKind.CONTENT,),
        "every message's text is in the rendering",
        "lose text",
        "set model.chat_template to a template that shows it, or take it out of the rows",
    )


def control_tokens_in_text(renderings: Sequence[Rendering]) -> Check:
    """No message spells out a special token, which would end turns or start documents."""
    return _by_problem(
        "control-tokens-in-text",
        renderings,
        (ProblemKind.CONTROL,),
        "no message spells out a special token",
        "spell out a special token of the tokenizer",
        "give plain messages, without any template applied to them; escape the token where the "
        "text is about it",
    )


def message_weights(renderings: Sequence[Rendering]) -> Check:
    """Every weight can be obeyed."""
    return _by_problem(
        "message-weights",
        renderings,
        (ProblemKind.WEIGHT,),
        "every message weight can be obeyed",
        "have a weight that is not obeyed",
        "weights belong to assistant messages and are finite numbers from 0",
    )


def serving_sends_the_same_prompt(renderer: Renderer, renderings: Sequence[Rendering]) -> Check:
    """What precedes an answer in training is, token for token, what serving will send."""
    name = "serving-sends-the-same-prompt"
    if not renderer.template.opens_answer:
        return Check(
            name,
            False,
            "the chat template ignores add_generation_prompt: serving would not open the answer, "
            "and the model would have to learn to",
            "set model.chat_template to a template that ends in "
            "{% if add_generation_prompt %}...{% endif %}",
        )
    kinds = (ProblemKind.PROMPT, ProblemKind.HISTORY)
    failing = [rendering for rendering in renderings if rendering.has(*kinds)]
    sample = _sample([r for r in renderings if _is_served(r) and not r.has(*kinds)])
    failing += [rendering for rendering in sample if not _begins_with_prompt(renderer, rendering)]
    detail = next(
        (p.detail for r in failing for p in r.problems if p.kind in kinds), "other tokens"
    )
    return _by_rows(
        name,
        failing,
        f"{len(sample)} prompts, tokenised alone, are how the training rows begin",
        lambda n: f"{n} rows show an answer after something that serving will not send: {detail}",
        SPLIT_REMEDY,
        compared=len(sample),
    )


def _is_served(rendering: Rendering) -> bool:
    """Whether the row's last message is a supervised answer that stands on a token boundary."""
    last = len(rendering.example.conversation.messages) - 1
    answered = bool(rendering.answers) and rendering.answers[-1].message == last
    return answered and not rendering.has(ProblemKind.BOUNDARY)


def _begins_with_prompt(renderer: Renderer, rendering: Rendering) -> bool:
    assert rendering.tokens is not None
    prompt = renderer.prompt_ids(rendering.example.conversation.prompt)
    return prompt == list(rendering.tokens.ids[: len(prompt)])


def boundary_on_token(renderings: Sequence[Rendering]) -> Check:
    """No token holds the end of a prompt and the beginning of its answer."""
    return _by_problem(
        "boundary-on-token",
        renderings,
        (ProblemKind.BOUNDARY,),
        "every answer begins and ends on a token boundary",
        "have a token that belongs to prompt and answer at once, which serving never produces",
        "strip the white space at the start of the answers, or set model.chat_template to a "
        "template whose generation prompt does not end in white space that the tokenizer joins "
        "to the next word",
    )


def stop_token_supervised(renderer: Renderer, renderings: Sequence[Rendering]) -> Check:
    """Every answer teaches the model to stop, with exactly one token at which serving stops."""
    wrong, stop_ids = [], sorted(renderer.stop_ids)
    for rendering in renderings:
        tokens = rendering.tokens
        stops = [
            int(np.isin(tokens.ids[answer.first : answer.end], stop_ids).sum())
            for answer in rendering.answers
            if tokens is not None
        ]
        if rendering.has(ProblemKind.END) or any(count != 1 for count in stops):
            wrong.append(rendering)
    names = renderer.tokenizer.convert_ids_to_tokens(stop_ids)
    shown = ", ".join(names) or "no token"
    return _by_rows(
        "stop-token-supervised",
        wrong,
        f"every answer ends in a supervised stop token (serving stops at {shown})",
        lambda n: (
            f"{n} rows have an answer without exactly one stop token at its end "
            f"(serving stops at {shown}): the model would not learn to stop"
        ),
        "set model.chat_template to a template that closes answers with the end token, and take "
        "end tokens out of the text of the messages",
        stop_ids=stop_ids,
        stop_tokens=names,
        end_token_id=renderer.end_token_id,
    )


def bos_count(renderer: Renderer, renderings: Sequence[Rendering]) -> Check:
    """Rows begin with the template's number of BOS tokens: one, or none if it writes none."""
    counts = [
        renderer.leading_bos(rendering.tokens.ids)
        for rendering in renderings
        if rendering.tokens is not None
    ]
    expected = min(max(set(counts), key=counts.count), 1) if counts else 0
    rendered = [rendering for rendering in renderings if rendering.tokens is not None]
    wrong = [r for r, count in zip(rendered, counts, strict=True) if count != expected]
    bos = renderer.tokenizer.bos_token_id
    plain = renderer.tokenizer("a", verbose=False)["input_ids"]
    missing = bos is not None and plain[:1] == [bos] and expected == 0
    note = "; the tokenizer puts one before plain text, the template does not" if missing else ""
    return _by_rows(
        "bos-count",
        wrong,
        f"every row begins with {expected} BOS tokens{note}",
        lambda n: f"{n} rows do not begin with {expected} BOS tokens (most: {max(counts)})",
        "let only one of the two write it: take the BOS out of the messages or out of the template",
        expected=expected,
        tokenizer_adds_one=missing,
    )


def supervised_tokens_present(renderer: Renderer, renderings: Sequence[Rendering]) -> Check:
    """Every row teaches something besides stopping."""
    stop_ids = sorted(renderer.stop_ids)
    empty = [
        rendering
        for rendering in renderings
        if rendering.tokens is not None
        and all(
            np.isin(rendering.tokens.ids[answer.first : answer.end], stop_ids).all()
            for answer in rendering.answers
        )
    ]
    return _by_rows(
        "supervised-tokens-present",
        empty,
        "every row has an answer to learn",
        lambda n: f"{n} rows have nothing to learn: no answer, an empty one, or weight 0",
        "end each row in an assistant message with text; remove rows that have none",
    )


def supervised_fraction(renderings: Sequence[Rendering]) -> Check:
    """The supervised share of the training tokens is in a plausible band."""
    tokens = [
        rendering.tokens
        for rendering in renderings
        if rendering.tokens is not None and rendering.example.split in (None, Split.TRAIN)
    ]
    total = sum(len(row) for row in tokens)
    supervised = sum(int(np.count_nonzero(row.weights)) for row in tokens)
    fraction = supervised / total if total else 0.0
    low, high = FRACTION_BAND
    passed = low <= fraction <= high
    detail = f"{supervised:,} of {total:,} training tokens are supervised ({fraction:.1%})"
    remedy = (
        f"between {low:.1%} and {high:.0%} is usual: look at a row with `postgrad explain`; "
        "shorten the prompts, or give the rows prompts"
    )
    data = {"supervised": supervised, "tokens": total, "fraction": fraction}
    return Check("supervised-fraction", passed, detail, "" if passed else remedy, data=data)


def over_length(renderings: Sequence[Rendering], config: DataConfig) -> Check:
    """No row is longer than `data.max_length`, or the recipe says what becomes of it."""
    name, limit = "over-length", config.max_length
    lengths = [len(rendering.tokens) for rendering in renderings if rendering.tokens is not None]
    table = length_table(lengths, limit)
    over = [r for r in renderings if r.tokens is not None and len(r.tokens) > limit]
    if not over:
        longest = table.get("longest", 0)
        detail = f"the longest row has {longest} tokens, data.max_length is {limit}"
        return Check(name, True, detail, data=table)
    left = [r for r in over if config.on_overlength == "truncate" and _keeps_an_answer(r, limit)]
    if config.on_overlength != "refuse" and len(over) - len(left) < len(lengths):
        fate = f"{len(left)} are cut, {len(over) - len(left)} are dropped"
        detail = f"{len(over)} rows are longer than {limit} tokens: {fate}, listed in the ledger"
        return Check(name, True, detail, data=table)
    if config.on_overlength != "refuse":
        detail = f"nothing is left of any row within {limit} tokens"
        remedy = f"raise data.max_length (the median row has {table['median']} tokens)"
        return _failed(name, over, detail, remedy, table)
    sizes = ", ".join(f"{key} {table[key]}" for key in ("median", "p90", "p95", "p99", "longest"))
    return _failed(
        name,
        over,
        f"{len(over)} of {len(lengths)} rows are longer than {limit} tokens ({sizes})",
        f"set data.max_length to {table['longest']} to keep them all, data.on_overlength to drop "
        "to leave them out, or to truncate to cut their ends off (the end token with it)",
        table,
    )


def _keeps_an_answer(rendering: Rendering, limit: int) -> bool:
    return rendering.tokens is not None and bool(rendering.tokens.weights[:limit].any())


def _sample(renderings: Sequence[Rendering]) -> list[Rendering]:
    if len(renderings) <= SAMPLE:
        return list(renderings)
    return [renderings[int(at)] for at in np.linspace(0, len(renderings) - 1, SAMPLE)]


def _by_problem(
    name: str,
    renderings: Sequence[Rendering],
    kinds: tuple[ProblemKind, ...],
    good: str,
    bad: str,
    remedy: str,
) -> Check:
    failing = [rendering for rendering in renderings if rendering.has(*kinds)]
    detail = next((p.detail for r in failing for p in r.problems if p.kind in kinds), "")
    return _by_rows(name, failing, good, lambda n: f"{n} rows {bad}: {detail}", remedy)


def _by_rows(
    name: str,
    failing: Sequence[Rendering],
    good: str,
    bad: Callable[[int], str],
    remedy: str,
    **data: Any,
) -> Check:
    if not failing:
        return Check(name, True, good, data=data)
    return _failed(name, failing, bad(len(failing)), remedy, data)


def _failed(
    name: str, failing: Sequence[Rendering], detail: str, remedy: str, data: dict[str, Any]
) -> Check:
    rows = tuple(rendering.example.source for rendering in failing[:SHOWN])
    return Check(name, False, detail, remedy, rows, len(failing), data=data)
