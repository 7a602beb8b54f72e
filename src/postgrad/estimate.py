"""What a training takes, by formula: operations, bytes, seconds, money. Pure: no torch, no disk.

Operations are multiplications and additions, two for each weight that a token meets. A frozen layer
needs no gradient of its weights: 2 forward and 2 for the gradient of its input. What is trained
needs that too: 2 and 4. The output head works on supervised positions only. Attention scores are
counted by document, causal: a token meets itself and what stands before it. A held-out loss is a
forward pass. Not counted, because they move bytes rather than multiply: norms, activations, rotary
embedding, optimizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgrad.errors import ModelError
from postgrad.prices import Prices

HELD_OUT_SPEED = 3.0
"""Tokens of a held-out loss that take as long as one token of training: no backward pass."""
LOGIT_CHUNK = 1024
"""Supervised positions whose logits exist at the same time (`train.sft.CHUNK`)."""
PROGRAM_BYTES = 550_000_000
"""Interpreter and libraries, resident on a CPU once a model has been loaded."""
HIDDEN_VECTORS = 8
"""Vectors of the hidden size that a layer keeps per token for its backward pass: two norms with
their inputs, queries, keys and values as the attention reads them, its probabilities and its
result. In units of the compute precision; measured with fused layers (model.fused)."""
INTERMEDIATE_VECTORS = 3
"""The same of the intermediate size: gate, up and their product."""
FP8_MULTIPLE = 16
"""What the widths of a layer must be multiples of for float8 (model.fp8)."""
INT8_SMALLEST = 2**16
"""Weights of a layer from which it is multiplied in int8 (model.int8)."""

_TWO_MATRICES = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "codegen")
"""Model types whose MLP has no gate: two matrices a layer instead of three."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a dense decoder, from its config.json."""

    hidden: int
    intermediate: int
    layers: int
    query_width: int
    """Heads times the width of a head."""
    key_width: int
    """Key and value heads times the width of a head."""
    vocabulary: int
    gated: bool = True
    """Whether the MLP has a gate (three matrices a layer) or not (two)."""
    tied: bool = True
    """Whether the output head is the embedding matrix."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name (Llama's names) -> (outputs, inputs)."""
        attention = {
            "q_proj": (self.query_width, self.hidden),
            "k_proj": (self.key_width, self.hidden),
            "v_proj": (self.key_width, self.hidden),
            "o_proj": (self.hidden, self.query_width),
        }
        gate = {"gate_proj": (self.intermediate, self.hidden)} if self.gated else {}
        up = (self.intermediate, self.hidden)
        return {**attention, **gate, "up_proj": up, "down_proj": (self.hidden, self.intermediate)}

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers but the output head."""
        return self.layers * sum(out * width for out, width in self.linears.values())

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights: linear layers, embeddings, head and two norms a layer; biases left out."""
        embeddings = self.head_weights * (1 if self.tied else 2)
        return self.linear_weights + embeddings + (2 * self.layers + 1) * self.hidden

    def adapter_parameters(self, r: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Weights of rank-r adapters, r x (outputs + inputs) each, on `targets` of every block.

        Raises:
            ModelError: a target is none of the names that this shape knows.
        """
        return self.layers * r * sum(out + width for out, width in self._adapted(targets))

    def eight_bit_bytes(self, kind: str, targets: str | Sequence[str] = "all-linear") -> int:
        """Bytes of the copies in 8 bits (`train.base_precision`) of layers with adapters."""
        sizes = self._adapted(targets)
        if kind == "fp8":
            fitting = [out * width for out, width in sizes if not (out | width) % FP8_MULTIPLE]
            return 2 * self.layers * sum(fitting)
        return self.layers * sum(n for out, width in sizes if (n := out * width) >= INT8_SMALLEST)

    def _adapted(self, targets: str | Sequence[str]) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of the layers of a block that `targets` names."""
        chosen = self.linears
        if targets != "all-linear":
            endings = [name.rpartition(".")[2] for name in targets]
            unknown = sorted(set(endings) - set(chosen))
            if unknown:
                raise ModelError(
                    f"model.adapt.target_modules: the sizes of {unknown[0]} do not stand in "
                    "config.json, so its adapters cannot be counted",
                    f"choose from {', '.join(chosen)} or all-linear, or use --dry-run, "
                    "which loads the model",
                )
            chosen = {name: size for name, size in chosen.items() if name in endings}
        return list(chosen.values())


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Return the sizes that a Transformers config.json names.

    Raises:
        ModelError: A size is missing, or the model has experts of which a token meets a few only.
    """
    text = config.get("text_config") or config
    for key in _EXPERTS:
        if (text.get(key) or 0) > 1:
            raise ModelError(
                f"config.json: {key} is {text[key]}; operations are counted for dense models only",
                "train with a small train.max_steps and look at the time that the run records",
            )

    def size(*names: str) -> int:
        found = next((text[name] for name in names if text.get(name)), None)
        if not isinstance(found, int):
            raise ModelError(
                f"config.json has no {names[0]}", "give the directory of a decoder-only model"
            )
        return found

    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head")
    intermediate = text.get("intermediate_size") or text.get("n_inner") or text.get("ffn_dim")
    width = text.get("head_dim") or hidden // heads
    return Shape(
        hidden=hidden,
        intermediate=int(intermediate or 4 * hidden),
        layers=size("num_hidden_layers", "n_layer"),
        query_width=heads * width,
        key_width=(text.get("num_key_value_heads") or heads) * width,
        vocabulary=size("vocab_size"),
        gated=text.get("model_type") not in _TWO_MATRICES,
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
    )


@dataclass(frozen=True, slots=True)
class Method:
    """What is trained, and in which precision."""

    trainable: int
    """Parameters that get a gradient."""
    full: bool
    """All parameters, instead of adapters on a frozen model."""
    compute_bytes: int
    """Bytes of a number in a matrix product: 2 for bf16, 4 for float32."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass instead of being kept."""
    beside_base: bool = False
    """The base is asked too, in every step: `train.kl_weight`."""
    eight_bit_bytes: int = 0
    """What the frozen weights take in 8 bits, beside themselves: `train.base_precision`."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is computed on: sums over documents."""

    tokens: int
    supervised: int
    """Positions whose loss counts."""
    pairs: int
    """Pairs of a token and one that it attends to: n (n + 1) / 2 for a document of n tokens."""

    def __add__(self, other: "Amount") -> "Amount":
        """Return both sets of documents together."""
        pairs = self.pairs + other.pairs
        return Amount(self.tokens + other.tokens, self.supervised + other.supervised, pairs)

    def __mul__(self, factor: float) -> "Amount":
        """Return the same documents `factor` times."""
        values = (self.tokens, self.supervised, self.pairs)
        return Amount(*(round(value * factor) for value in values))


NOTHING = Amount(0, 0, 0)


def amount_of(documents: Iterable[tuple[int, int]]) -> Amount:
    """Sum documents given as (tokens, supervised positions).

    >>> amount_of([(3, 1), (4, 2)])
    Amount(tokens=7, supervised=3, pairs=16)
    """
    rows = list(documents)
    pairs = sum(length * (length + 1) // 2 for length, _ in rows)
    return Amount(sum(n for n, _ in rows), sum(supervised for _, supervised in rows), pairs)


def flops(shape: Shape, method: Method, training: Amount, held_out: Amount) -> dict[str, int]:
    """Return multiplications and additions by part, and their `total`.

    Args:
        shape: Of the model.
        method: What is trained.
        training: All documents of all passes.
        held_out: All documents of all held-out losses.
    """
    backward = 4 if method.full else 2
    forward = _forward(shape, method, training)
    parts = {
        "layers": (2 + backward) * shape.linear_weights * training.tokens,
        "adapters": 0 if method.full else 6 * method.trainable * training.tokens,
        "output_head": (2 + backward) * shape.head_weights * training.supervised,
        "attention_scores": 3 * _scores(shape, training),
        "recomputation": forward if method.checkpointing else 0,
        "base": _base_forward(shape, training) if method.beside_base else 0,
        "held_out": _forward(shape, method, held_out)
        + 2 * shape.head_weights * held_out.supervised,
    }
    return {**parts, "total": sum(parts.values())}


def _base_forward(shape: Shape, amount: Amount) -> int:
    """Operations of one pass through the blocks without adapters, and through the head."""
    linear = 2 * shape.linear_weights * amount.tokens
    return linear + _scores(shape, amount) + 2 * shape.head_weights * amount.supervised


def _forward(shape: Shape, method: Method, amount: Amount) -> int:
    """Operations of one pass through the blocks, adapters included, without the head."""
    weights = shape.linear_weights + (0 if method.full else method.trainable)
    return 2 * weights * amount.tokens + _scores(shape, amount)


def _scores(shape: Shape, amount: Amount) -> int:
    """Operations of queries times keys and probabilities times values: 2 + 2 a pair and width."""
    return 4 * shape.layers * shape.query_width * amount.pairs


def activation_bytes_per_token(
    hidden: int, intermediate: int, layers: int, dtype_bytes: int, checkpointing: bool = False
) -> int:
    """Return what a forward pass keeps for the backward pass, per token of the micro-batch.

    Per layer `HIDDEN_VECTORS` of the hidden and `INTERMEDIATE_VECTORS` of the intermediate size;
    with checkpointing the input of every layer and everything inside one. Probabilities of
    attention are part of the hidden vectors: flash attention keeps none, and the matrix products
    that short documents go through keep few.
    """
    layer = HIDDEN_VECTORS * hidden + INTERMEDIATE_VECTORS * intermediate
    kept = layer + layers * hidden if checkpointing else layers * layer
    return round(kept * dtype_bytes)


def memory(
    shape: Shape, method: Method, micro_batch: Amount, *, parameters: int, on_gpu: bool
) -> dict[str, int]:
    """Return bytes by part at the moment when most is held, and their sum `peak_bytes`.

    On a CPU the program counts too (resident size); on a GPU tensors only, as torch counts them.

    Args:
        shape: Of the model.
        method: What is trained.
        micro_batch: The largest forward pass.
        parameters: Of the model, without adapters.
        on_gpu: Where.
    """
    weight_bytes = 4 if method.full else method.compute_bytes
    copied = method.full and method.compute_bytes < weight_bytes
    positions = min(LOGIT_CHUNK, micro_batch.supervised)
    per_token = activation_bytes_per_token(
        shape.hidden, shape.intermediate, shape.layers, method.compute_bytes, method.checkpointing
    )
    parts = {
        "program_bytes": 0 if on_gpu else PROGRAM_BYTES,
        "weights_bytes": weight_bytes * parameters,
        "adapters_bytes": 0 if method.full else 4 * method.trainable,
        "precision_copies_bytes": shape.linear_weights * method.compute_bytes if copied else 0,
        "eight_bit_copies_bytes": method.eight_bit_bytes,
        "gradients_bytes": 4 * method.trainable,
        "optimizer_bytes": 8 * method.trainable,
        "activations_bytes": micro_batch.tokens * per_token,
        "logits_bytes": positions * shape.vocabulary * (4 + 2 * method.compute_bytes),
    }
    return {**parts, "peak_bytes": sum(parts.values())}


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast this machine trains, and how that is known."""

    tokens_per_second: float
    """Forward and backward."""
    source: str
    """recorded run, probe or micro-batch."""
    detail: str
    """Which run, or what was timed."""
    step_seconds: float = 0.0
    """The optimizer, per step, where it is not part of the rate."""
    busy: bool = False
    """Other programs took the processor while this was measured, so it is too slow."""

    def seconds(self, training: Amount, held_out: Amount, steps: int) -> float:
        """Return the seconds of training with its held-out losses."""
        tokens = training.tokens + held_out.tokens / HELD_OUT_SPEED
        return tokens / self.tokens_per_second + steps * self.step_seconds


def costs(
    prices: Prices,
    *,
    seconds: float,
    machine: str,
    watts: tuple[float, str] | None,
    price_per_hour: float | None,
    currency: str,
    tokens: int,
    held_out_tokens: int,
    parameters: int,
) -> dict[str, Any]:
    """Return money and energy of a training here, and list prices of the same tokens elsewhere.

    Args:
        prices: A prices.toml.
        seconds: Of training.
        machine: Name of the GPU, or of the processor.
        watts: Power while training and who says so; None = not known, then no energy.
        price_per_hour: report.price_per_hour, in `currency`.
        currency: report.currency.
        tokens: All training tokens.
        held_out_tokens: Tokens of all held-out losses.
        parameters: Of the model.
    """
    hours, rent = seconds / 3600, prices.hour_of(machine)
    found: dict[str, Any] = {"here": None, "rented": None, "energy": None}
    if price_per_hour is not None:
        source = "report.price_per_hour"
        found["here"] = {"amount": price_per_hour * hours, "currency": currency, "source": source}
    if rent is not None:
        facts = rent.model_dump(include={"machine", "source", "url", "date"})
        found["rented"] = {"amount": rent.price * hours, "currency": prices.currency, **facts}
    if watts is not None:
        kwh = watts[0] * hours / 1000
        found["energy"] = {"kwh": kwh, "watts": watts[0], "watts_source": watts[1]}
        if prices.price_per_kwh is not None:
            found["energy"] |= {"amount": prices.price_per_kwh * kwh, "currency": prices.currency}
    found["hosted"] = []
    for offer in prices.hosted_for(parameters):
        billed = tokens + (held_out_tokens if offer.bills_validation else 0)
        facts = offer.model_dump(include={"service", "model", "closed", "source", "url", "date"})
        amount = billed / 1e6 * offer.price_per_million_tokens
        found["hosted"].append({"amount": amount, "currency": prices.currency, **facts})
    return found
