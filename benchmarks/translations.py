"""Answers of an encoder-decoder model of random weights in Marian's shape: this engine beside transformers' `generate`.

Sources of different lengths, each other than all before, are given at once, and each answer has its own length, as
those of translations have. Sides:

* ``asyncengine``: `engine.generate` of each, all at the same time, in one event loop; and with ``--quantization`` a
  second engine, with weights of so few bits.
* ``batch``: one `generate` of transformers over all of them, padded; it ends with the longest answer.
* ``one by one``: a `generate` for each.

Answers are greedy, or those of a beam search; then a token counts once, however many beams there are.

Sides alternate; figures are medians. `seconds` are of the wall, `CPU seconds` of all threads, `tokens` those that were
asked for per second of the wall. The last line is one JSON object.

    python -m benchmarks.translations [--size opus] [--sources 16] [--beams 1] [--rounds 3] [--dtype float32]
        [--quantization int8]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import statistics
import tempfile
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks.by_turns import by_turns, engines_of

SIZES = {"nano": (32, 1, 2, 300), "opus": (512, 6, 8, 58101)}
"""Width, layers of the encoder and of the decoder, heads, vocabulary."""
END, START = 0, 1
Source = tuple[list[int], int]
"""Token ids, and how many tokens are to be written."""


def write(path: Path, size: str) -> None:
    """A random checkpoint of a published shape, with a tokenizer of its size."""
    width, layers, heads, vocabulary = SIZES[size]
    common: dict[str, Any] = {"d_model": width, "vocab_size": vocabulary, "max_position_embeddings": 512}
    for side in ("encoder", "decoder"):
        common |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    marks = {"eos_token_id": END, "pad_token_id": START, "decoder_start_token_id": START, "forced_eos_token_id": None}
    torch.manual_seed(0)
    MarianMTModel._from_config(MarianConfig(**common, **marks)).save_pretrained(path)
    words = {"</s>": END, "<pad>": START} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(path)


def sources(count: int, vocabulary: int, seed: int) -> list[Source]:
    """So many sources of 8 to 64 tokens, whose answers have half to twice as many."""
    drawn = np.random.default_rng(seed)
    lengths = drawn.integers(8, 65, count)
    written = (lengths * drawn.uniform(0.5, 2.0, count)).astype(int)
    return [
        ([*drawn.integers(2, vocabulary, length - 1).tolist(), END], int(most))
        for length, most in zip(lengths, written, strict=True)
    ]


async def measure(arguments: argparse.Namespace, path: Path) -> dict[str, dict[str, float]]:
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    model = MarianMTModel.from_pretrained(path, dtype=dtype).eval()

    def generate(given: list[Source]) -> None:
        longest, most = max(len(ids) for ids, _ in given), max(most for _, most in given)
        made = model.generate(
            input_ids=torch.tensor([ids + [START] * (longest - len(ids)) for ids, _ in given]),
            attention_mask=torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in given]),
            num_beams=arguments.beams, do_sample=False, max_new_tokens=most, min_new_tokens=most,
        )  # fmt: skip
        assert made.shape[1] == most + 1, made.shape

    wanted = EngineConfig(str(path), dtype=arguments.dtype, max_num_sequence=arguments.sources * arguments.beams)
    engines = engines_of(wanted, arguments.quantization)
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines.values():
            await stack.enter_async_context(engine)

        async def answer(engine: AsyncEngine, ids: list[int], most: int) -> None:
            config = GenerationConfig(temperature=0.0, max_tokens=most, ignore_eos=True, num_beams=arguments.beams)
            assert (await engine.generate(ids, config)).usage.completion_tokens == most

        async def ours(engine: AsyncEngine, given: list[Source]) -> None:
            await asyncio.gather(*[answer(engine, *each) for each in given])

        async def batch(given: list[Source]) -> None:
            await asyncio.to_thread(generate, given)

        async def single(given: list[Source]) -> None:
            for each in given:
                await asyncio.to_thread(generate, [each])

        sides: dict[str, Callable[[list[Source]], Awaitable[None]]] = {
            **{side: functools.partial(ours, engine) for side, engine in engines.items()},
            "batch": batch,
            "one by one": single,
        }

        def work(count: int, number: int) -> list[Source]:
            """For each side sources of its own, of the same lengths."""
            given = sources(arguments.sources if count else 1, SIZES[arguments.size][3], count)
            return [([(each + number) % 250 + 2 for each in ids[:-1]] + [END], most) for ids, most in given]

        turns = await by_turns(sides, arguments.rounds, work)
    results = {}
    for side, taken in turns.items():
        figures = [(*turn, sum(most for _, most in given) / turn.wall) for turn, given in taken]
        wall, cpu, tokens = (statistics.median(each) for each in zip(*figures, strict=True))
        results[side] = {"seconds": wall, "CPU seconds": cpu, "tokens": tokens}
        print(f"{side:12} {wall:7.2f} s, {cpu:7.2f} CPU s, {tokens:7.1f} tokens/s")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="opus")
    parser.add_argument("--sources", type=int, default=16)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantization", choices=["none", "int8", "int4"], default="none")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.size)
        results = asyncio.run(measure(arguments, Path(folder)))
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "translations", **vars(arguments), **about, "results": results}))


if __name__ == "__main__":
    main()
