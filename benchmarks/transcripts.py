"""Transcripts by a Whisper of random weights: this engine beside transformers' own `generate`, on this machine.

Several audio of 30 seconds, each other than all before, are given at once. Sides:

* ``asyncengine``: `engine.transcribe` of each, all at the same time, in one event loop; and with ``--quantization`` a
  second engine, with weights of so few bits.
* ``batch``: one `generate` of transformers over all of them, padded to one batch.
* ``one by one``: a `generate` for each.

All are greedy, in one language, and say the same number of tokens; features are extracted within the time of each
side. Sides alternate; figures are medians. `seconds` are of the wall, `CPU seconds` of all threads, and `audio` are
seconds of audio per second of the wall. The last line is one JSON object.

    python -m benchmarks.transcripts [--size base] [--audio 8] [--tokens 64] [--rounds 3] [--dtype float32]
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
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks.by_turns import by_turns, engines_of

SIZES = {"nano": (64, 2, 2), "tiny": (384, 4, 6), "base": (512, 6, 8), "small": (768, 12, 12)}
"""Width, layers of the encoder and of the decoder, heads."""
RATE, SECONDS = 16_000, 30
END = 50257
_MARKS = (
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in list(LANGUAGES)[:99]), "<|translate|>",
    "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip


def write(path: Path, size: str) -> None:
    """A random checkpoint of a published shape, with a tokenizer of its size."""
    width, layers, heads = SIZES[size]
    common = {"d_model": width, "vocab_size": 51865, "num_mel_bins": 80}
    for side in ("encoder", "decoder"):
        common |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    torch.manual_seed(0)
    WhisperForConditionalGeneration._from_config(WhisperConfig(**common)).save_pretrained(path)
    tokens = {**{character: byte for byte, character in bytes_to_unicode().items()}}
    tokens |= {f"w{number}": number for number in range(256, END)}
    tokenizer = WhisperTokenizer(tokens, [])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    tokenizer.add_tokens([f"<|{0.02 * frame:.2f}|>" for frame in range(1501)])
    tokenizer.save_pretrained(path)
    WhisperFeatureExtractor().save_pretrained(path)
    ids = {mark: END + place for place, mark in enumerate(_MARKS)}
    stated = {
        "bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": END + 1,
        "is_multilingual": True, "no_timestamps_token_id": ids["<|notimestamps|>"], "max_length": 448,
        "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in list(LANGUAGES)[:99]},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")},
        "suppress_tokens": list(range(1, 90)) + list(range(END + 1, 50364)),
    }  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(stated))


def sounds(count: int, seed: int) -> list[Any]:
    """So many audio."""
    drawn = np.random.default_rng(seed).uniform(-0.5, 0.5, (count, RATE * SECONDS))
    return list(drawn.astype(np.float32))


async def measure(arguments: argparse.Namespace, path: Path) -> dict[str, dict[str, float]]:
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    model = WhisperForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(path)
    config = GenerationConfig(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)

    def generate(audio: list[Any]) -> None:
        features = extractor(audio, sampling_rate=RATE, return_tensors="pt")["input_features"].to(dtype)
        settings = {"language": "en", "task": "transcribe", "do_sample": False}
        length = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens}
        made = model.generate(input_features=features, **settings, **length)
        assert made.shape[1] >= arguments.tokens, made.shape

    wanted = EngineConfig(str(path), dtype=arguments.dtype, max_num_sequence=arguments.audio)
    engines = engines_of(wanted, arguments.quantization)
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines.values():
            await stack.enter_async_context(engine)

        async def ours(engine: AsyncEngine, audio: list[Any]) -> None:
            found = await asyncio.gather(*[engine.transcribe((each, RATE), config, language="en") for each in audio])
            assert all(each.usage.completion_tokens == arguments.tokens for each in found)

        async def batch(audio: list[Any]) -> None:
            await asyncio.to_thread(generate, audio)

        async def single(audio: list[Any]) -> None:
            for each in audio:
                await asyncio.to_thread(generate, [each])

        sides: dict[str, Callable[[list[Any]], Awaitable[None]]] = {
            **{side: functools.partial(ours, engine) for side, engine in engines.items()},
            "batch": batch,
            "one by one": single,
        }

        def work(count: int, number: int) -> list[Any]:
            return sounds(arguments.audio if count else 1, 10 * count + number)

        turns = await by_turns(sides, arguments.rounds, work)
    results = {}
    for side, taken in turns.items():
        wall, cpu = (statistics.median(each) for each in zip(*(turn for turn, _ in taken), strict=True))
        results[side] = {"seconds": wall, "CPU seconds": cpu, "audio": arguments.audio * SECONDS / wall}
        print(f"{side:12} {wall:7.2f} s, {cpu:7.2f} CPU s, {results[side]['audio']:6.1f} x real time")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--audio", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
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
    print(json.dumps({"benchmark": "transcripts", **vars(arguments), **about, "results": results}))


if __name__ == "__main__":
    main()
