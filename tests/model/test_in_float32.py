"""Models of short numbers, computed in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from asyncengine.model import in_float32
from asyncengine.model.in_float32 import ExpertsOneByOne, InFloat32

Checkpoint = Callable[..., Path]
IDS = torch.arange(1, 25).view(2, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt", "cohere", "mixtral", "gpt_oss", "deepseek_v3", "nemotron"],
)
@pytest.mark.in_short("torch.bfloat16")
def test_the_numbers_are_those_of_the_same_weights_in_float32(
    architecture: str, dtype: torch.dtype, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_float32, "_PIECE", 1 << 10)  # several pieces
    path = checkpoint(architecture)
    short, wide = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager") for _ in "ab")
    wide = wide.float()
    with torch.inference_mode():
        with ExpertsOneByOne(short), InFloat32():
            found = short(IDS, use_cache=False).logits
        with ExpertsOneByOne(wide):
            wanted = wide(IDS, use_cache=False).logits
        rounded = short(IDS, use_cache=False).logits
    assert found.dtype is torch.float32
    # Embeddings are multiplied by a number that the model has in its own dtype; and so rare are other differences.
    assert (found - wanted).norm() < 2e-5 * wanted.norm()
    assert (rounded - wanted).norm() > 1e-4 * wanted.norm()


def test_experts_are_multiplied_as_before_afterwards(checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.bfloat16)
    before = model.config._experts_implementation
    with ExpertsOneByOne(model):
        assert model.config._experts_implementation == "eager" != before
    assert model.config._experts_implementation == before


def test_some_weights_become_others_by_whole_parts() -> None:
    class Doubled:
        together = 6

        def __call__(self, weight: torch.Tensor, /) -> torch.Tensor:
            assert not len(weight) % 6
            return weight.float() * 2

    layer, other = nn.Linear(1 << 16, 12, dtype=torch.bfloat16), nn.Linear(16, 4, dtype=torch.bfloat16)
    table = torch.randn(9, 16).bfloat16()
    own = {id(layer.weight), id(table)}
    x, ids = torch.randn(3, 1 << 16), torch.tensor([[3, 8]])
    with torch.inference_mode(), InFloat32(lambda weight: Doubled() if id(weight) in own else None):
        found, plain, rows = layer(x), other(x[:, :16]), functional.embedding(ids, torch.cat((table, table[:3])))
        looked_up = functional.embedding(ids, table) if not len(ids) % 6 else None
    assert looked_up is None
    torch.testing.assert_close(found, x @ layer.weight.float().T * 2 + layer.bias.float())
    torch.testing.assert_close(plain, x[:, :16] @ other.weight.float().T + other.bias.float())
    assert torch.equal(rows, table.float()[ids])
