"""Parity with transformers on a device: logits of mixed paged batches against a plain forward, per architecture.

Tiny random models. Their sequences are computed over a paged cache by the engine's own runner, as mixed steps: prefill
chunks, prefix continuations and single decodes side by side. The error of a row of logits is its distance from what
transformers computes, relative to its norm; reported are the median and the largest of all rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, Cache

from asyncengine.model import architecture, compiled_parts
from asyncengine.model.adapters.adapted_modules import AdaptedModules
from asyncengine.model.adapters.lora import Lora, LowRank
from asyncengine.model.attention.protocol import AttentionBackend, CarryingBackend
from asyncengine.model.attention.select import select
from asyncengine.model.buckets import Buckets
from asyncengine.model.capturing import Capturing
from asyncengine.model.decoder.blueprint import recognise
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.graphs import graphs_for
from asyncengine.model.latent_attention import keep_latents
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.quantised.four_bit_experts import round_experts, use_kernels
from asyncengine.model.quantised.four_bit_linear import round_layers
from asyncengine.model.quantised.four_bits import FP4
from asyncengine.model.quantised.fp8_linear import quantise
from asyncengine.model.recurrent.states import States
from asyncengine.model.runner import TorchModel
from asyncengine.step.adapters import NO_ADAPTER
from asyncengine.step.batch import StepBatch
from asyncengine.step.limits import Limits

PAGE = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Largest allowed median of the rows' errors."""
FP8_TOLERANCE = 3e-1
"""The same where weights and KV cache are in fp8."""

