"""transformers on the same device and the same weights, as its users call it. The peers of `benchmarks.gpu`."""

from __future__ import annotations

import time
from typing import Any

import torch


def continuous_batching(model: Any, given: list[list[int]], outputs: list[int]) -> dict[str, float]:
    """Generated tokens per second, without setting up. It takes one output length here: the requests' mean."""
    from transformers import GenerationConfig

    tokens = max(1, round(sum(outputs) / len(outputs)))
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = {} if model.device.type == "cuda" else {"continuous_batching_config": _small()}
    manager = model.continuous_batching_context_manager(config, timeout=5, **options)
    generated, left = 0, len(given)
    with manager as batching:  # set up and, on CUDA, captured
        begun = time.perf_counter()
        batching.add_requests(given, max_new_tokens=tokens)
        while left:
            output = batching.get_result(timeout=60)
            assert output is not None, "continuous batching has stopped"
            if output.is_finished():
                generated, left = generated + len(output.generated_tokens), left - 1
        seconds = time.perf_counter() - begun
    assert generated == tokens * len(given), f"{generated} tokens: {output.error}"
    return {"requests": len(given), "seconds": round(seconds, 2), "tokens_per_s": round(generated / seconds, 1)}


def _small() -> Any:
    """Left to itself it takes most of a CPU's memory for its cache, and seconds to do so."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)


def static_cache_decode(model: Any, prompt: int, tokens: int, vocab: int) -> dict[str, float]:
    """Decoding one sequence with `generate` and a static cache, which transformers compiles on CUDA.

    The time of one token is the difference of a long and a short run over the difference of their lengths.
    """
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, vocab, (1, prompt), device=model.device)
    short = max(1, tokens // 4)

    def run(count: int) -> float:
        begun = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
        )
        assert output[0].cpu().shape == (prompt + count,)
        return time.perf_counter() - begun

    begun = time.perf_counter()
    run(tokens)
    run(short)
    warm_up = time.perf_counter() - begun
    seconds = (run(tokens) - run(short)) / (tokens - short)
    return {"ms_per_step": round(seconds * 1e3, 3), "warm_up_seconds": round(warm_up, 1)}
