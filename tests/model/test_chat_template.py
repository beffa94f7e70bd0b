"""Templates that write what is said, or leave it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from asyncengine.model.chat_template import ChatTemplate, template_of_processor

PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
EACH = "{% for m in messages %}{{ m.role }}:BODY;{% endfor %}"


class Tokenizer:
    def __init__(self, template: str) -> None:
        def refuse(message: str) -> None:
            raise ValueError(message)

        self.chat_template = template
        environment = ImmutableSandboxedEnvironment()
        environment.globals["raise_exception"] = refuse
        self._template = environment.from_string(template)

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **arguments: Any) -> str:
        return self._template.render(messages=messages, **arguments)


def written(body: str, **arguments: Any) -> str:
    messages = [
        {"role": "system", "content": "SYS"}, {"role": "user", "content": "HELLO"},
        {"role": "assistant", "content": "OK"}, {"role": "tool", "content": None},
    ]  # fmt: skip
    return ChatTemplate(Tokenizer(EACH.replace("BODY", body))).write(messages[:3], arguments)


@pytest.mark.parametrize(
    "body",
    [
        PARTS,
        "{{ m.content }}",
        "{% if m.role == 'user' %}" + PARTS + "{% else %}{{ m.content }}{% endif %}",
        "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}",
        "{% if on is not defined %}{{ raise_exception('x') }}{% endif %}" + PARTS,
    ],
)
def test_what_is_said_is_written(body: str) -> None:
    assert written(body, on=True) == "system:SYS;user:HELLO;assistant:OK;"


def test_what_a_template_changes_is_its_own() -> None:
    assert written("{{ m.content | upper }}") == "system:SYS;user:HELLO;assistant:OK;"
    assert written("{{ m.content[:2] }}") == "system:SY;user:HE;assistant:OK;"
    only_parts_as_json = "{{ m.content | tojson if m.content is not string else '' }}"
    assert written(only_parts_as_json) == "system:;user:;assistant:;"


def test_that_of_a_processor(tmp_path: Path) -> None:
    assert template_of_processor(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "x"}))
    assert template_of_processor(tmp_path) == "x"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": {"a": "x"}}))
    assert template_of_processor(tmp_path) is None
