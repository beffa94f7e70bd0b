"""Questions about images: the time to the first token, and tokens per second of several at once, beside transformers.

A random Qwen3-VL, whose text has the shape of Qwen3-0.6B (M; or tiny) with byte tokens, and whose encoder has 12 layers
of 768. Every image is new unless it is said otherwise, and 512 x 512 pixels large, which come to 256 tokens. Timed are:

* first: from the question to its first token, image read and encoded;
* again: another question about the same image, which is in the prefix cache then;
* several: questions about as many images at once, to the end of all answers, in tokens per second.

With --peer the same is asked of transformers, with its processor and a static batch of equal lengths (`generate`), in
the same rounds. Each figure is the median of the rounds; one round warms up. The last line is one JSON object.

    python -m benchmarks.images [--shape M] [--dtype bfloat16] [--device cpu] [--requests 8] [--tokens 32] [--rounds 5]
                                [--pixels 512] [--peer]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks import shapes

TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TOWERS = {
    "M": {"hidden_size": 768, "intermediate_size": 3072, "depth": 12, "num_heads": 12},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2},
}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
QUESTION = "What is there to be seen on it? "


def write(path: Path, shape: str, dtype: str) -> Path:
    """Writes the checkpoint."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(list(TOKENS))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=TOKENS[0]).save_pretrained(path)
    text = shapes.SHAPES[shape] | {
        "vocab_size": 512, "max_position_embeddings": 4096, "pad_token_id": 0, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    if shape == "tiny":
        text |= {"head_dim": 16, "rope_parameters": text["rope_parameters"] | {"mrope_section": [4, 2, 2]}}
    tower = TOWERS[shape] | {"out_hidden_size": text["hidden_size"], "patch_size": 16, "deepstack_visual_indexes": [1]}
    ids = {name: 256 + place for place, name in enumerate(TOKENS)}
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(path)
    images = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    settings = {
        "processor_class": "Qwen3VLProcessor",
        "image_processor": images | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": images | {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    (path / "processor_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def picture(seed: int, pixels: int) -> Any:
    """A random picture."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8))


def asking(image: Any, question: str = QUESTION) -> list[dict[str, Any]]:
    """A conversation."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def settings(tokens: int) -> GenerationConfig:
    """Of an answer."""
    return GenerationConfig(temperature=0, max_tokens=tokens, ignore_eos=True)


class Peer:
    """transformers with the same checkpoint."""

    def __init__(self, path: Path, dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from asyncengine.model.media.processor import processor

        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
        self.processor = processor(path)
        self.device = device

    def answer(self, images: list[Any], tokens: int) -> float:
        """Seconds that questions about images take, from pictures to the last token."""
        begun = time.perf_counter()
        texts = [f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}"] * len(images)
        given = self.processor(text=texts, images=[[image] for image in images], return_tensors="pt").to(
            self.device, self.model.dtype
        )
        self.model.generate(**given, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
        return time.perf_counter() - begun


async def measure(options: argparse.Namespace, path: Path) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    peer = Peer(path, options.dtype, options.device) if options.peer else None
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    config = EngineConfig(
        str(path), dtype=options.dtype, device=options.device, images=True, max_num_sequence=options.requests,
        max_total_sequence_length=4096 * 2,
    )  # fmt: skip
    seed = 0
    async with AsyncEngine(config) as engine:
        for note_of in engine.health().notes:
            print(note_of)
        for round in range(options.rounds + 1):
            images = [picture(seed := seed + 1, options.pixels) for _ in range(options.requests)]
            begun = time.perf_counter()
            result = await engine.chat(asking(picture(seed := seed + 1, options.pixels)), settings(1))
            first, tokens = time.perf_counter() - begun, result.usage.prompt_tokens
            begun = time.perf_counter()
            await engine.chat(asking(picture(seed, options.pixels), "And what is there not? "), settings(1))
            again = time.perf_counter() - begun
            begun = time.perf_counter()
            await asyncio.gather(*(engine.chat(asking(image), settings(options.tokens)) for image in images))
            several = time.perf_counter() - begun
            theirs = (0.0, 0.0)
            if peer is not None:
                theirs = peer.answer([picture(seed, options.pixels)], 1), peer.answer(images, options.tokens)
            if round:  # the first one warms up
                for name, seconds in (("first", first), ("again", again), ("several", several)):
                    note(name, seconds)
                if peer is not None:
                    note("peer first", theirs[0])
                    note("peer several", theirs[1])
    print(f"a question has {tokens} tokens")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=TOWERS, default="M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory) / "checkpoint", options.shape, options.dtype)
        found = uvloop.run(measure(options, path))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, seconds in medians.items():
        rate = f", {options.requests * options.tokens / seconds:.1f} tokens/s" if "several" in name else ""
        print(f"{name:>14}: {seconds * 1000:8.1f} ms{rate}")
    ratios = {}
    if options.peer:
        for name in ("first", "several"):
            each = zip(found[f"peer {name}"], found[name], strict=True)
            ratios[name] = statistics.median(theirs / own for theirs, own in each)
        print("transformers' time over ours: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print(json.dumps({"seconds": medians, "ratios": ratios}))


if __name__ == "__main__":
    main()
