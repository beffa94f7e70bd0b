"""A query and a document as one prompt, and the tokens that say whether they belong together. On any thread; values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from asyncengine.errors import InvalidRequestError
from asyncengine.generation import GenerationConfig
from asyncengine.loop.token_ids import encode_piece, tokenizer_of
from asyncengine.outputs import RequestResult
from asyncengine.reranking import RerankPrompt
from asyncengine.step.model import ModelView
from asyncengine.tokenizer import PairingTokenizer

_NEEDED = "a query and a document need one"


@dataclass(frozen=True, slots=True)
class TextPair:
    """A prompt of two texts, put together by the model's tokenizer."""

    first: str
    second: str
    has_template = False

    @property
    def size(self) -> int:
        """Characters of both."""
        return len(self.first) + len(self.second)

    def encoded(self, view: ModelView, most: int | None = None) -> tuple[list[int], int | None]:
        """Token ids, and where those of the second text begin if the model is told.

        Args:
            view: The model.
            most: How many there may be: the end of the second text is left out. None keeps all.

        Raises:
            InvalidRequestError: There is no tokenizer, or the model takes no pairs.
        """
        if not view.takes_pairs:
            raise InvalidRequestError(f"the prompt is a pair of texts; {view.config.model!r} takes one text")
        return cast("PairingTokenizer", tokenizer_of(view, _NEEDED)).encode_texts((self.first, self.second), most)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt that asks how far a document answers a query.

    Attributes:
        given: What it is written by; None is what the model's checkpoint says.
        instruction: What makes a document relevant; None is what that says.
    """

    query: str
    document: str
    given: RerankPrompt | None = None
    instruction: str | None = None

    @property
    def has_template(self) -> bool:
        """Whether it is written by a template of the caller's, which takes less time than a chat template."""
        return self.given is not None and self.given.template is not None

    @property
    def size(self) -> int:
        """Characters of both."""
        return len(self.query) + len(self.document)

    def encoded(self, view: ModelView, most: int | None = None) -> tuple[list[int], int | None]:
        """Token ids, and where those of the document begin if the model is told.

        A template writes special tokens itself, so none are added.

        Args:
            view: The model.
            most: How many there may be: the end of the document is left out. None keeps all.

        Raises:
            InvalidRequestError: There is no tokenizer, or it is not known how the model ranks.
        """
        how = how_to_rank(self.given, view)
        if how is None:
            instruction_of(how, self.instruction)
            return TextPair(self.query, self.document).encoded(view, most)
        ids = self._written(how, self.document, view)
        if most is None or len(ids) <= most:
            return ids, None
        tokenizer = tokenizer_of(view, _NEEDED)
        tokens = encode_piece(tokenizer, self.document)
        while len(ids) > most and tokens:  # what is cut may be encoded to one token more than it was
            tokens = tokens[: max(len(tokens) - (len(ids) - most), 0)]
            ids = self._written(how, tokenizer.decode(tokens, False), view)
        return ids, None

    def _written(self, how: RerankPrompt, document: str, view: ModelView) -> list[int]:
        tokenizer, instruction = tokenizer_of(view, _NEEDED), instruction_of(how, self.instruction)
        if how.template is not None:
            return encode_piece(tokenizer, how.text(self.query, document, instruction))
        messages = how.messages(self.query, document, instruction)
        return tokenizer.encode_chat(messages, {"add_generation_prompt": False, **how.template_arguments})


def how_to_rank(given: RerankPrompt | None, view: ModelView) -> RerankPrompt | None:
    """How a model ranks: as the caller says, else as its checkpoint does; None if its tokenizer makes the prompt.

    Raises:
        InvalidRequestError: Neither says, or the model cannot do it so.
    """
    how = view.ranking if given is None else given
    model = view.config.model
    if view.takes_pairs:
        if given is not None:
            raise InvalidRequestError(
                f"a RerankPrompt is given; the tokenizer of {model!r} makes its prompts of two texts: leave it out"
            )
        if view.classifier is None:
            raise InvalidRequestError(f"{model!r} cannot rank: it has no classification head; embed needs none")
        _check_one_label(view)
        return None
    if how is None:
        raise InvalidRequestError(
            f"{model!r} does not say how it ranks; give a RerankPrompt with its template"
            + (" and its tokens yes and no" if view.classifier is None else "")
        )
    if view.classifier is not None:
        _check_one_label(view)
        if how.yes is not None:
            raise InvalidRequestError(
                f"yes is {how.yes!r:.40}; {model!r} has a classification head: leave yes and no out"
            )
    elif how.yes is None:
        raise InvalidRequestError(f"yes is None; {model!r} has no classification head: give its tokens yes and no")
    return how


def _check_one_label(view: ModelView) -> None:
    assert view.classifier is not None
    if (count := len(view.classifier.labels)) != 1:
        raise InvalidRequestError(f"{view.config.model!r} cannot rank: its head has {count} labels; allowed: 1")


def instruction_of(how: RerankPrompt | None, given: str | None) -> str | None:
    """What makes a document relevant; None where nobody says.

    Raises:
        InvalidRequestError: It is no string, or there is no place for it.
    """
    if given is None:
        return None if how is None else how.instruction
    if not isinstance(given, str):
        raise InvalidRequestError(f"instruction is {given!r:.80}; expected a string or None")
    if how is None or not how.takes_instructions:
        raise InvalidRequestError(f"instruction is {given!r:.80}; the prompt has no place for one: leave it out")
    return given


def yes_or_no(how: RerankPrompt | None, view: ModelView) -> GenerationConfig:
    """A request for one token, which is one of the two, with the log-probabilities of both.

    Raises:
        InvalidRequestError: One of them is not a token, or there are none: a model with a head was loaded meanwhile.
    """
    if how is None or how.yes is None:
        raise InvalidRequestError(f"yes is None; {view.config.model!r}, which was loaded meanwhile, ranks by its head")
    yes, no = (_token_id(name, getattr(how, name), view) for name in ("yes", "no"))
    if yes == no:
        raise InvalidRequestError(f"yes is {how.yes!r:.40} and no is {how.no!r:.40}, which are one token")
    return GenerationConfig(
        max_tokens=1,
        allowed_token_ids=(yes, no),
        logprobs=True,
        top_logprobs=2,
        logprobs_mode="processed",
        detokenize=False,
        # All others as they change nothing, whatever the model's own defaults are.
        temperature=1.0,
        top_p=1.0,
        top_k=2,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        seed=0,
    )


def log_odds(config: GenerationConfig, result: RequestResult) -> float:
    """The logit of "yes" above that of "no", of what came of `yes_or_no`."""
    logprobs = result.outputs[0].logprobs
    assert logprobs is not None and config.allowed_token_ids is not None
    found = dict(zip(logprobs[0].top_ids, logprobs[0].top_logprobs, strict=True))
    yes, no = config.allowed_token_ids
    return found[yes] - found[no]


def _token_id(name: str, token: str | int | None, view: ModelView) -> int:
    if isinstance(token, int):
        if not 0 <= token < view.vocab_size:
            raise InvalidRequestError(f"{name} is {token}; allowed: 0..{view.vocab_size - 1}")
        return token
    assert token is not None
    ids = encode_piece(tokenizer_of(view, _NEEDED), token)
    if len(ids) != 1:
        raise InvalidRequestError(f"{name} is {token!r:.80}, which is {len(ids)} tokens; expected a text that is one")
    return ids[0]
