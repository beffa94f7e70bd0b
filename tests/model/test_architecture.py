from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from asyncengine.config import EngineConfig
from asyncengine.errors import UnsupportedModelError
from asyncengine.model import architecture
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.recorded import Watched
from tests.model.checkpoints import COMMON, write

SMALL: dict[str, Any] = COMMON | {"num_hidden_layers": 2}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "states of its own": (
        "RecurrentGemmaConfig",
        SMALL | {"num_hidden_layers": 3},
        r"RecurrentGemmaForCausalLM.*: 1 of 3 layers attend or keep a state in transformers' cache",
    ),
    "states in a cache of its own": (
        "MiniMaxConfig",
        SMALL | {"num_local_experts": 2},
        "MiniMaxForCausalLM.*: MiniMaxLightningAttention asks its cache for 'get_linear_cache'",
    ),
    "encoder-decoder": (
        "LongT5Config",
        {"vocab_size": 199, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96},
        "LongT5ForConditionalGeneration.* is an encoder-decoder model: it attends in code of its own",
    ),
    "attention biases in its own code": (
        "BloomConfig",
        {"vocab_size": 199, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "BloomForCausalLM.* computes attention in its own code",
    ),
    "bidirectional": ("BertConfig", SMALL, "BertLMHeadModel.* attends to later tokens"),
    "two attentions per layer": ("DiffLlamaConfig", SMALL, "DiffLlamaForCausalLM.* attends more than once per token"),
    "a mask of its own": ("DogeConfig", SMALL, "DogeForCausalLM.* passes attention_mask to its attention"),
    "chunked attention": (
        "Llama4TextConfig",
        SMALL | {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
        "llama4_text.* layers of type 'chunked_attention'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_what_cannot_be_served_by_name_and_reason_before_loading_it(kind: str, tmp_path: Path) -> None:
    name, values, message = REFUSED[kind]
    config = getattr(transformers, name)(**values)
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel):
        if type(config) in auto._model_mapping:
            auto.from_config(config).save_pretrained(tmp_path)
            break
    with pytest.raises(UnsupportedModelError, match=message):
        TransformersLoader().check(EngineConfig(str(tmp_path)), None)


def test_refuses_recurrent_layers_with_caches_that_are_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    TransformersLoader().check(EngineConfig(str(tmp_path)), None)
    monkeypatch.delattr(architecture.Cache, "get_conv_state")
    with pytest.raises(UnsupportedModelError, match=r"layers of type 'conv', which need transformers 5\.22 or later"):
        TransformersLoader().check(EngineConfig(str(tmp_path)), None)


def test_refuses_an_unknown_model_type_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "llama")
    text = (path / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "llarma"')
    (path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match="'llarma' model"):
        TransformersLoader().check(EngineConfig(str(path)), None)


def test_refuses_a_model_whose_paged_logits_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.model.attention.reference import TorchAttention

    right = TorchAttention.attend

    def wrong(self: Any, *arguments: Any) -> torch.Tensor:
        return right(self, *arguments).flip(1)

    path = write(tmp_path, "llama")
    loader = TransformersLoader()
    config = EngineConfig(str(path), attention_backend="torch", mode="interactive")
    loader.load(loader.check(config, None)).model.close()
    monkeypatch.setattr(TorchAttention, "attend", wrong)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does not compute over a paged KV cache"):
        loader.load(loader.check(config, None))


def model(path: Path, device: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=architecture.ATTENTION).eval()


def test_what_was_watched_without_weights_is_not_watched_again(tmp_path: Path) -> None:
    path = write(tmp_path, "gemma3_text")
    watched = architecture.record(model(path, "meta")).watched
    real = model(path, "cpu")
    wanted = architecture.record(real)
    real.forward = None  # it is not run
    assert architecture.layers_of(real, watched) == wanted


@pytest.mark.parametrize("watched", [None, "of another model"])
def test_what_was_not_watched_is_watched_with_weights(watched: Any, tmp_path: Path) -> None:
    real = model(write(tmp_path, "llama"), "cpu")
    wanted = architecture.record(real)
    if watched:
        watched = Watched({f"other.{layer.name}": layer.spec for layer in wanted.attention})
    assert architecture.layers_of(real, watched) == wanted


def test_sinks_are_those_of_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path, "gpt_oss")
    watched = architecture.record(model(path, "cpu")).watched
    real = model(path, "cpu")
    for layer in architecture.layers_of(real, watched).attention:
        assert layer.sinks is layer.module.sinks


def test_a_model_of_several_parts_is_loaded_with_the_configuration_of_its_text() -> None:
    kind, config = architecture.model_class(transformers.Llama4Config())
    assert isinstance(config, transformers.Llama4TextConfig) and kind is transformers.Llama4ForCausalLM
    plain = transformers.LlamaConfig()
    assert architecture.model_class(plain) == (transformers.LlamaForCausalLM, plain)
