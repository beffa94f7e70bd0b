"""transformers' functions of recurrent layers, over the kernels of a step in which each sequence has one token.

A layer that decodes is given the states of all sequences where it would be given those of its rows, and hands them on
to these functions, which know where the rows' own lie. What the kernels do not compute (another activation, another
dtype) is computed by the function that was there, over states that are gathered for it and written back. Whatever is
given other states, as pieces of prompts are, goes to that function as it is.

What transformers rounds to the model's dtype in between stays float32, and a step of Mamba-2 returns float32, as
several tokens at once do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from asyncengine.model.recurrent.functions import Functions, Present
from asyncengine.model.recurrent.places import Places
from asyncengine.model.recurrent.step_kernels import DTYPES, MOST_NUMBERS, MOST_TAPS, StepKernels

Function = Callable[..., Any]


def placed(kernels: StepKernels) -> Functions:
    """What there are kernels of, by transformers' names."""
    return {
        "causal_conv1d_update": lambda original, present: _convolution_update(kernels, original, present),
        "torch_recurrent_gated_delta_rule": lambda original, present: _delta_rule(kernels, original, present),
        "recurrent_kimi_delta_attention": lambda original, present: _delta_rule(kernels, original, present),
        "mamba2_selective_state_update": lambda original, present: _mamba2_step(kernels, original, present),
        "mamba_selective_state_update": lambda original, present: _mamba_step(kernels, original, present),
    }


def _convolution_update(kernels: StepKernels, original: Function, present: Present) -> Function:
    def causal_conv1d_update(
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **others: Any,
    ) -> torch.Tensor:
        places = present.places_of(conv_state)

        def plain(state: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = original(hidden_states, state, weight, bias, activation, **others)
            return output

        if places is None:
            return plain(conv_state)
        if (
            hidden_states.shape[2] != 1
            or weight.shape[1] - 1 > conv_state.shape[2]
            or max(weight.shape[1], conv_state.shape[2]) > MOST_TAPS
            or activation not in (None, "silu", "swish")
            or not _are_known(hidden_states, conv_state, weight, bias)
        ):
            gathered: torch.Tensor = _gathered(plain, conv_state, places)
            return gathered
        silu = activation is not None
        return kernels.convolution(hidden_states[..., 0], weight, bias, conv_state, places, silu=silu)[..., None]

    return causal_conv1d_update


def _delta_rule(kernels: StepKernels, original: Function, present: Present) -> Function:
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
        places = present.places_of(initial_state)

        def plain(state: torch.Tensor | None) -> Any:
            return original(
                query,
                key,
                value,
                g=g,
                beta=beta,
                initial_state=state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **others,
            )

        if places is None:
            return plain(initial_state)
        assert initial_state is not None
        if not output_final_state:
            return plain(initial_state.index_select(0, places.sources))
        if (
            key.shape[1] != 1
            or query.shape != key.shape
            or value.shape[2] % key.shape[2]
            or key.shape[3] > MOST_NUMBERS
            or not _are_known(query, key, value, g, beta, initial_state)
        ):
            own = initial_state.index_select(0, places.sources)
            output, behind = plain(own)
            initial_state.index_copy_(0, places.targets, behind.to(initial_state.dtype))
            return output, initial_state
        output = kernels.delta_rule(
            query[:, 0], key[:, 0], value[:, 0], g[:, 0], beta[:, 0], initial_state, places,
            normalise=use_qk_l2norm_in_kernel,
        )  # fmt: skip
        return output[:, None], initial_state

    return recurrent_delta_rule


def _mamba2_step(kernels: StepKernels, original: Function, present: Present) -> Function:
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
        places = present.places_of(state)

        def plain(state: torch.Tensor) -> Any:
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **others
            )

        if places is None:
            return plain(state)
        # transformers repeats what there is one of for each head: (..., heads) with strides of 0 behind.
        repeated = A.stride()[1:] == (0, 0) and all(each is None or each.stride()[-1] == 0 for each in (dt, D, dt_bias))
        if not repeated or B.shape[2] > MOST_NUMBERS or not _are_known(state, hidden_states, dt, A, B, C, D, dt_bias):
            return _gathered(plain, state, places)
        output = torch.empty(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        kernels.selective_scan(
            hidden_states, dt[..., 0], A[:, 0, 0], B, C, state, output, places,
            skip=None if D is None else D[:, 0], bias=None if dt_bias is None else dt_bias[:, 0], softplus=dt_softplus,
        )  # fmt: skip
        # As layers gate what the scan returns, which takes no gate.
        return output if z is None else output * functional.silu(z)

    return mamba2_selective_state_update


def _mamba_step(kernels: StepKernels, original: Function, present: Present) -> Function:
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
        places = present.places_of(state)

        def plain(state: torch.Tensor) -> Any:
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **others
            )

        if places is None:
            return plain(state)
        if A.shape[1] > MOST_NUMBERS or not _are_known(state, hidden_states, dt, A, B, C, D, dt_bias, z):
            return _gathered(plain, state, places)
        output = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
        kernels.selective_scan(
            hidden_states[:, None], dt[:, None], A[None], B[:, None], C[:, None], state[:, None], output[:, None],
            places, skip=D, bias=dt_bias, gate=None if z is None else z[:, None], softplus=dt_softplus,
        )  # fmt: skip
        return output

    return mamba_selective_state_update


def _gathered(compute: Callable[[torch.Tensor], Any], state: torch.Tensor, places: Places) -> Any:
    """What a function computes that changes its rows' states in place."""
    own = state.index_select(0, places.sources)
    output = compute(own)
    state.index_copy_(0, places.targets, own)
    return output


def _are_known(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels can read all that there are."""
    grads = torch.is_grad_enabled()
    return all(
        tensor is None or (tensor.dtype in DTYPES and not (grads and tensor.requires_grad)) for tensor in tensors
    )
