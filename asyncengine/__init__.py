"""An asyncio-native LLM serving core.

    async with AsyncEngine(EngineConfig("tiny")) as engine:
        async for output in engine.stream("Once upon a time"):
            print(output.text, end="")

Importing it imports neither torch nor transformers; loading a model does. Each name below is imported when it is first
used, so that a program that needs few of them, such as ``asyncengine --help``, pays for few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncengine._version import __version__

if TYPE_CHECKING:
    from asyncengine.config import EngineConfig
    from asyncengine.errors import (
        AdapterError,
        AsyncEngineError,
        CheckpointError,
        ConfigError,
        ContextLengthExceededError,
        DeadlineExceededError,
        EngineClosedError,
        EngineDrainingError,
        EngineFailedError,
        EngineOverloadedError,
        IllegalStateError,
        InsufficientMemoryError,
        InvalidRequestError,
        ModelNotLoadedError,
        PrefixCacheError,
        ReloadError,
        RequestDroppedError,
        StepError,
        UnsupportedModelError,
    )
    from asyncengine.fallback import TranscriptionFallback
    from asyncengine.generation import GenerationConfig
    from asyncengine.instructions import Deadlines
    from asyncengine.logits_processor import LogitsProcessor, LogitsRow
    from asyncengine.loop.engine import AsyncEngine
    from asyncengine.loop.health import Health
    from asyncengine.loop.many import ManyStream
    from asyncengine.loop.pending import PendingStream
    from asyncengine.loop.prepare import RequestOptions
    from asyncengine.loop.stream import RequestStream
    from asyncengine.loop.transcript_stream import TranscriptStream
    from asyncengine.media import AudioPrompt, ImagePrompt, Video, VideoPrompt
    from asyncengine.metrics import Counters, EngineMetrics, Histogram
    from asyncengine.outputs import (
        BranchResult,
        Classification,
        Embedding,
        FinishReason,
        PromptScore,
        Relevance,
        RequestOutput,
        RequestResult,
        Transcript,
        TranscriptDelta,
        TranscriptSegment,
        TranscriptWord,
        Usage,
    )
    from asyncengine.reranking import RerankPrompt
    from asyncengine.response_format import (
        Choice,
        EbnfGrammar,
        JsonObject,
        JsonSchema,
        Regex,
        ResponseFormat,
        StructuralTag,
        StructuralTags,
    )
    from asyncengine.source import SourcePrompt
    from asyncengine.state import EngineState
    from asyncengine.step.batch import TokenLogprobs
    from asyncengine.tokenizer import Tokenizer
    from asyncengine.trace import Trace
    from asyncengine.warm_up import WarmUp

__all__ = [
    "AdapterError",
    "AsyncEngine",
    "AsyncEngineError",
    "AudioPrompt",
    "BranchResult",
    "CheckpointError",
    "Choice",
    "Classification",
    "ConfigError",
    "ContextLengthExceededError",
    "Counters",
    "DeadlineExceededError",
    "Deadlines",
    "EbnfGrammar",
    "Embedding",
    "EngineClosedError",
    "EngineConfig",
    "EngineDrainingError",
    "EngineFailedError",
    "EngineMetrics",
    "EngineOverloadedError",
    "EngineState",
    "FinishReason",
    "GenerationConfig",
    "Health",
    "Histogram",
    "IllegalStateError",
    "ImagePrompt",
    "InsufficientMemoryError",
    "InvalidRequestError",
    "JsonObject",
    "JsonSchema",
    "LogitsProcessor",
    "LogitsRow",
    "ManyStream",
    "ModelNotLoadedError",
    "PendingStream",
    "PrefixCacheError",
    "PromptScore",
    "Regex",
    "Relevance",
    "ReloadError",
    "RequestDroppedError",
    "RequestOptions",
    "RequestOutput",
    "RequestResult",
    "RequestStream",
    "RerankPrompt",
    "ResponseFormat",
    "SourcePrompt",
    "StepError",
    "StructuralTag",
    "StructuralTags",
    "TokenLogprobs",
    "Tokenizer",
    "Trace",
    "Transcript",
    "TranscriptDelta",
    "TranscriptSegment",
    "TranscriptStream",
    "TranscriptWord",
    "TranscriptionFallback",
    "UnsupportedModelError",
    "Usage",
    "Video",
    "VideoPrompt",
    "WarmUp",
    "__version__",
]

_HOMES = {
    "asyncengine.config": ("EngineConfig",),
    "asyncengine.errors": (
        "AdapterError",
        "AsyncEngineError",
        "CheckpointError",
        "ConfigError",
        "ContextLengthExceededError",
        "DeadlineExceededError",
        "EngineClosedError",
        "EngineDrainingError",
        "EngineFailedError",
        "EngineOverloadedError",
        "IllegalStateError",
        "InsufficientMemoryError",
        "InvalidRequestError",
        "ModelNotLoadedError",
        "PrefixCacheError",
        "ReloadError",
        "RequestDroppedError",
        "StepError",
        "UnsupportedModelError",
    ),
    "asyncengine.fallback": ("TranscriptionFallback",),
    "asyncengine.generation": ("GenerationConfig",),
    "asyncengine.media": ("AudioPrompt", "ImagePrompt", "Video", "VideoPrompt"),
    "asyncengine.instructions": ("Deadlines",),
    "asyncengine.logits_processor": ("LogitsProcessor", "LogitsRow"),
    "asyncengine.loop.engine": ("AsyncEngine",),
    "asyncengine.loop.health": ("Health",),
    "asyncengine.loop.many": ("ManyStream",),
    "asyncengine.loop.pending": ("PendingStream",),
    "asyncengine.loop.prepare": ("RequestOptions",),
    "asyncengine.loop.stream": ("RequestStream",),
    "asyncengine.loop.transcript_stream": ("TranscriptStream",),
    "asyncengine.metrics": (
        "Counters",
        "EngineMetrics",
        "Histogram",
    ),
    "asyncengine.outputs": (
        "BranchResult",
        "Classification",
        "Embedding",
        "FinishReason",
        "PromptScore",
        "Relevance",
        "RequestOutput",
        "RequestResult",
        "Transcript",
        "TranscriptDelta",
        "TranscriptSegment",
        "TranscriptWord",
        "Usage",
    ),
    "asyncengine.reranking": ("RerankPrompt",),
    "asyncengine.response_format": (
        "Choice",
        "EbnfGrammar",
        "JsonObject",
        "JsonSchema",
        "Regex",
        "ResponseFormat",
        "StructuralTag",
        "StructuralTags",
    ),
    "asyncengine.source": ("SourcePrompt",),
    "asyncengine.state": ("EngineState",),
    "asyncengine.step.batch": ("TokenLogprobs",),
    "asyncengine.tokenizer": ("Tokenizer",),
    "asyncengine.trace": ("Trace",),
    "asyncengine.warm_up": ("WarmUp",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
