"""What a GGUF file says of its model, by the keys of its architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from asyncengine.errors import CheckpointError
from asyncengine.model.gguf.blocks import decode
from asyncengine.model.gguf.header import BlockTensor, Header


class Facts:
    """Reads metadata.

    Attributes:
        architecture: As llama.cpp calls it.
        tensors: By name.
    """

    def __init__(self, header: Header) -> None:
        self._metadata = header.metadata
        self.architecture = str(header.metadata.get("general.architecture"))
        self.tensors = header.tensors

    def get(self, key: str, otherwise: Any = None) -> Any:
        """A value, by its key without the architecture. A float is the shortest that is the same in 32 bits."""
        value = self._metadata.get(f"{self.architecture}.{key}", otherwise)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def __call__(self, key: str) -> Any:
        """As `get`, of what must be there.

        Raises:
            CheckpointError: It is not.
        """
        if (value := self.get(key)) is None:
            raise CheckpointError(f"its metadata has no {self.architecture}.{key}")
        return value

    def one(self, key: str, otherwise: Any = None) -> Any:
        """As `get`, of what may be stated for each layer; zeros are of layers that have no such thing.

        Raises:
            CheckpointError: Layers differ.
        """
        value = self(key) if otherwise is None else self.get(key, otherwise)
        if not isinstance(value, list):
            return value
        if len(found := set(value) - {0}) > 1:
            raise CheckpointError(f"{self.architecture}.{key} differs between layers: {value}")
        return found.pop() if found else 0

    def each(self, key: str) -> list[Any]:
        """What is stated for each layer, or for all alike.

        Raises:
            CheckpointError: Nothing is, or not for all.
        """
        value = self(key)
        found = value if isinstance(value, list) else [value] * self.layers
        if len(found) < self.layers:
            raise CheckpointError(f"{self.architecture}.{key} is of {len(found)} layers, and there are {self.layers}")
        return found[: self.layers]

    def without_architecture(self, key: str) -> Any:
        """A value, by its whole key."""
        return self._metadata.get(key)

    def token(self, kind: str) -> int | None:
        """The id of a special token."""
        value = self._metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return value if isinstance(value, int) else None

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor."""
        return tensor in self.tensors

    def numbers(self, name: str) -> list[float]:
        """The contents of a small tensor."""
        return _contents(self.tensors[name]).tolist() if name in self.tensors else []

    @property
    def layers(self) -> int:
        """How many layers the model has, without those that predict further tokens.

        Raises:
            CheckpointError: It is no number.
        """
        count, further = self("block_count"), self.get("nextn_predict_layers", 0)
        if not isinstance(count, int) or not isinstance(further, int) or not 0 <= count - further <= len(self.tensors):
            raise CheckpointError(
                f"{self.architecture}.block_count is {count!r}, of which {further!r} are for further tokens, and there "
                f"are {len(self.tensors)} tensors"
            )
        return count - further

    @property
    def head_dim(self) -> int:
        """Width of a head's keys."""
        return int(self.get("attention.key_length") or self("embedding_length") // self.one("attention.head_count"))

    def layers_with(self, tensor: str) -> list[bool]:
        """Of each layer, whether it has a tensor."""
        return [self.has(f"blk.{layer}.{tensor}") for layer in range(self.layers)]

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """Of a kind of tensor, in whatever layer has it first."""
        return next((each.shape for key, each in self.tensors.items() if key.endswith(f".{tensor}")), None)


def _contents(tensor: BlockTensor) -> torch.Tensor:
    size = tensor.rows * tensor.row_bytes
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        data = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
    found = decode(tensor.type_id, data.view(tensor.rows, -1), (tensor.rows, tensor.shape[-1]))
    return (found if isinstance(found, torch.Tensor) else found.weight(torch.float32)).flatten()
