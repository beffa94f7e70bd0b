"""Patches of images are multiplied, and come to what a convolution of them does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from asyncengine.model.media.patches import PatchConv3d, multiply_patches
from tests.model.media.checkpoints import load


def test_single_patches_are_multiplied_and_others_convolved(
    sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(sighted("qwen3_vl"))
    (convolution,) = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    patches = torch.randn(7, convolution.in_channels, *convolution.kernel_size)
    larger = torch.randn(2, convolution.in_channels, *(2 * size for size in convolution.kernel_size))
    with torch.no_grad():
        wanted, of_larger = convolution(patches), convolution(larger)
        multiply_patches(model)
        assert type(convolution) is PatchConv3d
        assert torch.equal(convolution(larger), of_larger)
        monkeypatch.setattr(nn.Conv3d, "forward", None)
        assert torch.allclose(convolution(patches), wanted, atol=1e-5)


def test_what_reads_no_images_is_left_alone(sighted: Callable[..., Path]) -> None:
    model = load(sighted("qwen3_vl"))
    model.get_decoder().extra = nn.Conv3d(2, 2, 2, stride=2)
    multiply_patches(model)
    assert type(model.get_decoder().extra) is nn.Conv3d
