"""What of a model looks at images, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.model import architecture
from asyncengine.model.media.modules import senses
from asyncengine.model.text_names import name_in
from tests.model import checkpoints
from tests.model.media.checkpoints import VISION, loaded


@pytest.mark.parametrize("name", VISION)
@pytest.mark.in_short(
    "lfm3_vl", "granite4_vision", "ernie4_5_vl_moe", "qwen3_vl_moe", "gemma3", "gemma4_moe", "llava", "idefics3"
)
def test_of_models_that_take_images_all_but_the_text(name: str, sighted: Callable[..., Path]) -> None:
    model = loaded(sighted(name))
    found = senses(model)
    text = {module for module in model.modules() if module not in found}
    assert set(model.get_decoder().modules()) <= text
    assert any(module in found for module in model.modules() if "vision" in type(module).__name__.lower())


@pytest.mark.parametrize("name", checkpoints.ARCHITECTURES)
def test_of_models_of_text_nothing(name: str) -> None:
    config, values = checkpoints.ARCHITECTURES[name]
    with torch.device("meta"):
        assert not senses(architecture.bare(getattr(transformers, config)(**values)))


@pytest.mark.loops("either")
async def test_a_head_that_is_called_decoder(tmp_path: Path) -> None:
    """What a model calls its decoder is not always what decodes."""
    config = transformers.ModernBertDecoderConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, local_attention=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ModernBertDecoderForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    ids = list(range(5, 45))
    wanted = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
    )[0, 40:].tolist()  # fmt: skip
    async with AsyncEngine(EngineConfig(str(tmp_path), device="cpu", dtype="float32")) as serving:
        found = await serving.generate(ids, GenerationConfig(max_tokens=8, temperature=0, ignore_eos=True))
    assert list(found.token_ids) == wanted


def test_names_of_a_text_alone_and_within_a_model_with_images() -> None:
    within, alone = {"model.language_model.layers.0.mlp", "lm_head"}, {"model.layers.0.mlp", "lm_head"}
    for spelling in ("model.language_model.layers.0.mlp", "model.layers.0.mlp", "language_model.model.layers.0.mlp"):
        assert name_in(spelling, within) == "model.language_model.layers.0.mlp"
        assert name_in(spelling, alone) == "model.layers.0.mlp"
        assert name_in(spelling, {"lm_head"}) == spelling
    assert name_in("lm_head", within) == "lm_head"
    older = {"language_model.model.norm.weight", "language_model.lm_head.weight"}
    for name in ("model.norm.weight", "model.language_model.norm.weight"):
        assert name_in(name, older) == "language_model.model.norm.weight"
    assert name_in("lm_head.weight", older) == "language_model.lm_head.weight"
