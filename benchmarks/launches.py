"""What a layer launches on a device, attention apart: by the model's own modules, and by the fused kernels.

Counted, not timed, so no device is needed: operators that compute something, and launches of Triton's kernels, of a
step of many tokens and of one, in models of one and of two layers. The attention is left out: it is the same in both.
Tiny random models in bfloat16; the numbers depend on the architecture alone. The last line is one JSON object.

    python -m benchmarks.launches [ARCHITECTURE ...]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asyncengine.model import architecture
from asyncengine.model.attention_modules import hooked
from asyncengine.model.decoder.blueprint import recognise
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.fused.launches import load_kernels
from benchmarks.gpu_parity import ARCHITECTURES, make

KERNELS = ("project", "rotate", "norm_rows", "activate")
MANY = 64


def addresses(arguments: Any) -> set[int]:
    """Where the tensors among them lie."""
    return {each.untyped_storage().data_ptr() for each in tree_leaves(arguments) if torch.is_tensor(each)}


class Launches(TorchDispatchMode):
    """Counts operators that compute something: no views, and no memory that is only asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)
        }
        result = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket).removeprefix("aten.")
        written = name.endswith("_") or function._overloadname == "out"
        made = any(
            torch.is_tensor(each) and each.untyped_storage().data_ptr() not in given for each in tree_leaves(result)
        )
        if written or (made and "empty" not in name):
            self.names[name] += 1
        return result


class Kernel:
    """Stands for one of Triton's kernels, and counts how often it is launched."""

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self._name = name
        self._launches = launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: self._launches.update([self._name])


@torch.inference_mode()
def launches(name: str, layers: int, tokens: int, fused: bool) -> Counter[str]:
    """What a step of a model's first layers launches, by name."""
    model = make(name, torch.bfloat16, torch.device("cpu")).requires_grad_(False)
    model.set_attn_implementation(architecture.ATTENTION)
    stack = model.get_decoder()
    stack.layers = stack.layers[:layers]
    model.config.num_hidden_layers = layers
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = kinds[:layers]
    recorded = architecture.record(model).attention
    ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]

    def attend(module: Any, query: Any, key: Any, value: Any, kwargs: Any) -> Any:
        return torch.empty(query.shape[0], query.shape[1], value.shape[-1], dtype=value.dtype)

    decoder = FusedDecoder(recognise(model, recorded, tokens, whole_experts=True)) if fused else None
    kernels = load_kernels()
    ours = {kernel: getattr(kernels, kernel) for kernel in KERNELS}
    counted = Launches()
    try:
        for kernel in KERNELS:
            setattr(kernels, kernel, Kernel(kernel, counted.names))
        with hooked({layer.module: attend for layer in recorded}), counted:
            if decoder is not None:
                decoder.forward(ids, positions, torch.tensor([tokens - 1]))
            else:
                model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    finally:
        for kernel, function in ours.items():
            setattr(kernels, kernel, function)
    return counted.names


def of_a_layer(name: str, tokens: int, fused: bool) -> Counter[str]:
    """What the second layer adds."""
    return launches(name, 2, tokens, fused) - launches(name, 1, tokens, fused)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help=", ".join(ARCHITECTURES))
    names = parser.parse_args(arguments).architectures or list(ARCHITECTURES)
    if strange := [name for name in names if name not in ARCHITECTURES]:
        parser.error(f"no such architecture: {', '.join(strange)}; there are {', '.join(ARCHITECTURES)}")
    results = {}
    for name in names:
        ways = {"modules": (MANY, False), f"fused, {MANY} tokens": (MANY, True), "fused, one token": (1, True)}
        found = {way: of_a_layer(name, *given) for way, given in ways.items()}
        results[name] = {way: counts.total() for way, counts in found.items()}
        print(f"{name:<8} {results[name]}", flush=True)
        for way, counts in found.items():
            print(f"  {way}: {dict(counts)}", flush=True)
    return {"benchmark": "launches", "torch": torch.__version__, "of_a_layer": results}


if __name__ == "__main__":
    print(json.dumps(main()))
