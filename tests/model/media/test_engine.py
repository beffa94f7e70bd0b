"""What models say of images: token for token as in transformers, whatever else is in their steps."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from asyncengine import (
    AdapterError,
    AsyncEngine,
    EngineConfig,
    GenerationConfig,
    ImagePrompt,
    InvalidRequestError,
    RequestOptions,
    StepError,
)
from asyncengine.errors import UnsupportedModelError
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.media.pictures import picture_of
from asyncengine.model.media.processor import processor
from tests.model.media.checkpoints import VISION, VOCABULARY, likeliest, load, loaded, picture, reference

pytestmark = pytest.mark.loops("either")

REFUSED = {
    "ernie4_5_vl_moe": "something else than in transformers",
    "granite4_vision": "gives out no embeddings",
    "idefics2": "text_replacement_offsets",
    "ovis2": "gives out visual_indicator_features",
}
"""Those that are served without images, and why."""
SERVED = [architecture for architecture in VISION if architecture not in REFUSED]
FIRST, SECOND, THIRD = picture(1, 48, 32), picture(2, 40, 24), picture(3, 32, 48)
TOKENS = 7


def asking(*parts: Any) -> list[dict[str, Any]]:
    """A question of texts and images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def bare(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """A conversation as transformers takes it, and its images."""
    images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    without = [
        {**message, "content": [{**part, "image": None} if "image" in part else part for part in message["content"]]}
        for message in messages
    ]
    return without, images


def told(path: Path, messages: list[dict[str, Any]], max_tokens: int = TOKENS) -> list[int]:
    """What transformers says."""
    return reference(path, *bare(messages), max_tokens)


def check(
    path: Path, messages: list[dict[str, Any]], found: Any, tokens: int = TOKENS, allowed: Any = range(VOCABULARY)
) -> None:
    """So many tokens were said, which are those of transformers."""
    said = list(found.token_ids)
    assert len(said) == tokens
    assert said == likeliest(path, *bare(messages), said, allowed)


def greedy(max_tokens: int = TOKENS, **more: Any) -> GenerationConfig:
    return GenerationConfig(max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_single_sequence_length": 400, "max_total_sequence_length": 1600,
        "prefill_chunk_size": 11, "kv_cache_page_size": 8, "max_num_sequence": 4,
    }  # fmt: skip
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


async def answers(engine: AsyncEngine, *conversations: list[dict[str, Any]]) -> list[list[int]]:
    results = await asyncio.gather(*(engine.chat(messages, greedy()) for messages in conversations))
    return [list(result.token_ids) for result in results]


async def are_as_told(engine: AsyncEngine, path: Path, *conversations: list[dict[str, Any]]) -> list[list[int]]:
    """Answers, which are those of transformers with what lies at `path`."""
    results = await asyncio.gather(*(engine.chat(messages, greedy()) for messages in conversations))
    for messages, result in zip(conversations, results, strict=True):
        check(path, messages, result)
    return [list(result.token_ids) for result in results]


AS_WITHOUT_EXPERTS = {"qwen3_5_moe", "qwen3_vl_moe"}
"""Those whose images go the way of a model beside them here, which has no experts."""
BESIDE_VIDEOS = {"qwen2_vl", "qwen2_5_vl", "qwen3_5", "llava_onevision", "lfm3_vl", "exaone4_5", "minicpmv4_6"}
"""Those whose images are compared with transformers' by the tests of videos, too."""
AS_OTHERS = {"aya_vision", "lighton_ocr", "deepseek_vl", "glm46v", "paddleocr_vl"}
"""Those whose images and text go the way of others here."""


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=pytest.mark.long if name in AS_WITHOUT_EXPERTS | BESIDE_VIDEOS | AS_OTHERS else ())
        for name in SERVED
    ],
)
async def test_greedy_equals_transformers(architecture: str, sighted: Callable[..., Path]) -> None:
    path = sighted(architecture)
    conversations = [
        asking("Look: ", FIRST, " and ", SECOND, " which?"),
        asking("no image at all, but a text that takes some steps"),
        asking(SECOND, "is other than", FIRST),
    ]
    chunk = 64 if architecture.startswith("gemma4") else 11  # it may have to see an image at once
    async with engine(path, images=True, prefill_chunk_size=chunk) as serving:
        assert serving.complete_engine_config.decoder_backend == "compiled" or architecture not in COMPILED
        first, *_ = await are_as_told(serving, path, *conversations)
        assert first[:3] == told(path, conversations[0], 3)
        again = await serving.chat(conversations[0], greedy(3))
        assert list(again.token_ids) == first[:3]
        assert again.usage.cached_tokens >= again.usage.prompt_tokens - 16
        other = await serving.chat(asking("Look: ", THIRD, " and ", SECOND, " which?"), greedy(1))
        assert other.usage.cached_tokens <= 24  # up to the first image


