import io
import os
import pty
import re
import subprocess
import sys

import pytest

from postgrad.progress import (
    BarDisplay,
    LineDisplay,
    Meter,
    SilentDisplay,
    choose_display,
    duration,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_meter_knows_speed_and_time_left(clock):
    meter = Meter("train", 1000, "tokens", clock=clock)
    assert meter.seconds_left is None
    clock.now += 10
    meter.advance(200, loss=1.5)
    assert meter.rate == 20
    assert meter.seconds_left == 40
    assert meter.text() == "200 of 1,000 tokens (20%), 20 tokens/s, 40 s left, loss 1.5"
    assert meter.text(brief=True) == "20%, 20 tokens/s, 40 s left, loss 1.5"


def test_what_an_earlier_process_did_counts_but_not_as_speed(clock):
    meter = Meter("train", 1000, "tokens", done=800, clock=clock)
    clock.now += 10
    meter.advance(100)
    assert meter.rate == 10
    assert meter.seconds_left == 10
    assert "900 of 1,000 tokens (90%)" in meter.text()


def test_a_total_may_be_unknown_or_exceeded(clock):
    unknown = Meter("read", None, "rows", clock=clock)
    small = Meter("read", 10, "rows", clock=clock)
    clock.now += 1
    unknown.advance(5)
    small.advance(20)
    assert unknown.text() == "5 rows, 5 rows/s"
    assert unknown.seconds_left is None
    assert small.seconds_left == 0
    assert "(100%)" in small.text()


def test_lines_are_far_apart_and_the_last_one_sums_up(clock):
    stream = io.StringIO()
    display = LineDisplay(stream, clock)
    clock.now += 62
    display.stage("train")
    display.note("two\nlines")
    with display.track("train", 100, "steps") as track:
        for _ in range(100):
            clock.now += 0.5
            track.advance(1, loss=0.25)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["[0:01:02] train", "  two", "  lines"]
    assert len(lines) == 3 + 5 + 1
    assert lines[3] == "  train: 20 of 100 steps (20%), 2 steps/s, 40 s left, loss 0.25"
    assert lines[-1] == "  train: 100 of 100 steps (100%), 2 steps/s, loss 0.25, took 50 s"


def test_the_summary_is_written_when_the_block_fails(clock):
    stream = io.StringIO()

    def stopped():
        with LineDisplay(stream, clock).track("train", 10) as track:
            track.advance(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "3 of 10 tokens" in stream.getvalue()


def test_silence_counts_nothing_visible(capsys):
    display = SilentDisplay()
    display.stage("train")
    display.note("x")
    with display.track("train", 10) as track:
        track.advance(10, loss=1.0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_display_follows_the_stream_and_the_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_display(io.StringIO()), LineDisplay)
    _, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        assert isinstance(choose_display(stream), BarDisplay)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(choose_display(stream), LineDisplay)
        monkeypatch.setenv("RANK", "1")
        assert isinstance(choose_display(stream), SilentDisplay)


BARS = """
from postgrad.progress import choose_display
display = choose_display()
display.stage("train")
with display.track("train", 10, "steps") as outer:
    outer.advance(4, loss=0.5)
    with display.track("held-out [x]", 5, "rows") as inner:
        inner.advance(5)
    display.note("a [bold]note[/bold]")
    outer.advance(6)
print("data")
"""


def on_a_terminal(code, **environment):
    """Return what a process writes to a terminal as its standard error, and its stdout."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(terminal)
    out = process.communicate()[0].decode()
    seen = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(main)
    assert process.returncode == 0
    return seen.decode(), out


def test_bars_leave_their_summaries_behind_and_stdout_alone():
    seen, out = on_a_terminal(BARS)
    assert out == "data\n"
    assert "held-out [x]: 5 of 5 rows (100%)" in seen
    assert "a [bold]note[/bold]" in seen
    assert "train: 10 of 10 steps (100%)" in seen
    assert "\x1b[1m[0:00:00] train" in seen
    assert "━" in seen


def test_no_color_is_honoured():
    seen, _ = on_a_terminal(BARS, NO_COLOR="1")
    assert not re.search(r"\x1b\[(3|4|9)\d", seen)
    assert "train: 10 of 10 steps (100%)" in seen


def test_durations_read_like_speech():
    assert [duration(s) for s in (0, 9.94, 59.6, 60, 3599, 3600, 90000)] == [
        "0.0 s",
        "9.9 s",
        "1 min 00 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "25 h 00 min",
    ]
