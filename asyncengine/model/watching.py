"""What a model's layers need, seen without its weights. On the loader's thread."""

from __future__ import annotations

import json
from typing import Any

import torch

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.building import BUILDING
from asyncengine.model.recorded import Watched

_WATCHED: dict[str, Watched] = {}
"""For each configuration whose model ran without weights, what was seen. It is not watched again: what is found depends
on nothing else."""


def watch(hf_config: Any, media: bool = False, latents: bool = False) -> Watched | None:
    """Watches the model run without weights, unless one of the same configuration was watched.

    Args:
        hf_config: The model's.
        media: Whether it is to take images, audio or videos.
        latents: Whether it keeps those of multi-head latent attention.

    Returns:
        What its layers need; None if it does not run without weights.
    """
    from asyncengine.model import architecture

    stated = json.loads(hf_config.to_json_string(use_diff=False))
    stated.pop("_name_or_path", None)  # where it was read from
    configuration = f"{type(hf_config).__qualname__} {media} {latents} {json.dumps(stated, sort_keys=True)}"
    if (known := _WATCHED.get(configuration)) is not None:
        return known
    try:
        with BUILDING, torch.device("meta"):
            # In a dtype of few digits, so that states of more digits are known to be so.
            model = architecture.bare(hf_config, torch.bfloat16, media, latents)
        found: Watched = architecture.record(model.eval()).watched
    except UnsupportedModelError:
        raise
    except Exception:
        # Some models cannot run without weights (their control flow reads them). They are watched once they are loaded.
        return None
    _WATCHED[configuration] = found
    return found