@pytest.mark.parametrize("architecture", REFUSED)
@pytest.mark.in_short("granite4_vision", "idefics2")
async def test_what_cannot_be_served_says_so_and_serves_text(architecture: str, sighted: Callable[..., Path]) -> None:
    path = sighted(architecture)
    text = asking("no image")
    async with engine(path) as serving:
        assert not serving.takes_images
        with pytest.raises(InvalidRequestError, match=REFUSED[architecture]):
            await serving.chat(asking(FIRST))
        assert any(note.startswith("images: refused: ") for note in serving.health().notes)
        await are_as_told(serving, path, text)
    if architecture == "idefics2":
        with pytest.raises(UnsupportedModelError, match=r"images is True; .* takes none"):
            async with engine(path, images=True):
                pass


COMPILED = ("qwen3_vl", "qwen2_5_vl", "internvl")


@pytest.mark.parametrize("architecture", COMPILED)
@pytest.mark.in_short("internvl")
async def test_the_other_way_of_running_a_model(architecture: str, sighted: Callable[..., Path]) -> None:
    path = sighted(architecture)
    messages = asking(FIRST, "beside", SECOND)
    async with engine(path, images=True, decoder_backend="transformers") as serving:
        assert serving.complete_engine_config.decoder_backend == "transformers"
        await are_as_told(serving, path, messages)


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen3_5"])
@pytest.mark.in_short("qwen3_vl")
async def test_preempted_they_are_seen_again(architecture: str, sighted: Callable[..., Path]) -> None:
    path = sighted(architecture)
    conversations = [asking("a" * length, picture(length, 48, 32), "?") for length in range(1, 5)]
    async with engine(path, images=True, max_total_sequence_length=200, max_single_sequence_length=120) as serving:
        results = await asyncio.gather(*(serving.chat(messages, greedy(40)) for messages in conversations))
        for messages, result in zip(conversations, results, strict=True):
            check(path, messages, result, 40)
        assert sum(result.usage.preemptions for result in results) > 0


async def test_a_conversation_goes_on(sighted: Callable[..., Path]) -> None:
    path = sighted("qwen3_vl")
    messages = asking("What is ", FIRST, "?")
    async with engine(path, images=True, kv_cache_page_size=4) as serving:
        first = await serving.chat(messages, greedy())
        said = {"role": "assistant", "content": [{"type": "text", "text": first.text}]}
        more = [*messages, said | {"token_ids": list(first.token_ids)}, *asking("And ", SECOND, "?")]
        second = await serving.chat(more, greedy())
        assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 4
        await serving.reset()
        assert list((await serving.chat(more, greedy())).token_ids) == list(second.token_ids)
        # It may write the token that stands for images, and is told what it wrote.
        token = loaded(path).config.image_token_id
        wrote = [*asking("see ", FIRST), said | {"token_ids": [70, token, 71]}, *asking(SECOND)]
        ids = await serving.tokenize_chat(wrote)
        assert ids.count(token) == 24 + 15 + 1
        assert len((await serving.chat(wrote, greedy(3))).token_ids) == 3


