"""A model that costs nothing, so that what is measured is the engine. Shared by the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.step.batch import Int32, StepBatch, StepTokens
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.step.scheduler import Limits


class ZeroCostModel:
    """Draws token 7 for everyone; each step takes `step_seconds`, spent without the GIL."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self.wait: Callable[[], object] | None = None  # called in every step, if set
        self.begun: list[float] = []
        self.ended: list[float] = []

    def place(self, slot: int, params: Any, branch: int, prompt: Int32, output: Int32) -> None:
        pass

    def execute(self, batch: StepBatch) -> StepTokens:
        self.begun.append(time.perf_counter())
        if self.wait is not None:
            self.wait()
        if self.step_seconds:
            time.sleep(self.step_seconds)
        tokens = StepTokens(np.full(len(batch.sample_index), 7, dtype=np.int32))
        self.ended.append(time.perf_counter())
        return tokens

    def device_lost(self, error: BaseException) -> bool:
        return False

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def update_weights(self, weights: Mapping[str, Any]) -> None:
        pass

    def debug_call(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        return []

    def close(self) -> None:
        pass


class ZeroCostLoader:
    """Loads one `ZeroCostModel`; requests have no tokenizer and no text."""

    def __init__(self, step_seconds: float = 0.0, max_num_sequence: int = 1024, max_length: int = 8192) -> None:
        self.model = ZeroCostModel(step_seconds)
        self.max_num_sequence = max_num_sequence
        self.max_length = max_length

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        return LoadPlan(config, True)

    def load(self, plan: LoadPlan) -> LoadedModel:
        limits = Limits(
            self.max_num_sequence, self.max_length, self.max_length, 16, self.max_num_sequence * self.max_length // 16
        )
        return LoadedModel(
            self.model, limits, plan.config.replace(max_queue_size=None), 1000, (), GenerationConfig(), None, None
        )


def zero_cost_engine(step_seconds: float = 0.0) -> tuple[AsyncEngine, ZeroCostModel]:
    """An engine over a `ZeroCostModel`, and the model."""
    loader = ZeroCostLoader(step_seconds)
    return AsyncEngine(EngineConfig("zero-cost"), loader=loader), loader.model
