"""How models are loaded unless the caller says otherwise."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

from asyncengine.builds import BuildError
from asyncengine.config import EngineConfig
from asyncengine.loop import delivery
from asyncengine.step.model import LoadedModel, LoadPlan


class DefaultLoader:
    """Loads with transformers, which is imported on the loader's thread: making an engine costs the loop nothing."""

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        """As `Loader` has it; what is not there is said before transformers is imported."""
        from asyncengine.model.location import check_there

        check_there(config)
        from asyncengine.model.loader import TransformersLoader

        return TransformersLoader().check(config, current)

    def load(self, plan: LoadPlan) -> LoadedModel:
        """As `Loader` has it; the delivery is compiled with the first model."""
        from asyncengine.model.loader import TransformersLoader

        with ThreadPoolExecutor(1, "asyncengine-delivery") as pool:
            pool.submit(delivery.compile_ahead)
            loaded = TransformersLoader().load(plan)
        try:
            delivery.use_compiled()
        except BuildError as error:
            return dataclasses.replace(loaded, notes=(*loaded.notes, f"tokens are delivered by Python code: {error}"))
        return loaded
