"""The base of every section of a recipe, and the sections that stand inside others.

Pure: no disk, no network. `postgrad.config` puts them together.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)


class Section(BaseModel):
    """Base of every section: immutable, unknown keys are errors, docstrings are descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class LoraConfig(Section):
    """Low-rank adapters on a frozen base (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    """Adapter method."""
    r: PositiveInt = 16
    """Rank. Over 35 models rank 16 costs a median 0.29 % of test loss against the best rank,
    rank 64 costs 0.00 % (recomputed from the tinker-cookbook SFT sweep)."""
    lora_alpha: PositiveFloat = 32
    """Scale numerator: the update is lora_alpha / r * B A. A fixed alpha of 32 lets one learning
    rate serve every rank (LoRA Without Regret, Schulman et al. 2025)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input. 0 unless the data are tiny (below about 1,000 rows)."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Which linear layers get an adapter: all but the output head, or a list of name endings.
    Attention-only underperforms even at equal parameter count (LoRA Without Regret)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA, arXiv 2312.03732)."""


class FullConfig(Section):
    """Full fine-tuning: every parameter is trained."""

    kind: Literal["full"] = "full"
    """Adapter method."""


def _adapter_kind(value: Any) -> Any:
    """Return which adapter section a value is: `kind`, or lora when it is left out."""
    return value.get("kind", "lora") if isinstance(value, Mapping) else getattr(value, "kind", None)


AdapterConfig = Annotated[
    Annotated[LoraConfig, Tag("lora")] | Annotated[FullConfig, Tag("full")],
    Discriminator(
        _adapter_kind,
        custom_error_type="adapter_kind",
        custom_error_message="must be {{kind: lora, ...}} or {{kind: full}}",
    ),
]


class ColumnsConfig(Section):
    """Names of the columns of a table whose headings postgrad does not know."""

    prompt: str
    """Column with the request."""
    completion: str
    """Column with the answer."""
    system: str | None = None
    """Column with the system prompt."""


class EarlyStoppingConfig(Section):
    """When to stop: held-out loss no longer improves by more than its own noise."""

    patience: PositiveInt = 5
    """Evaluations without a significant improvement before stopping. Held-out losses scatter while
    the learning rate is high and fall once more when it decays: 3 stops too early (LOG.md)."""
    min_delta: Literal["1se"] | NonNegativeFloat = "1se"
    """Improvement that counts: 1se = one standard error of the difference, paired by row; or nats
    per token."""
    max_kl: PositiveFloat | None = None
    """Largest distance from the base, KL(base || tuned) in nats per token on `train.kl_probe`. A
    checkpoint beyond it is never the best one and counts as no improvement; null = no limit."""
    retention_floor: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Points of accuracy that may be lost at most against the base model, by benchmark of
    evaluate.retention, for example {piqa: 2, all: 3}; `all` stands for every one that is not named.
    A checkpoint that lost more is never the best one and counts as no improvement. Measured at
    every held-out loss; the estimate itself decides, not its interval. Empty = not measured."""
    retention_items: Annotated[int, Field(ge=50)] = 200
    """Items of each benchmark of retention_floor (a seeded sample), never among those
    of evaluate.retention_limit or evaluate.dial.items, so that these judge what was chosen."""

    def problem(self, retention: Sequence[str]) -> str | None:
        """Return what is wrong between its keys and evaluate.retention, if anything."""
        usual = type(self).model_fields["retention_items"].default
        if not self.retention_floor:
            if self.retention_items == usual:
                return None
            return (
                "train.early_stopping.retention_items says how many items retention_floor asks, "
                "which is empty"
            )
        if not retention:
            return (
                "train.early_stopping.retention_floor watches benchmarks of evaluate.retention, "
                "which is empty"
            )
        return None


class DialConfig(Section):
    """How much of the tuning to keep: points between base and tuned model, chosen on validation."""

    lambdas: tuple[Annotated[float, Field(gt=0, le=2)], ...] = (0.25, 0.5, 0.75)
    """Scales of the adapter that are measured; full tuning: base + lambda (tuned - base). 0, the
    base, and 1, the tuned model, are always measured too."""
    checkpoints: NonNegativeInt = 0
    """Kept checkpoints that are measured too, evenly spaced, besides the best one; at most
    train.save_total_limit."""
    rows: PositiveInt | None = 300
    """Validation rows that each point answers (a seeded sample); null = all."""
    items: PositiveInt | None = 300
    """Items of each benchmark that each point answers (a seeded sample), never among those of
    evaluate.retention_limit; null = all others."""
    margin: NonNegativeFloat = 1.0
    """Points that may be lost, in the mean over the benchmarks. The point with the best answers
    among those that lose no more is chosen, exported and measured on the test rows."""

    def problem(self) -> str | None:
        """Return what is wrong between its keys, if anything."""
        if len(set(self.lambdas)) < len(self.lambdas):
            return "evaluate.dial.lambdas names the same scale twice"
        if 1 in self.lambdas:
            return "evaluate.dial.lambdas: 1, the tuned model, is always measured; leave it out"
        if not self.lambdas and not self.checkpoints:
            return "evaluate.dial has neither lambdas nor checkpoints to measure"
        return None


Shots = Annotated[int, Field(ge=0)]
ShotKinds = Annotated[tuple[Literal["static", "retrieved", "embedded"], ...], Field(min_length=1)]


class PromptSearchConfig(Section):
    """Prompts tried on validation rows, so that prompting is tuned as the model is."""

    fewshot: Annotated[tuple[Shots, ...], Field(min_length=1)] = (0, 4, 8)
    """Numbers of examples tried; from TRAIN only."""
    examples: ShotKinds = ("static", "retrieved", "embedded")
    """Kinds of examples tried, see evaluate.fewshot_examples."""
    draws: PositiveInt = 3
    """Draws of `static` examples tried for each number."""
    systems: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """System prompts tried in place of the rows' own, which are always tried too."""
    rows: PositiveInt | None = 100
    """Validation rows that each variant answers (a seeded sample); null = all."""
    minutes: PositiveFloat | Literal["auto"] | None = "auto"
    """No variant is begun after so many minutes. auto = as many as the training took, or no limit
    where nothing was trained; null = no limit."""
    max_variants: PositiveInt | None = None
    """Variants tried at most, the first of a seeded order; null = all."""


class ReportConfig(Section):
    """What estimate and report need to know about money and authorship."""

    price_per_hour: NonNegativeFloat | None = None
    """What an hour of this machine costs you; null = time only. List prices, electricity and power
    are said in `prices`."""
    currency: str = "USD"
    """Currency of price_per_hour."""
    prices: str | None = None
    """File with list prices, electricity and power, read by `estimate` and --dry-run; null =
    $POSTGRAD_PRICES, else the prices.toml that comes with postgrad."""
    language: str = "en"
    """Language of the data, for the model card's metadata."""
    license: str = "other"
    """Licence of the tuned model, for the model card's metadata."""
