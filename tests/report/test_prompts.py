"""The prompt search on the page: every variant, the winner, and how long it all took."""

from report_runs import add_rivals

from postgrad.report.collect import collect
from postgrad.report.html import page
from postgrad.report.model_card import write_model_card
from postgrad.report.prompts import prompts_section


def test_it_shows_every_prompt_the_best_first_and_the_effort(finished):
    assert prompts_section(collect(finished)) is None
    add_rivals(finished)
    report = collect(finished)
    shown = prompts_section(report)
    said = "4 of 11 prompts tried on 100 validation rows in 2 min 16 s of 6 min 11 s."
    assert said in shown
    assert "Best: 4 nearest examples (embedded), 60.0%." in shown
    assert "The training took 6 min 11 s." in shown
    names = (
        "4 nearest examples (embedded)",
        "8 nearest examples<",
        "8 examples, draw 2",
        "no exam",
    )
    places = [shown.index(name, shown.index("<tbody>")) for name in names]
    assert places == sorted(places)
    assert "<b>4 nearest examples (embedded)</b>" in shown
    assert "Name &lt;it&gt;." in shown
    assert "50.0\N{EN DASH}69.0%" in shown
    assert shown in page(report)
    write_model_card(finished)
    assert "4 of 11 prompts tried on 100" in finished.card_path.read_text(encoding="utf-8")
