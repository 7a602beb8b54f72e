"""The tokenizer without torch renders rows exactly as Transformers does."""

import json
import shutil

import pytest
from templates import STYLES, styled

from postgrad.data.render import Renderer
from postgrad.errors import ModelError
from postgrad.model.directory import end_token_ids, find_directory, read_settings
from postgrad.model.light_tokenizer import load_light_tokenizer
from postgrad.model.load import load_tokenizer
from postgrad.types import Conversation, Example, Message, content_id

TALKS = [
    [("user", "Is it so?"), ("assistant", "yes, it is")],
    [("user", "one\n two"), ("assistant", " no "), ("user", "why? é"), ("assistant", "maybe")],
]


def examples(system):
    head = [("system", "Answer briefly.")] if system else []
    for talk in TALKS:
        c = Conversation(tuple(Message(role, text) for role, text in [*head, *talk]))
        yield Example(content_id(c), c, "rows.jsonl:1")


def both(directory):
    return [Renderer(load(directory)) for load in (load_light_tokenizer, load_tokenizer)]


@pytest.mark.parametrize("name", STYLES)
def test_rows_are_rendered_as_transformers_does(name, tmp_path):
    style = STYLES[name]
    styled(style).save_pretrained(tmp_path)
    light, full = both(tmp_path)
    rows = list(examples(style.system))
    for ours, theirs in zip(light.inspect_all(rows), full.inspect_all(rows), strict=True):
        assert (ours.tokens is None) == (theirs.tokens is None)
        if ours.tokens is not None:
            assert ours.tokens.ids.tolist() == theirs.tokens.ids.tolist()
            assert ours.tokens.weights.tolist() == theirs.tokens.weights.tolist()
        assert [p.kind for p in ours.problems] == [p.kind for p in theirs.problems]
    assert light.stop_ids == full.stop_ids


def test_what_templates_may_use_is_there(tiny_model_dir):
    source = (
        "{{ strftime_now('%Y')[:2] }}{{ messages[0] | tojson }}{% for m in messages %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ eos_token }}"
    )
    talk = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "no"}]
    found = [
        load(tiny_model_dir).apply_chat_template(talk, chat_template=source, tokenize=False)
        for load in (load_light_tokenizer, load_tokenizer)
    ]
    assert found[0] == found[1]
    assert found[0].endswith('"content": "<é>"}<é><|im_end|>')


def test_the_template_comes_from_the_file_the_settings_or_the_recipe(tiny_model_dir, tmp_path):
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    own = load_light_tokenizer(directory).chat_template
    assert load_light_tokenizer(directory, "{{ messages }}").chat_template == "{{ messages }}"
    (directory / "chat_template.jinja").unlink()
    assert load_light_tokenizer(directory).chat_template is None
    settings = directory / "tokenizer_config.json"
    before = read_settings(directory, settings.name)
    entries = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": own}]
    settings.write_text(json.dumps(before | {"chat_template": entries}), encoding="utf-8")
    assert load_light_tokenizer(directory).chat_template == own


def test_other_tokenizers_are_left_to_transformers_and_damage_is_named(tiny_model_dir, tmp_path):
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_light_tokenizer(directory)
    (directory / "tokenizer.json").unlink()
    assert load_light_tokenizer(directory) is None


def test_a_directory_says_its_end_tokens(tiny_model_dir, tmp_path):
    assert find_directory(str(tiny_model_dir)) == tiny_model_dir
    assert end_token_ids(tiny_model_dir) == [2]
    assert end_token_ids(tmp_path) == []
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_settings(tmp_path, "config.json", required=True)
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ModelError, match="not a model"):
        find_directory(str(file))
