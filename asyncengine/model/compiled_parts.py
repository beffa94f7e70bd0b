"""Compiled code in the parts of a model that runs as transformers has it. Used on the loader's thread.

On the CPU its linear layers and experts, and everywhere the functions that its recurrent layers call. Whatever turns
out to compute something else in the trial is left out again, and the load says what is slower then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncengine.config import EngineConfig
from asyncengine.errors import UnsupportedModelError
from asyncengine.model.load_check import Details
from asyncengine.model.recorded import Recorded


def multiplies(config: EngineConfig, backend: Any) -> bool:
    """Whether the compiled code multiplies where the model does not run as a compiled step."""
    from asyncengine.model.attention.cpu import CpuAttention

    return isinstance(backend, CpuAttention) and config.quantization != "fp8"


def library_of(config: EngineConfig, details: Details, backend: Any) -> Any:
    """The compiled code."""
    from asyncengine.model.attention.kernel import kind_of

    return backend.library(kind_of(details.dtype, config.quantization))


def calling_compiled(layers: Recorded, device: torch.device) -> tuple[Recorded, tuple[str, ...]]:
    """Layers whose recurrent ones call compiled code, if that can be had; and why it cannot, in words."""
    if not layers.recurrent:
        return layers, ()
    if device.type == "cuda":
        return _calling_kernels(layers)
    from asyncengine.builds import BuildError
    from asyncengine.model.recurrent import scans
    from asyncengine.model.recurrent.compiled_functions import compiled

    if device.type != "cpu":
        return layers, ()
    try:
        return layers.calling(compiled(scans.Scans(scans.build()))), ()
    except BuildError as error:
        return layers, (f"recurrent layers: run as transformers has them, which is slower: {error}",)


def _calling_kernels(layers: Recorded) -> tuple[Recorded, tuple[str, ...]]:
    """Layers whose recurrent ones decode with kernels of a device."""
    from asyncengine.model.recurrent.placed_functions import placed
    from asyncengine.model.recurrent.step_kernels import StepKernels, Unavailable

    try:
        return layers.calling(placed(StepKernels()), in_place=True), ()
    except Unavailable as error:
        return layers, (f"recurrent layers: decode as transformers has them, which is slower: {error}",)


def slower_on_device(trial: Any) -> tuple[str, ...]:
    """What of recurrent layers is slower on a device than it could be, in words; after their trial."""
    from asyncengine.model.recurrent.packages import missing

    recurrent, notes = trial.layers.recurrent, []
    without = [layer.name for layer in recurrent if not layer.in_place]
    if without and any(layer.functions is not None for layer in recurrent):  # else it was said why not
        reasons = dict.fromkeys(trial.apart.get(name, "there are no kernels for them") for name in without)
        how = f"{len(without)} of {len(recurrent)} decode as transformers has them, which is slower"
        notes.append(f"recurrent layers: {how}: {'; '.join(reasons)}")
    if packages := missing(recurrent):
        what = "they are" if without else "prompts are"
        notes.append(f"recurrent layers: {what} computed by plain torch; {', '.join(packages)} would have kernels")
    return tuple(notes)


def tried(model: Any, trial: Any, backend: Any) -> tuple[str, ...]:
    """Tries a model, whose recurrent layers may call compiled code; if that is wrong, as transformers has them.

    Returns:
        What is slower then, in words.

    Raises:
        UnsupportedModelError: It computes something else over a paged cache.
    """
    from asyncengine.model.graphs import reason_of

    try:
        trial.run(model, backend)
        return ()
    except Exception as error:  # also what a compiler or a driver raises
        if all(layer.functions is None for layer in trial.layers.recurrent):
            raise
        reason = reason_of(error)
    trial.layers = trial.layers.calling(None)
    trial.run(model, backend)
    return (f"recurrent layers: run as transformers has them, which is slower: {reason}",)


def with_products(
    config: EngineConfig, model: Any, trial: Any, details: Details, backend: Any, again: Callable[[], Any]
) -> tuple[Any, Any, tuple[str, ...]]:
    """Has the compiled code multiply in the model's linear layers, narrow if that is wanted, and tries it.

    Args:
        config: What is wanted.
        model: The model.
        trial: Of it.
        details: What is known of it.
        backend: How it attends.
        again: Makes the model once more.

    Returns:
        The model and its trial, which are others where some module reads what is let go; and what came of it, in words.

    Raises:
        UnsupportedModelError: Nothing can be in so few bits, or the model computes something else over a paged cache.
    """
    from asyncengine.model import architecture
    from asyncengine.model.decoder import compiled_layers
    from asyncengine.model.decoder.compiled_linear import Products
    from asyncengine.model.graphs import reason_of
    from asyncengine.model.media.modules import senses

    quantization = config.quantization
    products = Products(library_of(config, details, backend), details.dtype, quantization)
    model.get_input_embeddings().__dict__.pop("stored_codes", None)  # rows are looked up in numbers
    as_stored, rounded_to = compiled_layers.has_codes(model), compiled_layers.rounded_to(model, quantization)
    compiled_layers.compile_layers(model, products, trial.layers.uncalled | senses(model))
    if quantization == "none":
        try:
            return model, trial, tried(model, trial, backend)
        except Exception as error:  # a module that reads the weights of its linear layers raises anything
            reason = reason_of(error)
        model = again()
        trial.layers, slower = calling_compiled(architecture.layers_of(model, details.watched), details.device)
        slower += tried(model, trial, backend)
        return model, trial, (*slower, f"decoder: its linear layers run as torch has them: {reason}")
    if not (share := compiled_layers.narrow_share(model)):
        raise UnsupportedModelError(
            f"{str(details.checkpoint.path)!r} has no linear layers that could be in {quantization}"
        )
    try:
        rounded = type(trial).of(model, trial.layers, details.device)
    except Exception as error:
        raise UnsupportedModelError(
            f"{str(details.checkpoint.path)!r} cannot be in {quantization}: {reason_of(error)}"
        ) from error
    off = rounded.off(trial, rounded_to)
    slower = tried(model, rounded, backend)
    how = "as stored" if as_stored else "rounded"
    how = f"{share:.0%} of the weights, {how}: logits of a trial are {off:.1%} of their norm off"
    return model, rounded, (*slower, f"quantization: {quantization}, {how}")
