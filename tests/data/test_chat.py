"""Messages become the text that `apply_chat_template` makes of them: EXPECTED is what transformers 5.24.0 made of TALK."""

import json
from pathlib import Path
from typing import Any

import pytest
from every_form import NESTED

from thinwire.config.data import DataSection
from thinwire.data.chat import Chat
from thinwire.data.corpus import load_corpus
from thinwire.data.records import BadRecord
from thinwire.errors import UserError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Süß <b>?\n"},
    {"role": "assistant", "content": "Ja.", "tool_calls": [{"name": "é", "arguments": {"x": "<1>"}}]},
    {"role": "user", "content": "stop"},
]
CHATML = """{{ bos_token }}{% for m in messages %}
    {%- if m.content == 'stop' %}
        {%- break %}
    {%- endif %}
    {{- '<|im_start|>' + m['role'] + '\\n' }}
    {% if m.role == 'assistant' %}
{% generation %}
{{ m.content }}{% endgeneration %}{{ m.tool_calls | tojson }}
    {% else %}
{{ m.content | trim }}
    {% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant{% endif %}{% if tools is not none %}tools{% endif %}"""


EXPECTED = (
    "<s><|im_start|>system\n\nBe brief.\n<|im_end|>\n<|im_start|>user\n\nSüß <b>?\n<|im_end|>\n<|im_start|>assistant\n\nJa."
    '[{"name": "é", "arguments": {"x": "<1>"}}]\n<|im_end|>\n26 Jul 2024'
)


def beside(folder: Path, config: object, **files: str) -> Chat:
    """Of a tokenizer.json with these files beside it."""
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / f"{name}.jinja").write_text(text)
    return Chat("", str(folder / "tokenizer.json"))


def test_a_template_is_found_beside_the_tokenizer(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    for bos in ("<s>", {"content": "<s>", "lstrip": False}):
        for template in (CHATML, named):
            assert beside(tmp_path, {"bos_token": bos, "chat_template": template}).render(TALK, "") == EXPECTED
    assert beside(tmp_path, {"bos_token": "<s>", "chat_template": "no"}, chat_template=CHATML).render(TALK, "") == EXPECTED
    (tmp_path / "mine.jinja").write_text("{{ messages[1].role }}")
    assert Chat(str(tmp_path / "mine.jinja"), str(tmp_path / "tokenizer.json")).render(TALK, "") == "user"
    assert Chat(str(tmp_path / "mine.jinja"), "bytes").render(TALK, "") == "user"


def test_messages_in_every_form_give_the_same_tokens(tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": f"{number}"}] for number in range(60)
    ]
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    found = set()
    for name, write in NESTED.items():
        (tmp_path / name).write_bytes(write([{"messages": talk} for talk in talks]))
        data = DataSection(source=str(tmp_path / name), field="messages", chat_template=str(tmp_path / "chat.jinja"))
        corpus = load_corpus(data, tmp_path / "cache")
        found.add((corpus.train.tobytes(), corpus.held_out.tobytes()))
    assert len(found) == 1
    assert b"user: Say 7.\nassistant: 7\n\0" in b"".join(found.pop())


def test_another_template_makes_other_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(NESTED["a.jsonl"]([{"messages": TALK}] * 9))
    template = tmp_path / "chat.jinja"
    data = DataSection(source=str(tmp_path / "a.jsonl"), field="messages", chat_template=str(template))
    sums = []
    for text in ("{{ messages[0].role }}" * 9, "{{ messages[1].role }}" * 9):
        template.write_text(text)
        sums.append(load_corpus(data, tmp_path / "cache").sha256)
    assert sums[0] != sums[1]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {},
            "here holds messages, and tokenizer '{folder}/tokenizer.json' has no chat template; set data.",
        ),
        (
            {"chat_template": "{% endfor %}"},
            "chat template {folder}/tokenizer_config.json: line 1: Encountered unknown tag 'endfor'",
        ),
        ({"chat_template": "{{ strftime_now('%d') }}"}, "here does not fit the chat template: 'strftime_now' is undefined"),
        (
            {"chat_template": "{{ messages[0].content + 1 }}"},
            "here does not fit the chat template: TypeError: can only conc",
        ),
        ({"chat_template": "{{ messages.append(1) }}"}, "here does not fit the chat template: "),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "here does not fit the chat template: access to attribute '__class__'"),
    ],
)
def test_what_a_template_cannot_do_is_one_line(tmp_path: Path, config: Any, problem: str) -> None:
    with pytest.raises((UserError, BadRecord)) as caught:
        beside(tmp_path, config).render(TALK, "here")
    assert str(caught.value).startswith(problem.format(folder=tmp_path)) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chat template .*absent\.jinja cannot be read: No such file"):
        Chat(str(tmp_path / "absent.jinja"), "bytes")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        Chat("", str(tmp_path / "tokenizer.json")).render(TALK, "")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"latin\.jinja is not UTF-8 at byte 0"):
        Chat(str(tmp_path / "latin.jinja"), "bytes").render(TALK, "")
