"""The keys and values of a model's prefix cache, to be kept and taken over. On the step thread, but for identities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.builds import cache_directory
from asyncengine.config import EngineConfig
from asyncengine.errors import PrefixCacheError
from asyncengine.model import kept_file
from asyncengine.model.findings import program, stamps
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.step.batch import Int32
from asyncengine.step.limits import Limits

MOST_DIGESTS = 256
"""Of checkpoints' weights, kept at a time; the oldest goes first."""


class KeptBlocks:
    """As `asyncengine.step.model.KeepingModel`.

    Args:
        layers: The KV cache.
        updated: Whether the weights are other ones by now than the checkpoint's.
    """

    def __init__(self, layers: PagedLayers, updated: Callable[[], bool]) -> None:
        self._layers = layers
        self._updated = updated

    def kept_parts(self) -> Mapping[str, int]:
        """As the protocol says."""
        return {name: stored.shape[1] for name, stored in self._stored().items()}

    def read_blocks(self, blocks: Int32) -> NDArray[np.uint8]:
        """As the protocol says."""
        self._check_weights()
        rows = torch.empty((len(blocks), sum(self.kept_parts().values())), dtype=torch.uint8)
        with torch.inference_mode():
            for stored, part in self._beside(rows):
                part.copy_(stored.index_select(0, torch.from_numpy(blocks).to(stored.device)))
        read: NDArray[np.uint8] = rows.numpy()
        return read

    def write_blocks(self, blocks: Int32, rows: NDArray[np.uint8]) -> None:
        """As the protocol says."""
        self._check_weights()
        with torch.inference_mode():
            for stored, part in self._beside(torch.from_numpy(rows)):
                stored.index_copy_(0, torch.from_numpy(blocks).long().to(stored.device), part.to(stored.device))

    def _beside(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor of the cache, and what is its in (blocks, bytes) of all."""
        tensors = self._stored().values()
        return zip(tensors, torch.split(rows, [stored.shape[1] for stored in tensors], dim=1), strict=True)

    def _stored(self) -> dict[str, torch.Tensor]:
        """By name, (blocks, bytes) each tensor of the cache."""
        caches = {id(cache): cache for cache in self._layers.caches}.values()  # layers may share one
        return {
            f"{layer}.{part}": stored.view(torch.uint8).flatten(1)
            for layer, cache in enumerate(caches)
            for part, stored in enumerate(cache.stored)
        }

    def _check_weights(self) -> None:
        if self._updated():
            raise PrefixCacheError("the model's weights were replaced by update_weights; they are not its checkpoint's")


def why_not(limits: Limits, drafts: bool) -> str:
    """Why a model's prefix cache cannot be kept, in words; empty if it can.

    Args:
        limits: What the model can take.
        drafts: Whether something drafts for it that has keys and values of its own.
    """
    if limits.kept_states is not None:
        return "states of recurrent layers are not kept"
    if drafts:
        return "what drafts for it has keys and values of its own, which are not kept"
    return "" if limits.reuses_prefixes else "prefix_cache_mode is 'disable'"


def numbers_of(details: Any, config: EngineConfig) -> dict[str, Any]:
    """What keys and values hang on beside the weights and the programs, by name.

    Args:
        details: An `asyncengine.model.load_check.Details`.
        config: As it was completed.
    """
    device: torch.device = details.device
    names = ("attention_backend", "decoder_backend", "quantization", "kv_cache_page_size", "mla")
    return {
        "configuration": [details.checkpoint.config, config.max_single_sequence_length],
        "dtype": [str(details.dtype), str(details.kv_dtype)],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **{name: getattr(config, name) for name in names},
    }


class Identity:
    """What keys and values hang on: `asyncengine.step.model.LoadedModel.prefix_identity`. Holds nothing of the model.

    Args:
        files: Of the weights, which are read after this is made.

    Attributes:
        settings: What else the numbers hang on, by name.
    """

    def __init__(self, files: list[Path]) -> None:
        self.settings: Mapping[str, Any] = {}
        self._files = files
        self._stamps = [*stamps(files)]

    def __call__(self) -> Mapping[str, str]:
        """By name, digests. The weights are read once on a machine; then their files' places and times tell.

        Raises:
            PrefixCacheError: The files are not those any longer that the model was loaded from.
        """
        try:
            weights = weights_digest(self._files)
            same = self._stamps == [*stamps(self._files)]
        except OSError as error:
            raise PrefixCacheError(f"cannot read the checkpoint's weights: {error}") from error
        if not same:
            raise PrefixCacheError("the files of the checkpoint's weights have changed since it was loaded")
        settings = {
            name: _digest(json.dumps(value, sort_keys=True, default=str)) for name, value in self.settings.items()
        }
        return {"weights": weights, **settings, "program": _digest(repr(program()))}


def weights_digest(files: list[Path]) -> str:
    """What is in files of weights, which are read if they were not before or have changed since."""
    place, before = None, [*stamps(files)]
    try:
        place = cache_directory() / "digests" / _digest(repr(before))
    except RuntimeError:  # this user has no home directory
        pass
    if place is not None and (known := kept_file.read(place)) is not None:
        return known.decode()
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    found = digest.hexdigest()
    if place is not None and before == [*stamps(files)]:  # or else it may be of others than those
        kept_file.write(place, found.encode(), MOST_DIGESTS)
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
