"""Whole engines over scripted models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from asyncengine.config import EngineConfig
from asyncengine.loop.engine import AsyncEngine
from asyncengine.testing.adapters import Script
from asyncengine.testing.scripted import echo
from asyncengine.testing.scripted_loader import ScriptedLoader
from asyncengine.testing.tokenizer import ByteTokenizer

Answers = Script | Mapping[str, str] | str

MODEL = "scripted"
"""Name under which the scripted model is loaded; any other works as well."""


def scripted_engine(
    answers: Answers,
    *,
    step_seconds: float = 0.0,
    adapters: Mapping[str, Answers] | None = None,
    kept_states: int | None = None,
    takes_images: bool = False,
    takes_audio: bool = False,
    takes_videos: bool = False,
    **config: Any,
) -> AsyncEngine:
    """An engine that gives known answers; enter it with ``async with``.

    Args:
        answers: One answer for every prompt; or a mapping from a piece of the prompt to the answer; or a function
            from the prompt's bytes and the branch to the answer's bytes.
        step_seconds: How long each step, that is each byte of an answer, takes.
        adapters: The answers that adapters give, by their names.
        kept_states: As of `ScriptedLoader`.
        takes_images: As of `ScriptedLoader`; any bytes are an image.
        takes_audio: The same of audio.
        takes_videos: The same of videos.
        **config: Fields of `EngineConfig`.
    """
    scripts = {name: _script(own) for name, own in (adapters or {}).items()}
    loader = ScriptedLoader(
        _script(answers),
        step_seconds=step_seconds,
        tokenizer=ByteTokenizer(),
        adapters=scripts,
        kept_states=kept_states,
        takes_images=takes_images,
        takes_audio=takes_audio,
        takes_videos=takes_videos,
    )
    return AsyncEngine(EngineConfig(MODEL, adapters={name: name for name in scripts}, **config), loader=loader)


def echo_engine(*, step_seconds: float = 0.0, **config: Any) -> AsyncEngine:
    """An engine that answers every prompt with the prompt; enter it with ``async with``."""
    return scripted_engine(echo, step_seconds=step_seconds, **config)


def _script(answers: Answers) -> Script:
    if callable(answers):
        return answers
    if isinstance(answers, str):
        constant = answers.encode()
        return lambda prompt, branch: constant
    table = dict(answers)

    def look_up(prompt: Sequence[int], branch: int) -> Iterable[int]:
        text = bytes(token for token in prompt if token < 256).decode(errors="replace")
        for piece, answer in table.items():
            if piece in text:
                return answer.encode()
        raise LookupError(f"no answer for a prompt that contains {text!r}")

    return look_up
