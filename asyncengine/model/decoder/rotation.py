"""How a decoder rotates queries and keys: asked of its own modules."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from asyncengine.model.attention_modules import hooked
from asyncengine.model.decoder.parts import NotRecognised


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary positions.

    Attributes:
        cosines: (positions, rotary / 2) float32.
        sines: Likewise.
        pairs: Whether dimensions 2 i and 2 i + 1 rotate together; else i and i + rotary / 2.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    pairs: bool


def rotation(rotary: nn.Module, attention: nn.Module, kind: str | None, max_length: int) -> Rotation:
    """Finds how layers of a kind rotate positions below `max_length`.

    Args:
        rotary: Gives cosines and sines.
        attention: Of such a layer.
        kind: Its entry in the configuration's layer types, if there are any.
        max_length: How many positions will be asked for.

    Raises:
        NotRecognised: In no way that is known here.
    """
    device = next(attention.parameters()).device
    x = torch.empty(1, 1, 1, dtype=torch.float32, device=device)
    positions = torch.arange(max_length, device=device)[None]
    try:
        cosines, sines = rotary(x, positions)
    except Exception:
        try:
            cosines, sines = rotary(x, positions, kind)
        except Exception as error:
            raise NotRecognised("its rotary embedding takes more than positions and a kind of layer") from error
    if cosines.shape[0] != 1:
        raise NotRecognised("its rotary embedding has more than one axis")
    known = _known_tables(cosines[0], sines[0])
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    for found in known:
        if apply is None or _rotates_like(apply, cosines, sines, found):
            return found
    raise NotRecognised("its rotary embedding rotates neither halves nor pairs")


@torch.no_grad()
def latent_rotation(rotary: nn.Module, attention: Any, kind: str | None, max_length: int) -> Rotation:
    """As `rotation`, where latents are kept: asked of the attention itself, which may rotate in ways of its own.

    Some put what they rotated in pairs into halves, keys as well as queries, which changes no product of the two.
    """
    weight = attention.kv_a_layernorm.weight
    positions, hidden = torch.arange(max_length, device=weight.device)[None], attention.kv_a_proj_with_mqa.in_features
    x = torch.empty(1, 1, 1, dtype=torch.float32, device=weight.device)

    def tables(positions: torch.Tensor) -> Any:
        try:
            return rotary(x, positions)
        except Exception:
            return rotary(x, positions, kind)

    seen: list[torch.Tensor] = []

    def watch(_module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _more: Any) -> Any:
        seen.append(key[:, 0, value.shape[2] :].float())
        return query.new_zeros(*query.shape[:2], value.shape[2])

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, min(4, max_length), hidden, generator=generator, dtype=torch.float32).to(weight)
    try:
        whole, few = tables(positions), tables(positions[:, : inputs.shape[1]])
        if not isinstance(few, torch.Tensor):
            few = tuple(each.to(weight.dtype) for each in few)
        with hooked({attention: watch}):
            attention(hidden_states=inputs, position_embeddings=few, attention_mask=None)
        before = attention.kv_a_proj_with_mqa(inputs)[0, :, weight.shape[0] :].float()
    except Exception as error:
        raise NotRecognised("its attention takes more than positions that rotate") from error
    cosines, sines = (whole.real, whole.imag) if isinstance(whole, torch.Tensor) else whole
    half = before.shape[1] // 2
    for found in _known_tables(cosines[0], sines[0]):
        if found.cosines.shape[1] != half:
            continue
        first, second = (before[:, ::2], before[:, 1::2]) if found.pairs else before.split(half, 1)
        c, s = found.cosines[: len(before)], found.sines[: len(before)]
        turned = first * c - second * s, second * c + first * s
        ways = [torch.cat(turned, 1), *([torch.stack(turned, 2).flatten(1)] if found.pairs else [])]
        if any(torch.allclose(seen[0], way, rtol=2e-2, atol=2e-2 * float(before.abs().max())) for way in ways):
            return found
    raise NotRecognised("its attention rotates neither halves nor pairs")


class _Watched(torch.Tensor):
    """Knows whether anybody has looked at it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in args:
            if isinstance(each, cls):
                each.__dict__["seen"] = True
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def rotates(attention: nn.Module, hidden: int) -> bool:
    """Whether a layer looks at the cosines that it is given; some of SmolLM3, Cohere2 and EXAONE 4 do not.

    Args:
        attention: The layer's attention, run here without weights; where it cannot be, it is taken to look.
        hidden: Its inputs.
    """
    x, table = torch.empty(1, 1, hidden, device="meta"), torch.empty(1, 1, 2, device="meta").as_subclass(_Watched)
    own = [*attention.named_parameters(), *attention.named_buffers()]
    weights = {name: torch.empty_like(each, device="meta") for name, each in own}
    try:
        with hooked({attention: _values}):
            functional_call(attention, weights, (x, (table, table)), {"attention_mask": None})
    except Exception:
        return True
    return "seen" in table.__dict__


def _values(_module: nn.Module, query: torch.Tensor, _key: Any, value: torch.Tensor, _more: Any) -> torch.Tensor:
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


def rotated(rotary: nn.Module, axes: torch.Tensor, width: int, pairs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, width / 2) float32 cosines and sines of tokens that are rotated by several axes.

    Args:
        rotary: Gives them for one axis, as `rotation` has found, or for several.
        axes: (axes, 1, tokens) positions.
        width: How many dimensions of a head rotate.
        pairs: Whether neighbouring ones rotate together.
    """
    cosines, sines = rotary(torch.empty(1, 1, 1, dtype=torch.float32), axes)
    tables = (each for each in _known_tables(cosines[0], sines[0]) if each.pairs is pairs)
    found = next(each for each in tables if 2 * each.cosines.shape[1] == width)
    return found.cosines, found.sines


def _known_tables(cosines: torch.Tensor, sines: torch.Tensor) -> list[Rotation]:
    """The ways in which a model may mean its cosines; the likeliest first."""
    half = cosines.shape[-1] // 2
    first, second = cosines[:, :half], cosines[:, half:]
    tables = []
    if 2 * half == cosines.shape[-1] and torch.equal(first, second):
        tables += [Rotation(_table(first), _table(sines[:, :half]), pairs) for pairs in (False, True)]
    elif torch.equal(cosines[:, ::2], cosines[:, 1::2]):
        tables += [Rotation(_table(cosines[:, ::2]), _table(sines[:, ::2]), True)]
    return tables + [Rotation(_table(cosines), _table(sines), pairs) for pairs in (False, True)]


def _rotates_like(apply: Any, cosines: torch.Tensor, sines: torch.Tensor, rotation: Rotation) -> bool:
    """Whether the model's own function does to random numbers what `rotation` says."""
    half = rotation.cosines.shape[1]
    count = min(cosines.shape[1], 3)
    x = torch.randn(1, 1, count, 2 * half, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    x = x.to(cosines.device)
    try:
        found, _ = apply(x, x, cosines[:, -count:], sines[:, -count:])
    except Exception:
        return False
    if rotation.pairs:
        a, b = x[..., ::2], x[..., 1::2]
    else:
        a, b = x[..., :half], x[..., half:]
    c, s = rotation.cosines[-count:], rotation.sines[-count:]
    rotated = (a * c - b * s, b * c + a * s)
    wanted = torch.stack(rotated, -1).flatten(-2) if rotation.pairs else torch.cat(rotated, -1)
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted, atol=1e-4)


def _table(values: torch.Tensor) -> torch.Tensor:
    return values.float().contiguous()
