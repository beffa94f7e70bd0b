"""A model that costs nothing, so that what is measured is the engine. Shared by the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.step.batch import Int32, StepBatch, StepTokens
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadedModel, LoadPlan


class ZeroCostModel:
    """Draws token 7 for everyone; each step takes `step_seconds`, spent without the GIL.

    Steps that are launched are computed one after the other, as on a GPU; `begun` and `ended` are that device's times.
    """

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self._sevens = np.full(1 << 16, 7, dtype=np.int32)
        self.free_at = 0.0  # when the last step that was launched is through
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
        tokens = self._draw(batch)
        self.ended.append(time.perf_counter())
        return tokens

    def launch(self, batch: StepBatch) -> tuple[float, StepTokens]:
        self.begun.append(max(time.perf_counter(), self.free_at))
        self.free_at = self.begun[-1] + self.step_seconds
        self.ended.append(self.free_at)
        return self.free_at, self._draw(batch)

    def _draw(self, batch: StepBatch) -> StepTokens:
        return StepTokens(self._sevens[: len(batch.sample_index)])

    def collect(self, flight: tuple[float, StepTokens]) -> StepTokens:
        if self.wait is not None:
            self.wait()
        left = flight[0] - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return flight[1]

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

    def __init__(
        self,
        step_seconds: float = 0.0,
        max_num_sequence: int = 1024,
        max_length: int = 8192,
        run_ahead: bool = False,
    ) -> None:
        self.run_ahead = run_ahead
        self.model = ZeroCostModel(step_seconds)
        self.max_num_sequence = max_num_sequence
        self.max_length = max_length

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        return LoadPlan(config, True)

    def load(self, plan: LoadPlan) -> LoadedModel:
        limits = Limits(
            self.max_num_sequence, self.max_length, self.max_length, 16, self.max_num_sequence * self.max_length // 16
        )
        config, launching = plan.config.replace(max_queue_size=None), self.model if self.run_ahead else None
        return LoadedModel(self.model, limits, config, 1000, (), GenerationConfig(), None, None, launching=launching)


def zero_cost_engine(step_seconds: float = 0.0, run_ahead: bool = False) -> tuple[AsyncEngine, ZeroCostModel]:
    """An engine over a `ZeroCostModel`, and the model."""
    loader = ZeroCostLoader(step_seconds, run_ahead=run_ahead)
    return AsyncEngine(EngineConfig("zero-cost"), loader=loader), loader.model
