"""The page's building blocks: section, table, facts, figure, folded text."""

from collections.abc import Iterable, Sequence

from postgrad.report.markup import Content, Html, tag
from postgrad.report.words import NOT_MEASURED, count


def section(title: str, name: str, *content: Content) -> Html:
    """Return a section with its heading; `name` is its anchor."""
    return tag("section", tag("h2", title), *content, id=name)


def empty(why: str) -> Html:
    """Return the sentence that stands where a measurement is missing."""
    return tag("p", f"{NOT_MEASURED.capitalize()}: {why}.", class_="empty")


def note(*content: Content) -> Html:
    """Return a remark in small type."""
    return tag("p", *content, class_="note")


def table(heads: Sequence[str], rows: Iterable[Sequence[Content]]) -> Html:
    """Return a table that stacks on a phone; a head that starts with # is a column of numbers."""
    names = [head.removeprefix("#") for head in heads]
    styles = ["number" if head.startswith("#") else None for head in heads]
    top = tag("tr", *(tag("th", n, class_=s) for n, s in zip(names, styles, strict=True)))
    body = [
        tag(
            "tr",
            *(
                tag("td", cell, class_=style, data_label=name or None)
                for cell, style, name in zip(row, styles, names, strict=True)
            ),
        )
        for row in rows
    ]
    return tag("table", tag("thead", top), tag("tbody", *body))


def facts_list(facts: Iterable[tuple[str, Content]]) -> Html:
    """Return names and values; a value of None is left out."""
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", name),
                tag("dd", value, dir="auto"),
                class_="long" if len(str(value)) > 44 else None,
            )
            for name, value in facts
            if value is not None
        ),
        class_="facts",
    )


def figure(drawings: Sequence[Html], caption: str, legend: Content = None) -> Html:
    """Return a chart drawn for a wide and a narrow page; CSS shows one of them."""
    wide, narrow = drawings
    return tag(
        "figure",
        tag("figcaption", caption),
        legend,
        tag("div", wide, class_="wide"),
        tag("div", narrow, class_="narrow"),
    )


def folded(text: str, shown: int, most: int) -> Html:
    """Return text of which the first `shown` characters stand open, and at most `most` at all."""
    if not text.strip():
        return tag("span", "(empty)" if not text else "(only white space)", class_="blank")
    if len(text) <= shown + 40:
        return tag("span", text, class_="text", dir="auto")
    space = text.rfind(" ", shown - 40, shown)
    shown = shown if space < 0 else space
    rest = text[shown:most]
    cut = len(text) - most
    more = tag("i", f" … {count(cut)} more characters in the file") if cut > 0 else None
    head = tag("summary", tag("span", text[:shown], class_="text", dir="auto"))
    return tag("details", head, tag("span", rest, more, class_="text", dir="auto"), class_="fold")
