from __future__ import annotations

from typing import Any

import pytest

from asyncengine import InvalidRequestError, RerankPrompt
from asyncengine.reranking import QWEN3_RERANKER


def test_what_is_put_in_is_not_looked_at_again() -> None:
    prompt = RerankPrompt(template="{instruction}|{query}|{document}|{other}{")
    assert prompt.text("{document}", "{query}", "{instruction}") == "{instruction}|{document}|{query}|{other}{"
    assert prompt.text("a", "b", None) == "|a|b|{other}{"


def test_messages_have_the_roles_of_rerankers() -> None:
    prompt = RerankPrompt()
    pair = [{"role": "query", "content": "a"}, {"role": "document", "content": "b"}]
    assert prompt.messages("a", "b", None) == pair
    assert prompt.messages("a", "b", "find") == [{"role": "system", "content": "find"}, *pair]


def test_qwen3_is_asked_as_its_card_says() -> None:
    text = QWEN3_RERANKER.text("What?", "That.", QWEN3_RERANKER.instruction)
    assert text.startswith("<|im_start|>system\nJudge whether the Document meets the requirements based on the Query")
    assert "\n<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that" in text
    assert text.endswith("<Query>: What?\n<Document>: That.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"template": 1}, "template is 1"),
        ({"template": "{query}"}, r"has no place for \{document\}"),
        ({"template": "{query}{document}", "instruction": "x"}, r"has no place for \{instruction\}"),
        ({"template": "{query}{document}", "template_arguments": {"a": 1}}, "template_arguments are given beside"),
        ({"template_arguments": 1}, "template_arguments is 1; expected a mapping"),
        ({"instruction": 1}, "instruction is 1"),
        ({"yes": "y"}, "yes is 'y' and no is None; expected both, or neither"),
        ({"yes": "", "no": "n"}, "yes is ''; expected a token id"),
        ({"yes": 1, "no": True}, "no is True; expected a token id"),
        ({"Yes": 1}, "unknown key 'Yes' of a rerank prompt; did you mean 'yes'?"),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        RerankPrompt.from_dict(fields)
