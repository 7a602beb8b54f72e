"""A prices file: shipped, the user's, or wrong in a way that is named."""

import pytest

from postgrad.errors import ConfigError
from postgrad.prices import SHIPPED, VARIABLE, load_prices

OWN = """
currency = "EUR"
price_per_kwh = 0.31
watts = 120
[[hour]]
machine = "EPYC"
price = 0.2
source = "contract"
url = "intranet"
date = "2026-11"
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_prices_name_their_sources_and_who_is_closed():
    prices = load_prices()
    for entry in (*prices.hour, *prices.hosted):
        assert entry.source
        assert entry.url.startswith("https://")
        assert entry.date
    assert {offer.service for offer in prices.hosted if offer.closed} == {"OpenAI"}
    assert [o.model for o in prices.hosted_for(20 * 10**9) if o.largest_parameters] == [
        "open models up to 80B"
    ]


def test_the_recipe_wins_over_the_environment_and_that_over_the_shipped_file(tmp_path, monkeypatch):
    named, other = write(tmp_path / "a.toml", OWN), write(tmp_path / "b.toml", 'currency = "CHF"')
    monkeypatch.setenv(VARIABLE, str(other))
    assert load_prices().currency == "CHF"
    found = load_prices(str(named))
    assert (found.currency, found.price_per_kwh, found.watts) == ("EUR", 0.31, 120)
    assert found.hour_of("AMD EPYC 9654").price == 0.2
    assert found.hour_of("Xeon") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("0.2", "-0.2"), r"prices.toml:7: hour.price must be at least 0, not -0.2"),
        (OWN.replace("watts", "wats"), r"prices.toml:4: unknown key wats \(did you mean watts\?\)"),
        (OWN.replace('source = "contract"\n', ""), r"prices.toml:5: hour.source is required"),
        (OWN.replace("0.31", '"much"'), r"prices.toml:3: price_per_kwh must be number or null"),
        ("currency = \n", r"not TOML: .*line 1"),
    ],
)
def test_what_is_wrong_is_named_with_line_and_key(tmp_path, text, message):
    path = write(tmp_path / "prices.toml", text)
    with pytest.raises(ConfigError, match=message):
        load_prices(str(path))


def test_a_missing_file_names_the_key(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"report\.prices: .*none\.toml"):
        load_prices(str(tmp_path / "none.toml"))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=VARIABLE):
        load_prices()


def test_the_shipped_file_says_how_to_bring_your_own():
    text = SHIPPED.read_text(encoding="utf-8")
    assert "report.prices" in text
    assert VARIABLE in text
