"""A model with its weights, as it will run, tried against transformers. Made on the loader's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

from asyncengine.config import DecoderBackend, EngineConfig
from asyncengine.errors import UnsupportedModelError
from asyncengine.media import UNENCODED, Kind
from asyncengine.model import compiled_parts, memory, packed_linear
from asyncengine.model.attention_modules import ATTENTION
from asyncengine.model.findings import Findings
from asyncengine.model.latent_attention import keep_latents
from asyncengine.model.load_check import Details
from asyncengine.model.load_report import cannot_load, check_weights, head_of, loaded
from asyncengine.model.load_settings import check_latents
from asyncengine.model.media.modules import senses
from asyncengine.model.media.trials import Trials
from asyncengine.model.recorded import Recorded
from asyncengine.model.recurrent.packages import missing

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
        media_trial: What reads images and audio and makes their encoder; None if the model takes neither.
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
    from asyncengine.model import architecture, verification
    from asyncengine.model.decoder.parts import NotRecognised
    from asyncengine.model.decoder.program import rounding_of
    from asyncengine.model.decoder.roundings import Roundings
    from asyncengine.model.decoder.weights import Packing
    from asyncengine.model.hidden_states import hidden_size

    notes: list[str] = []
    name = str(details.checkpoint.path)
    model, has_head = _with_weights(details)
    layers = architecture.layers_of(model, details.watched)
    check_latents(config, [layer.spec for layer in layers.attention])
    layers, slower = compiled_parts.calling_compiled(layers, details)
    notes.extend(slower)
    trial = verification.Trial.of(model, layers, details.device)
    classifier = _classifier(details, model)
    backend = attention()
    trials = Trials(config, details.no_media)
    trials.begin(details, model, layers, backend)
    layers = trial.layers = trials.layers_of(layers)
    if config.quantization == "int4" and details.device.type == "cuda":
        how, trial = _in_four_bits(model, trial, details)
        notes.append(how)
    program, findings = None, None
    try:
        blueprint = _blueprint(config, details, model, layers, backend)
        if blueprint is not None:
            library = compiled_parts.library_of(config, details, backend)
            rounded_to = rounding_of(blueprint, config.quantization)
            of_step = trial.of_step(model, Roundings(library, blueprint, rounded_to))
            off = None if of_step is trial or rounded_to == "none" else of_step.off(trial, rounded_to)
            # What is not mapped from its file is in memory, and let go matrix by matrix.
            mapped = details.checkpoint.stored_in(details.dtype)
            packing = Packing(library) if mapped else None
            program = _compile(config, details, blueprint, backend, packing)
            if packing is not None:
                meanwhile()
                packing.run()
            error = of_step.run(model, backend, program)
            notes.extend(_rounding(config.quantization, program, error if off is None else off))
            trials.with_program(model, layers, backend, program)
            findings = _findings(details, model, layers, blueprint, of_step, notes)
    except (NotRecognised, UnsupportedModelError) as error:
        if config.decoder_backend == "compiled" or not (
            config.quantization == "none" or compiled_parts.multiplies(config, backend)
        ):
            raise UnsupportedModelError(f"{name!r} cannot run as a compiled step: {error}") from error
        notes.append(f"decoder: runs as transformers has it: {error}")
        program = None
        if isinstance(error, UnsupportedModelError):  # it has taken the weights
            model, _ = _with_weights(details)
            layers = trial.layers = trials.layers_of(architecture.layers_of(model, details.watched))
    fused = None
    if program is None:
        if compiled_parts.multiplies(config, backend):
            model, trial, note_of_products = compiled_parts.with_products(
                config, model, trial, details, backend, lambda: _with_weights(details)[0]
            )
            notes.extend(note_of_products)
        else:
            if config.quantization == "none" and packed_linear.supports(details.dtype, details.device):
                packed_linear.pack(model, trial.layers.uncalled)
            notes.extend(_tried(config, model, trial, backend))
        layers = trial.layers = trials.layers_of(
            trial.layers
        )  # by now it is known which of the recurrent ones continue
        if fp8_weights := config.quantization == "fp8":
            notes.append(_quantise(model, trial, backend, details))
        if details.device.type == "cuda" and (packages := missing(layers.recurrent)):
            notes.append(
                f"recurrent layers: computed by plain torch; {', '.join(packages)} would have kernels for them"
            )
        fused, note = _fuse(config, details, model, layers, backend, trial)
        notes += note
        if details.kv_dtype is not details.dtype:
            layers = trial.layers = trial.scaled(model, backend)
            off = trial.run(model, backend, kv_dtype=details.kv_dtype, fp8_weights=fp8_weights)
            numbers = [
                number for layer in layers.attention for number in (layer.spec.key_scale, layer.spec.value_scale)
            ]
            scaled = sum(number != 1.0 for number in numbers)
            with_scales = f", {scaled} of {len(numbers)} scaled" if scaled else ""
            notes.append(
                f"KV cache: {config.kv_cache_dtype}{with_scales}: logits of a trial are {off:.1%} of their norm off"
            )
    if program is None:
        narrow = config.quantization == "fp8" or details.kv_dtype is not details.dtype
        trials.run(model, layers, backend, config.quantization, details.kv_dtype, narrow)
    notes.extend(trials.notes(name))
    return Built(
        model,
        layers,
        program,
        fused,
        tuple(notes),
        hidden_size(model),
        findings,
        has_head,
        classifier,
        trials.widest,
        trials.refused,
    )


def _classifier(details: Details, model: Any) -> Classifier | None:
    """The classification head of a model, tried, if it has one."""
    if details.head is None:
        return None
    from asyncengine.model import classification

    classifier = classification.read(details.head, details.checkpoint)
    classification.try_head(details.head, classifier, model, details.hf_config, details.device)
    return classifier


@dataclass(frozen=True, slots=True)
class Recalled:
    """A model that an earlier load found everything out about, but for its weights, which are mapped from their files.

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
            self.model,
            self.layers,
            self.program,
            None,
            tuple(about["notes"]),
            about["hidden_size"],
            no_media=details.no_media,
        )


