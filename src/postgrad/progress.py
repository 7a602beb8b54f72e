"""What a person watches while a stage runs: stages, notes and progress, on stderr only.

A bar on a terminal, plain lines elsewhere, nothing at all for tests and for ranks other than 0.
Standard output belongs to data and is never touched here. `rich` is imported when a bar is needed.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Protocol

Clock = Callable[[], float]

SECONDS_BETWEEN_LINES = 10.0
"""Plain lines of one track are at least this far apart, so that a log stays readable."""


class Track(Protocol):
    """Progress of one piece of work."""

    def advance(self, amount: int, **figures: float) -> None:
        """Add `amount` units; `figures` (loss=1.2) are shown beside and kept until replaced."""


class Display(Protocol):
    """Where a stage reports to people. Safe to call from the innermost loop."""

    def stage(self, name: str) -> None:
        """Say that a stage begins."""

    def note(self, text: str) -> None:
        """Say one thing worth knowing now."""

    def track(
        self, label: str, total: int | None, unit: str = "tokens", done: int = 0
    ) -> AbstractContextManager[Track]:
        """Show units per second and time left until the block ends.

        `done` units were finished earlier (a resumed run): they count, but not towards the speed.
        """


class Meter:
    """The arithmetic of a track: how far, how fast, how long still."""

    def __init__(
        self, label: str, total: int | None, unit: str, done: int = 0, clock: Clock = time.monotonic
    ) -> None:
        """Start counting at `done` of `total` units (None = unknown)."""
        self.label, self.total, self.unit = label, total, unit
        self.done, self.first = done, done
        self.figures: dict[str, float] = {}
        self._clock, self._start = clock, clock()

    def advance(self, amount: int, **figures: float) -> None:
        """Add units and replace figures."""
        self.done += amount
        self.figures.update(figures)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units per second of this process; 0 before anything was done."""
        return (self.done - self.first) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time until the total at the mean rate so far; None while that is unknown."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0, self.total - self.done) / self.rate

    def text(self, brief: bool = False) -> str:
        """Return the state as one line without the label; `brief` leaves out what a bar shows."""
        count, share = f"{self.done:,} {self.unit}", 0.0
        if self.total:
            share = min(1.0, self.done / self.total)
            count = f"{self.done:,} of {self.total:,} {self.unit} ({share:.0%})"
        parts = [f"{share:.0%}" if brief and self.total else count]
        if self.rate > 0:
            parts.append(f"{_number(self.rate)} {self.unit}/s")
        if self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        parts += [f"{name} {value:.4g}" for name, value in self.figures.items()]
        return ", ".join(parts)

    def summary(self) -> str:
        """Return the closing line, label included."""
        return f"{self.label}: {self.text()}, took {duration(self.seconds)}"


class SilentDisplay:
    """Shows nothing."""

    def stage(self, name: str) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    @contextlib.contextmanager
    def track(
        self, label: str, total: int | None, unit: str = "tokens", done: int = 0
    ) -> Iterator[Track]:
        """Count, and show nothing."""
        yield Meter(label, total, unit, done)


class LineDisplay:
    """Plain lines for logs, pipes and dumb terminals."""

    def __init__(self, stream: IO[str], clock: Clock = time.monotonic) -> None:
        """Write to `stream`; `clock` returns seconds."""
        self._stream, self._clock, self._start = stream, clock, clock()

    def stage(self, name: str) -> None:
        """Write the stage with the time since the start."""
        self._write(f"[{_clock_text(self._clock() - self._start)}] {name}")

    def note(self, text: str) -> None:
        """Write the text, indented."""
        self._write("  " + text.replace("\n", "\n  "))

    @contextlib.contextmanager
    def track(
        self, label: str, total: int | None, unit: str = "tokens", done: int = 0
    ) -> Iterator[Track]:
        """Write a line every few seconds and one at the end."""
        meter = _LineTrack(Meter(label, total, unit, done, self._clock), self._write)
        try:
            yield meter
        finally:
            self._write("  " + meter.meter.summary())

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class _LineTrack:
    def __init__(self, meter: Meter, write: Callable[[str], None]) -> None:
        self.meter, self._write, self._shown = meter, write, 0.0

    def advance(self, amount: int, **figures: float) -> None:
        self.meter.advance(amount, **figures)
        if self.meter.seconds - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = self.meter.seconds
            self._write(f"  {self.meter.label}: {self.meter.text()}")


class BarDisplay:
    """Bars on a terminal; finished tracks leave their summary line behind."""

    def __init__(self, stream: IO[str]) -> None:
        """Draw on `stream`; colours follow NO_COLOR and the terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(file=stream, highlight=False)
        self._start = time.monotonic()
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )

    def stage(self, name: str) -> None:
        """Print the stage with the time since the start."""
        passed = _clock_text(time.monotonic() - self._start)
        self._console.print(f"[{passed}] {name}", style="bold", markup=False)

    def note(self, text: str) -> None:
        """Print the text, indented, above any bar."""
        self._console.print("  " + text.replace("\n", "\n  "), markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def track(
        self, label: str, total: int | None, unit: str = "tokens", done: int = 0
    ) -> Iterator[Track]:
        """Draw a bar while the block runs; tracks may nest."""
        meter = Meter(label, total, unit, done)
        room = max(10, self._console.width - len(label) - 22)

        def text() -> str:
            whole = meter.text(brief=True)
            return whole if len(whole) <= room else whole[: room - 3] + "..."

        class Bar:
            def advance(_, amount: int, **figures: float) -> None:
                meter.advance(amount, **figures)
                self._progress.update(task, completed=meter.done, text=text())

        task = self._progress.add_task(label, total=total, completed=done, text=text())
        if len(self._progress.tasks) == 1:
            self._progress.start()
        try:
            yield Bar()
        finally:
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()
            self.note(meter.summary())


def choose_display(stream: IO[str] | None = None) -> Display:
    """Return bars for a terminal, lines for anything else, silence for ranks other than 0."""
    stream = stream or sys.stderr
    if os.environ.get("RANK", "0") != "0":
        return SilentDisplay()
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return BarDisplay(stream)
    return LineDisplay(stream)


def duration(seconds: float) -> str:
    """Return a length of time as people say it.

    >>> [duration(s) for s in (0.26, 42.4, 125, 7260)]
    ['0.3 s', '42 s', '2 min 05 s', '2 h 01 min']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _clock_text(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
