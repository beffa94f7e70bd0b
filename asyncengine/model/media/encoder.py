"""What a model's encoders make of images, audio and videos, kept for a while, in place of tokens. On the step thread.

Images and videos are encoded by the functions of transformers that are there for it, and given to the model's forward
as it takes what was encoded before. There is no such way for audio: it is encoded by the model's own forward, which
stops at the decoder's door, and put in there (`asyncengine.model.media.door`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from asyncengine.media import NOUNS, PLURALS, Kind, MediaFailure, MediaItem, MediaPart
from asyncengine.model.decoder.program import CompiledDecoder, Seen
from asyncengine.model.decoder.rotation import rotated
from asyncengine.model.media import door
from asyncengine.model.widened import WidenedLinears, is_faster
from asyncengine.step.batch import StepBatch

_WITHIN = {"pooler_output", "last_hidden_state", "hidden_states", "attentions"}
"""What an encoder tells of itself, and what stands for its images or videos in the prompt."""


@dataclass(frozen=True, slots=True)
class Features:
    """What stands in the place of an item's tokens.

    Attributes:
        rows: (tokens, hidden) their embeddings.
        beside: By name, lists of (tokens, hidden) that go into deeper layers (DeepStack, Meng et al., 2024).
        kind: Of the object that the encoder gave it in.
        dims: How many dimensions the embeddings had there; None if they were in a list.
    """

    rows: torch.Tensor
    beside: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    kind: Any = None
    dims: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.rows.nbytes + sum(each.nbytes for several in self.beside.values() for each in several)


class MediaEncoder:
    """A model's encoders of images, audio and videos, and what they have made of the last ones.

    Args:
        model: The model.
        token_ids: By kind, what stands for a piece in a prompt.
        device: Where it is.
        budget: Tokens whose embeddings are kept for steps to come; those of one item are always.

    Attributes:
        encoded: How many items were encoded.
    """

    def __init__(self, model: Any, token_ids: Mapping[Kind, int], device: torch.device, budget: int) -> None:
        self.encoded = 0
        self._model = model
        self._token_ids = token_ids
        self._device = device
        self._budget = budget
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self._tokens = 0
        self._rows_of_text: dict[int, torch.Tensor] = {}
        self._wanted: dict[Kind, Mapping[str, Any]] = {"audio": inspect.signature(model.forward).parameters}
        self._look: dict[Kind, Any] = {}
        self._given_as: dict[Kind, Kind] = {}
        """As which kind a forward takes what was encoded: some have no other place for videos than for images."""
        for kind in token_ids:
            if kind == "audio":
                continue
            look = _function(model, kind)
            self._look[kind] = look = look or _function(model, "image")
            self._wanted[kind] = inspect.signature(look).parameters
            apart = kind == "image" or (_function(model, kind) and token_ids[kind] != token_ids.get("image"))
            self._given_as[kind] = kind if apart else "image"

    def clear(self) -> None:
        """Forgets what was encoded."""
        self._kept.clear()
        self._tokens = 0
        self._rows_of_text.clear()

    def arguments(self, batch: StepBatch) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """What a model's forward takes of a step's images and videos.

        Returns:
            (axes, 1, tokens) where tokens are rotated to, if that is not by their positions; and further arguments.
        """
        axes = None if batch.axes is None else torch.from_numpy(batch.axes).to(self._device).long()[:, None]
        parts: dict[Kind, list[MediaPart]] = {}
        for part in batch.media:
            if part.item.kind in self._given_as:
                parts.setdefault(self._given_as[part.item.kind], []).append(part)
        outputs = {kind: self._together(several, batch) for kind, several in parts.items()}
        return axes, {"mm_encoder_outputs": outputs} if outputs else {}

    def at_the_door(self, batch: StepBatch) -> contextlib.AbstractContextManager[None]:
        """Puts a step's audio in its place while the model's forward runs."""
        audio = [part for part in batch.media if part.item.kind == "audio"]
        if not audio:
            return contextlib.nullcontext()
        rows = torch.cat([self._rows(part) for part in audio])
        at = torch.from_numpy(np.concatenate([part.tokens for part in audio])).to(self._device)
        return door.replaced(self._model, at, rows)

    def _together(self, several: Sequence[MediaPart], batch: StepBatch) -> Any:
        """The images of a step, or its videos, as one output of the encoder."""
        # The model looks for the id, so whatever has it gets a row; text that happens to, its row without images.
        token_id = several[0].item.token_id
        order = np.flatnonzero(batch.token_ids == token_id)
        parts = [(self.features(part.item), part) for part in several]
        first = parts[0][0]
        rows = self._row_of_text(token_id).to(first.rows.dtype).repeat(len(order), 1)
        beside = {
            name: [each.new_zeros(len(order), each.shape[1]) for each in several]
            for name, several in first.beside.items()
        }
        for features, part in parts:
            to = torch.from_numpy(np.searchsorted(order, part.tokens)).to(self._device)
            own = slice(part.first, part.first + len(part.tokens))
            rows[to] = features.rows[own]
            for name, deeper in features.beside.items():
                for whole, each in zip(beside[name], deeper, strict=True):
                    whole[to] = each[own]
        dims = first.dims
        pooled = [rows] if dims is None else rows[(None,) * (dims - 2)]
        deep = {name: [(each,) for each in several] for name, several in beside.items()}
        return first.kind(pooler_output=pooled, **deep)

    def seen(self, batch: StepBatch, program: CompiledDecoder) -> Seen:
        """What a step takes of its images, its audio and its videos that is run by `program`."""
        index = np.full(len(batch.token_ids), -1, dtype=np.int64)
        parts = [(self.features(part.item), part) for part in batch.media]
        rows, deep, count = [], [], 0
        layers = max(len(_deeper(features)) for features, _ in parts)
        for features, part in parts:
            own = slice(part.first, part.first + len(part.tokens))
            index[part.tokens] = count + np.arange(len(part.tokens))
            count += len(part.tokens)
            rows.append(features.rows[own])
            deeper = _deeper(features) or [torch.zeros_like(features.rows)] * layers  # audio has none
            deep.append([each[own] for each in deeper])
        rotation = None
        if batch.axes is not None and program.rotary:
            axes = torch.from_numpy(batch.axes).long()[:, None]
            rotation = rotated(self._model.get_decoder().rotary_emb, axes, program.rotary, program.pairs)
        return Seen(index, _joined(rows), tuple(map(_joined, zip(*deep, strict=True))), rotation)

    def features(self, item: MediaItem) -> Features:
        """What stands in the place of an item's tokens, encoded unless it was before."""
        found = self._kept.get(item.digest)
        if found is not None:
            self._kept.move_to_end(item.digest)
            return found
        try:
            found = self._kept[item.digest] = self._encode(item)
        except Exception as error:
            raise MediaFailure(item, error) from error
        self._tokens += len(found.rows)
        while self._tokens > self._budget and len(self._kept) > 1:
            self._tokens -= len(self._kept.popitem(last=False)[1].rows)
        return found

    def _rows(self, part: MediaPart) -> torch.Tensor:
        return self.features(part.item).rows[part.first : part.first + len(part.tokens)]

    def _row_of_text(self, token_id: int) -> torch.Tensor:
        """(1, hidden) what the model makes of a token with the id of images or videos where there are none, once."""
        if token_id not in self._rows_of_text:
            token = torch.tensor([[token_id]], device=self._device)
            found = door.embeddings(self._model, input_ids=token, position_ids=torch.zeros_like(token))
            self._rows_of_text[token_id] = self._model.get_input_embeddings()(token)[0] if found is None else found
        return self._rows_of_text[token_id]

    def _encode(self, item: MediaItem) -> Features:
        wanted = self._wanted[item.kind]
        given = {name: self._sent(value) for name, value in item.inputs.items() if name in wanted}
        faster = WidenedLinears() if is_faster(self._device) else contextlib.nullcontext()
        with torch.inference_mode(), faster:
            found = self._made(given, item)
        self.encoded += 1
        if len(found.rows) != len(item.places):
            raise ValueError(
                f"{NOUNS[item.kind]} has {len(item.places)} tokens in its prompt and {len(found.rows)} embeddings"
            )
        return found

    def _made(self, given: dict[str, Any], item: MediaItem) -> Features:
        """What stands in the place of an item's tokens, of what the encoder takes."""
        return self._audio(given, item) if item.kind == "audio" else self._looked_at(given, item.kind)

    def _looked_at(self, given: dict[str, Any], kind: Kind) -> Features:
        output = self._look[kind](**given, return_dict=True)
        pooled = output.pooler_output
        if pooled is None:
            raise ValueError(f"its encoder gives out no embeddings of {PLURALS[kind]}")
        in_list = isinstance(pooled, (list, tuple))
        rows = torch.cat([each.flatten(0, -2) for each in (pooled if in_list else [pooled])])
        beside = {}
        for name, value in output.items():
            if name in _WITHIN:
                continue
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"its encoder gives out {name}, for which there is no place here")
            beside[name] = [torch.cat(list(each)) for each in value]  # each is in pieces, one for each image
            if any(each.shape != rows.shape for each in beside[name]):
                raise ValueError(f"its encoder gives out {name}, which is not of the tokens of {PLURALS[kind]}")
        return Features(rows, beside, type(output), None if in_list else pooled.dim())

    def _audio(self, given: dict[str, Any], item: MediaItem) -> Features:
        ids = torch.tensor([list(item.tokens)], device=self._device)
        if "attention_mask" in self._wanted["audio"]:
            given["attention_mask"] = torch.ones_like(ids)
        with door.without_embedding(self._model):
            found = door.embeddings(self._model, input_ids=ids, **given)
        if found is None:
            raise ValueError("its forward gives its decoder no embeddings")
        return Features(found[ids[0] == item.token_id])

    def _sent(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._sent(each) for each in value]
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self._device, self._model.dtype if value.is_floating_point() else value.dtype)


def _function(model: Any, kind: Kind) -> Any:
    """Encodes images or videos; None if there is none."""
    name = f"get_{kind}_features"
    return getattr(model.base_model, name, None) or getattr(model, name, None)


def _deeper(features: Features) -> list[torch.Tensor]:
    return [each for several in features.beside.values() for each in several]


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(pieces)).float().contiguous()