_COMMON: dict[str, Any] = {
    "vocab_size": 499, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1 << 16, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_WINDOW = {"sliding_window": 40}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON),
    "gemma3": (
        "Gemma3TextConfig",
        _COMMON | _WINDOW
        | {"query_pre_attn_scalar": 64, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "gpt_oss": (
        "GptOssConfig",
        _COMMON | _WINDOW | _EXPERTS
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    ),
    "mixtral": ("MixtralConfig", _COMMON | _EXPERTS),
    "deepseek_v3": (
        "DeepseekV3Config",
        _COMMON
        | {
            "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        _COMMON
        | {
            "layer_types": ["linear_attention"] * 2 + ["full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        },
    ),
    "bamba": (
        "BambaConfig",
        _COMMON
        | {
            "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 2,
            "mamba_d_state": 64, "mamba_expand": 2, "mamba_chunk_size": 32,
        },
    ),
}  # fmt: skip
LATENTS = ("deepseek_v3",)
"""Those that keep latents, of the size that published models have. There are no fused kernels for them."""
RECURRENT = ("qwen3_5", "bamba")
"""Those with recurrent layers, for which there are no fused kernels either."""
FP8 = ("llama", "gemma3")
"""Those that are looked at with weights and KV cache in fp8 as well."""
FOUR_BITS = ("llama", "gpt_oss")
"""Those that are looked at with weights of four bits as well, the experts of the latter in FP4."""


def unknown() -> dict[str, str]:
    """Of which of them transformers here is too old for the engine, and why."""
    if hasattr(Cache, "get_conv_state"):
        return {}
    reason = f"layers keep states so from transformers 5.22 on; here is {transformers.__version__}"
    return dict.fromkeys(RECURRENT, reason)


@dataclass(frozen=True, slots=True)
class Way:
    """How logits are computed.

    Attributes:
        chunk: Tokens of a prompt that a step has at most.
        last: How many rows of each sequence are compared.
        fp8: Whether the KV cache is in fp8, and so are weights where errors are wanted.
        fused: Whether the fused kernels run the model.
        adapted: Whether sequences have adapters.
        four_bits: Whether weights have four bits; transformers computes with what those stand for.
    """

    chunk: int = 24
    last: int = 1 << 20
    fp8: bool = False
    fused: bool = False
    adapted: bool = False
    four_bits: bool = False

    def __str__(self) -> str:
        said = {
            "fp8 weights and KV cache": self.fp8, "four bits": self.four_bits, "adapters": self.adapted,
            "fused": self.fused,
        }  # fmt: skip
        return "".join(f", {what}" for what, so in said.items() if so)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of one sequence."""

    sequence: int
    start: int
    end: int

    @property
    def decodes(self) -> bool:
        """Whether it is a single token behind others."""
        return self.end - self.start == 1 and self.start > 0


def make(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A tiny model whose logits are spread widely."""
    kind, values = ARCHITECTURES[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.08) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def mixed_steps(lengths: list[int], chunk: int) -> list[list[Piece]]:
    """Steps that compute all sequences: the last three tokens of each one by one, what is before in chunks."""
    plans = []
    for sequence, length in enumerate(lengths):
        cuts = sorted({0, *range(chunk, max(length - 3, 1), chunk), *range(max(length - 3, 0), length), length})
        plans.append([Piece(sequence, start, end) for start, end in itertools.pairwise(cuts)])
    steps = [[piece for piece in pieces if piece is not None] for pieces in itertools.zip_longest(*plans)]
    # Decodes come first, as in the engine.
    return [sorted(step, key=lambda piece: not piece.decodes) for step in steps]


def adapters_of(model: Any) -> list[Lora]:
    """Two random adapters: of all linear layers in blocks that are not experts, and of some."""
    generator = torch.Generator().manual_seed(0)
    dtype, found = next(model.parameters()).dtype, []

    def low_rank(layer: torch.nn.Linear, rank: int) -> LowRank:
        down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        up = torch.randn(layer.out_features, rank, generator=generator) * 0.3
        return LowRank(down.to(dtype), up.to(dtype), 0.5)

    for rank, ends in ((5, ""), (12, ("v_proj", "o_proj"))):
        layers = {
            name: module
            for name, module in model.named_modules()
            if type(module) is torch.nn.Linear
            and ".layers." in name
            and ".experts." not in name
            and name.endswith(ends)
        }
        found.append({name: low_rank(layer, rank) for name, layer in layers.items()})
    return found


def adapter_of(sequence: int) -> int:
    """The index of a sequence's adapter."""
    return sequence % 3 - 1


def step_batch(step: list[Piece], ids: list[np.ndarray], tables: np.ndarray, adapted: bool = False) -> StepBatch:
    """The engine's own form of a step; the logits of all tokens are wanted."""
    adapters = np.array([adapter_of(piece.sequence) for piece in step], np.int32)
    counts = [piece.end - piece.start for piece in step]
    positions = np.concatenate([np.arange(piece.start, piece.end) for piece in step])
    rows = np.repeat([piece.sequence for piece in step], counts)
    none = np.zeros(sum(counts), np.int64)
    return StepBatch(
        token_ids=np.concatenate([ids[piece.sequence][piece.start : piece.end] for piece in step]).astype(np.int32),
        positions=positions.astype(np.int32),
        query_start=np.cumsum([0, *counts]).astype(np.int32),
        context_lens=np.array([piece.start for piece in step], np.int32),
        block_tables=tables[[piece.sequence for piece in step]],
        slot_mapping=tables[rows, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        sample_index=np.arange(sum(counts), dtype=np.int64),
        sample_slots=none,
        sample_positions=none,
        copies=np.zeros((0, 2), np.int64),
        num_decodes=sum(piece.decodes for piece in step),
        slots=np.array([piece.sequence for piece in step]),
        adapters=adapters if adapted and (adapters != NO_ADAPTER).any() else None,
    )


def paged_logits(
    model: Any,
    backend: AttentionBackend,
    ids: list[np.ndarray],
    device: torch.device,
    way: Way,
    notes: list[str] | None = None,
) -> list[torch.Tensor]:
    """The last rows of logits of every sequence, (rows, vocabulary) each, on the host in float32.

    What there is to be said of captures is added to the notes, if they are given.
    """
    lengths = [len(sequence) for sequence in ids]
    blocks = [-(-length // PAGE) for length in lengths]
    order = np.random.default_rng(1).permutation(sum(blocks))
    tables = np.zeros((len(ids), max(blocks)), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(blocks), blocks, strict=True)):
        tables[row, :count] = order[end - count : end]
    limits = Limits(len(ids), max(lengths), way.chunk * len(ids), PAGE, sum(blocks))
    model.set_attn_implementation(architecture.ATTENTION)
    keep_latents(model)
    recorded, slower = compiled_parts.calling_compiled(architecture.record(model), device)
    layers, recurrent, dtype = recorded.attention, recorded.recurrent, next(model.parameters()).dtype
    kv_dtype = torch.float8_e4m3fn if way.fp8 else dtype
    states = States(recurrent, limits, dtype, device, trying=True) if recurrent else None
    paged = PagedLayers(layers, backend, limits, kv_dtype, device, states)
    paged.allocate()
    runner = TorchModel(model, paged, None, device)  # type: ignore[arg-type]
    if way.fused:
        runner.use_fused(FusedDecoder(recognise(model, layers, max(lengths), whole_experts=True)))
    adapters = AdaptedModules(model, recorded, device, next(model.parameters()).dtype)
    for index, adapter in enumerate(adapters_of(model) if way.adapted else ()):
        adapters.put(index, adapter)
    runner.use_adapters(adapters)
    if states is not None:  # what a load finds out before anything is captured
        warm_up = [Piece(0, 0, min(2, lengths[0]))]
        with torch.inference_mode():
            runner.logits(step_batch(warm_up, ids, tables))
        slower += tuple(f"{name} decodes without kernels: {reason}" for name, reason in states.apart.items())
    graphs, said = graphs_for(runner, backend, len(ids), device, waits=architecture.waits(model), states=states)
    said += slower
    if graphs is not None:
        mixed = None
        if isinstance(backend, CarryingBackend) and states is None:
            mixed = graphs.mixed(Buckets.mixed(limits.prefill_chunk_size), 1 << 20)  # all rows are compared
        adapted = graphs.adapted(Buckets.doubling(len(ids)), adapters)
        capturing = Capturing(graphs, mixed=mixed, adapted=adapted, at_once=True)
        capturing.begin()
        runner.use_graphs(capturing)
        said += capturing.warmth.notes
    if notes is not None:
        notes.extend(said)
    rows: list[list[torch.Tensor]] = [[] for _ in ids]
    with torch.inference_mode():
        for step in mixed_steps(lengths, way.chunk):
            logits = runner.logits(step_batch(step, ids, tables, way.adapted)).float()
            for piece, part in zip(step, logits.split([piece.end - piece.start for piece in step]), strict=True):
                rows[piece.sequence].append(part[-way.last :].cpu())
    if runner.capturing is not None:
        runner.capturing.clear()
    paged.free()
    return [torch.cat(parts)[-way.last :] for parts in rows]


def errors(
    model: Any,
    backend: AttentionBackend,
    ids: list[np.ndarray],
    device: torch.device,
    way: Way,
    notes: list[str],
) -> torch.Tensor:
    """(rows,) relative errors of all sequences' last rows; with fp8, the errors of that."""
    if way.four_bits:
        round_experts(model, values=FP4)
        round_layers(model)
        use_kernels(model, False)
    if way.adapted:
        adapters, expected = [*adapters_of(model), {}], []  # the last is -1
        for number, sequence in enumerate(ids):
            with merged(model, adapters[adapter_of(number)]):
                expected += plain_logits(model, [sequence], device, way.last)
    else:
        expected = plain_logits(model, ids, device, way.last)
    if way.fp8:
        quantise(model)
    if way.four_bits:
        use_kernels(model, True)
    found = paged_logits(model, backend, ids, device, way, notes)
    return torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(found, expected, strict=True)])


@contextlib.contextmanager
def merged(model: Any, adapter: Lora) -> Iterator[None]:
    """Within the block the model's weights have an adapter in them."""
    weights = {name: model.get_submodule(name).weight for name in adapter}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, factors in adapter.items():
            weights[name] += (factors.scaling * (factors.up.double() @ factors.down.double())).to(weights[name])
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(before[name])


def plain_logits(model: Any, ids: list[np.ndarray], device: torch.device, last: int) -> list[torch.Tensor]:
    """As `paged_logits`, by transformers alone."""
    # Eager attention knows everything that a model may ask for, but its scores of a long context fill the memory.
    model.set_attn_implementation("eager" if max(map(len, ids)) <= 4096 else "sdpa")
    expected = []
    with torch.inference_mode():
        for sequence in ids:
            given = torch.from_numpy(sequence)[None].to(device)
            expected.append(model(input_ids=given, use_cache=False, logits_to_keep=last).logits[0].float().cpu())
    return expected


def checks(
    names: list[str],
    dtypes: list[torch.dtype],
    lengths: list[int],
    long_context: int,
    device: torch.device,
    fused: bool = True,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What finds the errors of each architecture in each dtype, a long context, and weights in fp8 and four bits.

    Each is computed by the model's own modules, and once more by fused kernels, if they are wanted. One has adapters.
    """
    generator = np.random.default_rng(0)
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    cases = [(name, dtype, lengths, Way()) for dtype in dtypes for name in names]
    cases.append(("llama", dtypes[-1], [long_context], Way(min(2048, long_context), 64)))
    cases += [(name, torch.bfloat16, lengths, Way(fp8=True)) for name in FP8 if name in names]
    cases += [("llama", dtype, lengths, Way(adapted=True)) for dtype in dtypes]
    cases += [(name, dtype, lengths, Way(four_bits=True)) for dtype in dtypes for name in FOUR_BITS if name in names]
    if fused:  # steps with adapters are left to the modules
        cases += [
            (*case, dataclasses.replace(way, fused=True))
            for *case, way in cases
            if case[0] not in (*LATENTS, *RECURRENT)
        ]
    for name, dtype, sizes, way in cases:
        ids = [generator.integers(1, 499, size).astype(np.int64) for size in sizes]
        key = f"{name} {str(dtype).removeprefix('torch.')}" + (f" {sizes[0]} tokens" if len(sizes) == 1 else "")
        found[f"{key}{way}"] = functools.partial(_check, f"{key}{way}", name, dtype, ids, device, way)
    return found


def _check(
    key: str, name: str, dtype: torch.dtype, ids: list[np.ndarray], device: torch.device, way: Way
) -> dict[str, Any]:
    backend = select("torch" if way.fp8 and device.type == "cpu" else "auto", device).backend
    return _case(key, make(name, dtype, device), backend, ids, device, way)


def check_backend(
    made: Callable[[], AttentionBackend],
    names: list[str],
    dtype: torch.dtype,
    lengths: list[int],
    device: torch.device,
) -> dict[str, Any]:
    """Errors of each architecture over one kind of attention."""
    generator = np.random.default_rng(0)
    results: dict[str, Any] = {}
    for name in names:
        ids = [generator.integers(1, 499, size).astype(np.int64) for size in lengths]
        results[name] = _case(name, make(name, dtype, device), made(), ids, device, Way())
    return results


def _case(
    key: str,
    model: Any,
    backend: AttentionBackend,
    ids: list[np.ndarray],
    device: torch.device,
    way: Way,
) -> dict[str, Any]:
    """Errors of one model, and whether they are small enough."""
    dtype = next(model.parameters()).dtype
    notes: list[str] = []
    found = errors(model, backend, ids, device, way, notes)
    median = float(found.median())
    result = {
        "attention": backend.name,
        "rows": len(found),
        "median_error": float(f"{median:.2g}"),
        "largest_error": float(f"{float(found.max()):.2g}"),
        "ok": median <= (FP8_TOLERANCE if way.fp8 else TOLERANCE[dtype]),
    } | ({"notes": notes} if notes else {})
    print(f"  {key:<50} {result}", flush=True)
    return result
