"""A model that an earlier load found everything out about. Made on the loader's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asyncengine.config import EngineConfig
from asyncengine.errors import UnsupportedModelError
from asyncengine.model.built_model import Built, compiled_step
from asyncengine.model.compiled_parts import library_of
from asyncengine.model.load_check import Details
from asyncengine.model.read_model import kept_forms
from asyncengine.model.recorded import Recorded


@dataclass(frozen=True, slots=True)
class Recalled:
    """A model but for its weights, which are mapped from their files.

    All are packed by one call, so whoever holds the GIL meanwhile is not in the way.
    """

    details: Details
    backend: Any
    model: Any
    layers: Recorded
    program: Any
    packing: Any

    def built(self) -> Built | None:
        """Packs the weights, and tries the compiled step as it was tried then.

        Returns:
            None, if it does not compute what transformers did then.
        """
        from asyncengine.model import verification

        findings, details = self.details.findings, self.details
        assert findings is not None
        self.packing.run()
        trial = verification.Trial.recalled(findings, details.dtype, self.layers, details.device)
        try:
            trial.run(self.model, self.backend, self.program)
        except UnsupportedModelError:
            return None
        about = findings.description
        return Built(
            model=self.model,
            layers=self.layers,
            program=self.program,
            fused=None,
            notes=tuple(about["notes"]),
            hidden_size=about["hidden_size"],
            no_media=details.no_media,
        )


def recalled(config: EngineConfig, details: Details, backend: Any) -> Recalled:
    """The compiled step of a model whose `details` have findings."""
    from asyncengine.model.decoder.weights import Packing
    from asyncengine.model.skeleton import assembled

    assert details.findings is not None
    forms = kept_forms(details)
    model, layers, blueprint = assembled(details.findings, details.checkpoint, details.max_length, details.dtype, forms)
    details.checkpoint.check_unchanged()
    packing = Packing(library_of(config, details, backend))
    program = compiled_step(config, details, blueprint, backend, packing)
    return Recalled(details, backend, model, Recorded(layers), program, packing)
