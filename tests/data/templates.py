"""Chat templates in the shapes that public models use, and small real tokenizers for them."""

from functools import cache
from typing import NamedTuple


class Style(NamedTuple):
    template: str
    end: str
    """The token that closes an answer."""
    bos: str | None
    special: tuple[str, ...]
    system: bool = True
    multi_turn_system: bool = True


CHATML = Style(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
    None,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)

DEFAULT_SYSTEM_TRIM = Style(
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
    None,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)

HEADERS = Style(  # the shape of Llama 3
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "<|eot_id|>",
    "<|begin_of_text|>",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

INST = Style(  # the shape of Mistral: no generation prompt, the system prompt in the last request
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}"
    "{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{% if loop.index0 >= loop.length - 2 and system %}"
    "[INST] {{ system }}\n\n{{ m.content }} [/INST]"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant, please') }}{% endif %}{% endfor %}",
    "</s>",
    "<s>",
    ("<s>", "</s>"),
    multi_turn_system=False,
)

TURNS = Style(  # the shape of Gemma: no system role, the assistant has another name
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}{% set who = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + who + '\n' + m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "<end_of_turn>",
    "<bos>",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    system=False,
)

ZEPHYR = Style(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "</s>",
    None,
    ("</s>",),
)

CLOSED = Style(  # the shape of Phi 3: an end token per turn and another one at the very end
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    "<|end|>",
    None,
    ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
)

THINKING = Style(  # thoughts are shown in the last answer only
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<|im_end|>",
    None,
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)

TOOLS = Style(
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
    None,
    ("<|im_start|>", "<|im_end|>"),
)

STYLES = {
    "chatml": CHATML,
    "default-system-trim": DEFAULT_SYSTEM_TRIM,
    "headers": HEADERS,
    "inst": INST,
    "turns": TURNS,
    "zephyr": ZEPHYR,
    "closed": CLOSED,
    "thinking": THINKING,
    "tools": TOOLS,
}

CORPUS = [
    "user assistant system model the answer to this question is yes no maybe number",
    "What is the licence of this file? It is Apache-2.0. Be brief.\n\n[INST] [/INST]",
    'name arguments weather city Paris {"city": "Paris"}',
] * 4


@cache
def make_tokenizer(special: tuple[str, ...], end: str, bos: str | None, metaspace: bool = False):
    """A trained BPE tokenizer: byte-level with trimmed offsets, or SentencePiece-like."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    if metaspace:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
        )
        alphabet = []
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    extra = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if metaspace else []
    trainer = BpeTrainer(
        vocab_size=700, special_tokens=extra, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=bos)
    return fast


def styled(style: Style, metaspace: bool = False):
    """A copy of the tokenizer with the template of `style`."""
    import copy

    tokenizer = copy.deepcopy(make_tokenizer(style.special, style.end, style.bos, metaspace))
    tokenizer.chat_template = style.template
    return tokenizer
