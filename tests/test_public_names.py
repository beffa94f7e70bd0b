from __future__ import annotations

import inspect

import asyncengine
import asyncengine.testing

PUBLIC = [
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
    "TranscriptWord",
    "TranscriptStream",
    "TranscriptionFallback",
    "UnsupportedModelError",
    "Usage",
    "Video",
    "VideoPrompt",
    "WarmUp",
    "__version__",
]

TESTING = [
    "MODEL",
    "ByteTokenizer",
    "Script",
    "ScriptedMediaReader",
    "ScriptedLoader",
    "ScriptedModel",
    "echo",
    "echo_engine",
    "pieces_of",
    "scripted_engine",
]


def test_of_the_package() -> None:
    assert sorted(asyncengine.__all__) == sorted(PUBLIC)


def test_of_the_testing_package() -> None:
    assert sorted(asyncengine.testing.__all__) == sorted(TESTING)


def test_are_all_there_and_documented() -> None:
    for module in (asyncengine, asyncengine.testing):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name} is not documented"


def test_methods_are_documented_and_typed() -> None:
    for name in asyncengine.__all__:
        value = getattr(asyncengine, name)
        if not inspect.isclass(value) or not value.__module__.startswith("asyncengine"):
            continue
        for method, function in vars(value).items():
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            assert inspect.getdoc(function), f"{name}.{method} is not documented"
            signature = inspect.signature(function)
            assert signature.return_annotation is not inspect.Signature.empty, f"{name}.{method}"


def test_the_package_is_typed() -> None:
    from pathlib import Path

    assert (Path(asyncengine.__file__).parent / "py.typed").exists()
