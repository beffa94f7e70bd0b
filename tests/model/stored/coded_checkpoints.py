"""Writes checkpoints as tools for quantisation do, each beside a plain one that has the same numbers in float32."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP = 32


@dataclass
class Coded:
    """What becomes of one weight.

    Attributes:
        stored: Tensors by the ends of their names, which follow that of the layer.
        numbers: What they stand for.
    """

    stored: Tensors
    numbers: torch.Tensor


def words(codes: torch.Tensor, bits: int, padded: bool = False) -> torch.Tensor:
    """(rows, count) codes to (rows, words) int32, each row one long number whose lowest bits are the first code.

    Padded, a word has as many codes as fit, and nothing else.
    """
    rows, each = [], 32 // bits
    if padded:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
        return torch.cat([words(part, bits) for part in codes.split(each, 1)], 1)
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"), dtype=np.int32))
    return torch.from_numpy(np.stack(rows).copy())


def integers(weight: torch.Tensor, bits: int, symmetric: bool = False) -> tuple[torch.Tensor, ...]:
    """Codes (outputs, inputs), scales and zeros (outputs, groups), and the numbers that they stand for."""
    most = (1 << bits) - 1
    grouped = weight.view(len(weight), -1, GROUP)
    if symmetric:
        zeros = torch.full(grouped.shape[:2], 1 << bits - 1)
        scales = (grouped.abs().amax(-1) / (most / 2)).half().float()
    else:
        low, high = grouped.amin(-1), grouped.amax(-1)
        scales = ((high - low) / most).half().float()
        zeros = (-low / scales).round().clamp(0, most).int()
    codes = ((grouped / scales[..., None]).round() + zeros[..., None]).clamp(0, most).int()
    numbers = (codes - zeros[..., None]) * scales[..., None]
    return codes.view(weight.shape), scales, zeros, numbers.view(weight.shape)


def gptq(weight: torch.Tensor, bits: int = 4, less: int = 1, act_order: bool = False, of_words: bool = False) -> Coded:
    codes, scales, zeros, numbers = integers(weight, bits)
    group_of = torch.arange(weight.shape[1]) // GROUP
    if act_order:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        codes, numbers, group_of = codes[:, order], numbers[:, order], group_of[order]
    stored = {
        "qweight": words(codes, bits).t(),
        "qzeros": words((zeros.t() - (0 if of_words else less)) & (1 << bits) - 1, bits),
        "scales": scales.t().half(),
        "g_idx": group_of.int(),
    }
    if of_words:
        stored["qzeros"] -= sum(1 << at for at in range(0, 32, bits))
    return Coded(stored, numbers)


def awq(weight: torch.Tensor) -> Coded:
    codes, scales, zeros, numbers = integers(weight, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # of the outputs in a word, from its lowest bits

    def packed(rows: torch.Tensor) -> torch.Tensor:
        return words(rows.reshape(len(rows), -1, 8)[..., order].reshape(rows.shape), 4)

    stored = {"qweight": packed(codes.t()), "qzeros": packed(zeros.t()), "scales": scales.t().half()}
    return Coded(stored, numbers)


def pack_quantized(weight: torch.Tensor, symmetric: bool, bits: int = 4, padded: bool = False) -> Coded:
    codes, scales, zeros, numbers = integers(weight, bits, symmetric)
    stored = {
        "weight_packed": words(codes, bits, padded),
        "weight_scale": scales.half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = words(zeros.t(), bits, padded).t()
    return Coded(stored, numbers)


def fp8(weight: torch.Tensor, block: tuple[int, int], name: str) -> Coded:
    """With scales for blocks; (1, inputs) is one for each output."""
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    scales, numbers = torch.empty(rows, columns), torch.empty(weight.shape)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(codes.dtype)
            numbers[part] = codes[part].float() * scales[i, j]
    return Coded({"weight": codes, f"weight_{name}": scales}, numbers)


def fp8_whole(weight: torch.Tensor) -> Coded:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return Coded(stored, codes.float() * scale)


def fp8_inverse(weight: torch.Tensor) -> Coded:
    """Scales that codes are divided by, of each output."""
    found = fp8(weight, (1, weight.shape[1]), "scale_inv")
    found.stored["weight_scale_inv"] = 1 / found.stored["weight_scale_inv"].flatten()
    return found


def int8_out_of_order(weight: torch.Tensor) -> Coded:
    """With a scale for each group of inputs, which do not lie side by side."""
    group_of = torch.arange(weight.shape[1]) % 4
    scales = torch.stack([weight[:, group_of == group].abs().amax(1) for group in range(4)], 1) / 127
    codes = (weight / scales[:, group_of]).round().to(torch.int8)
    stored = {"weight": codes, "weight_scale": scales, "weight_g_idx": group_of}
    return Coded(stored, codes * scales[:, group_of])


def int8(weight: torch.Tensor) -> Coded:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return Coded({"weight": codes, "weight_scale": scales}, codes * scales)


def small_floats(weight: torch.Tensor, group: int, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of two codes each, the first in the lower half, and the numbers that they stand for."""
    grouped = weight.view(len(weight), -1, group) / scales[..., None]
    nearest = (grouped.abs()[..., None] - FP4).abs().argmin(-1)
    codes = (nearest + 8 * (grouped < 0)).view(weight.shape).to(torch.uint8)
    numbers = FP4[nearest] * grouped.sign() * scales[..., None]
    return codes[:, ::2] + 16 * codes[:, 1::2], numbers.view(weight.shape)


