"""What weights are rounded to before they are packed is what the packed ones stand for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine.model.architecture import ATTENTION, record
from asyncengine.model.attention import kernel
from asyncengine.model.decoder.blueprint import recognise
from asyncengine.model.decoder.compiled_linear import Products, ProductStruct
from asyncengine.model.decoder.four_bit_matrix import form_of, packed
from asyncengine.model.decoder.roundings import InForm, Roundings
from asyncengine.model.decoder.weights import DTYPES, NARROW, Rounding
from asyncengine.model.latent_attention import by_head, keep_latents
from asyncengine.model.quantised.eight_bits import nearest_bytes
from asyncengine.model.quantised.four_bit_linear import round_layers
from asyncengine.model.quantised.four_bits import nearest
from tests.model.decoder.test_program import LATENTS

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def library() -> Any:
    return kernel.load(kernel.build("int4"))


def multiplied(library: Any, weight: torch.Tensor, rounding: Rounding, x: torch.Tensor) -> torch.Tensor:
    """Rows by a packed matrix."""
    matrix = packed(library, [weight], [None], rounding)
    products = Products(library, torch.bfloat16, "int4")
    struct = ProductStruct(matrix.struct, DTYPES[torch.bfloat16], NARROW["int4"])
    found = torch.empty(len(x), len(weight), dtype=torch.bfloat16)
    assert not products.library.decoder_product(ctypes.addressof(struct), x.data_ptr(), len(x), found.data_ptr(), 1)
    return found.float()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("rounding", "inputs"), [("int8", 96), ("int8", 80), ("int4", 96), ("int4", 80), ("bytes", 96)]
)
def test_products_are_those_of_the_numbers(rounding: Rounding, inputs: int, turned: bool, library: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(inputs, 40).bfloat16().T if turned else torch.randn(40, inputs).bfloat16()
    numbers = InForm(library, form_of([weight], rounding))(weight)
    x = torch.randn(7, inputs).bfloat16()
    wanted, before = x.float() @ numbers.T, x.float() @ weight.float().T
    found = multiplied(library, weight, rounding, x)
    assert (found - wanted).norm() < 3e-3 * wanted.norm()  # half a digit of bfloat16, and that of scales
    assert (before - wanted).norm() > 3e-3 * wanted.norm()


@pytest.mark.parametrize("group", [32, 16])
def test_numbers_are_the_nearest_codes(group: int, library: Any) -> None:
    torch.manual_seed(1)
    weight = torch.randn(33, 64).bfloat16()
    weight[3] = 0
    in_bytes = InForm(library, form_of([weight, nearest_bytes(weight.float(), group)], "bytes"))
    assert torch.equal(in_bytes(weight), nearest_bytes(weight.float(), group).weight(torch.float32))
    in_four = InForm(library, form_of([weight], "int4"))
    torch.testing.assert_close(in_four(weight), nearest(weight).weight(torch.float32), rtol=0, atol=2e-7)


def model_of(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=ATTENTION).eval()


def roundings_of(model: Any, library: Any, rounding: Rounding) -> Roundings:
    with torch.inference_mode():
        blueprint = recognise(model, record(model).attention, 64)
    return Roundings(library, blueprint, rounding)


@pytest.mark.parametrize("rounding", ["int8", "int4", "bytes"])
@pytest.mark.parametrize(
    "architecture", ["qwen2", "phi3", "gpt2", "gpt_neox", "cohere", "mixtral", "gpt_oss", "qwen2_moe"]
)
@pytest.mark.in_short("int8", "qwen2_moe-int4", "gpt_oss-int4", "gpt_oss-bytes", "phi3-bytes", "phi3-int4")
def test_all_weights_are_told_that_are_packed_narrow(
    architecture: str, rounding: Rounding, checkpoint: Checkpoint, library: Any
) -> None:
    """And no others: norms, biases, positions and routers stay what they are."""
    model = model_of(checkpoint(architecture))
    roundings = roundings_of(model, library, rounding)
    assert roundings.told
    assert roundings.sparse == (architecture in ("mixtral", "gpt_oss", "qwen2_moe"))
    for name, parameter in model.named_parameters():
        narrow = name.endswith(("proj.weight", "up_proj", "down_proj", "embed_tokens.weight", "lm_head.weight"))
        narrow |= architecture in ("gpt2", "gpt_neox") and parameter.dim() > 1 and "wpe" not in name
        assert (roundings.of(parameter) is not None) == narrow, name
        if parameter.dim() == 3:
            assert roundings.of(parameter[1]) is not None, name
    assert not roundings_of(model, library, "none").some


@pytest.mark.parametrize("rounding", ["int8", "int4", "bytes"])
def test_the_matrix_behind_latents_is_rounded_as_it_is_turned(
    rounding: Rounding, checkpoint: Checkpoint, library: Any
) -> None:
    model = model_of(checkpoint("deepseek_v3", **LATENTS["deepseek_v3"]))
    keep_latents(model)
    attention = model.model.layers[0].self_attn
    weight = attention.kv_b_proj.weight
    rounded = roundings_of(model, library, rounding).of(weight)
    assert rounded is not None
    assert rounded.together == len(weight) // 4
    whole = rounded(weight)
    assert torch.equal(whole[rounded.together :], rounded(weight[rounded.together :]))
    few: Rounding = "int8" if rounding == "int4" else rounding
    for parts, found in zip(by_head(weight.detach(), 4, 16), by_head(whole, 4, 16), strict=True):
        form = InForm(library, form_of(list(parts[:1]), few))
        for part, own in zip(parts, found, strict=True):
            torch.testing.assert_close(own, form(part), rtol=0, atol=1e-7)


def test_codes_that_become_others_cannot_be_told(checkpoint: Checkpoint, library: Any) -> None:
    model = model_of(checkpoint("llama", hidden_size=80, num_attention_heads=5, num_key_value_heads=5))
    assert roundings_of(model, library, "bytes").told
    round_layers(model, group=16)
    assert not roundings_of(model, library, "bytes").told
