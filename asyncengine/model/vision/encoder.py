"""What a model's encoder makes of images, kept for a while and put in the place of tokens. On the step thread."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncengine.images import Image, ImageFailure
from asyncengine.model.decoder.program import CompiledDecoder, Seen
from asyncengine.model.decoder.rotation import rotated
from asyncengine.model.widened import WidenedLinears, is_faster
from asyncengine.step.batch import StepBatch

_WITHIN = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}
"""What an encoder tells of itself, and what stands for its images in the prompt."""


@dataclass(frozen=True, slots=True)
class Features:
    """What stands in the place of an image's tokens.

    Attributes:
        rows: (tokens, hidden) their embeddings.
        beside: By name, lists of (tokens, hidden) that go into deeper layers (DeepStack, Meng et al., 2024).
        kind: Of the object that the encoder gave it in.
        dims: How many dimensions the embeddings had there; None if they were in a list.
    """

    rows: torch.Tensor
    beside: dict[str, list[torch.Tensor]]
    kind: Any
    dims: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.rows.nbytes + sum(each.nbytes for several in self.beside.values() for each in several)


class _Seen(Exception):
    """Ends a forward that has shown what was looked for."""


class ImageEncoder:
    """A model's encoder of images, and what it has made of the last ones.

    Args:
        model: The model.
        token_id: What stands for a piece of an image in a prompt.
        device: Where it is.
        budget: Tokens of images whose embeddings are kept for steps to come; those of one image are always.

    Attributes:
        encoded: How many images were encoded.
    """

    def __init__(self, model: Any, token_id: int, device: torch.device, budget: int) -> None:
        self.encoded = 0
        self._model = model
        self._token_id = token_id
        self._device = device
        self._budget = budget
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self._tokens = 0
        self._row: torch.Tensor | None = None
        body = model.base_model
        self._encoding = body.get_image_features if hasattr(body, "get_image_features") else model.get_image_features
        self._wanted = inspect.signature(self._encoding).parameters

    def clear(self) -> None:
        """Forgets what was encoded."""
        self._kept.clear()
        self._tokens = 0
        self._row = None

    def arguments(self, batch: StepBatch) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """What a model's forward takes of a step's images.

        Returns:
            (axes, 1, tokens) where tokens are rotated to, if that is not by their positions; and further arguments.
        """
        # The model looks for the id, so whatever has it gets a row; text that happens to, its row without images.
        order = np.flatnonzero(batch.token_ids == self._token_id)
        parts = [(self.features(part.image), part) for part in batch.images]
        first = parts[0][0]
        rows = self._row_of_text().to(first.rows.dtype).repeat(len(order), 1)
        beside = {
            name: [each.new_zeros(len(order), each.shape[1]) for each in several]
            for name, several in first.beside.items()
        }
        for features, part in parts:
            to = torch.from_numpy(np.searchsorted(order, part.tokens)).to(self._device)
            own = slice(part.first, part.first + len(part.tokens))
            rows[to] = features.rows[own]
            for name, several in features.beside.items():
                for whole, each in zip(beside[name], several, strict=True):
                    whole[to] = each[own]
        dims = first.dims
        pooled = [rows] if dims is None else rows[(None,) * (dims - 2)]
        deep = {name: [(each,) for each in several] for name, several in beside.items()}
        output = first.kind(pooler_output=pooled, **deep)
        axes = None if batch.axes is None else torch.from_numpy(batch.axes).to(self._device).long()[:, None]
        return axes, {"mm_encoder_outputs": {"image": output}}

    def seen(self, batch: StepBatch, program: CompiledDecoder) -> Seen:
        """What a step takes of its images that is run by `program`."""
        index = np.full(len(batch.token_ids), -1, dtype=np.int64)
        rows, deep, count = [], [], 0
        for part in batch.images:
            features, own = self.features(part.image), slice(part.first, part.first + len(part.tokens))
            index[part.tokens] = count + np.arange(len(part.tokens))
            count += len(part.tokens)
            rows.append(features.rows[own])
            deep.append([each[own] for several in features.beside.values() for each in several])
        rotation = None
        if batch.axes is not None and program.rotary:
            axes = torch.from_numpy(batch.axes).long()[:, None]
            rotation = rotated(self._model.get_decoder().rotary_emb, axes, program.rotary, program.pairs)
        return Seen(index, _joined(rows), tuple(map(_joined, zip(*deep, strict=True))), rotation)

    def features(self, image: Image) -> Features:
        """What stands in the place of an image's tokens, encoded unless it was before."""
        found = self._kept.get(image.digest)
        if found is not None:
            self._kept.move_to_end(image.digest)
            return found
        try:
            found = self._kept[image.digest] = self._encode(image)
        except Exception as error:
            raise ImageFailure(image.digest, error) from error
        self._tokens += len(found.rows)
        while self._tokens > self._budget and len(self._kept) > 1:
            self._tokens -= len(self._kept.popitem(last=False)[1].rows)
        return found

    def _row_of_text(self) -> torch.Tensor:
        """(1, hidden) what the model makes of a token with the id of images where there are none, once."""
        if self._row is None:
            token = torch.tensor([[self._token_id]], device=self._device)

            def look(module: Any, arguments: Any, keywords: Any) -> None:
                self._row = keywords.get("inputs_embeds")
                raise _Seen

            handle = self._model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
            try:
                self._model(input_ids=token, position_ids=torch.zeros_like(token), use_cache=False)
            except _Seen:
                pass
            finally:
                handle.remove()
            found = self._model.get_input_embeddings()(token) if self._row is None else self._row
            self._row = found[0]
        return self._row

    def _encode(self, image: Image) -> Features:
        given = {name: self._sent(value) for name, value in image.inputs.items() if name in self._wanted}
        faster = WidenedLinears() if is_faster(self._device) else contextlib.nullcontext()
        with torch.inference_mode(), faster:
            output = self._encoding(**given, return_dict=True)
        self.encoded += 1
        pooled = output.pooler_output
        if pooled is None:
            raise ValueError("its encoder gives out no embeddings of images")
        in_list = isinstance(pooled, (list, tuple))
        rows = torch.cat([each.flatten(0, -2) for each in (pooled if in_list else [pooled])])
        if len(rows) != len(image.places):
            raise ValueError(f"an image has {len(image.places)} tokens in its prompt and {len(rows)} embeddings")
        beside = {}
        for name, value in output.items():
            if name in _WITHIN:
                continue
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"its encoder gives out {name}, for which there is no place here")
            beside[name] = [torch.cat(list(each)) for each in value]  # each is in pieces, one for each image
            if any(each.shape != rows.shape for each in beside[name]):
                raise ValueError(f"its encoder gives out {name}, which is not of the tokens of images")
        return Features(rows, beside, type(output), None if in_list else pooled.dim())

    def _sent(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._sent(each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self._device, self._model.dtype if value.is_floating_point() else value.dtype)


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(pieces)).float().contiguous()
