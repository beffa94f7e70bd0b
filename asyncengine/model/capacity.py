"""How much a model can take at once: what the configuration leaves open, filled in from the memory that there is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncengine.config import EngineConfig
from asyncengine.model import memory
from asyncengine.model.attention.protocol import CapturableBackend, CarryingBackend, LayerSpec, is_capturable
from asyncengine.model.attention_modules import RecordedLayer, hooked, text_config
from asyncengine.model.built_model import Built
from asyncengine.model.load_check import Details
from asyncengine.model.load_settings import sequences_of
from asyncengine.model.recurrent.recorded import RecurrentSpec
from asyncengine.model.recurrent.states import bytes_per_place, state_bytes
from asyncengine.speculation.lengths import LONGEST
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadPlan

CPU_CHUNK, CUDA_CHUNK = 512, 2048
"""Tokens of prompts in a step, where the configuration leaves that open."""
_STATE_COPIES = 6
"""Of a row's states that are there at once while its layer is computed: as they were, and what transformers' own
functions make of them in between."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A built model, and how much it takes at once.

    Attributes:
        config: What was wanted.
        details: What is known of it.
        built: It.
        backend: What attends.
        limits: What it takes.
    """

    config: EngineConfig
    details: Details
    built: Built
    backend: Any
    limits: Limits

    @property
    def nbytes(self) -> int:
        """Bytes of its weights and of all that it keeps of its sequences."""
        limits, layers, details = self.limits, self.built.layers, self.details
        per_block = kv_bytes_per_block(layers.attention, self.backend, limits, details.kv_dtype)
        places = limits.max_num_sequence + (limits.kept_states or 0) + limits.drafted_states + 1
        of_states = places * bytes_per_place(layers.recurrent, details.dtype)
        return self.built.nbytes + limits.num_blocks * per_block + of_states


def limits_of(
    plan: LoadPlan, built: Built, drafting: Sequence[RecordedLayer], backend: Any
) -> tuple[Limits, EngineConfig]:
    """Fills in everything that the configuration leaves open.

    Args:
        plan: What is wanted.
        built: The model.
        drafting: The layers of what drafts for it that attend.
        backend: How they do.
    """
    config, details = plan.config, plan.details
    cuda = details.device.type == "cuda"
    sequences = sequences_of(config, details.device)
    length = details.max_length
    chunk = _chunk(config, details)
    page_size = config.kv_cache_page_size or (16 if cuda else 32)
    layers = [*built.layers.attention, *drafting]  # they share the blocks
    per_block = sum(backend.bytes_per_block(layer.spec, page_size, details.kv_dtype) for layer in layers)
    share = config.gpu_memory_utilization or (memory.CUDA_SHARE if cuda else memory.CPU_SHARE)
    if cuda:
        drafts = most_drafts(config, sequences, chunk)
        activations = _profile(built.model, built.layers.attention, chunk, sequences + drafts, details.device)
        if built.media_trial is not None:
            of_media, kept = _media_profile(built, details.device)
            activations = max(activations, of_media) + kept
        if details.draft_head is not None:
            activations += head_bytes(details, chunk + sequences)
        used = memory.total_bytes(details.device) - memory.free_bytes(details.device)
        available = int(memory.total_bytes(details.device) * share) - used - activations
        share = 1.0
    else:
        available = memory.free_bytes(details.device)
    recurrent = [layer.spec for layer in built.layers.recurrent]

    def scratch(count: int) -> memory.GraphReserve:
        """Of so many rows' states, in a step that is launched."""
        if not cuda:
            return memory.GraphReserve()
        return state_scratch(recurrent, details.dtype, count, all_in_place(built))

    def captured(count: int) -> memory.GraphReserve | None:
        graphs = graph_reserve(config, details, backend, count, [layer.spec for layer in layers])
        return None if graphs is None else graphs + scratch(count)

    def beside(count: int) -> int:
        return scratch(count).nbytes + (captured(count) or memory.GraphReserve()).nbytes

    available, kept_states, drafted_states = max(available, 0), None, 0
    if built.layers.recurrent:
        per_state = bytes_per_place(built.layers.recurrent, details.dtype)
        room = memory.state_budget(
            nbytes=int(available * share),
            bytes_per_state=per_state,
            sequences=sequences,
            wanted=config.max_num_sequence is not None,
            keeps=config.prefix_cache_mode == "radix",
            beside=beside,
            drafts=lambda count: most_drafts(config, count, chunk),
        )
        sequences, kept_states, drafted_states = room.sequences, room.kept, room.drafted
        available -= int(room.nbytes / share) + scratch(sequences).nbytes
    budget = memory.kv_budget(
        available=available,
        share=share,
        bytes_per_block=max(per_block, 1),  # a model need not attend
        page_size=page_size,
        wanted_tokens=config.max_total_sequence_length,
        useful_tokens=sequences * -(-length // page_size) * page_size,
        graphs=captured(sequences) if cuda else None,
    )
    limits = Limits(
        max_num_sequence=sequences,
        max_single_sequence_length=length,
        prefill_chunk_size=chunk,
        page_size=page_size,
        num_blocks=budget.num_blocks,
        hybrid=config.prefill_mode == "hybrid",
        prefix_cache=config.prefix_cache_mode == "radix",
        max_recycling=config.prefix_cache_max_num_recycling_seqs,
        kept_states=kept_states,
        drafted_states=drafted_states,
    )
    complete = config.replace(
        tokenizer=config.tokenizer or (config.model if plan.tokenizer_key else None),
        device=str(details.device),
        dtype=str(details.dtype).removeprefix("torch."),
        max_num_sequence=sequences,
        max_total_sequence_length=budget.num_blocks * page_size,
        max_single_sequence_length=length,
        prefill_chunk_size=chunk,
        kv_cache_page_size=page_size,
        gpu_memory_utilization=config.gpu_memory_utilization or (memory.CUDA_SHARE if cuda else memory.CPU_SHARE),
    )
    return limits, complete


def _chunk(config: EngineConfig, details: Details) -> int:
    """Tokens of prompts in a step."""
    usual = CUDA_CHUNK if details.device.type == "cuda" else CPU_CHUNK
    return min(config.prefill_chunk_size or usual, details.max_length)


def most_drafts(config: EngineConfig, sequences: int, chunk: int) -> int:
    """How many tokens a step of so many sequences can have drafted, of which `chunk` is the most."""
    if config.speculative_mode == "disable":
        return 0
    return min(sequences * (config.spec_draft_length or LONGEST), chunk)


def graph_reserve(
    config: EngineConfig, details: Details, backend: Any, sequences: int, specs: Collection[LayerSpec]
) -> memory.GraphReserve | None:
    """What the captured steps of a model and of the one that drafts for it will take; None if there will be none."""
    if not is_capturable(backend) or details.device.type != "cuda":
        return None
    needs = graphs_of(config, details, backend, sequences, specs, bool(config.adapters))
    return needs if details.draft is None else needs + graphs_of(config, details.draft, backend, sequences, specs)


def state_scratch(
    specs: Collection[RecurrentSpec], dtype: torch.dtype, sequences: int, in_place: bool
) -> memory.GraphReserve:
    """What steps work on beside the states: copies of those of all rows, in one layer after the other.

    Args:
        specs: Of the recurrent layers.
        dtype: Of the model.
        sequences: So many decode at once.
        in_place: Whether states of these are changed where they lie: then only a piece of a prompt takes copies.
    """
    largest = max((state_bytes([spec], dtype) for spec in specs), default=0)
    return memory.GraphReserve(_STATE_COPIES * (1 if in_place else sequences) * largest)


def all_in_place(built: Built) -> bool:
    """Whether all recurrent layers of a model change states where they lie."""
    return all(layer.in_place for layer in built.layers.recurrent)


def graphs_of(
    config: EngineConfig,
    details: Details,
    backend: Any,
    sequences: int,
    specs: Collection[LayerSpec],
    adapters: bool = False,
) -> memory.GraphReserve:
    """What the captured steps of one model will take, also those with adapters or not, and its attention for them."""
    from asyncengine.model import graph_memory

    draws = config.speculative_mode == "disable"  # else no token stays on the device
    tokens = _chunk(config, details) + sequences if isinstance(backend, CarryingBackend) else 0
    steps = graph_memory.reserve(text_config(details.hf_config), details.dtype, sequences, draws, tokens, adapters)
    if not isinstance(backend, CapturableBackend):
        return steps
    return steps + memory.GraphReserve(backend.capture_bytes(specs, sequences, details.device))


def head_bytes(details: Details, tokens: int) -> int:
    """Bytes that a draft head takes beside its weights and its KV cache, in a step of so many tokens: the hidden states
    that it is handed, and what it computes with them, most of it in an MLP, which is some four times as wide.
    """
    assert details.draft_head is not None
    hidden = int(text_config(details.hf_config).hidden_size)
    return tokens * hidden * (len(details.draft_head.target_layers) + 16) * details.dtype.itemsize


def kv_bytes_per_block(layers: Any, backend: Any, limits: Limits, dtype: torch.dtype) -> int:
    """Bytes of one block of KV cache, all layers together."""
    return sum(int(backend.bytes_per_block(layer.spec, limits.page_size, dtype)) for layer in layers)


def _media_profile(built: Built, device: torch.device) -> tuple[int, int]:
    """Bytes that a model's encoders take for one large image or a long audio, measured, and those of the embeddings
    that it keeps.
    """
    from asyncengine.model.media.trial import BUDGET_TOKENS

    assert built.media_trial is not None
    peak = kept = 0
    encoder = built.media_trial.encoder(built.model)
    for item in built.media_trial.large():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        features = encoder.features(item)
        peak = max(peak, int(torch.cuda.max_memory_allocated(device)) - before)
        kept = max(kept, features.nbytes * BUDGET_TOKENS // len(features.rows))
        del features
        encoder.clear()
        memory.empty_cache()
    return peak, kept


def _profile(model: Any, layers: Any, chunk: int, sequences: int, device: torch.device) -> int:
    """Bytes that the activations of the largest step take, measured."""
    from asyncengine.model.graph_memory import draw_bytes

    def nothing(module: Any, query: Any, key: Any, value: Any, kwargs: Any) -> Any:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])

    tokens = chunk + sequences
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with hooked({layer.module: nothing for layer in layers}), torch.inference_mode():
        positions = torch.arange(tokens, device=device)[None] % 16
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=sequences)
    peak = int(torch.cuda.max_memory_allocated(device)) - before
    memory.empty_cache()
    # Sampling works on a few copies of the logits in float32.
    vocab = int(text_config(model.config).vocab_size)
    return peak + max(4 * sequences * vocab * 4, draw_bytes(sequences, vocab))
