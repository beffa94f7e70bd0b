"""transformers' functions of recurrent layers, over the compiled code: the same arguments, the same results.

Three things differ, none of which its layers see otherwise than as speed and digits. A state that is given is changed
in place and returned, where a new one would be. What transformers rounds to the model's dtype in between stays
float32. And a single step of Mamba-2 returns float32, as several tokens at once do, so that both come to the same bits.

Whatever else is asked for goes to the function that was there: packed sequences, other activations, other dtypes,
tensors on a device, gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from asyncengine.model.recurrent import functions
from asyncengine.model.recurrent.functions import Functions, Present
from asyncengine.model.recurrent.scans import CODES, MOST_TAPS, Scans

Function = Callable[..., Any]


def compiled(scans: Scans) -> Functions:
    """What is compiled, by transformers' names."""
    return {
        "causal_conv1d_fn": lambda original, present: _convolution(scans),
        "causal_conv1d_update": lambda original, present: _convolution_update(scans),
        "torch_chunk_gated_delta_rule": lambda original, present: _chunked_delta_rule(scans, original),
        "torch_recurrent_gated_delta_rule": lambda original, present: _delta_rule(scans, original),
        "chunk_kimi_delta_attention": lambda original, present: _chunked_delta_rule(scans, original),
        "recurrent_kimi_delta_attention": lambda original, present: _delta_rule(scans, original),
        "mamba2_chunk_scan": lambda original, present: _mamba2_scan(scans, original),
        "mamba2_selective_state_update": lambda original, present: _mamba2_step(scans, original),
        "mamba_selective_scan": lambda original, present: _mamba_scan(scans, original, present),
        "mamba_selective_state_update": lambda original, present: _mamba_step(scans, original),
    }


def _convolution(scans: Scans) -> Function:
    def causal_conv1d_fn(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **others: Any,
    ) -> torch.Tensor:
        if not _convolves(hidden_states, weight, bias, activation) or _packed(others):
            return functions.causal_conv1d_fn(hidden_states, weight, bias, activation, **others)
        return scans.convolution(hidden_states, weight.contiguous(), bias, None, silu=activation is not None)

    return causal_conv1d_fn


def _convolution_update(scans: Scans) -> Function:
    def causal_conv1d_update(
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        if (
            hidden_states.shape[2] != 1
            or not weight.shape[1] - 1 <= conv_state.shape[2] <= MOST_TAPS
            or conv_state.dtype is not hidden_states.dtype
            or not _is_dense(conv_state)
            or not _convolves(hidden_states, weight, bias, activation)
        ):
            return functions.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)
        silu = activation is not None
        return scans.convolution(hidden_states, weight.contiguous(), bias, conv_state, silu=silu)

    return causal_conv1d_update