def recalled(config: EngineConfig, details: Details, backend: Any) -> Recalled:
    """The compiled step of a model whose `details` have findings."""
    from asyncengine.model.decoder.weights import Packing
    from asyncengine.model.skeleton import assembled

    assert details.findings is not None
    forms = _kept_forms(details)
    model, layers, blueprint = assembled(details.findings, details.checkpoint, details.max_length, details.dtype, forms)
    details.checkpoint.check_unchanged()
    packing = Packing(compiled_parts.library_of(config, details, backend))
    program = _compile(config, details, blueprint, backend, packing)
    return Recalled(details, backend, model, Recorded(layers), program, packing)


def _findings(
    details: Details, model: Any, layers: Recorded, blueprint: Any, trial: Any, notes: list[str]
) -> Findings | None:
    """What was found out, if that is to be kept and the next load could do with it."""
    from asyncengine.model.skeleton import described

    if (
        details.findings_at is None
        or (found := described(model, layers.attention, blueprint, details.checkpoint)) is None
    ):
        return None
    kept = trial.kept()
    limit = None if details.rope_limit is None else astuple(details.rope_limit)
    more = {"notes": notes, "rope_limit": limit}
    return Findings(found.description | kept.description | more, found.tensors | kept.tensors)


def _tried(config: EngineConfig, model: Any, trial: Any, backend: Any) -> tuple[str, ...]:
    """Tries a model as transformers has it; returns what is slower than it could be, in words.

    Raises:
        UnsupportedModelError: It computes something else over a paged cache.
    """
    from asyncengine.model.graphs import reason_of
    from asyncengine.model.quantised.four_bit_experts import use_kernels

    try:
        return compiled_parts.tried(model, trial, backend)
    except Exception as error:  # also what a compiler or a driver raises
        if config.quantization != "int4":
            raise
        reason = reason_of(error)
    use_kernels(model, False)
    trial.run(model, backend)
    return (f"quantization: numbers are made of codes in each step, which is slow: {reason}",)


