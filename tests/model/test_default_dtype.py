"""transformers sets torch's default dtype for the whole process while it makes a model; steps must not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model.loader import TransformersLoader

pytestmark = pytest.mark.loops("either")

CONFIGS = [
    GenerationConfig(temperature=0, max_tokens=8, ignore_eos=True),
    GenerationConfig(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=3, max_tokens=8, ignore_eos=True),
    GenerationConfig(
        temperature=0.9, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={7: 2.0}, logprobs=True,
        top_logprobs=3, seed=4, max_tokens=8, ignore_eos=True,
    ),
]  # fmt: skip


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("decoder", ["compiled", "transformers"])
@pytest.mark.in_short("compiled")
async def test_steps_do_not_depend_on_the_default_dtype(
    checkpoint: Callable[..., Path], default_dtype: Callable[[torch.dtype], None], decoder: str
) -> None:
    """A step that wrote float32 logits into a tensor of the default dtype wrote past its end."""
    settings = EngineConfig(
        str(checkpoint("llama")), device="cpu", decoder_backend=decoder, max_total_sequence_length=1024
    )
    async with AsyncEngine(settings) as engine:
        prompts = [list(range(1, 40)), [5, 6, 7]]
        expected = [await engine.generate(prompt, config) for prompt in prompts for config in CONFIGS]
        scored = await engine.score(prompts, top_logprobs=2)
        await engine.reset()
        default_dtype(torch.bfloat16)
        found = [await engine.generate(prompt, config) for prompt in prompts for config in CONFIGS]
        assert [result.outputs for result in found] == [result.outputs for result in expected]
        assert await engine.score(prompts, top_logprobs=2) == scored
        await engine.reload(settings)
        found = [await engine.generate(prompt, config) for prompt in prompts for config in CONFIGS]
        assert [result.outputs for result in found] == [result.outputs for result in expected]


def test_loading_models_at_once_leaves_the_default_dtype_as_it_was(
    checkpoint: Callable[..., Path],
) -> None:
    loader = TransformersLoader()
    plan = loader.check(
        EngineConfig(str(checkpoint("llama")), device="cpu", dtype="bfloat16", max_total_sequence_length=256), None
    )
    begin = threading.Barrier(4)

    def load() -> None:
        begin.wait()
        loader.load(plan).model.close()

    before = torch.get_default_dtype()
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() is before
