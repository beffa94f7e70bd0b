"""A model with its weights, as it will run, tried against transformers. Made on the loader's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

from asyncengine.config import DecoderBackend, EngineConfig
from asyncengine.errors import UnsupportedModelError
from asyncengine.media import UNENCODED, Kind
from asyncengine.model import compiled_parts, memory, packed_linear
from asyncengine.model.findings import Findings
from asyncengine.model.load_check import Details
from asyncengine.model.load_settings import check_latents
from asyncengine.model.media.modules import senses
from asyncengine.model.media.trials import Trials
from asyncengine.model.read_model import codes_stay, kept_forms, read_model
from asyncengine.model.recorded import Recorded

if TYPE_CHECKING:
    from asyncengine.classifier import Classifier
    from asyncengine.model.media.trial import MediaTrial


@dataclass(frozen=True, slots=True)
class Built:
    """A model with its weights and without its KV cache.

    Attributes:
        layers: Those that keep something of the tokens before.
        hidden_size: Width of its hidden states; None if there is no telling.
        findings: What the next load of it need not find out; None if that is not to be kept.
        has_head: Whether its head is the checkpoint's, not made up.
        classifier: Its classification head, if it has one.
        media_trial: What reads images, audio and videos and makes their encoder; None if the model takes none.
        no_media: By kind, why it takes none, in words.
    """

    model: Any
    layers: Recorded
    program: Any
    fused: Any
    notes: tuple[str, ...]
    hidden_size: int | None
    findings: Findings | None = None
    has_head: bool = True
    classifier: Classifier | None = None
    media_trial: MediaTrial | None = None
    no_media: Mapping[Kind, str] = field(default_factory=lambda: UNENCODED)

    def decoder_backend(self, config: EngineConfig) -> DecoderBackend:
        """What the configuration comes to; "auto" where that rests on measurements, so that a restart makes them."""
        if self.program is not None:
            return "compiled"
        return "transformers" if self.fused is None else config.decoder_backend

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        from asyncengine.model.decoder.compiled_layers import weight_bytes

        return weight_bytes(self.model) if self.program is None else int(self.program.nbytes)


def build(
    config: EngineConfig, details: Details, attention: Callable[[], Any], meanwhile: Callable[[], object] = lambda: None
) -> Built:
    """Reads the weights, and tries the model in every form in which it may run.

    Args:
        config: What is wanted.
        details: What is known of it.
        attention: Returns what attends. Called after the weights are there, since it may wait for a compiler.
        meanwhile: Called when what follows hardly needs the GIL, if there is such a time.

    Raises:
        UnsupportedModelError: It does not compute what transformers does, or not in the form that is asked for.
    """
    from asyncengine.model.hidden_states import hidden_size

    building = _Building(config, details, attention)
    if config.quantization == "int4" and details.device.type == "cuda":
        building.round_to_four_bits()
    program, findings = building.as_program(meanwhile)
    fused = building.as_modules() if program is None else None
    building.notes += building.trials.notes(building.name)
    return Built(
        model=building.model,
        layers=building.layers,
        program=program,
        fused=fused,
        notes=tuple(building.notes),
        hidden_size=hidden_size(building.model),
        findings=findings,
        has_head=building.has_head,
        classifier=building.classifier,
        media_trial=building.trials.widest,
        no_media=building.trials.refused,
    )


class _Building:
    """A model on its way to the form in which it will run, tried in each.

    Attributes:
        name: Of its checkpoint, for messages.
        model: It, as transformers has it; a program has taken its weights.
        has_head: Whether its head is the checkpoint's.
        classifier: Its classification head, if it has one.
        backend: What attends.
        trial: What transformers makes of it, and its layers.
        trials: The same of images, audio and videos.
        notes: What is slower than it could be, or inexact, in words.
    """

    def __init__(self, config: EngineConfig, details: Details, attention: Callable[[], Any]) -> None:
        from asyncengine.model import verification

        self._config, self._details = config, details
        self.name = str(details.checkpoint.path)
        self.notes: list[str] = []
        self.model, self.has_head = read_model(details)
        layers = self._found_layers()
        check_latents(config, [layer.spec for layer in layers.attention])
        layers, slower = compiled_parts.calling_compiled(layers, details.device)
        self.notes += slower
        self.trial = verification.Trial.of(self.model, layers, details.device)
        self.classifier = _classifier(details, self.model)
        self.backend = attention()
        self.trials = Trials(config, details.no_media)
        self.trials.begin(details, self.model, layers, self.backend)
        self._attend_by(layers)

    @property
    def layers(self) -> Recorded:
        """Those that keep something of the tokens before."""
        return self.trial.layers

    def round_to_four_bits(self) -> None:
        """Rounds weights to four bits, unless the checkpoint has them so; the trial is of what the codes stand for.

        Raises:
            UnsupportedModelError: Nothing can be in four bits.
        """
        from asyncengine.model.quantised.four_bit_experts import round_experts, share_of, use_kernels
        from asyncengine.model.quantised.four_bit_linear import round_layers

        rounded, before = not codes_stay(self._details), self.trial
        if rounded:
            round_experts(self.model)
            round_layers(self.model, but=self.layers.uncalled | senses(self.model))
            memory.empty_cache()
        if not (share := share_of(self.model)):
            raise UnsupportedModelError(f"{self.name!r} has no linear layers that could be in int4")
        use_kernels(self.model, False)  # they are what is tried
        self.trial = type(before).of(self.model, self.layers, self._details.device)
        use_kernels(self.model, True)
        how = "as stored"
        if rounded:
            how = f"rounded: logits of a trial are {self.trial.off(before):.1%} of their norm off"
        self.notes.append(f"quantization: int4, {share:.0%} of the weights, {how}")

    def as_program(self, meanwhile: Callable[[], object]) -> tuple[Any, Findings | None]:
        """The model as a compiled step, and what the next load need not find out; None where it runs otherwise.

        Raises:
            UnsupportedModelError: It cannot run as one, and nothing else will do.
        """
        from asyncengine.model.decoder.parts import NotRecognised

        config = self._config
        try:
            return self._compiled(meanwhile)
        except (NotRecognised, UnsupportedModelError) as error:
            if config.decoder_backend == "compiled" or not (
                config.quantization == "none" or compiled_parts.multiplies(config, self.backend)
            ):
                raise UnsupportedModelError(f"{self.name!r} cannot run as a compiled step: {error}") from error
            self.notes.append(f"decoder: runs as transformers has it: {error}")
            weights_are_taken = isinstance(error, UnsupportedModelError)
        if weights_are_taken:  # what was raised is gone by now, and with it the weights that its traceback held
            self.model, _ = read_model(self._details)
            self._attend_by(self._found_layers())
        return None, None

    def _compiled(self, meanwhile: Callable[[], object]) -> tuple[Any, Findings | None]:
        from asyncengine.model.decoder.program import rounding_of
        from asyncengine.model.decoder.roundings import Roundings
        from asyncengine.model.decoder.weights import Packing

        config, details = self._config, self._details
        blueprint = self._blueprint()
        if blueprint is None:
            return None, None
        library = compiled_parts.library_of(config, details, self.backend)
        rounded_to = rounding_of(blueprint, config.quantization)
        trial = self.trial.of_step(self.model, Roundings(library, blueprint, rounded_to))
        off = None if trial is self.trial or rounded_to == "none" else trial.off(self.trial, rounded_to)
        # What is not mapped from its file is in memory, and let go matrix by matrix.
        mapped = details.checkpoint.stored_in(details.dtype)
        packing = Packing(library) if mapped else None
        program = compiled_step(config, details, blueprint, self.backend, packing)
        if packing is not None:
            meanwhile()
            packing.run()
        error = trial.run(self.model, self.backend, program)
        self.notes += _rounding(config.quantization, program, error if off is None else off)
        self.trials.with_program(self.model, self.layers, self.backend, program)
        return program, self._findings(blueprint, trial)

    def _blueprint(self) -> Any:
        """The model's parts, if it is to be compiled; None if that is not wanted or not for this device.

        Raises:
            NotRecognised: The model is not one that the compiled step can run.
        """
        from asyncengine.model.attention.cpu import CpuAttention
        from asyncengine.model.decoder.blueprint import NotRecognised
        from asyncengine.model.fused.choice import DEVICES

        config, device = self._config, self._details.device
        if config.decoder_backend == "transformers":
            return None
        if config.decoder_backend == "auto" and config.quantization == "fp8":
            return None
        if device.type in DEVICES and config.quantization != "int8":
            return None  # `_fused` sees to it
        if not isinstance(self.backend, CpuAttention):
            if config.decoder_backend == "auto" and config.quantization == "none":
                return None
            raise NotRecognised(f"it needs the compiled attention of the CPU, not {self.backend.name!r} on {device}")
        return self._recognised()

    def _findings(self, blueprint: Any, trial: Any) -> Findings | None:
        """What was found out, if that is to be kept and the next load, which repeats the trial, could do with it."""
        from asyncengine.model.skeleton import described

        details = self._details
        if details.findings_at is None:
            return None
        found = described(self.model, self.layers.attention, blueprint, details.checkpoint)
        if found is None:
            return None
        kept = trial.kept()
        limit = None if details.rope_limit is None else astuple(details.rope_limit)
        more = {"notes": list(self.notes), "rope_limit": limit}
        return Findings(found.description | kept.description | more, found.tensors | kept.tensors)

    def as_modules(self) -> Any:
        """Has the model run by its own modules, as fast as they can be made; its fused kernels, or None.

        Raises:
            UnsupportedModelError: It computes something else over a paged cache, or not in the form that is asked for.
        """
        config, details = self._config, self._details
        self._multiply()
        self._attend_by(self.layers)  # by now it is known which of the recurrent ones continue
        if config.quantization == "fp8":
            self._round_to_fp8()
        if details.device.type == "cuda":
            self.notes += compiled_parts.slower_on_device(self.trial)
        fused = self._fused()
        narrow_cache = details.kv_dtype is not details.dtype
        if narrow_cache:
            self._narrow_cache()
        narrow = config.quantization == "fp8" or narrow_cache
        self.trials.run(self.model, self.layers, self.backend, config.quantization, details.kv_dtype, narrow)
        return fused

    def _multiply(self) -> None:
        """Settles what multiplies in the model's linear layers, and tries it."""
        from asyncengine.model.graphs import reason_of

        config, details = self._config, self._details
        if compiled_parts.multiplies(config, self.backend):
            self.model, self.trial, said = compiled_parts.with_products(
                config, self.model, self.trial, details, self.backend, lambda: read_model(details)[0]
            )
            self.notes += said
            return
        if config.quantization == "none" and packed_linear.supports(details.dtype, details.device):
            packed_linear.pack(self.model, self.layers.uncalled)
        try:
            self.notes += compiled_parts.tried(self.model, self.trial, self.backend)
            return
        except Exception as error:  # also what a compiler or a driver raises
            if config.quantization != "int4":
                raise
            reason = reason_of(error)
        from asyncengine.model.quantised.four_bit_experts import use_kernels

        use_kernels(self.model, False)
        self.trial.run(self.model, self.backend)
        self.notes.append(f"quantization: numbers are made of codes in each step, which is slow: {reason}")

    def _round_to_fp8(self) -> None:
        """Turns linear layers into fp8."""
        from asyncengine.model.quantised.fp8_linear import counted, quantise

        details, model = self._details, self.model
        done, of = counted(model) if codes_stay(details) else quantise(model, self.layers.uncalled | senses(model))
        if not done:
            raise UnsupportedModelError(f"{self.name!r} has no linear layers that could be in fp8")
        if details.device.type == "cuda":
            memory.empty_cache()
        off = self.trial.run(model, self.backend, fp8_weights=True)
        stays = [weight for weight in details.checkpoint.coded.values() if weight.stays(kept_forms(details))]
        how = "as stored" if stays and not any(weight.rounded for weight in stays) else "rounded"
        slow = "" if details.device.type == "cuda" else f"; slow on {details.device}"
        self.notes.append(
            f"quantization: fp8, {done / of:.0%} of the weights, {how}: logits of a trial are {off:.1%} of their norm "
            f"off{slow}"
        )

    def _fused(self) -> Any:
        """The model's fused kernels, or None; a note says why there are none, if they were wanted.

        Raises:
            UnsupportedModelError: There are none, and nothing else will do.
        """
        from asyncengine.model.fused import choice
        from asyncengine.model.fused.decoder import FusedDecoder
        from asyncengine.model.graphs import reason_of

        config, details, trial = self._config, self._details, self.trial
        if details.device.type not in choice.DEVICES:
            return None
        if config.decoder_backend == "transformers" or config.quantization == "int8":
            return None
        try:
            fused = FusedDecoder(self._recognised(whole_experts=True))
            in_fp8 = config.quantization == "fp8"
            if in_fp8:  # what fused kernels compute is what the modules do, in fp8 as these are
                trial = type(trial).of(self.model, self.layers, details.device)
            trial.run_fused(self.model, self.backend, fused, in_fp8)
        except Exception as error:  # also what a compiler or a driver raises: the model can be served without
            reason = reason_of(error)
            if config.decoder_backend == "compiled":
                raise UnsupportedModelError(f"{self.name!r} cannot run as a compiled step: {reason}") from error
            self.notes.append(f"decoder: runs as transformers has it: {reason}")
            return None
        return fused

    def _narrow_cache(self) -> None:
        """Tries the model over a KV cache of fewer bits, with scales of its own where it needs some."""
        config, kv_dtype = self._config, self._details.kv_dtype
        self.trial.layers = self.trial.scaled(self.model, self.backend)
        off = self.trial.run(self.model, self.backend, kv_dtype=kv_dtype, fp8_weights=config.quantization == "fp8")
        scales = [scale for layer in self.layers.attention for scale in (layer.spec.key_scale, layer.spec.value_scale)]
        scaled = sum(scale != 1.0 for scale in scales)
        with_scales = f", {scaled} of {len(scales)} scaled" if scaled else ""
        self.notes.append(
            f"KV cache: {config.kv_cache_dtype}{with_scales}: logits of a trial are {off:.1%} of their norm off"
        )

    def _recognised(self, whole_experts: bool = False) -> Any:
        """The model's parts.

        Raises:
            NotRecognised: It is not of a kind that is known.
        """
        from asyncengine.model.decoder.blueprint import NotRecognised, recognise

        if self.layers.recurrent:
            raise NotRecognised("it has recurrent layers")
        longest = self._details.max_length
        return recognise(self.model, self.layers.attention, longest, whole_experts=whole_experts)

    def _found_layers(self) -> Recorded:
        from asyncengine.model import architecture

        return architecture.layers_of(self.model, self._details.watched)

    def _attend_by(self, layers: Recorded) -> None:
        """Goes on with these layers, as they attend where there are images."""
        self.trial.layers = self.trials.layers_of(layers)


def compiled_step(config: EngineConfig, details: Details, blueprint: Any, backend: Any, later: Any = None) -> Any:
    """A model as a compiled step, which takes its weights: at once, or when `later`, a `Packing`, is run."""
    from asyncengine.model.decoder.program import CompiledDecoder

    library = compiled_parts.library_of(config, details, backend)
    return CompiledDecoder(blueprint, library, details.dtype, config.quantization, later)


def _classifier(details: Details, model: Any) -> Classifier | None:
    """The classification head of a model, tried, if it has one."""
    if details.head is None:
        return None
    from asyncengine.model import classification

    classifier = classification.read(details.head, details.checkpoint)
    classification.try_head(details.head, classifier, model, details.hf_config, details.device)
    return classifier


def _rounding(quantization: str, program: Any, off: float) -> tuple[str, ...]:
    """What narrow weights have come to in a compiled step, in words, if they are codes of the checkpoint or have four
    bits.
    """
    if program.as_stored:
        return (f"quantization: {quantization}, as stored",)
    if quantization != "int4":
        return ()
    return (f"quantization: int4, rounded: logits of a trial are {off:.1%} of their norm off",)
