"""The one exception tree, split by what the caller should do.

::

    AsyncEngineError
    ├── ConfigError (ValueError)               fix the configuration
    ├── InvalidRequestError (ValueError)       fix the request
    │   └── ContextLengthExceededError         a shorter prompt
    ├── IllegalStateError                      fix the program: not allowed in this state
    ├── EngineOverloadedError                  retry later  (retryable)
    ├── EngineDrainingError                    retry later  (retryable)
    ├── DeadlineExceededError (TimeoutError)   retry later  (retryable)
    ├── StepError                              retry        (retryable)
    ├── RequestDroppedError                    fix the request's own code: it failed by itself
    ├── PrefixCacheError                       compute the prompts again: nothing kept of them can be used
    ├── ModelNotLoadedError                    reload
    ├── ReloadError                            reload with something else
    │   ├── CheckpointError                    missing, incomplete or damaged files
    │   ├── UnsupportedModelError              an architecture that cannot be served correctly
    │   ├── AdapterError                       an adapter that is not there, damaged, or for another model
    │   └── InsufficientMemoryError            does not fit; the message shows the arithmetic
    ├── EngineFailedError                      restart
    └── EngineClosedError                      give up on this engine
"""

from __future__ import annotations

from typing import ClassVar


class AsyncEngineError(Exception):
    """Root of every error that the engine raises on purpose.

    Attributes:
        retryable: Whether the same call may succeed later without being changed.
    """

    retryable: ClassVar[bool] = False


class ConfigError(AsyncEngineError, ValueError):
    """An `EngineConfig` is wrong: unknown key, wrong type, value out of range."""


class InvalidRequestError(AsyncEngineError, ValueError):
    """A request is wrong. The message names the field, the value and what is allowed."""


class ContextLengthExceededError(InvalidRequestError):
    """The prompt leaves no room for another token; the message says how many it may have."""


class IllegalStateError(AsyncEngineError):
    """The instruction is not allowed in the engine's present state; nothing was changed."""


class EngineOverloadedError(AsyncEngineError):
    """The waiting queue is full and the caller chose not to wait."""

    retryable = True


class EngineDrainingError(AsyncEngineError):
    """The engine is finishing what it has and takes no new requests."""

    retryable = True


class DeadlineExceededError(AsyncEngineError, TimeoutError):
    """One of the request's deadlines passed; what was generated until then was delivered."""

    retryable = True


class StepError(AsyncEngineError):
    """The model step that this request took part in failed; the cause is chained."""

    retryable = True


class RequestDroppedError(AsyncEngineError):
    """Handling this request's own parameters failed; no other request was affected."""


class PrefixCacheError(AsyncEngineError):
    """A prefix cache cannot be kept, or a file of one is missing, damaged or of another model."""


class ModelNotLoadedError(AsyncEngineError):
    """There is no model; call `reload` first."""


class ReloadError(AsyncEngineError):
    """A model could not be loaded; the message says whether the former one still serves."""


class CheckpointError(ReloadError):
    """The checkpoint is missing, incomplete or damaged."""


class UnsupportedModelError(ReloadError):
    """The architecture cannot be served correctly."""


class AdapterError(ReloadError):
    """An adapter is missing, damaged, of a kind that is not served, or does not fit the model."""


class InsufficientMemoryError(ReloadError):
    """Weights or KV cache do not fit."""


class EngineFailedError(AsyncEngineError):
    """The device is lost; `await engine.restart()` loads the model again."""


class EngineClosedError(AsyncEngineError):
    """The engine was shut down."""
