"""`RerankPrompt`: how a model is asked whether a document answers a query. A value."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncengine.errors import InvalidRequestError

_PLACE = re.compile(r"\{(query|document|instruction)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankPrompt:
    """How a query and a document become a prompt, and which tokens answer it.

    Attributes:
        template: The prompt, special tokens included, with ``{query}`` and ``{document}`` where these go and, if it has
            a place for one, ``{instruction}``. Other braces stay as they are. Documents share the prefix cache as far
            as the template is the same, so the query goes first. None is the model's chat template, which gets messages
            of the roles ``"query"`` and ``"document"``, behind one of the role ``"system"`` with the instruction if
            there is one.
        instruction: What makes a document relevant, where the caller of `AsyncEngine.rerank` does not say.
        template_arguments: Passed to the chat template, which gets ``add_generation_prompt=False`` besides unless it
            is among them.
        yes: The token by which the model says that the document answers the query: its id, or a text that is one token.
            None for a model with a classification head, which says so by that.
        no: The token by which it says that it does not. Both are given, or neither.
    """

    template: str | None = None
    instruction: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    yes: str | int | None = None
    no: str | int | None = None

    def __post_init__(self) -> None:
        if self.template is not None:
            if not isinstance(self.template, str):
                raise InvalidRequestError(f"template is {self.template!r:.80}; expected a string or None")
            for name in ("query", "document"):
                if f"{{{name}}}" not in self.template:
                    raise InvalidRequestError(f"template is {self.template!r:.80}; it has no place for {{{name}}}")
            if self.template_arguments:
                raise InvalidRequestError(
                    "template_arguments are given beside template; they are for the chat template"
                )
        if self.instruction is not None and not isinstance(self.instruction, str):
            raise InvalidRequestError(f"instruction is {self.instruction!r:.80}; expected a string or None")
        if not isinstance(self.template_arguments, Mapping):
            raise InvalidRequestError(f"template_arguments is {self.template_arguments!r:.80}; expected a mapping")
        if self.instruction is not None and not self.takes_instructions:
            raise InvalidRequestError(f"template is {self.template!r:.80}; it has no place for {{instruction}}")
        if (self.yes is None) != (self.no is None):
            raise InvalidRequestError(f"yes is {self.yes!r:.40} and no is {self.no!r:.40}; expected both, or neither")
        for name in ("yes", "no"):
            token = getattr(self, name)
            if token is not None and (isinstance(token, bool) or not isinstance(token, (str, int)) or token == ""):
                raise InvalidRequestError(f"{name} is {token!r:.80}; expected a token id, or a text that is one token")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RerankPrompt:
        """Builds one from a mapping of field names.

        Raises:
            InvalidRequestError: An unknown key, or a wrong value.
        """
        known = [each.name for each in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise InvalidRequestError(f"unknown key {key!r} of a rerank prompt; {hint}")
        return cls(**values)

    @property
    def takes_instructions(self) -> bool:
        """Whether an instruction has a place in it; the chat template is taken to have one."""
        return self.template is None or "{instruction}" in self.template

    def text(self, query: str, document: str, instruction: str | None) -> str:
        """The prompt by the template; what is put in is not looked at for places again."""
        assert self.template is not None
        values = {"query": query, "document": document, "instruction": instruction or ""}
        return _PLACE.sub(lambda place: values[place[1]], self.template)

    def messages(self, query: str, document: str, instruction: str | None) -> list[dict[str, str]]:
        """The same for the chat template."""
        system = [] if instruction is None else [{"role": "system", "content": instruction}]
        return [*system, {"role": "query", "content": query}, {"role": "document", "content": document}]


QWEN3_RERANKER = RerankPrompt(
    template=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    yes="yes",
    no="no",
)
"""What the card of the Qwen3-Reranker models (Zhang et al., 2025) says of them."""
