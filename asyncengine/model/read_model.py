"""A transformers model with its weights, as the checkpoint has them. Made on the loader's thread."""

from __future__ import annotations

from typing import Any

from asyncengine.model.attention_modules import ATTENTION
from asyncengine.model.latent_attention import keep_latents
from asyncengine.model.load_check import Details
from asyncengine.model.load_report import cannot_load, check_weights, head_of, loaded


def read_model(details: Details) -> tuple[Any, bool]:
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
    kept = KeptCodes(coded, dtype, kept_forms(details)) if codes_stay(details) else None
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


def codes_stay(details: Details) -> bool:
    """Whether some of the checkpoint's codes stay codes."""
    forms = kept_forms(details)
    return any(weight.stays(forms) for weight in details.checkpoint.coded.values())


def kept_forms(details: Details) -> frozenset[str]:
    """In which forms codes may stay."""
    forms: frozenset[str] = details.checkpoint.kept_forms(details.quantization, details.device.type)
    return forms