def _fuse(
    config: EngineConfig, details: Details, model: Any, layers: Recorded, backend: Any, trial: Any
) -> tuple[Any, tuple[str, ...]]:
    """The model's fused kernels, or None; and why there are none, in words, if they were wanted.

    Raises:
        UnsupportedModelError: There are none, and nothing else will do.
    """
    from asyncengine.model.fused import choice
    from asyncengine.model.fused.decoder import FusedDecoder
    from asyncengine.model.graphs import reason_of
    from asyncengine.model.verification import Trial

    if (
        details.device.type not in choice.DEVICES
        or config.decoder_backend == "transformers"
        or config.quantization == "int8"
    ):
        return None, ()
    try:
        fused = FusedDecoder(_recognised(model, layers, details.max_length, whole_experts=True))
        in_fp8 = config.quantization == "fp8"
        if in_fp8:  # what fused kernels compute is what the modules do, in fp8 as these are
            trial = Trial.of(model, layers, details.device)
        trial.run_fused(model, backend, fused, in_fp8)
    except Exception as error:  # also what a compiler or a driver raises: the model can be served without
        reason = reason_of(error)
        if config.decoder_backend == "compiled":
            raise UnsupportedModelError(
                f"{str(details.checkpoint.path)!r} cannot run as a compiled step: {reason}"
            ) from error
        return None, (f"decoder: runs as transformers has it: {reason}",)
    return fused, ()


def _quantise(model: Any, trial: Any, backend: Any, details: Details) -> str:
    """Turns linear layers into fp8; returns what came of it, in words."""
    from asyncengine.model.quantised.fp8_linear import counted, quantise

    done, of = counted(model) if _stays(details) else quantise(model, trial.layers.uncalled | senses(model))
    if not done:
        raise UnsupportedModelError(f"{str(details.checkpoint.path)!r} has no linear layers that could be in fp8")
    if details.device.type == "cuda":
        memory.empty_cache()
    error = trial.run(model, backend, fp8_weights=True)
    stays = [weight for weight in details.checkpoint.coded.values() if weight.stays(_kept_forms(details))]
    how = "as stored" if stays and not any(weight.rounded for weight in stays) else "rounded"
    note = (
        f"quantization: fp8, {done / of:.0%} of the weights, {how}: logits of a trial are {error:.1%} of their norm off"
    )
    return note if details.device.type == "cuda" else f"{note}; slow on {details.device}"


def _rounding(quantization: str, program: Any, error: float) -> tuple[str, ...]:
    """What narrow weights have come to in a compiled step, in words, if they are codes of the checkpoint or have four
    bits.
    """
    if program.as_stored:
        return (f"quantization: {quantization}, as stored",)
    if quantization != "int4":
        return ()
    return (f"quantization: int4, rounded: logits of a trial are {error:.1%} of their norm off",)


def _in_four_bits(model: Any, trial: Any, details: Details) -> tuple[str, Any]:
    """Rounds weights to four bits, unless the checkpoint has them so.

    Returns:
        What came of it, in words; and a trial of the numbers that codes stand for.

    Raises:
        UnsupportedModelError: Nothing can be in four bits.
    """
    from asyncengine.model.quantised.four_bit_experts import round_experts, share_of, use_kernels
    from asyncengine.model.quantised.four_bit_linear import round_layers

    rounded = not _stays(details)
    if rounded:
        round_experts(model)
        round_layers(model, but=trial.layers.uncalled | senses(model))
        memory.empty_cache()
    if not (share := share_of(model)):
        raise UnsupportedModelError(f"{str(details.checkpoint.path)!r} has no linear layers that could be in int4")
    use_kernels(model, False)  # they are what is tried
    after = type(trial).of(model, trial.layers, details.device)
    use_kernels(model, True)
    how = f"rounded: logits of a trial are {after.off(trial):.1%} of their norm off" if rounded else "as stored"
    return f"quantization: int4, {share:.0%} of the weights, {how}", after


