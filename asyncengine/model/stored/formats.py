"""Which weights of a checkpoint are stored as codes, by what its ``quantization_config`` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.stored import integers, small_floats
from asyncengine.model.stored.parts import Tensors
from asyncengine.model.stored.scaled import CODES, ENDINGS, scaled
from asyncengine.model.stored.tensor import StoredTensor
from asyncengine.model.stored.weight import CodedWeight

About = Mapping[str, Any]


def coded_weights(config: Mapping[str, Any], tensors: Tensors, beside: About) -> dict[str, CodedWeight]:
    """The weights that are stored as codes, by the names of the parameters; none where nothing is.

    Args:
        config: The contents of ``config.json``.
        tensors: All that is stored, by name.
        beside: Those of ``hf_quant_config.json``, where older versions of ModelOpt say what ``config.json`` does not.

    Raises:
        UnsupportedModelError: They are stored in a way that is not known here; the message has its name.
        CheckpointError: Something that belongs to them is missing.
    """
    about = _about(config)
    if about is None and isinstance(of_modelopt := beside.get("quantization"), Mapping):
        about = {"quant_method": "modelopt", **of_modelopt}
    if about is None:
        alone = next((name for name, tensor in tensors.items() if _has_scales(tensor, tensors)), None)
        if alone is not None:
            raise UnsupportedModelError(
                f"{alone} is stored as codes with scales, and config.json has no quantization_config"
            )
        return {}
    method = about.get("quant_method", "compressed-tensors" if "config_groups" in about else None)
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        by = "in a way that quantization_config does not name" if method is None else f"by {method!r}"
        known = ", ".join(sorted(_METHODS))
        raise UnsupportedModelError(f"its weights are quantised {by}; those of {known} can be read")
    if not tensors:
        raise UnsupportedModelError(f"its weights are quantised by {method!r}, and are not in safetensors files")
    try:
        found = read(tensors, about)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the quantization_config of {method!r} is not as that writes it: {error!r}") from error
    return {weight.name: weight for weight in found}


def _has_scales(tensor: StoredTensor, tensors: Tensors) -> bool:
    """Whether a tensor cannot be what a weight is, although it is called so."""
    return tensor.dtype in CODES and any(f"{tensor.name}{ending}" in tensors for ending in ENDINGS)


def _about(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a ``config.json`` says about how weights are quantised; None if it says nothing."""
    for values in (config, config.get("text_config")):
        if isinstance(values, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(about := values.get(key), dict) and about:
                    return about
    return None


def _fp8(tensors: Tensors, about: About) -> list[CodedWeight]:
    meaning = about.get("weight_scale_semantics", "multiplier")
    if meaning not in ("multiplier", "inverse"):
        raise UnsupportedModelError(f"weight_scale_semantics {meaning!r} is not supported")
    block = about.get("weight_block_size")
    return scaled(tensors, [] if block is None else [_block(block)], meaning == "inverse")


def _block(stated: Any) -> list[int]:
    """Outputs and inputs of a block: two numbers, or "128x128"."""
    parts = stated.split("x") if isinstance(stated, str) else stated
    block = [int(part) for part in parts]
    if len(block) != 2 or min(block) < 1:
        raise CheckpointError(f"blocks of scales are {stated!r}; expected two integers above 0")
    return block


def _modelopt(tensors: Tensors, about: About) -> list[CodedWeight]:
    """NVIDIA's ModelOpt."""
    algorithm = about.get("quant_algo", (about.get("quantization") or {}).get("quant_algo"))
    if algorithm is None:  # of the KV cache alone
        return []
    if algorithm == "FP8":
        return scaled(tensors)
    if algorithm == "NVFP4":
        return small_floats.nvfp4(tensors, divided=False)
    raise UnsupportedModelError(f"ModelOpt's {algorithm!r} is not supported; 'FP8' and 'NVFP4' are")


def _compressed_tensors(tensors: Tensors, about: About) -> list[CodedWeight]:
    """compressed-tensors, which LLM Compressor writes: one format for all layers, or one for each group of them."""
    if (about.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UnsupportedModelError(f"sparse weights ({about['sparsity_config']['format']}) are not supported")
    if (about.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedModelError("weights behind transforms, as of QuIP and SpinQuant, are not supported")
    groups = [group for group in (about.get("config_groups") or {}).values() if group.get("weights")]
    kinds = {str(group.get("format") or about.get("format")) for group in groups}
    weights = [group["weights"] for group in groups]
    if unknown := sorted(kinds - _EIGHT_BITS - {"pack-quantized", *_FOUR_BIT_FLOATS}):
        raise UnsupportedModelError(f"compressed-tensors' format {unknown[0]!r} is not supported")
    packed = kinds - _EIGHT_BITS
    if len(packed) > 1:
        raise UnsupportedModelError(f"{' and '.join(sorted(packed))} in one checkpoint are not supported")
    found: list[CodedWeight] = []
    if kinds & _EIGHT_BITS:
        found += scaled(tensors, [_block(each["block_structure"]) for each in weights if each.get("block_structure")])
    if packed == {"pack-quantized"}:
        widths = sorted({int(each["num_bits"]) for each in weights} & set(range(1, 9)))
        found += integers.packed_integers(tensors, widths, not any(each.get("symmetric", True) for each in weights))
    for kind in packed & _FOUR_BIT_FLOATS.keys():
        found += _FOUR_BIT_FLOATS[kind](tensors)
    return found


_EIGHT_BITS = {"float-quantized", "int-quantized", "naive-quantized"}
_FOUR_BIT_FLOATS: dict[str, Callable[[Tensors], list[CodedWeight]]] = {
    "mxfp4-pack-quantized": small_floats.mxfp4,
    "nvfp4-pack-quantized": lambda tensors: small_floats.nvfp4(tensors, divided=True),
}
_METHODS: dict[str, Callable[[Tensors, About], list[CodedWeight]]] = {
    "awq": integers.awq,
    "bitsandbytes": lambda tensors, _: small_floats.bitsandbytes(tensors),
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fp8,
    "fp8": _fp8,
    "gptq": integers.gptq,
    "modelopt": _modelopt,
    "mxfp4": lambda tensors, _: small_floats.mxfp4_experts(tensors),
}
