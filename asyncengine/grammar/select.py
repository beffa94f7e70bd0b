"""Which grammar library is used. They are imported here, on a worker thread, and only where a request asks for one."""

from __future__ import annotations

from collections.abc import Callable

from asyncengine.config import GrammarLibrary
from asyncengine.errors import InvalidRequestError
from asyncengine.grammar.protocol import GrammarBackend
from asyncengine.grammar.vocabulary import TokenSource, Vocabulary


def make_backend(
    name: GrammarLibrary, tokenizer: object, vocab_size: int, end_token_ids: tuple[int, ...]
) -> GrammarBackend:
    """A back end for a model's vocabulary.

    Args:
        name: ``"auto"`` takes llguidance, or xgrammar where only that is installed.
        tokenizer: The model's; None if it has none.
        vocab_size: The model's.
        end_token_ids: The model's.

    Raises:
        InvalidRequestError: The library is not installed, or the tokenizer does not say what its tokens are.
    """
    if tokenizer is None:
        raise InvalidRequestError("response_format needs a tokenizer and the model has none")
    if not isinstance(tokenizer, TokenSource):
        raise InvalidRequestError(
            f"response_format needs to know the model's tokens, which {type(tokenizer).__name__} cannot tell: it is "
            "not a tokenizer of the tokenizers library and has no method token_table"
        )
    missing: ImportError | None = None
    for candidate in ("llguidance", "xgrammar") if name == "auto" else (name,):
        try:
            kind = _library(candidate)
        except ImportError as error:
            missing = missing or error
        else:
            return kind(Vocabulary(tokenizer.token_table(), vocab_size, end_token_ids))
    library = "llguidance" if name == "auto" else name
    extra = {"llguidance": "grammar"}.get(library, library)
    raise InvalidRequestError(
        f"response_format needs {library}, which is not installed: pip install 'asyncengine[{extra}]'"
    ) from missing


def _library(name: str) -> Callable[[Vocabulary], GrammarBackend]:
    if name == "llguidance":
        from asyncengine.grammar.llguidance_backend import LlguidanceBackend

        return LlguidanceBackend
    from asyncengine.grammar.xgrammar_backend import XgrammarBackend

    return XgrammarBackend