def _stays(details: Details) -> bool:
    """Whether some of the checkpoint's codes stay codes."""
    forms = _kept_forms(details)
    return any(weight.stays(forms) for weight in details.checkpoint.coded.values())


def _kept_forms(details: Details) -> frozenset[str]:
    forms: frozenset[str] = details.checkpoint.kept_forms(details.quantization, details.device.type)
    return forms


def _with_weights(details: Details) -> tuple[Any, bool]:
    """The transformers model, with its weights, and whether they include its head.

    Weights that are stored in the wanted dtype are mapped, not read: the file's pages are their only copy in host
    memory, and moving the model copies one parameter after the other from there to the device. What is converted, and
    experts that transformers puts together, are held in host memory once, besides the file's pages.

    Raises:
        CheckpointError: Others are missing, or they are not those of the model.
    """
    import torch

    from asyncengine.model import architecture
    from asyncengine.model.stored.kept import KeptCodes
    from asyncengine.model.stored.weight import state_of

    checkpoint, dtype = details.checkpoint, details.dtype
    kind, hf_config = architecture.model_class(details.hf_config, details.media)
    coded = architecture.coded_for(checkpoint, kind, hf_config)
    kept = KeptCodes(coded, dtype, _kept_forms(details)) if _stays(details) else None
    state = state_of(checkpoint.plain, coded, dtype) | ({} if kept is None else kept.state()) if coded else None
    try:
        model, report = loaded(
            kind,
            checkpoint.path if state is None else state,
            config=hf_config,
            dtype=dtype,
            attn_implementation=ATTENTION,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise cannot_load(checkpoint, error) from error
    check_weights(checkpoint, report, head_of(model))
    if kept is not None:
        kept.put(model)
    checkpoint.check_unchanged()
    architecture.attend_here(model)
    if details.latents:
        keep_latents(model)
    has_head = not report["missing_keys"] and not checkpoint.classifies  # one that is tied is not missing
    return model.to(details.device).eval().requires_grad_(False), has_head


def _blueprint(config: EngineConfig, details: Details, model: Any, layers: Recorded, backend: Any) -> Any:
    """The parts of a model that is to be compiled; None if that is not wanted or not for this device.

    Raises:
        NotRecognised: The model is not one that the compiled step can run.
    """
    from asyncengine.model.attention.cpu import CpuAttention
    from asyncengine.model.decoder.blueprint import NotRecognised
    from asyncengine.model.fused.choice import DEVICES

    if config.decoder_backend == "transformers" or (config.decoder_backend == "auto" and config.quantization == "fp8"):
        return None
    if details.device.type in DEVICES and config.quantization != "int8":
        return None  # `_fuse` sees to it
    if not isinstance(backend, CpuAttention):
        if config.decoder_backend == "auto" and config.quantization == "none":
            return None
        raise NotRecognised(f"it needs the compiled attention of the CPU, not {backend.name!r} on {details.device}")
    return _recognised(model, layers, details.max_length)


def _recognised(model: Any, layers: Recorded, longest: int, whole_experts: bool = False) -> Any:
    """A model's parts.

    Raises:
        NotRecognised: It is not of a kind that is known.
    """
    from asyncengine.model.decoder.blueprint import NotRecognised, recognise

    if layers.recurrent:
        raise NotRecognised("it has recurrent layers")
    return recognise(model, layers.attention, longest, whole_experts=whole_experts)


def _compile(config: EngineConfig, details: Details, blueprint: Any, backend: Any, later: Any = None) -> Any:
    """The model as a compiled step, which takes its weights: at once, or when `later`, a `Packing`, is run."""
    from asyncengine.model.decoder.program import CompiledDecoder

    library = compiled_parts.library_of(config, details, backend)
    return CompiledDecoder(blueprint, library, details.dtype, config.quantization, later)
