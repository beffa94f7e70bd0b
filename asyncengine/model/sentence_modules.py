"""How a checkpoint makes embeddings: the files of Sentence Transformers beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asyncengine.dense import Dense, Squash
from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.text_files import json_in, part_of

_POOLINGS = {"mean_tokens": "mean", "lasttoken": "last", "cls_token": "cls"}  # newer files have the engine's words
_SQUASHES: dict[str, Squash] = {"Identity": "identity", "Tanh": "tanh"}
_ORDER = re.compile(r"(Transformer( Pooling( Dense)*( Normalize)?)?)?")
"""The modules that are known. The first is the model itself; the length of vectors is what callers choose."""


@dataclass(frozen=True, slots=True)
class Embedder:
    """How hidden states become vectors.

    Attributes:
        pooling: Which of them, in one of the engine's words or in the checkpoint's.
        dense: Layers behind that.
        prompts: What is put in front of a text, by the name of what the text is for.
    """

    pooling: str = "mean"
    dense: tuple[Dense, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)


def embedder_of(path: Path) -> Embedder:
    """How the model in a directory makes embeddings; the mean, if nothing is said.

    Raises:
        CheckpointError: A file is damaged or missing.
        UnsupportedModelError: A layer behind the pooling does something that is not known.
    """
    listed = json_in(path / "modules.json", [])
    found = part_of(path / "config_sentence_transformers.json", "prompts")
    prompts = {name: text for name, text in found.items() if isinstance(text, str)}
    if not listed:  # of older ones there is this file alone
        return Embedder(_pooling(path / "1_Pooling"), prompts=prompts)
    modules = [each for each in listed if isinstance(each, dict)]
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if not _ORDER.fullmatch(" ".join(kinds)):  # something else is done to the vectors, which nobody does here
        return Embedder(" + ".join(kinds[1:]) or kinds[0], prompts=prompts)
    pooling, dense = "mean", []
    for kind, module in zip(kinds, modules, strict=True):
        place = module.get("path", "")
        if not isinstance(place, str):
            raise CheckpointError(f"{path / 'modules.json'}: the path of a {kind} is {place!r:.80}")
        if kind == "Pooling":
            pooling = _pooling(path / place, needed=True)
        elif kind == "Dense":
            dense.append(_dense(path / place))
    return Embedder(pooling, tuple(dense), prompts)


def _pooling(place: Path, needed: bool = False) -> str:
    values = json_in(place / "config.json", {})
    if not values:
        if needed:
            raise CheckpointError(f"{place / 'config.json'} does not say how to pool")
        return "mean"
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, value in values.items() if key.startswith(prefix) and value is True]
    if stated := values.get("pooling_mode"):
        modes = [str(each) for each in (stated if isinstance(stated, list) else [stated])]
    pooling = " + ".join(_POOLINGS.get(mode, mode) for mode in modes) or "none of the modes"
    return f"{pooling} without the prompt" if values.get("include_prompt") is False else pooling


def _dense(place: Path) -> Dense:
    named = str(json_in(place / "config.json", {}).get("activation_function", ""))
    squash = _SQUASHES.get(named.rpartition(".")[2])
    if squash is None:
        raise UnsupportedModelError(
            f"{place}: its activation is {named!r:.80}; allowed: {', '.join(sorted(_SQUASHES))} of torch"
        )
    tensors = _tensors(place)
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or weight.ndim != 2 or not weight.size or (bias is not None and bias.shape != weight.shape[:1]):
        raise CheckpointError(f"{place}: linear.weight and linear.bias do not make a layer")
    if not all(np.isfinite(each).all() for each in (weight, bias) if each is not None):
        raise CheckpointError(f"{place}: there are numbers in it that are none")
    return Dense(weight, bias, squash)


def _tensors(place: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    try:
        if (file := place / "model.safetensors").exists():
            tensors = load_file(file)
        else:
            tensors = torch.load(place / "pytorch_model.bin", weights_only=True, map_location="cpu")
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}
    except Exception as error:
        raise CheckpointError(f"{place}: its weights cannot be read: {error}") from error
