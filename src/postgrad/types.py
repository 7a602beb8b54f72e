"""The nouns that flow through postgrad: frozen dataclasses without torch or behaviour.

row -> Example -> Tokens -> Batch -> LossSum -> checkpoint -> Evidence -> Measurement -> report
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

ROLES = ("system", "user", "assistant", "tool")


class Split(StrEnum):
    """Which part of the data a row belongs to; set once, by `data.splits`."""

    TRAIN = "train"
    """The only split that training and few-shot examples may see."""
    VALIDATION = "validation"
    """The only split that may select a checkpoint or a hyperparameter."""
    TEST = "test"
    """Measured once, at the end."""
    RETENTION = "retention"
    """General-ability benchmarks: what the model could do before."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call made by the assistant; `arguments` is a JSON string (OpenAI format)."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` None means by role: 1 for the assistant, 0 for everyone else."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        """Check the role: anything else is a bug of the reader, not of the user."""
        assert self.role in ROLES, self.role

    @property
    def supervised_weight(self) -> float:
        """The weight of this message's tokens in the loss (0 = context only)."""
        if self.weight is not None:
            return self.weight
        return 1.0 if self.role == "assistant" else 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """A non-empty sequence of messages and the tools on offer (JSON schemas, OpenAI format)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Check that there is at least one message."""
        assert self.messages

    @property
    def prompt(self) -> "Conversation":
        """Everything before the last message, when that is the assistant's; else the whole."""
        if self.messages[-1].role == "assistant" and len(self.messages) > 1:
            return Conversation(self.messages[:-1], self.tools)
        return self

    @property
    def answer(self) -> str:
        """The last assistant message's text (empty when the conversation does not end in one)."""
        last = self.messages[-1]
        return last.content if last.role == "assistant" else ""


def content_id(conversation: Conversation) -> str:
    """Return 16 hex digits of the SHA-256 of the conversation: equal content, equal id."""
    payload = {
        "messages": [
            [m.role, m.content, [[c.name, c.arguments] for c in m.tool_calls], m.name, m.weight]
            for m in conversation.messages
        ],
        "tools": [dict(tool) for tool in conversation.tools],
    }
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the user's data: where it came from, what it says, which split it is in."""

    id: str
    """Content hash (`content_id`), with `-2`, `-3` … for exact repeats within one data set."""
    conversation: Conversation
    source: str
    """`file:line` of the row, for error messages."""
    group: str | None = None
    """Rows of one group never cross splits (a customer, a document, a ticket)."""
    split: Split | None = None
    unfinished: bool = False
    """The last answer was cut off where generating it ended: to stop there is not learned."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not used, and why: a line of data/dropped.jsonl. Nothing goes silently."""

    id: str
    source: str
    step: str
    """`invalid`, `duplicate`, `overlap`, `overlength`, `truncated`, `replay` or `limit`."""
    reason: str
    twin: str | None = None
    """`source` of the row that was kept instead."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A rendered example: token ids and the weight of each token as a *label*.

    `weights[i]` is the weight of predicting `ids[i]` from `ids[:i]`; `weights[0]` is always 0.
    """

    ids: IntArray
    weights: FloatArray
    example_id: str

    def __post_init__(self) -> None:
        """Check that lengths agree and that the first token is not a label."""
        assert self.ids.ndim == 1
        assert self.ids.shape == self.weights.shape
        assert len(self.ids) == 0 or self.weights[0] == 0

    @property
    def supervised(self) -> float:
        """Sum of the weights: what this example adds to the loss denominator."""
        return float(self.weights.sum(dtype=np.float64))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: R rows of S tokens.

    Packed: R = 1 and the documents stand one after another. Unpacked: a document per row, padded
    on the right. `labels[r, s]` is the token that position s must predict (the *next* token of the
    same document), `weights[r, s]` its weight; the last token of a document has weight 0.
    """

    ids: IntArray
    """[R, S] token ids; 0 where padded."""
    labels: IntArray
    """[R, S] next-token ids; 0 where weight is 0."""
    weights: FloatArray
    """[R, S] label weights."""
    positions: IntArray
    """[R, S] position inside the document, from 0."""
    documents: IntArray
    """[R, S] index into `example_ids`; -1 where padded."""
    example_ids: tuple[str, ...]
    packed: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, in order."""
        counts = np.bincount(self.documents[self.documents >= 0], minlength=len(self.example_ids))
        return tuple(int(count) for count in counts)

    @property
    def tokens(self) -> int:
        """Real tokens, padding excluded."""
        return int((self.documents >= 0).sum())

    @property
    def supervised(self) -> float:
        """Sum of the label weights, known before any forward pass."""
        return float(self.weights.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class LossSum:
    """A weighted sum of losses and the sum of weights — never a mean.

    `total` is a scalar tensor (it carries the graph); dividing by the *global* weight is the
    training loop's job, so an average of averages cannot be written.
    """

    total: Any
    weight: float
    per_document: Any = None
    """[number of documents] loss sums, detached, when the objective was asked for them."""
    terms: Mapping[str, Any] = field(default_factory=dict)
    """What `total` is made of where it is more than one thing: detached sums by the name that they
    get in metrics.jsonl (`loss`, `kl`), unweighted."""


class StopReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The model produced a stop token."""
    LENGTH = "length"
    """`max_new_tokens` was reached."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated answer."""

    text: str
    ids: tuple[int, ...]
    stop_reason: StopReason
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """One scorer's judgement of one completion; `value` is in [0, 1]."""

    value: float
    passed: bool
    explanation: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One evaluated row: a line of `evidence/<task>.<arm>.jsonl`. An error is data too."""

    example_id: str
    prompt: str
    """The last user message; the full request can be rebuilt from the recipe."""
    reference: str
    completion: str
    scores: Mapping[str, Score]
    stop_reason: StopReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    group: str | None = None
    """Rows of one group (subject, passage, customer) are not independent: errors are clustered."""
    logprobs: tuple[float, ...] = ()
    """Log-likelihood of each option, in nats, where the answer is chosen by likelihood."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A figure with its sample size, its interval and the file it can be recomputed from."""

    task: str
    metric: str
    arm: str
    """`base/zero-shot`, `base/few-shot-K` (also `-retrieved`, `-embedded`), `base/best-prompt` or
    `tuned`."""
    value: float
    low: float
    high: float
    n: int
    method: str = "wilson"
    """How the interval was made: `wilson`, `bootstrap`, `clustered`, `two-level`."""
    evidence: str = ""
    """Path inside the run directory."""
    errors: int = 0
    """Rows among the n that failed instead of being answered; they count as score 0."""


class Verdict(StrEnum):
    """What a paired comparison allows one to say."""

    IMPROVED = "improved"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arm `b` against arm `a` on the same rows; `difference` is b - a."""

    task: str
    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    n: int
    method: str
    """`mcnemar-exact` for 0/1 scores, `paired-bootstrap` for graded ones, `paired-clustered` for
    rows in groups, `two-level` over several seeds."""
    verdict: Verdict
    detectable: float
    """Smallest true difference this n would have seen with 80 % power at the same confidence."""
    wins: int = 0
    """Rows that b got right and a did not (or scored higher)."""
    losses: int = 0
    lower: float = -1.0
    """One-sided bound at the same confidence: the true difference is at least this."""
    upper: float = 1.0
    """One-sided bound: the true difference is at most this."""
    deviation: float | None = None
    """Standard deviation of the differences, row by row: what a planner needs."""
    corrected: float | None = None
    """p after Holm's correction over the suite of comparisons that it was judged in."""


@dataclass(frozen=True, slots=True)
class SeedSpread:
    """One figure over several trainings: the spread from seeds and from rows, kept apart."""

    task: str
    metric: str
    arm: str
    against: str
    """Empty for the figure itself; else the arm that it is the difference to."""
    values: tuple[float, ...]
    """The figure of each seed."""
    mean: float
    seed_deviation: float
    """Standard deviation over the seeds."""
    row_error: float
    """Standard error from the choice of rows."""
    over_seeds: tuple[float, float]
    """Low and high for new seeds on these very rows."""
    over_rows: tuple[float, float]
    """Low and high for new rows and these very models."""
    over_both: tuple[float, float]
    """Low and high for new seeds on new rows: what holds for the recipe."""


class GateStatus(StrEnum):
    """What the figures allow one to say about a condition of the recipe."""

    PASS = "PASS"
    """Shown to hold."""
    FAIL = "FAIL"
    """Shown not to hold."""
    UNDECIDED = "UNDECIDED"
    """Neither: too few rows, or not measured. Counts as not met."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition of `evaluate.gates` and whether it was met."""

    name: str
    """`target`, or `retention` and a task: `retention.hellaswag`."""
    rule: str
    """What was asked for."""
    status: GateStatus
    finding: str
    """The figures it rests on, in words."""


@dataclass(frozen=True, slots=True)
class Check:
    """One pre-flight check: what was looked at, what was found, whether training may go on."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""
    rows: tuple[str, ...] = ()
    """Example sources (`file:line`) that failed, at most a few dozen."""
    failures: int = 0
    waived: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)
    """Figures behind the sentence, for the report."""
