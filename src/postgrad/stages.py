"""One wiring function per verb: the map of the system. Each is short; the work is elsewhere."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from postgrad.config import Recipe
from postgrad.data.dataset import Dataset, load_dataset, read_dataset, save_dataset
from postgrad.data.replay import SELF, planned_self_replay
from postgrad.errors import ConfigError, RunError
from postgrad.evaluate.floor import Floor, check_floors, load_floors, open_watch, planned_amount
from postgrad.progress import Display, SilentDisplay
from postgrad.run import Run, create_run, find_resumable, read_json, write_atomic
from postgrad.types import Check, Comparison, Measurement, Split, Verdict


@dataclass(frozen=True, slots=True)
class Options:
    """What every verb takes besides its recipe."""

    out: Path | None = None
    """The run directory; None = a new one below runs/."""
    resume: bool = False
    """Go on with the run of an equal recipe."""
    dry_run: bool = False
    """Print the plan and stop."""
    show: Display = field(default_factory=SilentDisplay)
    """Where progress goes."""


def run(recipe: Recipe, options: Options, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Data, pre-flight, training, evaluation, report: the whole job in one run directory."""
    _check_benchmarks(recipe)
    if options.dry_run:
        return plan(recipe, options)
    with _open(recipe, "run", options) as run:
        run.update(**(facts or {}))
        return _whole(run, options)


def run_seeds(recipe: Recipe, count: int, options: Options) -> dict[str, Any]:
    """Do a recipe with `count` seeds on the same split, each in a run of its own, and combine them.

    A seed that is finished is not run again; what the base model answered is taken from the first.
    """
    from postgrad.evaluate.seeds import combine, reuse_base_evidence

    if options.dry_run:
        raise ConfigError("--dry-run plans one training", "leave --seeds out, and multiply")
    _check_benchmarks(recipe)
    with _open(recipe, "seeds", options) as parent:
        members: list[Run] = []
        for seed in range(recipe.seed, recipe.seed + count):
            own = recipe.with_seed(seed)
            if members:  # one learning curve is enough, and seeds differ in nothing but the seed
                settings = own.evaluate.model_copy(update={"learning_curve": ()})
                same = {"base_precision": members[0].config.train.base_precision}
                training = own.train.model_copy(update=same)
                own = own.model_copy(update={"evaluate": settings, "train": training})
            member = Run(parent.seeds / str(seed))
            if not _is_done(member):
                inside = _inside(options, member)
                with _open(own, "run", inside):
                    if members:
                        reuse_base_evidence(members[0], member)
                    _whole(member, inside)
            members.append(member)
        combine(parent, members)
        return _finish(parent, options)


