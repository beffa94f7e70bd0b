"""What a model is tried with before it serves images, audio and videos, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncengine.config import EngineConfig, Quantization
from asyncengine.errors import UnsupportedModelError
from asyncengine.media import KINDS, PLURALS, UNENCODED, Kind
from asyncengine.model.load_check import Details
from asyncengine.model.media.refusals import wanted
from asyncengine.model.recorded import Recorded


def check_wanted(config: EngineConfig, details: Details) -> None:
    """Refuses a load that wants images, audio or videos of a model whose processor cannot be loaded.

    Raises:
        UnsupportedModelError: As it says.
    """
    kinds = [kind for kind in KINDS if not details.no_media[kind]]
    asked_for = next((kind for kind in kinds if wanted(kind, config)), None)
    if asked_for is None:
        return
    try:
        from asyncengine.model.media.processor import processor

        processor(details.checkpoint.path, kinds)
    except Exception as error:
        raise _taken_none(asked_for, config.model, _unprocessed(error)) from error


class Trials:
    """The trials of one model: of images, of audio beside them if it takes these, and of videos beside both.

    Args:
        config: What is wanted.
        refused: By kind, why it is not to be tried, in words; empty if it is.

    Attributes:
        refused: By kind, why the model takes none, in words; empty if it takes some.
    """

    def __init__(self, config: EngineConfig, refused: dict[Kind, str]) -> None:
        self.refused = dict(refused)
        self._config = config
        self._passed: dict[Kind, Any] = {}

    @property
    def widest(self) -> Any:
        """A `asyncengine.model.media.trial.MediaTrial` of all that the model takes; None if it takes none."""
        return next(reversed(self._passed.values()), None)

    def layers_of(self, layers: Recorded) -> Recorded:
        """The model's layers, as they attend where there are images."""
        return layers if self.widest is None else self.widest.layers_of(layers)

    def begin(self, details: Details, model: Any, layers: Recorded, backend: Any) -> None:
        """Tries the model as transformers has it so far."""
        kinds = [kind for kind in KINDS if not self.refused[kind]]
        if not kinds:
            return
        from asyncengine.model.graphs import reason_of
        from asyncengine.model.media.processor import processor
        from asyncengine.model.media.trial import MediaTrial

        try:
            prepares = processor(details.checkpoint.path, kinds)
        except Exception as error:
            for kind in kinds:
                self.refused[kind] = _unprocessed(error)
            return
        if "video" in kinds and not hasattr(prepares, "video_processor"):
            self.refused["video"] = UNENCODED["video"]
            kinds.remove("video")
        key = details.checkpoint.media_key
        for kind in kinds:

            def tried(one_audio: bool, kind: Kind = kind) -> Any:
                both = [*self._passed, kind]
                looked_ahead = self.widest is not None and self.widest.looks_ahead
                trial = MediaTrial(
                    model, layers, prepares, both, key, details.device, one_audio, details.max_length, looked_ahead
                )
                if kind == "audio":
                    trial.check_repeats(model)
                trial.run(model, trial.layers_of(layers), backend)
                return trial

            try:
                self._passed[kind] = _with_one_at_least(tried) if kind == "audio" else tried(False)
            except Exception as error:  # whatever is in a processor or an encoder
                self.refused[kind] = reason_of(error)

    def with_program(self, model: Any, layers: Recorded, backend: Any, program: Any) -> None:
        """Tries the model's compiled step.

        Raises:
            UnsupportedModelError: It does not say what the model does, and that is wanted: the model can run otherwise.
        """
        from asyncengine.model.graphs import reason_of

        for kind in list(self._passed):
            try:
                self._passed[kind].run(model, layers, backend, program)
            except Exception as error:  # whatever is in its rotary embedding
                if wanted(kind, self._config):
                    raise UnsupportedModelError(reason_of(error)) from error
                self._refuse(kind, f"{reason_of(error)}; {PLURALS[kind]}=True runs the model as transformers has it")

    def run(
        self,
        model: Any,
        layers: Recorded,
        backend: Any,
        quantization: Quantization,
        kv_dtype: Any,
        narrow: bool,
    ) -> None:
        """Tries the model as it is by now, as `asyncengine.model.media.trial.MediaTrial.run` does."""
        from asyncengine.model.graphs import reason_of

        for kind in list(self._passed):
            try:
                self._passed[kind].run(model, layers, backend, None, quantization, kv_dtype, narrow)
            except Exception as error:  # also what a compiler or a driver raises
                self._refuse(kind, reason_of(error))

    def notes(self, name: str) -> list[str]:
        """What there is to be said, in words.

        Raises:
            UnsupportedModelError: Some kind is wanted, and the model takes none of it.
        """
        found = []
        for kind, reason in self.refused.items():
            if reason and wanted(kind, self._config):
                raise _taken_none(kind, name, reason)
            if reason not in ("", UNENCODED[kind]) and wanted(kind, self._config) is None:
                found.append(f"{PLURALS[kind]}: refused: {reason}")
        return found

    def _refuse(self, kind: Kind, reason: str) -> None:
        """Refuses a kind, and what was tried beside it."""
        first = KINDS.index(kind)
        for each in KINDS[first:]:
            if self._passed.pop(each, None) is not None:
                self.refused[each] = reason if each == kind else f"{PLURALS[kind]} beside it: {reason}"


def _with_one_at_least(tried: Callable[[bool], Any]) -> Any:
    """A trial with two sounds, or with one, if transformers makes something else of two than of each."""
    try:
        return tried(False)
    except Exception as error:
        try:
            return tried(True)
        except Exception as other:
            raise other from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0]


def _unprocessed(error: Exception) -> str:
    return f"its processor cannot be loaded: {_first_line(error)}"


def _taken_none(kind: Kind, name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{PLURALS[kind]} is True; {name!r} takes none: {reason}")
