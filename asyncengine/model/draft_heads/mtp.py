"""Multi-token prediction (Gloeckle et al., 2024; DeepSeek-V3): a further layer of the model, over its last states.

A token's embedding and the state before it come together in one product, each behind a norm of its own, and go through
a decoder layer of the model's kind, which transformers runs as a model of one layer. A second guess goes through the
same layer again. Of images it has what the model has: in the place of their tokens' embeddings, and their axes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.attention_modules import RecordedLayer
from asyncengine.model.draft_heads.head import Pictured
from asyncengine.model.draft_heads.mtp_layouts import MtpLayout


class MtpHead(nn.Module):
    """As `asyncengine.model.draft_heads.head.Head`.

    Args:
        model: Of transformers, of one layer, whose last norm is the head's. Its embedding and its head are not used.
        layers: Those of its layers that attend.
        layout: Which way it is put together.
        norms: Weights of the norms of embedding and state, and of the model that is drafted for if that counts.
        projection: Of both, (hidden, 2 * hidden).
        embedding: (vocabulary, hidden)
        head: (vocabulary, hidden)
    """

    sees_images = True

    def __init__(
        self,
        model: Any,
        layers: list[RecordedLayer],
        layout: MtpLayout,
        norms: list[torch.Tensor],
        projection: torch.Tensor,
        embedding: nn.Parameter,
        head: nn.Parameter,
    ) -> None:
        super().__init__()
        self.width = int(embedding.shape[1])
        self.body = model.get_decoder()
        self.norm, self.body.norm = self.body.norm, nn.Identity()
        self.norms = nn.ModuleList()
        for weight in norms:
            norm = copy.deepcopy(self.norm)
            norm.weight = nn.Parameter(weight, requires_grad=False)
            self.norms.append(norm)
        self.projection = nn.Parameter(projection, requires_grad=False)
        self.embedding, self.head = embedding, head
        self._layers, self._layout = layers, layout

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the protocol says."""
        states = hidden.to(self.projection.dtype)
        if self._layout.of_normed:
            states = self.norms[2](states)
        return states

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        before: torch.Tensor,
        pictured: Pictured | None = None,
    ) -> torch.Tensor:
        """As the protocol says."""
        embedded = functional.embedding(token_ids, self.embedding)
        if pictured is not None:
            embedded[pictured.tokens] = pictured.rows.to(embedded.dtype)
        both = [self.norms[0](embedded), self.norms[1](before)]
        if self._layout.state_first:
            both.reverse()
        entered = functional.linear(torch.cat(both, -1), self.projection)
        places = positions[..., None, :]  # (1, tokens), or (axes, 1, tokens)
        states: torch.Tensor = self.body(inputs_embeds=entered[None], position_ids=places, use_cache=False)[0][0]
        return self._normed(states) if self._layout.goes_on_normed else states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """As the protocol says."""
        return functional.linear(states if self._layout.goes_on_normed else self._normed(states), self.head)

    def recorded(self) -> list[RecordedLayer]:
        """Its layers that attend."""
        return self._layers

    def _normed(self, states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(states)
        return normed