def train(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Data, pre-flight and training; `evaluate RUN` can follow."""
    load_floors(recipe)
    if options.dry_run:
        return plan(recipe, options)
    with _open(recipe, "train", options) as run:
        _train(run, _data(run, options), options)
        return _finish(run, options)


def evaluate(target: Recipe | Run, options: Options) -> dict[str, Any]:
    """Measure a finished training's run, or, from a recipe, the base model's prompting arms."""
    if isinstance(target, Run):
        _refuse_seeds(target)
        with target.lock():
            _evaluate(target, read_dataset(target), options)
            _learning_curve(target, options)
            return _finish(target, options)
    if target.evaluate.learning_curve:
        raise ConfigError(
            "evaluate.learning_curve trains on shares of the rows, and here nothing is trained",
            "use `postgrad run`, or add evaluate.learning_curve=[]",
        )
    with _open(target, "evaluate", options) as run:
        dataset = _data(run, options)
        _refuse_few_rows(target, dataset)
        _evaluate(run, dataset, options)
        return _finish(run, options)


def report(run: Run) -> dict[str, Any]:
    """Write report.html and MODEL_CARD.md from files alone."""
    from postgrad.report.html import write_report
    from postgrad.report.model_card import write_model_card

    write_report(run)
    if not run.seeds.is_dir():
        write_model_card(run)
    return document(run)


def compare(runs: Sequence[Run], picture: Path | None) -> dict[str, Any]:
    """Compare two runs row by row, from their evidence alone; draw the dials of two or more."""
    from postgrad.evaluate.compare_runs import collect_frontiers, compare_runs, names_of

    if len(runs) == 2:
        found = compare_runs(*runs)
    else:
        found = {"frontiers": collect_frontiers(runs, names_of(runs))}
    if picture is None:
        return found
    from postgrad.report.html import frontiers_page

    if len(found["frontiers"]) < len(runs):
        raise ConfigError(
            f"the dials of {len(found['frontiers'])} of {len(runs)} runs can stand in one picture",
            "evaluate all with evaluate.dial: the same base model, scorer, validation rows and "
            "benchmark items",
        )
    write_atomic(picture, frontiers_page(found["frontiers"]).encode())
    return {**found, "picture": str(picture)}


def plan_rows(points: float, runs: Sequence[Run]) -> dict[str, Any]:
    """Say how many test rows show a difference of so many points."""
    from postgrad.evaluate.compare_runs import plan_rows as planned

    return planned(points, runs)


def export_lm_eval(
    source: Recipe | Run, out: Path | None, samples: Sequence[Path]
) -> dict[str, Any]:
    """Write the test set as a task of lm-evaluation-harness, or read its sample logs back."""
    from postgrad.export.lm_eval import import_samples, write_task

    if isinstance(source, Run):
        _refuse_seeds(source)
    recipe = source.config if isinstance(source, Run) else source
    own = source.path if isinstance(source, Run) else Path(f"{recipe.name}-lm-eval")
    if samples:
        return import_samples(samples, recipe, out or own)
    if isinstance(source, Run):
        dataset, folder = read_dataset(source), source.export / "lm-eval"
    else:
        dataset, folder = load_dataset(recipe.data, recipe.data_seed), own
    files = write_task(recipe, dataset, out or folder)
    return {"export": str(out or folder), "files": [str(path) for path in files]}


def demo(minutes: float, options: Options) -> dict[str, Any]:
    """Run the embedded recipe, sized to a time budget."""
    from postgrad.demo.licences import ATTRIBUTION
    from postgrad.demo.recipe import demo_recipe

    options.show.note(ATTRIBUTION)
    facts = {"minutes": minutes, "attribution": ATTRIBUTION}
    return {**run(demo_recipe(minutes), options, {"demo": facts}), "demo": facts}


def plan(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Load everything, train nothing: tokens, steps, memory and time from one real micro-batch."""
    from postgrad.train.probe import dry_run
    from postgrad.train.probe_rows import check_given_chats
    from postgrad.train.session import open_session

    options.show.stage("data")
    dataset = _planned(recipe)
    options.show.stage("model")
    session = open_session(recipe, dataset)
    check_given_chats(session.renderer, recipe)
    watched = planned_amount(recipe, session.loaded.tokenizer)
    return {"plan": dry_run(session, dataset, watched)}


def estimate(recipe: Recipe, runs: Path, options: Options) -> dict[str, Any]:
    """Say what a recipe takes, from its rows and files; loads no model (torch for a probe only)."""
    from postgrad.model.directory import find_directory
    from postgrad.model.light_tokenizer import load_light_tokenizer
    from postgrad.train import forecast, speed

    dataset = _planned(recipe)
    base, template = recipe.model.base, recipe.model.chat_template
    directory = find_directory(base, recipe.model.revision)
    if directory is None:
        options.show.note("converting the GGUF file, once (loads torch)")
        from postgrad.model.load import model_directory

        directory = model_directory(base, recipe.model.revision)
    tokenizer: Any = load_light_tokenizer(directory, template)
    if tokenizer is None:
        options.show.note("no tokenizer.json: Transformers reads the tokenizer (loads torch)")
        from postgrad.model.load import load_tokenizer

        tokenizer = load_tokenizer(directory, template)
    work = forecast.forecast(
        recipe, dataset, directory, tokenizer, planned_amount(recipe, tokenizer)
    )
    found = speed.recorded_speed(work.recipe, work.method, runs)
    if found is None:
        key = speed.probe_key(work.recipe, work.method, work.epoch.tokens / work.rows["train"])
        found = speed.cached_speed(key)
        if found is None:
            options.show.note("no such run on this machine: timing a few layers once (loads torch)")
            from postgrad.train.probe import probe

            found = probe(work, dataset, directory)
            if found.busy:
                options.show.note("this machine is busy: the probe is not kept for the next time")
            else:
                speed.keep_speed(key, found)
    return {"estimate": forecast.document(work, found)}


def explain_row(recipe: Recipe, row: int) -> list[tuple[str, float]]:
    """Return training row number `row` (from 1) as rendered pieces with their loss weights.

    Rows of a replay file come after the training rows.
    """
    from postgrad.data.render import Renderer
    from postgrad.model.load import load_tokenizer, model_directory

    dataset = load_dataset(recipe.data, recipe.data_seed)
    rows = (*dataset.of(Split.TRAIN), *dataset.replay)
    if not 1 <= row <= len(rows):
        raise ConfigError(f"there is no training row {row}", f"choose from 1 to {len(rows)}")
    directory = model_directory(recipe.model.base, recipe.model.revision)
    renderer = Renderer(load_tokenizer(directory, recipe.model.chat_template))
    return renderer.pieces(renderer.render(rows[row - 1]))


def doctor(recipe: Recipe) -> dict[str, Any]:
    """Run every pre-flight check of a recipe without training."""
    from postgrad.train.probe_rows import check_given_chats
    from postgrad.train.session import open_session

    dataset = _planned(recipe)
    _refuse_few_rows(recipe, dataset)
    floors = load_floors(recipe)
    session = open_session(recipe, dataset)
    check_given_chats(session.renderer, recipe)
    checks = session.checks(_data_checks(dataset, recipe, floors))
    return {"checks": [asdict(check) for check in checks]}


def verify_resume(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Prove on this recipe that an interrupted and resumed training equals an uninterrupted one."""
    from postgrad.train.verify_resume import verify_resume as verify

    folder = Path(tempfile.mkdtemp(prefix="postgrad-verify-resume-"))
    try:
        return verify(recipe, folder, options.show)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def document(run: Run) -> dict[str, Any]:
    """Return the one JSON document of a run."""
    record = run.record
    measured: dict[str, Any] = {
        "measurements": [],
        "comparisons": [],
        "references": [],
        "retention": [],
    }
    if run.measurements_path.exists():
        measured |= read_json(run.measurements_path)
    return {
        "run": str(run.path),
        "verdict": record.get("verdict"),
        "gates": record.get("gates", []),
        "measurements": measured["measurements"],
        "comparisons": measured["comparisons"],
        "references": measured["references"],
        "costs": measured.get("costs", {}),
        "prompt_search": measured.get("prompt_search"),
        "learning_curve": measured.get("learning_curve"),
        "seeds": measured.get("seeds", []),
        "retention": measured["retention"],
        "dial": measured.get("dial"),
        "train": record.get("train"),
        "learning_rate_probe": record.get("learning_rate_probe"),
        "seconds": record.get("seconds", {}),
        "report": str(run.report_path) if run.report_path.exists() else None,
    }


@contextlib.contextmanager
def _open(recipe: Recipe, verb: str, options: Options) -> Iterator[Run]:
    """Create the run directory, or find the one to resume, and hold its lock."""
    run = find_resumable(recipe, verb, options.out) if options.resume else None
    resumed = run is not None
    run = run or create_run(recipe, verb, options.out)
    if options.resume and not resumed:
        options.show.note("nothing to resume: this is a new run")
    options.show.note(f"{'resuming' if resumed else 'run'} {run.path}")
    with run.lock():
        try:
            yield run
        except BaseException as error:
            run.fail(error)
            raise


def _is_done(run: Run) -> bool:
    return run.record_path.exists() and run.record["status"] == "done"


def _inside(options: Options, member: Run) -> Options:
    """Return the options of a run inside another one, new or begun."""
    return replace(options, out=member.path, resume=member.record_path.exists())


@contextlib.contextmanager
def _timed(run: Run, stage: str, options: Options) -> Iterator[None]:
    options.show.stage(stage)
    began = time.monotonic()
    try:
        yield
    finally:
        run.add_seconds(stage, time.monotonic() - began)


def _whole(run: Run, options: Options) -> dict[str, Any]:
    dataset = _data(run, options)
    _refuse_few_rows(run.recipe, dataset)
    _train(run, dataset, options)
    _evaluate(run, dataset, options)
    _learning_curve(run, options)
    return _finish(run, options)


def _data(run: Run, options: Options) -> Dataset:
    if run.manifest_path.exists():
        return read_dataset(run)
    with _timed(run, "data", options):
        dataset = load_dataset(run.recipe.data, run.recipe.data_seed)
        save_dataset(dataset, run)
    return dataset


def _train(run: Run, dataset: Dataset, options: Options) -> None:
    """Pre-flight, the loop, the best weights, the export; does nothing when that is all done."""
    from postgrad.train.preflight import may_pack, refuse, write_checks
    from postgrad.train.probe_rows import check_given_chats, given_chats
    from postgrad.train.rate_probe import probe_learning_rate
    from postgrad.train.replay import add_own_answers, needs_own_answers
    from postgrad.train.session import open_session
    from postgrad.train.workflow import export_model, train_model

    if "train" in run.record:
        return
    first, loaded, floors = not run.probe_path.exists(), None, load_floors(run.config)
    if first:
        given_chats(run.config.train)  # a wrong path costs nothing
    if needs_own_answers(run.config, dataset):
        with _timed(run, "replay", options):
            dataset, loaded = add_own_answers(run, dataset)
    with _timed(run, "preflight", options):
        session = open_session(run.config, dataset, loaded)
        if first:
            check_given_chats(session.renderer, session.recipe)
        run.write_text(run.config_path, session.recipe.to_yaml())
        checks = session.checks(_data_checks(dataset, session.recipe, floors))
        write_checks(run, checks)
        run.add_dropped(asdict(row) for row in session.dropped)
        refuse(checks)
        packed, session = may_pack(checks), session.settled(checks)
        run.write_text(run.config_path, session.recipe.to_yaml())
    if session.recipe.train.learning_rate == "probe":
        with _timed(run, "learning_rate_probe", options):
            session = probe_learning_rate(session, run, packed, options.show)
            run.write_text(run.config_path, session.recipe.to_yaml())
    with _timed(run, "train", options):
        watch = open_watch(run, session.recipe, floors, options.show)
        facts = train_model(session, run, packed, options.show, watch)
        merge = export_model(session, run, packed, facts["restored_loss"])
        run.update(train=facts, **({"merge": merge} if merge else {}))


def _planned(recipe: Recipe) -> Dataset:
    """Read the data; answers that the base model has yet to give stand in at their longest."""
    from postgrad.train.probe_rows import given_chats

    given_chats(recipe.train)  # a wrong path costs nothing
    dataset = load_dataset(recipe.data, recipe.data_seed)
    if recipe.data.replay != SELF:
        return dataset
    rows = len(dataset.of(Split.TRAIN))
    return replace(dataset, replay=planned_self_replay(recipe.data, rows, recipe.data_seed))


def _data_checks(dataset: Dataset, recipe: Recipe, floors: Sequence[Floor]) -> tuple[Check, ...]:
    """Return the checks of rows and items alone, the test rows' references included."""
    from postgrad.evaluate.runner import check_references

    tests, scoring = dataset.of(Split.TEST), recipe.evaluate
    answers = check_references(tests, scoring.scorer, scoring.pattern)
    return (*dataset.checks, answers, *check_floors(floors))


def _refuse_seeds(run: Run) -> None:
    if run.seeds.is_dir():
        raise RunError(f"{run.path} holds several seeds", f"name one of them: {run.seeds}/SEED")


def _refuse_few_rows(recipe: Recipe, dataset: Dataset) -> None:
    """Find that TRAIN is too small for the examples in a prompt before hours of training."""
    from postgrad.evaluate.fewshot import require_rows

    require_rows(recipe.evaluate, dataset.of(Split.TRAIN))


def _check_benchmarks(recipe: Recipe) -> None:
    """Find every benchmark before hours of training, not after."""
    from postgrad.evaluate.benchmarks import load_benchmarks

    load_floors(recipe, load_benchmarks(recipe))


def _evaluate(run: Run, dataset: Dataset, options: Options) -> None:
    from postgrad.evaluate.workflow import evaluate_run

    with _timed(run, "evaluate", options):
        evaluate_run(run, dataset, options.show)


def _learning_curve(run: Run, options: Options) -> None:
    """Train on each share of the rows that is not done, in runs inside this one; measure them."""
    from postgrad.evaluate.learning_curve import measure_curve, share_recipe
    from postgrad.evaluate.seeds import reuse_base_evidence
    from postgrad.evaluate.workflow import answer_limit

    shares = run.recipe.evaluate.learning_curve
    if not shares or "train" not in run.record:
        return
    members = [(share, run.inside("shares", f"{100 * share:g}")) for share in sorted(shares)]
    with _timed(run, "learning_curve", options):
        for share, member in members:
            if not _is_done(member):
                inside = _inside(options, member)
                limit = answer_limit(run, read_dataset(run))
                own = share_recipe(run, share, limit)
                with _open(own, "run", inside):
                    if own.evaluate.retention:
                        reuse_base_evidence(run, member, "*.jsonl")
                    _whole(member, inside)
        options.show.note(f"learning curve: {measure_curve(run, members).finding}")


def _judge(run: Run, options: Options) -> None:
    """Judge the recipe's gates by what was measured of the tuned model; say which are not met."""
    from postgrad.evaluate.gates import TUNED, judge_gates, unmet

    gates = run.config.evaluate.gates
    if not run.measurements_path.exists() or not (gates.target or gates.retention):
        return
    measured = read_json(run.measurements_path)
    measurements = [Measurement(**m) for m in measured["measurements"]]
    if all(m.arm != TUNED for m in measurements):
        return
    judged = judge_gates(
        gates,
        measured["task"],
        measured["metric"],
        measurements,
        [Comparison(**{**c, "verdict": Verdict(c["verdict"])}) for c in measured["comparisons"]],
        run.config.evaluate.confidence,
    )
    run.update(gates=[asdict(gate) for gate in judged])
    for gate in unmet(judged):
        options.show.note(f"gate not met: {gate.name} {gate.rule}: {gate.status}, {gate.finding}")


def _finish(run: Run, options: Options) -> dict[str, Any]:
    _judge(run, options)
    with _timed(run, "report", options):
        report(run)
    report(run)
    run.seal()
    return document(run)