def nvfp4(weight: torch.Tensor, divided: bool) -> Coded:
    whole = weight.abs().max() / (448 * 6)
    scales = (weight.view(len(weight), -1, 16).abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    packed, numbers = small_floats(weight, 16, scales.float() * whole)
    if divided:
        return Coded(
            {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": 1 / whole.view(1)}, numbers
        )
    return Coded({"weight": packed, "weight_scale": scales, "weight_scale_2": whole}, numbers)


def mxfp4(weight: torch.Tensor) -> Coded:
    exponents = (weight.view(len(weight), -1, 32).abs().amax(-1).log2().floor() - 2).int()
    packed, numbers = small_floats(weight, 32, torch.exp2(exponents.float()))
    return Coded({"weight_packed": packed, "weight_scale": (exponents + 127).to(torch.uint8)}, numbers)


def nf4(weight: torch.Tensor, nested: bool) -> Coded:
    """Numbers that codes stand for are stored: any will do."""
    table = torch.linspace(-1, 1, 16) ** 3
    flat = weight.reshape(-1, 64)
    largest = flat.abs().amax(1)
    about: dict[str, Any] = {"blocksize": 64, "shape": list(weight.shape), "dtype": "float32", "quant_type": "nf4"}
    stored: Tensors = {}
    if nested:
        offset, map_of = float(largest.mean()), torch.linspace(-1, 1, 256)
        apart = (largest - offset).view(-1, 8)  # whoever wrote it has a whole number of blocks here
        nested_largest = apart.abs().amax(1)
        codes = ((apart / nested_largest[:, None])[..., None] - map_of).abs().argmin(-1)
        largest = (map_of[codes] * nested_largest[:, None]).flatten() + offset
        about |= {"nested_blocksize": 8, "nested_offset": offset, "nested_dtype": "float32"}
        stored |= {
            "weight.absmax": codes.flatten().to(torch.uint8),
            "weight.nested_absmax": nested_largest,
            "weight.nested_quant_map": map_of,
        }
    else:
        stored["weight.absmax"] = largest
    codes = ((flat / largest[:, None])[..., None] - table).abs().argmin(-1)
    pairs = codes.flatten().to(torch.uint8)
    state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    stored |= {
        "weight": (pairs[::2] * 16 + pairs[1::2])[:, None],
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": state,
    }
    return Coded(stored, (table[codes] * largest[:, None]).view(weight.shape))


def eight_bits_of_bitsandbytes(weight: torch.Tensor) -> Coded:
    largest = weight.abs().amax(1)
    codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
    return Coded({"weight": codes, "SCB": largest}, codes * largest[:, None] / 127)


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


@dataclass
class Method:
    """A way to store weights.

    Attributes:
        about: ``quantization_config``.
        write: What becomes of a weight.
        four_bits: Whether codes can stay codes.
    """

    about: dict[str, Any]
    write: Callable[[torch.Tensor], Coded]
    four_bits: bool = field(default=False)


INTEGERS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
FLOATS = {"num_bits": 4, "type": "float"}
IN_FP8 = {"num_bits": 8, "type": "float"}
BITSANDBYTES = {"quant_method": "bitsandbytes"}
GPTQ = {"quant_method": "gptq", "bits": 4}
METHODS: dict[str, Method] = {
    "gptq": Method(GPTQ | {"group_size": GROUP, "sym": False}, gptq, True),
    "gptq 2": Method(GPTQ | {"checkpoint_format": "gptq_v2"}, lambda weight: gptq(weight, less=0), True),
    "gptq of 3 bits": Method(GPTQ | {"bits": 3}, lambda weight: gptq(weight, 3)),
    "gptq of 8 bits": Method(GPTQ | {"bits": 8}, lambda weight: gptq(weight, 8)),
    "gptq out of order": Method(GPTQ | {"desc_act": True}, lambda weight: gptq(weight, act_order=True)),
    "gptq of GPTQModel": Method(
        GPTQ | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}, lambda weight: gptq(weight.abs(), of_words=True), True
    ),
    "awq": Method({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq, True),
    "packed": Method(
        _compressed("pack-quantized", **INTEGERS, symmetric=True), lambda weight: pack_quantized(weight, True), True
    ),
    "packed with zeros": Method(
        _compressed("pack-quantized", **INTEGERS, symmetric=False), lambda weight: pack_quantized(weight, False), True
    ),
    "packed in 3 bits": Method(
        _compressed("pack-quantized", num_bits=3), lambda weight: pack_quantized(weight, True, 3)
    ),
    "packed in 5 bits of older versions": Method(
        _compressed("pack-quantized", num_bits=5, symmetric=False),
        lambda weight: pack_quantized(weight, False, 5, True),
    ),
    "fp8 of GPTQModel": Method({"quant_method": "fp8", "weight_scale_semantics": "inverse"}, fp8_inverse),
    "fp8": Method(
        {"quant_method": "fp8", "weight_block_size": [40, 32]}, lambda weight: fp8(weight, (40, 32), "scale_inv")
    ),
    "fp8 by output": Method(
        _compressed("float-quantized", **IN_FP8, strategy="channel"),
        lambda weight: fp8(weight, (1, weight.shape[1]), "scale"),
    ),
    "fp8 by blocks": Method(
        _compressed("float-quantized", **IN_FP8, strategy="block", block_structure=[32, 64]),
        lambda weight: fp8(weight, (32, 64), "scale"),
    ),
    "fp8 with as many blocks as outputs": Method(
        _compressed("float-quantized", **IN_FP8, strategy="block", block_structure="8x8"),
        lambda weight: fp8(weight, (8, 8), "scale"),
    ),
    "fp8 of ModelOpt": Method({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_whole),
    "int8": Method(_compressed("int-quantized", num_bits=8, type="int", strategy="channel"), int8),
    "int8 out of order": Method(_compressed("int-quantized", num_bits=8, type="int"), int8_out_of_order),
    "nvfp4": Method(_compressed("nvfp4-pack-quantized", **FLOATS), lambda weight: nvfp4(weight, True)),
    "nvfp4 of ModelOpt": Method(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, lambda weight: nvfp4(weight, False)
    ),
    "mxfp4": Method(_compressed("mxfp4-pack-quantized", **FLOATS), mxfp4, True),
    "nf4": Method(BITSANDBYTES | {"load_in_4bit": True}, lambda weight: nf4(weight, False)),
    "nf4 with nested scales": Method(BITSANDBYTES | {"load_in_4bit": True}, lambda weight: nf4(weight, True)),
    "eight bits of bitsandbytes": Method(BITSANDBYTES | {"load_in_8bit": True}, eight_bits_of_bitsandbytes),
}


def write(path: Path, plain: Path, method: str, others: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """Writes a checkpoint with the projections of a plain one in codes, and a plain one that has the same numbers.

    Args:
        path: Where.
        plain: The plain one.
        method: One of `METHODS`.
        others: Layers outside of the blocks that are in codes, too.

    Returns:
        Their directories.
    """
    way = METHODS[method]
    coded: Tensors = {}
    numbers: Tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        inside = ".layers." in name or layer in others
        if not inside or weight.dim() != 2 or layer == name or "gate." in name:
            coded[name] = numbers[name] = weight
            continue
        found = way.write(weight)
        coded |= {f"{layer}.{end}": tensor for end, tensor in found.stored.items()}
        numbers[name] = found.numbers.float()
    return saved(path / "coded", plain, coded, way.about), saved(path / "numbers", plain, numbers)


def write_experts(path: Path, plain: Path) -> tuple[Path, Path]:
    """The same with the experts of gpt-oss in MXFP4, as it is published."""
    coded: Tensors = {}
    numbers: Tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            coded[name] = numbers[name] = weight
            continue
        each = [mxfp4(own.t().contiguous()) for own in weight]
        blocks = torch.stack([own.stored["weight_packed"] for own in each])
        coded[f"{name}_blocks"] = blocks.view(*blocks.shape[:2], -1, 16)
        coded[f"{name}_scales"] = torch.stack([own.stored["weight_scale"] for own in each])
        numbers[name] = torch.stack([own.numbers.t() for own in each])
    about = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return saved(path / "coded", plain, coded, about), saved(path / "numbers", plain, numbers)


def saved(path: Path, plain: Path, tensors: Tensors, about: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    for file in plain.glob("*.json"):
        shutil.copy(file, path)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if about is not None:
        config = json.loads((plain / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return path
