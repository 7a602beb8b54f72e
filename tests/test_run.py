import json
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from postgrad.config import parse_recipe
from postgrad.errors import CheckpointError, RunError
from postgrad.run import (
    Run,
    create_run,
    disk_errors,
    find_resumable,
    hardware,
    list_runs,
    open_run,
    read_jsonl,
    verify_checksums,
    versions,
    write_atomic,
)

TREE = {"name": "bot", "model": {"base": "some/model"}, "data": {"train": "rows.jsonl"}}
RECIPE = parse_recipe(TREE)
OTHER = parse_recipe({**TREE, "train": {"learning_rate": 1e-4}})


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
"""
"""Every write beyond 4 kB fails from here on."""


def python(code, *arguments, first=""):
    """Run code in another process; it prints what the test looks at."""
    command = [sys.executable, "-c", first + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_new_run_says_who_it_is(tmp_path):
    run = create_run(RECIPE, "train", root=tmp_path)
    record = run.record
    assert run.path.name.endswith(f"-bot-train-{RECIPE.hash()[:6]}")
    assert record["id"] == run.path.name
    assert (record["status"], record["verb"], record["seed"]) == ("running", "train", 7)
    assert record["recipe_hash"] == RECIPE.hash()
    assert record["versions"]["python"]
    assert record["hardware"]["cores"] >= 1
    assert run.recipe == RECIPE == run.config
    assert [line["event"] for line in read_jsonl(run.events_path)] == ["created"]


def test_the_resolved_config_wins_over_the_recipe(tmp_path):
    run = create_run(RECIPE, "train", root=tmp_path)
    write_atomic(run.config_path, OTHER.to_yaml().encode())
    assert run.config == OTHER
    assert run.recipe == RECIPE


def test_a_second_run_of_the_day_gets_a_number(tmp_path):
    paths = [create_run(RECIPE, "train", root=tmp_path).path for _ in range(3)]
    assert [path.name.removeprefix(paths[0].name) for path in paths] == ["", "-2", "-3"]


def test_runs_started_at_the_same_moment_never_share_a_directory(tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(create_run(RECIPE, "train", root=tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.path for run in found}) == 8


def test_out_is_used_as_it_is_and_never_overwritten(tmp_path):
    out = tmp_path / "deep" / "out"
    assert create_run(RECIPE, "run", out).path == out
    with pytest.raises(RunError, match="not empty") as caught:
        create_run(RECIPE, "run", out)
    assert "--resume" in caught.value.remedy
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        create_run(RECIPE, "run", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_out_directory_is_fine(tmp_path):
    assert create_run(RECIPE, "run", tmp_path).path == tmp_path


def test_a_directory_that_cannot_be_made_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*Not a directory"):
        create_run(RECIPE, "run", tmp_path / "file" / "out")
    with pytest.raises(RunError, match="cannot write"):
        create_run(RECIPE, "run", root=tmp_path / "file")


def test_a_read_only_directory_is_a_run_error(tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from postgrad.config import parse_recipe
        from postgrad.errors import RunError
        from postgrad.run import create_run
        os.chdir(sys.argv[1])
        if os.geteuid() == 0:
            os.seteuid(65534)
        for out in (Path("out"), Path("locked/out")):
            try:
                create_run(parse_recipe(eval(sys.argv[2])), "run", out)
            except RunError as error:
                print(error.message)
    """
    (tmp_path / "locked").mkdir(mode=0o000)
    tmp_path.chmod(0o555)
    result = python(code, tmp_path, TREE)
    tmp_path.chmod(0o755)
    (tmp_path / "locked").chmod(0o755)
    assert result.stdout.splitlines() == [
        "cannot write out: Permission denied",
        "cannot write locked/out: Permission denied",
    ]


def test_a_run_is_found_by_recipe_and_verb(tmp_path):
    assert find_resumable(RECIPE, "train", None, root=tmp_path) is None
    first = create_run(RECIPE, "train", root=tmp_path)
    create_run(OTHER, "train", root=tmp_path)
    create_run(RECIPE, "run", root=tmp_path)
    assert find_resumable(RECIPE, "train", None, root=tmp_path) == first
    second = create_run(RECIPE, "train", root=tmp_path)
    assert find_resumable(RECIPE, "train", None, root=tmp_path) == second
    assert find_resumable(RECIPE, "train", first.path) == first
    assert find_resumable(RECIPE, "train", tmp_path / "nowhere") is None


