"""An asyncio-native LLM serving core.

    async with AsyncEngine(EngineConfig("tiny")) as engine:
        async for output in engine.stream("Once upon a time"):
            print(output.text, end="")

Importing it imports neither torch nor transformers; loading a model does.
"""

from asyncengine._version import __version__
from asyncengine.config import EngineConfig
from asyncengine.errors import (
    AsyncEngineError,
    CheckpointError,
    ConfigError,
    DeadlineExceededError,
    EngineClosedError,
    EngineDrainingError,
    EngineFailedError,
    EngineOverloadedError,
    IllegalStateError,
    InsufficientMemoryError,
    InvalidRequestError,
    ModelNotLoadedError,
    ReloadError,
    RequestDroppedError,
    StepError,
    UnsupportedModelError,
)
from asyncengine.generation import GenerationConfig
from asyncengine.instructions import Deadlines
from asyncengine.logits_processor import LogitsProcessor, LogitsRow
from asyncengine.loop.engine import AsyncEngine
from asyncengine.loop.health import Health
from asyncengine.loop.many import ManyStream, PendingStream
from asyncengine.loop.prepare import RequestOptions
from asyncengine.loop.stream import RequestStream
from asyncengine.metrics import Counters, EngineMetrics, Histogram
from asyncengine.outputs import BranchResult, FinishReason, PromptScore, RequestOutput, RequestResult, Usage
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
from asyncengine.state import EngineState
from asyncengine.step.batch import TokenLogprobs
from asyncengine.tokenizer import Tokenizer
from asyncengine.trace import Trace

__all__ = [
    "AsyncEngine",
    "AsyncEngineError",
    "BranchResult",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "Counters",
    "DeadlineExceededError",
    "Deadlines",
    "EbnfGrammar",
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
    "InsufficientMemoryError",
    "InvalidRequestError",
    "JsonObject",
    "JsonSchema",
    "LogitsProcessor",
    "LogitsRow",
    "ManyStream",
    "ModelNotLoadedError",
    "PendingStream",
    "PromptScore",
    "Regex",
    "ReloadError",
    "RequestDroppedError",
    "RequestOptions",
    "RequestOutput",
    "RequestResult",
    "RequestStream",
    "ResponseFormat",
    "StepError",
    "StructuralTag",
    "StructuralTags",
    "TokenLogprobs",
    "Tokenizer",
    "Trace",
    "UnsupportedModelError",
    "Usage",
    "__version__",
]
