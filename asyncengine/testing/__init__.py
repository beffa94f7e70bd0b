"""For whoever builds on the engine: models that need no torch, so that an application's tests take milliseconds.

Everything but the model is the real engine: threads, scheduler, KV accounting, streams, errors.
"""

from asyncengine.testing.adapters import Script
from asyncengine.testing.engines import MODEL, echo_engine, scripted_engine
from asyncengine.testing.media import ScriptedMediaReader, pieces_of
from asyncengine.testing.scripted import ScriptedModel, echo
from asyncengine.testing.scripted_loader import ScriptedLoader
from asyncengine.testing.tokenizer import ByteTokenizer

__all__ = [
    "MODEL",
    "ByteTokenizer",
    "Script",
    "ScriptedLoader",
    "ScriptedMediaReader",
    "ScriptedModel",
    "echo",
    "echo_engine",
    "pieces_of",
    "scripted_engine",
]