def test_a_run_of_another_recipe_is_refused_and_the_field_named(tmp_path):
    out = create_run(RECIPE, "train", tmp_path / "out").path
    with pytest.raises(RunError) as caught:
        find_resumable(OTHER, "train", out)
    assert "train.learning_rate: 'auto' there, 0.0001 here" in caught.value.message
    assert "--out" in caught.value.remedy


def test_open_run_needs_a_run(tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        open_run(tmp_path)
    run = create_run(RECIPE, "train", tmp_path / "out")
    assert open_run(run.path) == run


def test_runs_are_listed_oldest_first_and_a_damaged_one_does_not_hide_the_others(tmp_path):
    assert list_runs(tmp_path / "nowhere") == []
    runs = [create_run(RECIPE, "train", root=tmp_path) for _ in range(3)]
    for run, year in zip(runs, ("2026", "2024", "2025"), strict=True):
        run.update(created=f"{year}-01-01")
    assert list_runs(tmp_path) == [runs[1], runs[2], runs[0]]
    runs[0].record_path.write_text("{")
    assert list_runs(tmp_path) == [runs[0], runs[1], runs[2]]


def test_update_merges_and_seconds_add_up(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    run.update(verdict="improved")
    run.add_seconds("train", 1.5)
    run.add_seconds("train", 2.0)
    run.add_seconds("data", 0.25)
    assert run.record["verdict"] == "improved"
    assert run.record["seconds"] == {"train": 3.5, "data": 0.25}
    assert run.record["name"] == "bot"


def test_metrics_are_read_back_and_rewound(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    for step in range(1, 5):
        run.metrics(step, step * 100, step * 0.5, **{"train/loss": 1 / step})
    run.rewind_metrics(2)
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1] == {"step": 2, "tokens": 200, "seconds": 1.0, "train/loss": 0.5}


def test_a_line_cut_off_by_a_kill_is_left_out_and_written_over(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    run.metrics(1, 100, 0.5, loss=1.0)
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step": 2, "tok')
    assert [line["step"] for line in run.read_metrics()] == [1]
    run.metrics(2, 200, 1.0, loss=0.5)
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_a_first_line_cut_off_leaves_an_empty_file(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    run.metrics_path.write_bytes(b'{"st')
    run.metrics(1, 100, 0.5)
    assert [line["step"] for line in run.read_metrics()] == [1]


def test_damage_in_the_middle_is_an_error_with_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(RunError, match=r"x\.jsonl:2: not JSON"):
        read_jsonl(path)


def test_text_of_every_kind_survives_jsonl(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    rows = [{"text": "é \u2028 \x00 \U0001f600 \r\n"}, {"text": ""}]
    run.write_jsonl(run.kept_path, rows)
    assert read_jsonl(run.kept_path) == rows


def test_a_damaged_record_is_an_error_with_its_path(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    run.record_path.write_text("{")
    with pytest.raises(RunError, match=r"run\.json is not JSON"):
        _ = run.record
    run.record_path.unlink()
    with pytest.raises(RunError, match=r"run\.json is missing"):
        _ = run.record


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from postgrad.errors import RunError
        from postgrad.run import write_atomic
        try:
            write_atomic(Path(sys.argv[1]), b"x" * 100_000)
        except RunError as error:
            print(error)
    """
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    result = python(code, path, first=FULL_DISK)
    assert f"cannot write {path}: File too large" in result.stdout
    assert "free space" in result.stdout
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.bin"]


def test_a_full_disk_while_publishing_leaves_no_half_checkpoint(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from postgrad.errors import RunError
        from postgrad.run import Run
        run = Run(Path(sys.argv[1]))
        try:
            with run.publish(run.checkpoints / "step-000002") as folder:
                (folder / "weights").write_bytes(b"y" * 100_000)
        except RunError as error:
            print(error)
    """
    run = create_run(RECIPE, "train", tmp_path / "out")
    with run.publish(run.checkpoints / "step-000001") as folder:
        (folder / "weights").write_bytes(b"x")
    result = python(code, run.path, first=FULL_DISK)
    assert "cannot write" in result.stdout
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    verify_checksums(run.checkpoints / "step-000001")


def test_publish_shows_all_or_nothing(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    final = run.checkpoints / "step-000001"

    def write(content):
        with run.publish(final) as folder:
            assert folder.parent == final.parent
            (folder / "weights").write_text(content)
            (folder / "inner").mkdir()
            (folder / "inner" / "state").write_text(content)
            if content == "bad":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("bad")
    assert not final.exists()
    write("one")
    with pytest.raises(KeyboardInterrupt):
        write("bad")
    assert (final / "weights").read_text() == "one"
    write("two")
    assert (final / "inner" / "state").read_text() == "two"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]


def test_verify_checksums_finds_any_damage(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    final = run.checkpoints / "step-000001"
    with run.publish(final) as folder:
        (folder / "weights").write_bytes(b"0123456789")
        (folder / "state").write_bytes(b"abc")
    verify_checksums(final)
    (final / "weights").write_bytes(b"012345678")
    with pytest.raises(CheckpointError, match="damaged: weights"):
        verify_checksums(final)
    (final / "weights").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        verify_checksums(final)
    with pytest.raises(CheckpointError, match="incomplete"):
        verify_checksums(tmp_path / "nowhere")


def test_pointers_move_and_survive_a_moved_run(tmp_path):
    run = create_run(RECIPE, "train", tmp_path / "out")
    assert run.pointed("best") is None
    for name in ("step-000001", "step-000002"):
        with run.publish(run.checkpoints / name) as folder:
            (folder / "weights").write_text(name)
        run.point("best", run.checkpoints / name)
    assert run.pointed("best") == run.checkpoints / "step-000002"
    moved = Run(run.path.rename(tmp_path / "moved"))
    assert moved.pointed("best") == moved.checkpoints / "step-000002"


def test_a_second_process_is_kept_out(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from postgrad.errors import RunError
        from postgrad.run import Run
        try:
            with Run(Path(sys.argv[1])).lock():
                print("mine")
        except RunError as error:
            print(error)
    """
    run = create_run(RECIPE, "train", tmp_path / "out")
    with run.lock():
        assert "in use by another process" in python(code, run.path).stdout
    assert python(code, run.path).stdout == "mine\n"


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from postgrad.run import Run
        with Run(Path(sys.argv[1])).lock():
            os.kill(os.getpid(), 9)
    """
    run = create_run(RECIPE, "train", tmp_path / "out")
    assert python(code, run.path).returncode == -signal.SIGKILL
    with run.lock():
        pass


def test_the_seal_covers_every_file_but_the_log(tmp_path):
    run = create_run(RECIPE, "run", tmp_path / "out")
    run.metrics(1, 10, 0.1)
    run.report_path.write_text("<html></html>")
    with run.publish(run.checkpoints / "step-000001") as folder:
        (folder / "weights").write_text("w")
    run.point("best", run.checkpoints / "step-000001")
    run.seal()
    record = run.record
    assert record["status"] == "done"
    assert record["finished"] >= record["created"]
    assert set(record["sealed"]) == {
        "recipe.yaml",
        "metrics.jsonl",
        "report.html",
        "checkpoints/step-000001/weights",
        "checkpoints/step-000001/checksums.json",
    }
    assert read_jsonl(run.events_path)[-1]["event"] == "sealed"


def test_evidence_paths_have_no_slashes_from_arms(tmp_path):
    path = Run(tmp_path).evidence_path("test", "base/few-shot-8")
    assert path == tmp_path / "evidence" / "test.base-few-shot-8.jsonl"


def test_disk_errors_let_other_errors_through(tmp_path):
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError("a bug")


def test_versions_and_hardware_are_plain_data():
    assert json.loads(json.dumps([versions(), hardware()]))
    assert hardware()["memory_bytes"] > 2**28
