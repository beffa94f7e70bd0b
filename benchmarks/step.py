"""Milliseconds of one model step on the CPU, without the engine around it, and which share of the machine it reaches.

A random checkpoint of a known shape. ``decode N``: N rows of one token each with `--context` tokens behind them,
greedy; limited by reading all weights once and the rows' keys and values, so the share of the memory's bandwidth
(measured here) is given. ``prefill``: one row of `--prefill` new tokens; limited by arithmetic, given in GFLOP/s, two
operations for each weight of the layers and token. With ``--drafts D``, ``drafted N``: N rows, each with D guessed
tokens behind its own; given as a multiple of the time of the same rows without.

A figure is the median over repetitions. With ``--peer``, transformers' own forward does the same, over a cache of its
own. The last line is one JSON object.

    python -m benchmarks.step [--shape S] [--dtype bfloat16] [--decoder compiled] [--quantization none]
        [--rows 1 16 64] [--drafts 4] [--peer]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from asyncengine import EngineConfig, GenerationConfig
from asyncengine.generation import resolve
from asyncengine.step.batch import StepBatch
from benchmarks import shapes

PAGE = 32


def bandwidth(words_read: int = 1 << 27) -> float:
    """Bytes per second that all threads together read: by a sum or a matrix-vector product, whichever is faster."""
    import torch

    words = torch.ones(words_read, dtype=torch.float32)
    matrix, vector = words.view(-1, 4096), torch.ones(4096)
    times = []
    for _ in range(7):
        for read in (words.sum, lambda: matrix @ vector):
            begun = time.perf_counter()
            read()
            times.append(time.perf_counter() - begun)
    return words.nbytes / min(times)


def batch_of(rows: int, new: int, context: int, vocabulary: int, drafted: bool = False) -> StepBatch:
    """`rows` sequences of `new` tokens on `context`, all but the first maybe `drafted`; blocks are in random order."""
    blocks = -(-(context + new) // PAGE)
    tables = np.random.default_rng(0).permutation(rows * blocks).astype(np.int32).reshape(rows, blocks)
    positions = np.tile(np.arange(context, context + new), rows)
    row = np.repeat(np.arange(rows), new)
    samples = np.arange(rows * new) if drafted else np.arange(new - 1, rows * new, new)
    return StepBatch(
        token_ids=np.random.default_rng(1).integers(0, vocabulary, rows * new).astype(np.int32),
        positions=positions.astype(np.int32),
        query_start=np.arange(0, rows * new + 1, new, dtype=np.int32),
        context_lens=np.full(rows, context, np.int32),
        block_tables=tables,
        slot_mapping=tables[row, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        sample_index=samples,
        sample_slots=row[samples],
        sample_positions=np.zeros(len(samples), np.int64),
        copies=np.empty((0, 2), np.int64),
        num_decodes=rows if new == 1 or drafted else 0,
        draft_lengths=np.full(rows, new - 1) if drafted else None,
        slots=np.arange(rows, dtype=np.int64),
    )


def load(arguments: argparse.Namespace, path: Path) -> Any:
    """The model, as the engine would load it."""
    from asyncengine.model.loader import TransformersLoader

    loader = TransformersLoader()
    config = EngineConfig(
        str(path), device="cpu", dtype=arguments.dtype, decoder_backend=arguments.decoder,
        quantization=arguments.quantization, kv_cache_page_size=PAGE, max_num_sequence=max(arguments.rows),
        max_total_sequence_length=max(max(arguments.rows) * (arguments.context + PAGE), arguments.prefill + PAGE),
        speculative_mode="ngram" if arguments.drafts else "disable", spec_draft_length=arguments.drafts,
    )  # fmt: skip
    return loader.load(loader.check(config, None))


def place_greedy(model: Any, rows: int, vocabulary: int) -> None:
    """Lets the model's first slots draw the most likely token."""
    greedy = resolve(
        GenerationConfig(temperature=0), GenerationConfig(), vocab_size=vocabulary, eos_token_ids=(), max_tokens=64,
        seed=0,
    )  # fmt: skip
    prompt = np.zeros(1, np.int32)
    for slot in range(rows):
        model.place(slot, greedy, 0, prompt, prompt[:0])


