"""Patches of images, multiplied where transformers convolves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.media.modules import senses


class PatchConv3d(nn.Conv3d):
    """A convolution that is usually given single patches, as many as there are, each as large as its kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(patches, channels, frames, height, width) to (patches, outputs, 1, 1, 1)."""
        if tuple(input.shape[2:]) != tuple(self.kernel_size):
            return super().forward(input)
        return functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def multiply_patches(model: Any) -> None:
    """Lets a model's encoder multiply patches by a matrix.

    oneDNN convolves a patch at a time in 3 dimensions, which takes some 15 times as long as one product of all of them.
    """
    for module in senses(model):
        if type(module) is nn.Conv3d and module.groups == 1 and not any(module.padding):
            module.__class__ = PatchConv3d
