"""Where a head's weights come from: its own files, and the model's, where it shares embedding or head with that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asyncengine.errors import CheckpointError
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.stored.weight import OpenFiles, state_of
from asyncengine.model.text_names import name_in


class HeadFiles:
    """The weight files of a head, in a directory of its own.

    Args:
        checkpoint: The directory.

    Attributes:
        shapes: Of what is stored, by name.

    Raises:
        CheckpointError: They cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._plain = {tensor.name: tensor for tensor in checkpoint.plain}
        self._pickled: dict[str, torch.Tensor] = {}
        for file in checkpoint.weight_files:
            if file.suffix != ".safetensors":
                try:
                    self._pickled |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                except Exception as error:
                    raise CheckpointError(f"{file} cannot be read: {error}") from error
        self._files = OpenFiles()
        self.shapes = {name: tensor.shape for name, tensor in self._plain.items()}
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One of them."""
        return self._pickled[name] if name in self._pickled else self._files.tensor(self._plain[name])


def shared_name(checkpoint: Checkpoint, model: Any, of_head: bool) -> str | None:
    """The name of a model's embedding in its checkpoint, or of its head, which may be its embedding; None if there is
    no telling.

    Args:
        checkpoint: The model's.
        model: Of transformers; with or without weights.
        of_head: Which of them.
    """
    names = {module: name for name, module in model.named_modules()}
    modules = [model.get_output_embeddings(), model.get_input_embeddings()][0 if of_head else 1 :]
    for module in modules:
        if module in names and (name := name_in(f"{names[module]}.weight", checkpoint.shapes)) in checkpoint.shapes:
            return name
    return None


def shared_weight(built: Any, details: Any, of_head: bool) -> torch.Tensor:
    """The (vocabulary, hidden) weights of a model's embedding, or of its head.

    Where the model runs as modules they are its own. A compiled step has packed them; then they are read once more.

    Args:
        built: The model, an `asyncengine.model.built_model.Built`.
        details: What is known of it.
        of_head: Which of them.

    Raises:
        CheckpointError: They are nowhere; some models have no head.
    """
    if of_head and not built.has_head:
        raise CheckpointError(f"{details.checkpoint.name} has no language-model head, which the draft head shares")
    model, checkpoint = built.model, details.checkpoint
    module = model.get_output_embeddings() if of_head else model.get_input_embeddings()
    weight = getattr(module, "weight", None)
    if (
        built.program is None
        and type(module) in (nn.Linear, nn.Embedding)
        and isinstance(weight, nn.Parameter)
        and not weight.is_meta
        and weight.dim() == 2
        and weight.dtype is details.dtype
    ):
        return weight
    name = shared_name(checkpoint, model, of_head)
    if name is None:
        raise CheckpointError(
            f"{checkpoint.name}: its {'head' if of_head else 'embedding'} is not found for the draft head"
        )
    read = state_of(checkpoint.plain, checkpoint.coded.values(), details.dtype)[name][...]
    return read.to(details.dtype, copy=True)  # a file that is written over while the model serves changes nothing
