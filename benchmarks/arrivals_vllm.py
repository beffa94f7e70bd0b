"""vLLM's side of `benchmarks.arrivals`. Runs under an interpreter that has vLLM and nothing of this project."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def serve(given: dict[str, Any]) -> dict[str, Any]:
    """Answers all requests when they are due; returns when what came."""
    import vllm
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {name: given[name] for name in ("model", "dtype", "max_model_len", "max_num_seqs", "enforce_eager")}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**settings, skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True)
    )

    async def ask(name: str, prompt: list[int], tokens: int) -> list[tuple[float, int]]:
        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        came = []
        async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
            if output.outputs[0].token_ids:
                came.append((time.perf_counter(), len(output.outputs[0].token_ids)))
        return came

    try:
        for number, (_, prompt, tokens) in enumerate(given["work"][:2]):
            await ask(f"warm-{number}", prompt, tokens)
        begun = time.perf_counter()

        async def one(number: int, at: float, prompt: list[int], tokens: int) -> tuple[float, Any]:
            await asyncio.sleep(begun + at - time.perf_counter())
            return begun + at, await ask(f"r{number}", prompt, tokens)

        samples = await asyncio.gather(*(one(number, *each) for number, each in enumerate(given["work"])))
    finally:
        engine.shutdown()
    return {"samples": samples, "version": vllm.__version__}


if __name__ == "__main__":
    found = asyncio.run(serve(json.load(sys.stdin)))
    print("\n" + json.dumps(found))
