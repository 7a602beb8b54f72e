"""The command line: verbs, dotted overrides, one JSON document, errors with a remedy.

Nothing heavy is imported here: `postgrad --help` answers before torch, numpy or pydantic would have
loaded. Results go to stdout, everything for people to stderr. Exit codes: 0 done, 1 failed,
2 usage or recipe, 3 refused by a check, 4 gate not met, 130 interrupted with the checkpoint saved.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from postgrad import __version__, errors

if TYPE_CHECKING:
    from postgrad.stages import Options

_USAGE_ERROR: Any = typer.BadParameter.__base__
"""What typer raises for a wrong command line, whichever click it carries."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What a verb answers: the JSON document, the same for people, the exit code."""

    document: Mapping[str, Any]
    text: Callable[[], str]
    exit_code: int = 0


app = typer.Typer(
    name="postgrad",
    help="Fine-tune a language model on your own examples, and prove what was gained and lost.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, for example train.learning_rate=1e-4."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Run directory [runs/DATE-NAME-VERB-HASH]."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run of this recipe.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, then stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.callback(invoke_without_command=True)
def postgrad(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> Reply | None:
    """Fine-tune a language model on your own examples, and prove what was gained and lost."""
    if version:
        return Reply({"version": __version__}, lambda: f"postgrad {__version__}")
    return None


@app.command("demo")
def demo(
    minutes: Annotated[
        float, typer.Option("--minutes", min=1, help="Time budget on two cores.")
    ] = 6.0,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> Reply:
    """Train and evaluate the embedded example.

    Fetches a 135M model and 14,000 licence notices once, tunes the model to name the licence, and
    compares it with the untuned one, without examples and with the nearest ones in the prompt.
    Works offline from the second time on.
    """
    return _staged("demo", minutes, _options(out, resume))


@app.command("run")
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", metavar="N", min=2, help="Train N seeds, same rows.")
    ] = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> Reply:
    """Do a whole recipe: data, train, evaluate, report."""
    if seeds is not None:
        options = _options(out, resume, dry_run)
        return _staged("run_seeds", _recipe(recipe, overrides), seeds, options)
    return _staged("run", _recipe(recipe, overrides), _options(out, resume, dry_run))


@app.command("estimate")
def estimate(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Annotated[
        Path, typer.Option("--runs", metavar="DIR", help="Where earlier runs give the speed.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> Reply:
    """Say what a recipe takes: steps, operations, memory, time, money.

    Reads rows, tokenizer and config.json, not the weights. The time comes from an earlier run of
    such a model on this machine, else from a probe that is made once; --dry-run of run and train
    measures it on the model itself.
    """
    return _staged("estimate", _recipe(recipe, overrides), runs, _options(None))


@app.command("train")
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> Reply:
    """Check the data and the model, then train."""
    return _staged("train", _recipe(recipe, overrides), _options(out, resume, dry_run))


@app.command("evaluate")
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN_DIR", help="A YAML recipe or a trained run.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> Reply:
    """Compare base and tuned model on the test rows."""
    if not target.is_dir():
        return _staged("evaluate", _recipe(target, overrides), _options(out, resume))
    if out is not None:
        raise errors.ConfigError(
            f"{target} is a run: its evaluation is written into it", "leave out --out"
        )
    if overrides:
        raise errors.ConfigError(
            f"{target} is a run: its recipe cannot be overridden",
            f"copy {target / 'recipe.yaml'}, change it and evaluate that",
        )
    from postgrad.run import open_run

    return _staged("evaluate", open_run(target), _options(out, resume))


@app.command("compare")
def compare(
    run_dirs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN_A RUN_B", help="Two evaluated runs; more with --picture."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE.html", help="Draw the runs' dials in one picture."),
    ] = None,
    plan: Annotated[
        float | None,
        typer.Option(
            "--plan", metavar="POINTS", min=0.1, max=100, help="Say how many rows show POINTS."
        ),
    ] = None,
    as_json: AsJson = False,
) -> Reply:
    """Compare two runs row by row, or plan how many rows to test.

    Both runs must have answered the same rows. With --plan POINTS and no run, one run or two: how
    many test rows show a difference of so many percentage points.
    """
    from postgrad.run import open_run

    found = [open_run(path) for path in run_dirs or ()]
    if plan is not None and len(found) <= 2:
        return _staged("plan_rows", plan, found)
    if len(found) != 2 and not (picture and len(found) > 2):
        raise errors.ConfigError(
            f"compare takes two runs, not {len(found)}", "write: compare RUN_A RUN_B"
        )
    return _staged("compare", found, picture)


@app.command("report")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
    as_json: AsJson = False,
) -> Reply:
    """Write report.html and MODEL_CARD.md of a run."""
    from postgrad.run import open_run

    return _staged("report", open_run(run_dir))


@app.command("export")
def export(
    target: Annotated[
        Literal["lm-eval"], typer.Argument(metavar="lm-eval", help="The program to write for.")
    ],
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN_DIR", help="A YAML recipe or a run.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder [RUN_DIR/export/lm-eval, NAME-lm-eval]."),
    ] = None,
    samples: Annotated[
        list[Path] | None,
        typer.Option("--samples", metavar="FILE", help="Read this sample log; can be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> Reply:
    """Write the test set for another program.

    lm-eval: a task of lm-evaluation-harness. With --samples, its sample logs become evidence: every
    log is measured, and compared row by row with the first.
    """
    if not source.is_dir():
        return _staged("export_lm_eval", _recipe(source, overrides), out, samples or ())
    if overrides:
        raise errors.ConfigError(
            f"{source} is a run: its recipe cannot be overridden", "leave out KEY=VALUE"
        )
    from postgrad.run import open_run

    return _staged("export_lm_eval", open_run(source), out, samples or ())


@app.command("runs")
def runs(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory of runs, or one run.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> Reply:
    """List runs with their verdicts, or show one."""
    from postgrad import console, listing

    if (directory / "run.json").exists():
        found = listing.describe_run(directory)
        return Reply(found, lambda: console.run_text(found))
    if not directory.is_dir() and directory != Path("runs"):
        raise errors.RunError(f"no directory {directory}", "give a directory of runs, or one run")
    rows = listing.list_summaries(directory)
    return Reply({"runs": rows}, lambda: console.runs_text(rows, str(directory)))


@app.command("explain")
def explain(
    target: Annotated[
        str | None, typer.Argument(metavar="KEY|RECIPE", help="A key, or a recipe with --row.")
    ] = None,
    overrides: Overrides = None,
    row: Annotated[
        int | None, typer.Option("--row", metavar="N", min=1, help="Show training row N rendered.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema.")] = False,
    as_json: AsJson = False,
) -> Reply:
    """Say what a recipe key takes, and why its default.

    Without a key: all keys. With --row N RECIPE: the N-th training row as the model sees it, with
    the supervised tokens marked.
    """
    from postgrad import config

    if row is not None:
        return _explain_row(row, target, overrides)
    if schema:
        found = config.json_schema()
        return Reply(found, lambda: json.dumps(found, indent=2, ensure_ascii=False))
    if overrides:
        raise errors.ConfigError("explain takes one key", "name one key, or add --row N")
    return _explain_key(target)


@app.command("doctor")
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Also check this recipe's data.")
    ] = None,
    overrides: Overrides = None,
    verify_resume: Annotated[
        bool, typer.Option("--verify-resume", help="Prove on RECIPE that resuming is exact.")
    ] = False,
    as_json: AsJson = False,
) -> Reply:
    """Check the machine, and a recipe's data and model.

    With a recipe every pre-flight check is run, and nothing is trained.
    """
    from postgrad import console
    from postgrad import doctor as checkup

    if verify_resume:
        if recipe is None:
            raise errors.ConfigError("--verify-resume needs a recipe", "add the path of a recipe")
        proof = _staged("verify_resume", _recipe(recipe, overrides), _options(None)).document
        return Reply(proof, lambda: console.mapping_text(proof))
    with contextlib.redirect_stdout(sys.stderr):
        checks = [dataclasses.asdict(check) for check in checkup.examine(Path.cwd())]
    document: dict[str, Any] = {"checks": checks}
    if recipe is not None:
        found = _staged("doctor", _recipe(recipe, overrides)).document
        document = {**found, "checks": [*checks, *found.get("checks", ())]}
    refused = any(not check["passed"] and not check["waived"] for check in document["checks"])
    colour = _colour(sys.stdout)
    return Reply(
        document, lambda: console.checks_text(document["checks"], colour), 3 if refused else 0
    )


def _explain_key(key: str | None) -> Reply:
    from postgrad import config, console, keys

    known = config.fields()
    if key is None:
        return Reply({"keys": known}, lambda: console.keys_text(known))
    if key not in known:
        near = keys.nearest_key(key, known)
        hint = f"did you mean {near}?" if near else "run `postgrad explain` for all keys"
        raise errors.ConfigError(f"no key {key}", hint)
    inside = [name for name in known if name.startswith(f"{key}.")]
    entry = {"key": key, **known[key]} | ({"keys": inside} if inside else {})
    return Reply(entry, lambda: console.key_text(key, known[key], inside))


def _explain_row(row: int, target: str | None, overrides: list[str] | None) -> Reply:
    if target is None:
        raise errors.ConfigError("--row needs a recipe", "write: explain --row N RECIPE")
    from postgrad import console, stages

    recipe = _recipe(Path(target), overrides)
    with contextlib.redirect_stdout(sys.stderr):
        pieces = stages.explain_row(recipe, row)
    document = [{"text": text, "weight": weight} for text, weight in pieces]
    colour = _colour(sys.stdout)
    return Reply({"row": row, "pieces": document}, lambda: console.row_text(pieces, colour))


def _recipe(path: Path, overrides: list[str] | None) -> Any:
    from postgrad.config import load_recipe

    return load_recipe(path, overrides or ())


def _options(out: Path | None, resume: bool = False, dry_run: bool = False) -> "Options":
    from postgrad.progress import choose_display
    from postgrad.stages import Options

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise errors.ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains in one process",
            "use `torchrun --nproc-per-node 1`, or no torchrun",
        )

    return Options(out=out, resume=resume, dry_run=dry_run, show=choose_display())


def _staged(stage: str, *arguments: Any) -> Reply:
    """Run a stage; whatever a library prints goes to stderr, so that stdout stays one document."""
    from postgrad import console, stages

    with contextlib.redirect_stdout(sys.stderr):
        document = getattr(stages, stage)(*arguments)
    met = all(gate["status"] == "PASS" for gate in document.get("gates", ()))
    code = 0 if met or stage == "report" else 4
    return Reply(document, lambda: console.result_text(document), code)


def call(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are rendered, never raised."""
    as_json = "--json" in arguments
    try:
        reply = app(arguments, standalone_mode=False, prog_name="postgrad")
    except errors.PostgradError as error:
        if os.environ.get("POSTGRAD_DEBUG") == "1":
            traceback.print_exc()
        return _fail(error.message, error.remedy, error.exit_code, type(error).__name__, as_json)
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "postgrad"
        message = error.format_message()
        if not arguments:
            sys.stderr.write(message + "\n")
            return 2
        return _fail(message.rstrip("."), f"see `{path} --help`", 2, "UsageError", as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(as_json)
    except BrokenPipeError:
        return _closed_pipe()
    except Exception as error:  # noqa: BLE001 - the last line of defence, and it says so
        traceback.print_exc()
        remedy = "this is a bug in postgrad: please report it with the lines above"
        return _fail(f"{type(error).__name__}: {error}", remedy, 1, type(error).__name__, as_json)
    if isinstance(reply, Reply):
        return _print(reply.document if as_json else None, reply.text, reply.exit_code)
    return _interrupted(as_json) if reply == 130 else int(reply or 0)


def main() -> NoReturn:
    """Entry point of `postgrad`, `python -m postgrad` and `torchrun -m postgrad`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(call(sys.argv[1:]))


def _fail(message: str, remedy: str, code: int, kind: str, as_json: bool) -> int:
    from postgrad.console import error_text

    sys.stderr.write(error_text(message, remedy, _colour(sys.stderr)) + "\n")
    document = {"error": {"kind": kind, "message": message, "remedy": remedy, "exit_code": code}}
    return _print(document, str, code) if as_json else code


def _interrupted(as_json: bool) -> int:
    remedy = "run the same command again, with --resume when it had begun a run"
    return _fail("interrupted", remedy, 130, "Interrupted", as_json)


def _print(document: Mapping[str, Any] | None, text: Callable[[], str], code: int) -> int:
    """Print the document, or else the text; only rank 0 prints under torchrun."""
    if os.environ.get("RANK", "0") != "0":
        return code
    try:
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        if document is not None:
            shown = json.dumps(_jsonable(document), indent=2, ensure_ascii=not utf8)
        else:
            shown = text()
        sys.stdout.write(shown + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    return code


def _closed_pipe() -> int:
    """Stop quietly: whoever read our output (head, less) has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _jsonable(value: Any) -> Any:
    """Return plain JSON data; what is not a finite number becomes null, as JSON has no NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _colour(stream: Any) -> bool:
    return bool(stream.isatty()) and "NO_COLOR" not in os.environ
