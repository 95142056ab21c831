"""Chat templates: what is rendered, where the template is found, which token ends an answer."""

import json

import pytest
from vocabularies import USER_DEFINED, byte_level_metadata, train_library, write_folder

from minillm.errors import MinillmError, UsageError
from minillm.text.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello\n"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Who?"},
]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def with_template(template: str | None, **extra) -> Tokenizer:
    metadata = byte_level_metadata(**extra)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return Tokenizer.from_gguf(metadata)


# The formats as their makers document them; <s> and </s> are this vocabulary's BOS and EOS.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hello\n<|im_end|>\n"
            "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama2",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST] Hi. </s><s>[INST] Who? [/INST]",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nHello [/INST] Hi.</s>[INST] Who? [/INST]"),
        (
            "zephyr",
            "<|system|>\nBe brief.</s>\n<|user|>\n Hello\n</s>\n<|assistant|>\nHi.</s>\n<|user|>\nWho?</s>\n"
            "<|assistant|>\n",
        ),
    ],
)
def test_built_in_templates(name, expected):
    tokenizer = with_template(None).with_chat_template(name)
    assert tokenizer.has_chat_template and tokenizer.render_chat(TALK) == expected
    without_system = tokenizer.render_chat(TALK[1:2])
    assert "Hello" in without_system and "SYS" not in without_system and "system" not in without_system
    assert not tokenizer.render_chat(TALK[:3], add_generation_prompt=False).endswith("assistant\n")


def test_blocks_are_trimmed_and_helpers_are_those_of_transformers():
    template = """\
{% for m in messages %}
    {% if loop.index0 == 2 %}
        {% break %}
    {% endif %}
{{ m | tojson }}
{% generation %}
[{{ m.content }}]
{% endgeneration %}
{% endfor %}
{{ tools is none }} {{ bos_token }}{{ eos_token }} {{ strftime_now('%Y') | length }} {{ undefined_thing }}"""
    messages = [{"role": "user", "content": "<é & '>"}] * 3
    line = '{"role": "user", "content": "<é & \'>"}\n[<é & \'>]\n'
    assert with_template(template).render_chat(messages) == line * 2 + "True <s></s> 4 "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "endfor"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_failing_template_is_one_line(template, message):
    tokenizer = with_template(template)
    assert tokenizer.stop_ids == {1, 2}  # nothing is lost for plain completion
    with pytest.raises(MinillmError, match=message) as caught:
        tokenizer.render_chat(TALK)
    assert "\n" not in str(caught.value)


def test_no_template():
    tokenizer = with_template(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(MinillmError, match="--raw.*--chat-template"):
        tokenizer.render_chat(TALK)


def test_a_template_by_file_or_text(tmp_path):
    tokenizer = with_template("{{ 1 }}")
    (tmp_path / "mine.jinja").write_text("{{ 2 }}")
    assert tokenizer.with_chat_template(str(tmp_path / "mine.jinja")).render_chat(TALK) == "2"
    assert tokenizer.with_chat_template("{{ 3 }}").render_chat(TALK) == "3"
    assert tokenizer.render_chat(TALK) == "1"
    for missing in ("chatlm", str(tmp_path), str(tmp_path / "none.jinja")):
        with pytest.raises(UsageError, match="chatml, llama2, llama3, mistral, zephyr"):
            tokenizer.with_chat_template(missing)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x", "template": "only"}]}}, "only"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
                }
            },
            "d",
        ),
        (
            {"tokenizer_config.json": {"chat_template": "config"}, "chat_template.json": {"chat_template": "json"}},
            "json",
        ),
        ({"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "file"}, "file"),
    ],
)
def test_where_a_folder_keeps_its_template(tmp_path, files, expected):
    write_folder(tmp_path, train_library())
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.has_chat_template == (expected is not None)
    if expected:
        assert tokenizer.render_chat(TALK) == expected


def test_several_templates_and_none_default(tmp_path):
    templates = [{"name": "rag", "template": "r"}, {"name": "tools", "template": "t"}]
    write_folder(tmp_path, train_library(), tokenizer_config={"chat_template": templates})
    with pytest.raises(MinillmError, match="rag, tools"):
        Tokenizer.from_folder(tmp_path)


# The token that ends an answer. In this vocabulary 0 is BOS, 1 EOS; none of the others stops by its name.
CONTROL = ("<s>", "</s>", "<|turn|>", "<|user|>", "<|im_start|>")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}", {2}),
        ("{% for m in messages %}{{ m.content | trim }} \n<|turn|>\n{% endfor %}", {2}),
        ("{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}", set()),  # 1 stops anyway
        (
            "{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}<|im_start|>",
            {2},
        ),  # ignores add_generation_prompt
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<|turn|>", {2}),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }} END\n<|turn|>{% endfor %}", set()),
        ("{% for m in messages %}{{ m.content }}<s>{% endfor %}", set()),  # BOS begins the next turn
        ("no message at all <|turn|>", set()),
        ("{{ raise_exception('no') }}", set()),
    ],
)
def test_the_token_that_ends_a_turn_is_found_in_the_template(template, ends):
    assert with_template(template, control=CONTROL).stop_ids == {1} | ends


def test_an_end_of_turn_that_is_not_marked_special_is_found_too():
    metadata = byte_level_metadata(control=CONTROL)
    metadata["tokenizer.ggml.token_type"][2] = USER_DEFINED
    metadata["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.stop_ids == {1, 2} and 2 in tokenizer.special_ids


def test_another_template_ends_otherwise():
    tokenizer = with_template("{{ messages[-1].content }}<|turn|>", control=CONTROL)
    assert tokenizer.stop_ids == {1, 2}
    assert tokenizer.with_chat_template("{{ messages[-1].content }}<|user|>").stop_ids == {1, 3}


def test_templated_text_has_one_bos():
    tokenizer = with_template("{{ bos_token }}{{ messages[-1].content }}", pre="llama-bpe")
    plain = tokenizer.encode("Who?", bos=False)
    assert tokenizer.encode(tokenizer.render_chat(TALK)) == [0, *plain]
    assert tokenizer.with_chat_template("{{ messages[-1].content }}").encode("Who?") == [0, *plain]
