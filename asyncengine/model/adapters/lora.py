"""A LoRA adapter as PEFT saves it, read and checked. Used on any thread; what it makes is never changed again.

After "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021): a linear layer's output ``W x`` becomes
``W x + scaling * B (A x)``, with A of shape (rank, inputs) and B of shape (outputs, rank). rsLoRA (Kalajdzievski, 2023)
scales by ``alpha / sqrt(rank)`` where LoRA scales by ``alpha / rank``.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncengine.errors import AdapterError
from asyncengine.model.location import ADAPTER_CONFIG, locate_adapter
from asyncengine.model.text_names import name_in

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")
"""Name of a tensor; between factor and ``weight`` PEFT's own modules have the name of the adapter."""
_OFF: dict[str, tuple[object, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "modules_to_save": (None, [], ()),
    "target_parameters": (None, [], ()),
    "trainable_token_indices": (None, [], (), {}),
    "layer_replication": (None, [], ()),
    "alora_invocation_tokens": (None, [], ()),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
}
"""Settings that change more than linear layers, or in another way, and the values with which they do nothing."""
_ALTERING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How ``init_lora_weights`` begins where training began by taking something off the model's own weights."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a linear layer: ``scaling * up @ down @ x``.

    Attributes:
        down: (rank, inputs).
        up: (outputs, rank).
        scaling: Of the product.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Of the product."""
        return self.down.shape[0]


Lora = Mapping[str, LowRank]
"""An adapter: what is added to which layer, by the layer's name in the model."""


def read(
    source: Any, config: Mapping[str, Any] | None, layers: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> Lora:
    """Reads an adapter.

    Args:
        source: A directory, or tensors by their names.
        config: With tensors, what ``adapter_config.json`` has in a directory.
        layers: Outputs and inputs of each linear layer that can be adapted, by its name in the model.
        dtype: Of the factors.

    Raises:
        AdapterError: It is missing or damaged, of a kind that is not served, or does not fit these layers or the dtype.
    """
    if isinstance(source, Mapping):
        if not isinstance(config, Mapping):
            raise AdapterError(f"config is {config!r:.80}; with tensors, expected what {ADAPTER_CONFIG} would have")
        what, tensors = "adapter", dict(source)
    elif isinstance(source, (str, os.PathLike)) and os.fspath(source):
        if config is not None:
            raise AdapterError(f"config is given with a directory, whose own is in {ADAPTER_CONFIG}; leave it out")
        path = locate_adapter(os.fspath(source))
        what, config, tensors = f"adapter {str(path)!r:.200}", read_config(path), _tensors(path)
    else:
        raise AdapterError(f"the adapter is {source!r:.80}; expected a directory or a mapping of tensors")
    check_config(what, config)
    return _adapter(what, config, tensors, layers, dtype)


def read_config(path: Path) -> Mapping[str, Any]:
    """What ``adapter_config.json`` of a directory says.

    Raises:
        AdapterError: It cannot be read.
    """
    file = path / ADAPTER_CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{file} is not a JSON object")
    return values


def check_config(what: str, config: Mapping[str, Any]) -> None:
    """Refuses what is not a LoRA adapter of linear layers alone.

    Raises:
        AdapterError: As it says.
    """
    kind = config.get("peft_type", "LORA")
    if str(getattr(kind, "value", kind)).upper() != "LORA":
        raise AdapterError(f"{what} is of peft_type {str(getattr(kind, 'value', kind))!r}; served: 'LORA'")
    for key, nothing in _OFF.items():
        value = config.get(key)
        if not any(value == each and type(value) is type(each) for each in nothing):
            raise AdapterError(f"{what} has {key} = {value!r:.80}; that is not served, only adapted linear layers are")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_ALTERING):
        raise AdapterError(
            f"{what} has init_lora_weights = {begun!r:.80}, so it is one for altered weights; have PEFT convert it: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    _number(what, "r", config.get("r", 8))
    _number(what, "lora_alpha", config.get("lora_alpha", 8))
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise AdapterError(f"{what} has {key} = {config[key]!r:.80}; expected numbers by names of layers")


def check_there(source: str, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a directory whose adapter cannot be loaded, by what can be told without the model.

    Args:
        source: The directory.
        stored: Shapes of the checkpoint's tensors by their names. What the model calls otherwise is not looked at.

    Raises:
        AdapterError: As it says.
    """
    path = locate_adapter(source)
    what = f"adapter {str(path)!r:.200}"
    check_config(what, read_config(path))
    for module, (down, up) in _factors(what, _tensors(path)).items():
        shape = stored.get(f"{module}.weight", ())
        if len(shape) == 2 and sorted(shape) != sorted((up.shape[0], down.shape[1])):  # some store it transposed
            raise AdapterError(_misfit(what, module, down, up, f"the checkpoint's weight of it is {shape}"))


def _tensors(path: Path) -> dict[str, Any]:
    try:
        if (path / WEIGHTS).exists():
            from safetensors.torch import load_file

            return dict(load_file(path / WEIGHTS))
        if (path / PICKLED).exists():
            loaded = torch.load(path / PICKLED, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict):
                raise ValueError(f"a {type(loaded).__name__}")
            return loaded
    except Exception as error:  # of whatever kind the libraries raise
        raise AdapterError(f"the weights in {path} cannot be read: {error}") from error
    raise AdapterError(f"{path} has no weights: neither {WEIGHTS} nor {PICKLED}")


def _factors(what: str, tensors: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer by its name."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _FACTOR.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise AdapterError(f"{what} has a tensor {name!r:.120}, which is no factor of an adapted linear layer")
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim != 2:
            raise AdapterError(f"{what}: {name} is not a matrix")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise AdapterError(f"{what}: {name} is sparse, or has no numbers")
        if not tensor.numel() or not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{what}: {name} is empty, or has numbers that are not finite")
        module = found["module"].removeprefix(_PREFIX)
        if factors.setdefault(module, {}).setdefault(found["factor"], tensor) is not tensor:
            raise AdapterError(f"{what}: {module} has lora_{found['factor']} twice, as if of two adapters")
    if not factors:
        raise AdapterError(f"{what} has no tensors")
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"{what}: {module} has lora_{next(iter(pair))} alone")
    return {module: (pair["A"].detach(), pair["B"].detach()) for module, pair in factors.items()}


def _adapter(
    what: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    layers: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
) -> Lora:
    adapter = {}
    for module, (down, up) in _factors(what, tensors).items():
        name = name_in(module, layers)
        shape = layers.get(name)
        if shape is None:
            near = difflib.get_close_matches(module, layers, n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]!r}?" if near else f"; such as {next(iter(layers))!r}" if layers else ""
            if module.endswith(".kv_b_proj"):
                hint = (
                    "; where the model keeps latents, decoder_backend='transformers' lets it be, and so does mla=False"
                )
            raise AdapterError(f"{what} adapts {module!r}, which is not a linear layer that can be adapted{hint}")
        rank = down.shape[0]
        if up.shape[1] != rank or (up.shape[0], down.shape[1]) != shape:
            layer = f"its layer of the model takes {shape[1]} numbers and gives {shape[0]}"
            raise AdapterError(_misfit(what, module, down, up, layer))
        scaling = _scaling(what, config, module, rank)
        down, up = (factor.to("cpu", dtype, copy=True) for factor in (down, up))
        if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise AdapterError(f"{what}: {module} has numbers that {str(dtype).removeprefix('torch.')} cannot hold")
        adapter[name] = LowRank(down, up, scaling)
    return adapter


def _misfit(what: str, module: str, down: torch.Tensor, up: torch.Tensor, layer: str) -> str:
    return f"{what}: {module} has factors of {tuple(down.shape)} and {tuple(up.shape)}; {layer}"


def _scaling(what: str, config: Mapping[str, Any], module: str, rank: int) -> float:
    """What the product of a layer's factors is multiplied by."""
    alpha = config.get("lora_alpha", 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{what} has the pattern {pattern!r:.80}: {error}") from error
        if matches:
            alpha = own
            break
    return _number(what, "lora_alpha", alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(what: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e9:
        raise AdapterError(f"{what} has {key} = {value!r:.80}; expected a number > 0")
    return float(value)