async def test_a_prompt_without_a_template(sighted: Callable[..., Path]) -> None:
    path, text = sighted("llava"), "say: <image> or <image>"
    given = processor(path)(text=[text], images=[[FIRST, SECOND]], return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    wanted = loaded(path).generate(**given, **settings)
    async with engine(path, images=True) as serving:
        found = await serving.generate(ImagePrompt(text, [FIRST, SECOND]), greedy())
    assert list(found.token_ids) == wanted[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("architecture", [pytest.param("llava", marks=pytest.mark.long), "qwen3_vl", "gemma4"])
@pytest.mark.in_short("qwen3_vl")
async def test_text_that_has_the_token_of_images_stays_text(architecture: str, sighted: Callable[..., Path]) -> None:
    """Beside an image in the same step, a token that happens to be what stands for one is what it is."""
    path = sighted(architecture)
    token = loaded(path).config.image_token_id
    ids = [80, token, 81, token, token, 82]
    for backend in ("auto", "transformers"):
        async with engine(
            path, decoder_backend=backend, prefill_chunk_size=100, prefix_cache_mode="disable"
        ) as serving:
            prompt = ImagePrompt(serving._thread.core.view.media_reader.marks["image"] + "?", [FIRST])  # type: ignore[union-attr]
            alone = [await serving.generate(each, greedy(logprobs=True)) for each in (prompt, ids)]
            await serving.pause()
            streams = [await serving.add_request(each, greedy(logprobs=True)) for each in (prompt, ids)]
            steps = serving.metrics().counters.steps
            await serving.resume()
            for stream, wanted in zip(streams, alone, strict=True):
                found = await stream
                assert list(found.token_ids) == list(wanted.token_ids)
                logprobs = [[entry.logprob for entry in each.outputs[0].logprobs or ()] for each in (found, wanted)]
                assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
            assert serving.metrics().counters.steps - steps == TOKENS  # they were in the same ones


async def test_weights_that_change_change_what_is_seen(sighted: Callable[..., Path]) -> None:
    path, other = sighted("llava"), sighted("llava", seed=1)
    messages = asking("what ", FIRST)
    async with engine(path, images=True, prefix_cache_mode="disable") as serving:
        await are_as_told(serving, path, messages)
        await serving.update_weights(dict(loaded(other).named_parameters()))
        await are_as_told(serving, other, messages)


async def test_nothing_is_left_of_a_model(sighted: Callable[..., Path]) -> None:
    async with engine(sighted("qwen3_vl"), images=True) as serving:
        await serving.chat(asking(FIRST), greedy(2))
        core = serving._thread.core
        assert core.loaded is not None and core.view is not None
        reader = core.view.media_reader
        encoder = weakref.ref(core.loaded.model._media)
        weights = [weakref.ref(each) for each in core.loaded.model._model.parameters()]
        await serving.unload()
        gc.collect()
        assert reader is not None
        assert encoder() is None
        assert not any(weight() is not None for weight in weights)


def file_of(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **how)
    return held.getvalue()


async def test_forms_of_one_image(sighted: Callable[..., Path], tmp_path: Path) -> None:
    png = file_of(FIRST)
    (tmp_path / "image.png").write_bytes(png)
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    turned = FIRST.transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x0112] = 8  # how it was held
    forms = [
        {"type": "image", "image": FIRST},
        {"type": "image", "image": png},
        {"type": "image", "image": tmp_path / "image.png"},
        {"type": "image", "image": np.asarray(FIRST)},
        {"type": "image", "base64": base64.b64encode(png).decode()},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "image": FIRST.convert("RGBA")},
        {"type": "image", "image": file_of(turned, exif=exif)},
    ]
    async with engine(sighted("internvl"), images=True) as serving:
        found = [await serving.chat([{"role": "user", "content": [form]}], greedy(3)) for form in forms]
        assert len({tuple(result.token_ids) for result in found}) == 1
        assert all(result.usage.cached_tokens for result in found[1:])  # it is the same to the prefix cache, too


