"""What a checkpoint says of how it ranks documents: the files of Sentence Transformers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asyncengine.errors import CheckpointError, InvalidRequestError
from asyncengine.model.text_files import json_in, part_of
from asyncengine.reranking import RerankPrompt

_MODULE = ".LogitScore"
"""How the type of the module ends that compares the logits of two tokens after the prompt."""


def ranking_of(path: Path) -> RerankPrompt | None:
    """How the model in a directory ranks; None if it does not say, or not by two tokens.

    Raises:
        CheckpointError: What it says makes no sense.
    """
    modules = json_in(path / "modules.json", [])
    found = next((each for each in modules if isinstance(each, dict) and _type_of(each).endswith(_MODULE)), None)
    if found is None:
        return None
    place = path / str(found.get("path", "")) / "config.json"
    tokens = json_in(place, {})
    if tokens.get("false_token_id") is None:  # the logit of one token is its relevance: log-probabilities do not tell
        return None
    processing = part_of(path / "sentence_bert_config.json", "processing_kwargs")
    beside = path / "config_sentence_transformers.json"
    instruction = part_of(beside, "prompts").get(str(json_in(beside, {}).get("default_prompt_name"))) or None
    if not isinstance(instruction, str | None):
        raise CheckpointError(f"{beside}: the prompt that is named is {instruction!r:.80}; expected a string")
    try:
        return RerankPrompt(
            instruction=instruction,
            template_arguments=processing.get("chat_template") or {},
            yes=tokens.get("true_token_id"),
            no=tokens["false_token_id"],
        )
    except InvalidRequestError as error:
        raise CheckpointError(f"{place}: {error}") from error


def _type_of(module: dict[str, Any]) -> str:
    return str(module.get("type", ""))
