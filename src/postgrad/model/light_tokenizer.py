"""A directory's tokenizer and chat template without torch: what `Renderer` asks of Transformers.

`AutoTokenizer` loads torch wherever torch is installed, which takes longer than all the counting.
tokenizer.json and the Jinja template need neither. Rendered rows are equal to those of Transformers
(tested), except for tokenizers whose Transformers class changes what tokenizer.json says.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import AddedToken, Tokenizer

from postgrad.errors import ModelError
from postgrad.model.directory import read_settings, template_text

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class LightTokenizer:
    """The part of a fast Transformers tokenizer that rendering needs."""

    is_fast = True

    def __init__(
        self, tokenizer: Tokenizer, special: Mapping[str, str], chat_template: str | None
    ) -> None:
        """Take a tokenizer, its special tokens by name (`eos_token` ...) and its template."""
        self._tokenizer = tokenizer
        self._special = dict(special)
        self.chat_template = chat_template
        self._compiled: dict[str, jinja2.Template] = {}
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence."""
        return self._special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a sequence."""
        return self._special.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a sequence."""
        return self.convert_tokens_to_ids(self.bos_token) if self.bos_token else None

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a sequence."""
        return self.convert_tokens_to_ids(self.eos_token) if self.eos_token else None

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of the special tokens that have a name."""
        return list(dict.fromkeys(self._special.values()))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        return self._tokenizer.get_added_tokens_decoder()

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token."""
        return self._tokenizer.token_to_id(token)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """Return how the vocabulary spells a token."""
        return self._tokenizer.id_to_token(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def __call__(
        self, texts: str | list[str], add_special_tokens: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Return `input_ids` and `offset_mapping` (characters) of one text or several."""
        if isinstance(texts, str):
            found = self._tokenizer.encode(texts, add_special_tokens=add_special_tokens)
            return {"input_ids": found.ids, "offset_mapping": found.offsets}
        several = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {
            "input_ids": [found.ids for found in several],
            "offset_mapping": [found.offsets for found in several],
        }

    def get_chat_template(self, chat_template: str | None = None) -> str:
        """Return the given template, else the tokenizer's own; ValueError when there is none."""
        chosen = chat_template or self.chat_template
        if not chosen:
            raise ValueError("the tokenizer has no chat template")
        return chosen

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str:
        """Return a conversation as text, as Transformers renders it."""
        assert not tokenize
        source = self.get_chat_template(chat_template)
        if source not in self._compiled:
            self._compiled[source] = _environment().from_string(source)
        return self._compiled[source].render(
            messages=conversation,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special,
        )


def load_light_tokenizer(
    directory: Path, chat_template: str | None = None
) -> LightTokenizer | None:
    """Load tokenizer.json and the chat template; None where only Transformers can read the files.

    Raises:
        ModelError: tokenizer.json is damaged, or model.chat_template names no file.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust tokenizers raise nothing more specific
        raise ModelError(f"{file}: {error}", "fetch the model again") from error
    settings = {
        **read_settings(directory, "special_tokens_map.json"),
        **read_settings(directory, "tokenizer_config.json"),
    }
    special = {}
    for name in _NAMED:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    template = template_text(chat_template) if chat_template else _own_template(directory, settings)
    return LightTokenizer(tokenizer, special, template)


def _own_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if found is None:
        found = read_settings(directory, "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for others; here it is only printed."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Any) -> Any:
        """Return what stands inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Return what Transformers gives to chat templates: sandbox, filters and functions."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