async def test_wrong_images(sighted: Callable[..., Path]) -> None:
    png = file_of(FIRST)
    wrong: dict[str, Any] = {
        "damaged or none of PNG, JPEG": b"not an image",
        "damaged or none of": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "nobody knows what is white": Image.new("F", (8, 8)),
        "cannot be read": png[: len(png) // 2],
        "is not base64": "data:image/png;base64,!!!",
        "nothing is fetched": "https://example.com/a.png",
        "expected a PIL image": 3,
        r"array of \(2, 2\) float64": np.zeros((2, 2)),
        "No such file": Path("/nowhere/image.png"),
        "allowed: 1..67108864": np.zeros((1 << 14, (1 << 12) + 1), np.uint8),
    }
    async with engine(sighted("qwen3_vl"), images=True) as serving:
        for message, image in wrong.items():
            content = [{"type": "image", "image": each} for each in (FIRST, image)]
            with pytest.raises(InvalidRequestError, match=rf"images\[1\]: .*{message}"):
                await serving.chat([{"role": "user", "content": content}])
        for part in (
            {"type": "image"},
            {"type": "image", "image": png, "url": "x"},
            {"type": "image_url", "image_url": {}},
        ):
            with pytest.raises(InvalidRequestError, match="messages has an image part"):
                await serving.chat([{"role": "user", "content": [part]}])
        with pytest.raises(InvalidRequestError, match="more marks of images"):
            await serving.chat(asking("<|image_pad|>", FIRST))
        with pytest.raises(InvalidRequestError, match=r"marks of images .*; expected 1"):
            await serving.generate(ImagePrompt("nothing", [FIRST]))
        with pytest.raises(InvalidRequestError, match=r"first 17 images come to .* tokens; allowed: 399"):
            await serving.chat(asking(*[FIRST] * 20))
        for given in ("y", [], None):
            with pytest.raises(InvalidRequestError, match="images is"):
                ImagePrompt("x", given)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="may stand beside each other"):
            await serving.generate(ImagePrompt("<|image_pad|><|image_pad|>", [FIRST, SECOND]))
        assert len((await serving.chat(asking(FIRST), greedy(3))).token_ids) == 3