def _convolves(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> bool:
    known = activation in (None, "silu", "swish") and weight.shape[1] <= MOST_TAPS
    return known and _are_plain(given, weight, bias)


def _chunked_delta_rule(scans: Scans, original: Function) -> Function:
    recurrent = _delta_rule(scans, original)

    def chunk_delta_rule(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = 64,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        found: tuple[torch.Tensor, torch.Tensor | None] = recurrent(
            query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **others
        )
        return found

    return chunk_delta_rule


def _delta_rule(scans: Scans, original: Function) -> Function:
    """The gated delta rule, and that of Kimi: they differ in the decay's dimensions."""

    def recurrent_delta_rule(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **others: Any,
    ) -> Any:
        if (
            _packed(others)
            or not _are_plain(query, key, value, g, beta, initial_state)
            or value.shape[2] % key.shape[2]
            or query.shape != key.shape
        ):
            return original(
                query,
                key,
                value,
                g=g,
                beta=beta,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **others,
            )
        shape = (key.shape[0], value.shape[2], key.shape[3], value.shape[3])
        state = _state(initial_state, shape, output_final_state)
        output = scans.delta_rule(
            query, key, value, g, beta, state, fresh=initial_state is None, normalise=use_qk_l2norm_in_kernel
        )
        return output, state if output_final_state else None

    return recurrent_delta_rule


def _mamba2_scan(scans: Scans, original: Function) -> Function:
    def mamba2_chunk_scan(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **others: Any,
    ) -> Any:
        batch, _, heads, dim = hidden_states.shape
        of_heads = all(each is None or each.shape == (heads,) for each in (A, D, dt_bias))
        if _packed(others) or not of_heads or not _are_plain(hidden_states, dt, A, B, C, D, dt_bias, initial_states):
            return original(
                hidden_states,
                dt,
                A,
                B,
                C,
                chunk_size,
                D=D,
                dt_bias=dt_bias,
                initial_states=initial_states,
                dt_softplus=dt_softplus,
                dt_limit=dt_limit,
                return_final_states=return_final_states,
                **others,
            )
        state = _state(initial_states, (batch, heads, dim, B.shape[3]), return_final_states)
        output = torch.empty(hidden_states.shape, dtype=torch.float32)
        scans.selective_scan(
            hidden_states,
            dt,
            _dense(A),
            B,
            C,
            state,
            output,
            fresh=initial_states is None,
            skip=_dense(D),
            bias=_dense(dt_bias),
            softplus=dt_softplus,
            limits=dt_limit,
        )
        return (output, state) if return_final_states else output

    return mamba2_chunk_scan


def _mamba2_step(scans: Scans, original: Function) -> Function:
    def mamba2_selective_state_update(
        state: torch.Tensor,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        z: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        # transformers repeats what there is one of for each head: (..., heads) with strides of 0 behind.
        repeated = A.stride()[1:] == (0, 0) and all(each is None or each.stride()[-1] == 0 for each in (dt, D, dt_bias))
        if not repeated or not _are_plain(state, hidden_states, dt, A, B, C, D, dt_bias, z):
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **others
            )
        worked = _state(state, state.shape, True)
        output = torch.empty(hidden_states.shape, dtype=torch.float32)
        scans.selective_scan(
            hidden_states[:, None],
            dt[:, None, :, 0],
            _dense(A[:, 0, 0]),
            B[:, None],
            C[:, None],
            worked,
            output[:, None],
            fresh=False,
            skip=None if D is None else _dense(D[:, 0]),
            bias=None if dt_bias is None else _dense(dt_bias[:, 0]),
            softplus=dt_softplus,
        )
        if worked is not state:
            state.copy_(worked)
        # As layers gate what the scan returns, which takes no gate.
        return output if z is None else output * functional.silu(z)

    return mamba2_selective_state_update


def _mamba_scan(scans: Scans, original: Function, present: Present) -> Function:
    def mamba_selective_scan(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **others: Any,
    ) -> Any:
        if not _are_plain(hidden_states, dt, A, B, C, D, z, delta_bias):
            return original(
                hidden_states,
                dt,
                A,
                B,
                C,
                D=D,
                z=z,
                delta_bias=delta_bias,
                delta_softplus=delta_softplus,
                return_last_state=return_last_state,
                **others,
            )
        batch, channels, tokens = hidden_states.shape
        shape = (batch, channels, B.shape[1])
        # It has no argument for a state to begin with, though the layer has one.
        initial = present.recurrent_state(shape)
        state = _state(initial, shape, return_last_state)
        dtype = hidden_states.dtype
        for each in (D, z):
            dtype = dtype if each is None else torch.promote_types(dtype, each.dtype)
        output = torch.empty((batch, tokens, channels), dtype=dtype)
        scans.selective_scan(
            hidden_states.transpose(1, 2)[:, :, None],
            dt.transpose(1, 2)[:, :, None],
            _dense(A)[None],
            B.transpose(1, 2)[:, :, None],
            C.transpose(1, 2)[:, :, None],
            state,
            output[:, :, None],
            fresh=initial is None,
            skip=_dense(D),
            bias=_dense(delta_bias),
            gate=None if z is None else z.transpose(1, 2)[:, :, None],
            softplus=delta_softplus,
        )
        found = output.transpose(1, 2)
        return (found, state) if return_last_state else found

    return mamba_selective_scan


def _mamba_step(scans: Scans, original: Function) -> Function:
    def mamba_selective_state_update(
        state: torch.Tensor,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        z: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        if not _are_plain(state, hidden_states, dt, A, B, C, D, dt_bias, z):
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **others
            )
        worked = _state(state, state.shape, True)
        output = torch.empty(hidden_states.shape, dtype=hidden_states.dtype)
        scans.selective_scan(
            hidden_states[:, None, None],
            dt[:, None, None],
            _dense(A)[None],
            B[:, None, None],
            C[:, None, None],
            worked,
            output[:, None, None],
            fresh=False,
            skip=_dense(D),
            bias=_dense(dt_bias),
            gate=None if z is None else z[:, None, None],
            softplus=dt_softplus,
        )
        if worked is not state:
            state.copy_(worked)
        return output

    return mamba_selective_state_update


def _are_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether the compiled code can read all that there are."""
    grads = torch.is_grad_enabled()
    return all(
        tensor is None or (tensor.is_cpu and tensor.dtype in CODES and not (grads and tensor.requires_grad))
        for tensor in tensors
    )


def _packed(others: dict[str, Any]) -> bool:
    """Whether several sequences lie behind one another in a row."""
    return others.get("cu_seqlens") is not None or others.get("seq_idx") is not None


def _is_dense(state: torch.Tensor) -> bool:
    """Whether each sequence's state is contiguous."""
    expected = 1
    for size, stride in zip(reversed(state.shape[1:]), reversed(state.stride()[1:]), strict=True):
        if stride != expected and size != 1:
            return False
        expected *= size
    return True


def _state(initial: torch.Tensor | None, shape: tuple[int, ...], wanted: bool) -> torch.Tensor:
    """What the compiled code works on: the state that is given itself, where that can be and is wanted afterwards."""
    if initial is None:
        return torch.empty(shape, dtype=torch.float32)
    if wanted and initial.dtype is torch.float32 and _is_dense(initial):
        return initial
    return initial.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _dense(tensor: Any) -> Any:
    """Parameters as the compiled code reads them."""
    return None if tensor is None else tensor.float().contiguous()