def median_seconds(model: Any, batch: StepBatch, repetitions: int) -> float:
    """Of `repetitions` steps after a few to warm up."""
    times = []
    for _ in range(repetitions + 2):
        begun = time.perf_counter()
        model.execute(batch)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def peer_seconds(path: Path, dtype: str, rows: int, new: int, context: int, repetitions: int) -> float:
    """Of one forward of transformers: `rows` sequences of `new` tokens on top of `context`; the median."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    times = []
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        if context:
            model(torch.zeros(rows, context, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        ids = torch.zeros(rows, new, dtype=torch.long)
        for _ in range(repetitions + 1):
            before = cache if context else DynamicCache(config=model.config)
            begun = time.perf_counter()
            model(ids, past_key_values=before, use_cache=True, logits_to_keep=1)
            times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--decoder", default="auto", choices=["auto", "compiled", "transformers"])
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="measure transformers' own forward as well")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    from asyncengine.model.decoder.compiled_layers import weight_bytes

    logging.disable_progress_bar()
    peak = bandwidth()
    figures: dict[str, float] = {"memory_gb_s": peak / 1e9}
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory), arguments.shape, arguments.dtype)
        begun = time.perf_counter()
        loaded = load(arguments, path)
        figures["load_s"] = time.perf_counter() - begun
        if arguments.peer:
            few = max(arguments.repetitions // 4, 3)
            for rows in arguments.rows:
                seconds = peer_seconds(path, arguments.dtype, rows, 1, arguments.context, few)
                figures[f"peer_decode_{rows}_ms"] = seconds * 1e3
            seconds = peer_seconds(path, arguments.dtype, 1, arguments.prefill, 0, 3)
            figures["peer_prefill_tokens_per_s"] = arguments.prefill / seconds
    model, vocabulary = loaded.model, loaded.vocab_size
    shape = shapes.SHAPES[arguments.shape]
    weights = sum(p.numel() for p in model._model.parameters())
    embedding = vocabulary * shape["hidden_size"]
    compiled = model._program
    held = compiled.nbytes if compiled is not None else weight_bytes(model._model)
    if compiled is None:  # beside the head, of which few rows are read
        held -= embedding * getattr(torch, arguments.dtype).itemsize
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    kinds = shape.get("layer_types", ["full_attention"] * shape["num_hidden_layers"])
    cached = 2 * kinds.count("full_attention") * shape["num_key_value_heads"] * head_dim
    print(
        f"{arguments.shape} {arguments.dtype} {loaded.config.decoder_backend}, {torch.get_num_threads()} threads, "
        f"memory {peak / 1e9:.1f} GB/s, loaded in {figures['load_s']:.1f} s"
    )
    place_greedy(model, max(arguments.rows), vocabulary)
    for rows in arguments.rows:
        seconds = median_seconds(model, batch_of(rows, 1, arguments.context, vocabulary), arguments.repetitions)
        read = held + rows * arguments.context * cached * getattr(torch, arguments.dtype).itemsize
        share = read / seconds / peak
        peer = figures.get(f"peer_decode_{rows}_ms")
        beside = "" if peer is None else f"; transformers {peer:.2f} ms, {peer / seconds / 1e3:.2f} x"
        rate = f"{rows / seconds:7.0f} tokens/s, {share:.0%} of bandwidth"
        print(f"decode {rows:>3}: {seconds * 1e3:8.2f} ms = {rate}{beside}")
        figures[f"decode_{rows}_ms"] = seconds * 1e3
        figures[f"decode_{rows}_bandwidth_share"] = share
        if arguments.drafts:
            batch = batch_of(rows, arguments.drafts + 1, arguments.context, vocabulary, drafted=True)
            drafted = median_seconds(model, batch, arguments.repetitions)
            print(f"drafted {rows:>2}: {drafted * 1e3:8.2f} ms = {drafted / seconds:.2f} x decode {rows}")
            figures[f"drafted_{rows}_ms"] = drafted * 1e3
    seconds = median_seconds(model, batch_of(1, arguments.prefill, 0, vocabulary), max(arguments.repetitions // 4, 3))
    operations = 2 * (weights - embedding) * arguments.prefill / seconds
    peer = figures.get("peer_prefill_tokens_per_s")
    beside = "" if peer is None else f"; transformers {peer:.0f} tokens/s, {arguments.prefill / seconds / peer:.2f} x"
    print(f"prefill: {arguments.prefill / seconds:.0f} tokens/s, {operations / 1e9:.0f} GFLOP/s{beside}")
    figures["prefill_tokens_per_s"] = arguments.prefill / seconds
    figures["prefill_gflop_s"] = operations / 1e9
    names = {"benchmark": "step", "shape": arguments.shape, "dtype": arguments.dtype}
    names |= {"decoder": loaded.config.decoder_backend, "quantization": arguments.quantization}
    print(json.dumps({**names, **{name: round(figure, 4) for name, figure in figures.items()}}))


if __name__ == "__main__":
    main()
