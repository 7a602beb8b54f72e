"""HTML and SVG that are escaped by construction: text becomes markup only through `tag`."""

import html
from collections.abc import Iterable

_CONTROL: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **{0x0D: None, 0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD},
}
_CONTROL |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Html(str):
    """Markup that is already safe; a plain `str` is text and is escaped where it is used."""

    __slots__ = ()


Content = str | int | float | None
"""What may stand inside an element: `Html` as it is, anything else as escaped text."""


def clean(text: str) -> str:
    """Return text that may stand in HTML and XML: control characters visible, no lone surrogates.

    >>> clean("a" + chr(0) + "b")
    'a␀b'
    """
    return text.translate(_CONTROL).encode("utf-8", "replace").decode()


def escape(content: Content) -> Html:
    """Return `Html` unchanged and everything else as escaped text; None is nothing.

    >>> escape("<b>")
    '&lt;b&gt;'
    """
    if isinstance(content, Html):
        return content
    return Html("" if content is None else html.escape(clean(str(content)), quote=True))


def join(parts: Iterable[Content], separator: Content = "") -> Html:
    """Return the parts one after another, each escaped unless it is `Html`."""
    return Html(escape(separator).join(escape(part) for part in parts))


def tag(name: str, /, *children: Content, **attributes: Content) -> Html:
    """Return an element; `class_` is `class`, other underscores are hyphens, None is left out.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if not children:
        return Html(f"<{name}{inside}/>") if name in _EMPTY else Html(f"<{name}{inside}></{name}>")
    return Html(f"<{name}{inside}>{join(children)}</{name}>")


_EMPTY = frozenset({"meta", "br", "input", "circle", "line", "rect", "path", "polyline"})
