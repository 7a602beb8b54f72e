"""Runs to report on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import build_run

from postgrad.run import Run


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "finished").path


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Run:
    """A run that trained and evaluated; each test has its own copy."""
    return Run(shutil.copytree(finished_once, tmp_path / "finished"))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """`build_run` into the test's folder."""
    return lambda **changes: build_run(tmp_path / "made", **changes)