async def test_they_are_seen_by_requests_with_adapters(sighted: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter of what looks at them is refused; prompts with them have vectors."""
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = sighted("qwen3_vl")
    name = next(name for name, _ in loaded(path).named_modules() if name.endswith("layers.1.self_attn.q_proj"))
    outputs, inputs_ = loaded(path).get_submodule(name).weight.shape
    torch.manual_seed(1)
    factors = {"lora_A": torch.randn(4, inputs_), "lora_B": torch.randn(outputs, 4)}
    save_file(
        {f"base_model.model.{name}.{factor}.weight": value for factor, value in factors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}'
    )
    model = load(path)
    with torch.no_grad():
        model.get_submodule(name).weight += factors["lora_B"] @ factors["lora_A"]
    merged = tmp_path / "merged"
    model.save_pretrained(merged)
    for file in path.glob("*"):
        if not (merged / file.name).exists():
            (merged / file.name).write_bytes(file.read_bytes())
    messages, text = asking("what is", FIRST, "?"), "<|image_pad|> and text"
    given = processor(path)(text=[text], images=[[FIRST]], return_tensors="pt")
    with torch.inference_mode():
        wanted = loaded(path).base_model(**given, use_cache=False).last_hidden_state[0].mean(dim=0)
    for backend in ("compiled", "transformers"):
        async with engine(path, images=True, decoder_backend=backend, adapters={"a": str(tmp_path)}) as serving:
            with_one = serving.chat(messages, greedy(), RequestOptions(adapter="a"))
            results = await asyncio.gather(with_one, serving.chat(messages, greedy()))
            check(merged, messages, results[0])
            check(path, messages, results[1])
            with pytest.raises(AdapterError, match="not a linear layer that can be adapted"):
                await serving.load_adapter("seeing", *adapter_of_what_looks(path))
            await are_as_told(serving, path, messages)
            [vector] = await serving.embed([ImagePrompt(text, [FIRST])], "mean", normalize=False)
            assert np.allclose(vector.vector, wanted, atol=1e-3)


def adapter_of_what_looks(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    modules = {n: m for n, m in loaded(path).named_modules() if isinstance(m, torch.nn.Linear) and ".visual." in n}
    name, module = next(iter(modules.items()))
    sizes = {"lora_A": (4, module.in_features), "lora_B": (module.out_features, 4)}
    tensors = {f"base_model.model.{name}.{factor}.weight": torch.ones(size) for factor, size in sizes.items()}
    return tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [name.rpartition(".")[2]]}


async def test_one_that_cannot_be_encoded_ends_its_own_requests(
    sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sighted("qwen3_vl")
    text, other = asking("some text"), asking("and ", SECOND)
    encode = MediaEncoder._encode

    def failing(self: MediaEncoder, image: Any) -> Any:
        if len(image.places) == 24:  # which FIRST has, and SECOND has not
            raise torch.OutOfMemoryError("no memory for so large an image")
        return encode(self, image)

    for backend in ("compiled", "transformers"):
        async with engine(path, images=True, decoder_backend=backend, max_num_sequence=8) as serving:
            with monkeypatch.context() as patch:
                patch.setattr(MediaEncoder, "_encode", failing)
                seen = [serving.chat(each, greedy()) for each in (text, asking("what is ", FIRST), other)]
                found = await asyncio.gather(*seen, return_exceptions=True)
            assert isinstance(found[1], StepError)
            assert "an image cannot be encoded: no memory for so large an image" in str(found[1])
            check(path, text, found[0])
            check(path, other, found[2])
            await are_as_told(serving, path, asking("what is ", FIRST))


async def test_one_picture_in_many_requests(sighted: Callable[..., Path], tmp_path: Path) -> None:
    """It is opened, and read by whoever comes first."""
    path = sighted("internvl")
    picture(5, 700, 500).save(tmp_path / "large.png")
    opened = Image.open(tmp_path / "large.png")
    messages = asking("what is ", opened)
    async with engine(path, images=True, max_num_sequence=16, max_total_sequence_length=4000) as serving:
        found = await asyncio.gather(*(serving.chat(messages, greedy(3)) for _ in range(16)))
    assert {tuple(result.token_ids) for result in found} == {
        tuple(told(path, asking("what is ", picture(5, 700, 500)), 3))
    }


def test_sixteen_bits_are_made_eight() -> None:
    ramp = np.arange(256, dtype=np.uint16).repeat(256).reshape(256, 256) * 257
    file = file_of(Image.fromarray(ramp))
    assert np.array_equal(np.asarray(picture_of(file))[:, 0, 0], np.arange(256))


@pytest.mark.parametrize("architecture", [pytest.param("qwen3_5", marks=pytest.mark.long), "llava"])
async def test_names_of_the_text_alone_are_known(
    architecture: str, sighted: Callable[..., Path], tmp_path: Path
) -> None:
    """Adapters and weights of a model that was trained without its encoder have other names."""
    path = sighted(architecture)
    names = [name for name, module in loaded(path).named_modules() if name.endswith("mlp.up_proj")]
    outputs, inputs_ = loaded(path).get_submodule(names[0]).weight.shape
    alone = names[0].replace("model.language_model.", "model.")
    assert alone != names[0]
    factors = {"lora_A": torch.randn(4, inputs_), "lora_B": torch.randn(outputs, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    async with engine(path, images=True) as serving:
        before = await answers(serving, asking(FIRST))
        tensors = {f"base_model.model.{alone}.{factor}.weight": value for factor, value in factors.items()}
        await serving.load_adapter("a", tensors, config)
        adapted = await serving.chat(asking(FIRST), greedy(), RequestOptions(adapter="a"))
        assert [list(adapted.token_ids)] != before
        await serving.update_weights({f"{alone}.weight": loaded(path).get_submodule(names[0]).weight * 3})
        assert await answers(serving, asking(FIRST)) != before


@pytest.mark.long
async def test_narrow_weights_and_short_numbers(sighted: Callable[..., Path]) -> None:
    """What looks at images is not rounded, and the trial allows for what rounding of the rest does."""
    for changes in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}):
        async with engine(sighted("qwen3_vl"), images=True, **changes) as serving:
            assert len((await serving.chat(asking(FIRST), greedy(3))).token_ids) == 3


async def test_they_can_be_left_out(sighted: Callable[..., Path]) -> None:
    async with engine(sighted("qwen3_5"), images=False) as serving:
        with pytest.raises(InvalidRequestError, match="images is False"):
            await serving.chat(asking(FIRST))
        assert "images: refused" not in str(serving.health().notes)
        names = dict(serving._thread.core.loaded.model._model.named_parameters())  # type: ignore[union-attr]
        assert not any("visual" in name for name in names)


async def test_without_pillow(sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "PIL" else found(name, *more))
    async with engine(sighted("qwen3_vl")) as serving:
        with pytest.raises(InvalidRequestError, match="Pillow is not installed; the extra 'images' brings it"):
            await serving.chat(asking(FIRST))
