"""Escaping by construction: what goes in as text comes out as the same text."""

from xml.etree import ElementTree

from hypothesis import example, given
from hypothesis import strategies as st

from postgrad.report.markup import Html, clean, escape, join, tag

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=80)


@given(ANY_TEXT)
@example("</script><script>alert(1)</script>")
@example("\x00\x1b[31m\ud800\u202e ]]> &amp; \r\n")
def test_any_text_survives_as_text(text: str):
    element = ElementTree.fromstring(tag("p", text))
    assert (element.text or "") == clean(text)
    assert len(element) == 0


@given(ANY_TEXT)
@example('" onload="alert(1)')
def test_any_text_survives_as_an_attribute(text: str):
    element = ElementTree.fromstring(tag("p", "x", title=text))
    assert set(element.attrib) == {"title"}
    # XML normalises white space in attributes; nothing else may change
    assert element.attrib["title"].split() == clean(text).split()


@given(ANY_TEXT)
def test_clean_text_can_always_be_encoded_and_is_stable(text: str):
    once = clean(text)
    assert once.encode().decode() == once
    assert clean(once) == once


def test_markup_is_not_escaped_twice():
    inner = tag("b", "1 < 2")
    assert inner == "<b>1 &lt; 2</b>"
    assert tag("p", inner, " & ", None, 3) == "<p><b>1 &lt; 2</b> &amp; 3</p>"
    assert escape(inner) is inner
    assert isinstance(join([inner, "<"]), Html)


def test_attributes_and_empty_elements():
    assert tag("input", type="radio", id="a", checked=None) == '<input type="radio" id="a"/>'
    assert tag("label", for_="a", data_label="n", class_="c") == (
        '<label for="a" data-label="n" class="c"></label>'
    )
