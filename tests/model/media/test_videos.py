"""What models say of videos: token for token as in transformers, whatever else is in their steps."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, InvalidRequestError, StepError, Video, VideoPrompt
from asyncengine.errors import UnsupportedModelError
from asyncengine.model import architecture as architectures
from asyncengine.model.media.axes import Axes
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.media.processor import processor
from asyncengine.model.media.trial import MediaTrial
from tests.model.media.checkpoints import Film, film, inputs, likeliest, load, loaded, picture, reference

pytestmark = pytest.mark.loops("either")

SERVED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "lfm3_vl", "exaone4_5"]
EITHER = ["glm4v", "glm46v", "internvl"]
"""Those in which the same tokens stand for pieces of images and of videos."""
WITH_TORCHVISION = ["glm46v", "internvl", "gemma4"]
"""Those whose video processor is not to be had without."""
REFUSED = {"llava": "no encoder of videos"}
"""Those that take images alone, and why."""
FIRST, SECOND, THIRD = film(1, 4, 48, 32), film(2, 6, 40, 24, fps=3.0), film(3, 4, 48, 32)
IMAGE, OTHER = picture(1, 48, 32), picture(2, 40, 24)
TOKENS = 7
LONG = {"max_single_sequence_length": 1000, "max_total_sequence_length": 4000}


def asking(*parts: Any) -> list[dict[str, Any]]:
    """A question of texts, images and films."""

    def part(value: Any) -> dict[str, Any]:
        if isinstance(value, Film):
            return {"type": "video", "video": value.frames, "fps": value.fps}
        return {"type": "text", "text": value} if isinstance(value, str) else {"type": "image", "image": value}

    return [{"role": "user", "content": [part(value) for value in parts]}]


def bare(*parts: Any) -> tuple[list[dict[str, Any]], list[Image.Image], list[Film]]:
    """The same as transformers takes it, and its images and its films."""
    kinds = {str: "text", Film: "video"}
    content = [
        {"type": kinds.get(type(part), "image"), **({"text": part} if isinstance(part, str) else {})} for part in parts
    ]
    images = [part for part in parts if isinstance(part, Image.Image)]
    return [{"role": "user", "content": content}], images, [part for part in parts if isinstance(part, Film)]


def greedy(max_tokens: int = TOKENS, **more: Any) -> GenerationConfig:
    return GenerationConfig(max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "max_single_sequence_length": 400, "max_total_sequence_length": 1600,
        "prefill_chunk_size": 11, "kv_cache_page_size": 8, "max_num_sequence": 4, "videos": True,
    }  # fmt: skip
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


def check(path: Path, parts: tuple[Any, ...], found: Any, tokens: int = TOKENS) -> list[int]:
    """So many tokens were said, which are those of transformers."""
    said = list(found.token_ids)
    assert len(said) == tokens
    messages, images, films = bare(*parts)
    assert said == likeliest(path, messages, images, said, films=films)
    return said


async def are_as_told(serving: AsyncEngine, path: Path, *conversations: tuple[Any, ...]) -> list[list[int]]:
    results = await asyncio.gather(*(serving.chat(asking(*parts), greedy()) for parts in conversations))
    return [check(path, parts, result) for parts, result in zip(conversations, results, strict=True)]


def needing_torchvision(architecture: str) -> None:
    if architecture in WITH_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")


@pytest.mark.parametrize("architecture", EITHER)
async def test_where_a_prompt_has_either_images_or_videos(architecture: str, sighted: Callable[..., Path]) -> None:
    needing_torchvision(architecture)
    path = sighted(architecture)
    async with engine(path, **LONG) as serving:
        await are_as_told(
            serving, path, ("Look: ", FIRST, " which?"), (FIRST, "is other than", THIRD), (IMAGE, "alone")
        )
        with pytest.raises(InvalidRequestError, match="images and videos; the model takes one of them at a time"):
            await serving.chat(asking(FIRST, IMAGE), greedy(1))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of numpy, for how a processor copies a tensor
@pytest.mark.parametrize(
    "architecture", [*SERVED, "gemma4", "minicpmv4_6", "kimi_k25", pytest.param("qwen3_vl_moe", marks=pytest.mark.long)]
)
@pytest.mark.in_short("qwen3_5", "qwen2_5_vl", "llava_onevision", "gemma4", "kimi_k25")
async def test_greedy_equals_transformers(architecture: str, sighted: Callable[..., Path]) -> None:
    needing_torchvision(architecture)
    path = sighted(architecture)
    question = ("Look: ", FIRST, " and ", IMAGE, " which?")
    second = film(2, 4, 40, 24) if architecture == "llava_onevision" else SECOND  # it wants them of one length
    async with engine(path, **(LONG if architecture == "gemma4" else {})) as serving:
        assert serving.takes_videos
        first, *_ = await are_as_told(
            serving, path, question, (second, "is other than", FIRST), ("no video at all",), (IMAGE, "beside", OTHER)
        )
        messages, images, films = bare(*question)
        assert first[:3] == reference(path, messages, images, 3, films)
        again = await serving.chat(asking(*question), greedy(3))
        assert list(again.token_ids) == first[:3]
        assert again.usage.cached_tokens >= again.usage.prompt_tokens - 16
        other = await serving.chat(asking("Look: ", THIRD, " and ", IMAGE, " which?"), greedy(1))
        assert other.usage.cached_tokens <= 32  # up to the first video
        asked = (question, question, (FIRST, second), (THIRD, IMAGE), (IMAGE, OTHER))
        ids = torch.cat([inputs(path, *bare(*parts))["input_ids"][0] for parts in asked])
        config, counters = loaded(path).config, serving.metrics().counters
        assert counters.image_tokens == int((ids == config.image_token_id).sum())
        assert counters.video_tokens == int((ids == config.video_token_id).sum())


async def test_another_rate_is_another_video(sighted: Callable[..., Path]) -> None:
    path, slower = sighted("qwen3_vl"), Film(FIRST.frames, 1.0)
    async with engine(path, decoder_backend="transformers") as serving:
        said, other = await are_as_told(serving, path, ("See ", FIRST), ("See ", slower))
        assert said != other  # its times stand in the prompt
        usual = [{"role": "user", "content": [{"type": "text", "text": "See "},
                                              {"type": "video", "video": list(FIRST.frames)}]}]  # fmt: skip
        assert list((await serving.chat(usual, greedy())).token_ids) == said  # two in a second, as the processor says


async def test_preempted_they_are_seen_again_and_encoded_once(
    sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encode, encoded = sighted("qwen3_vl"), MediaEncoder._encode, list[bytes]()

    def watched(self: MediaEncoder, item: Any) -> Any:
        encoded.append(item.digest)
        return encode(self, item)

    several = [("a" * length, film(length, 4, 48, 32), "?") for length in range(1, 5)]
    async with engine(path, max_total_sequence_length=240, max_single_sequence_length=176) as serving:
        monkeypatch.setattr(MediaEncoder, "_encode", watched)
        results = await asyncio.gather(*(serving.chat(asking(*parts), greedy(40)) for parts in several))
        for parts, result in zip(several, results, strict=True):
            check(path, parts, result, 40)
        assert sum(result.usage.preemptions for result in results) > 0
        assert len(encoded) == len({*encoded}) == len(several)  # kept from step to step, and after


async def test_branches_and_scores_of_a_prompt(sighted: Callable[..., Path]) -> None:
    path, parts = sighted("qwen3_vl"), ("x", FIRST, "y", IMAGE, "and z")
    given = inputs(path, *bare(*parts))
    with torch.inference_mode():
        logprobs = loaded(path)(**given).logits[0].log_softmax(-1)
    ids = given["input_ids"][0]
    wanted = logprobs[torch.arange(len(ids) - 1), ids[1:]].tolist()
    async with engine(path) as serving:
        result = await serving.chat(asking(*parts), greedy(n=2, prompt_logprobs=0))
        assert result.prompt_token_ids is not None and result.prompt_logprobs is not None
        assert list(result.prompt_token_ids) == ids.tolist()
        assert [entry.logprob for entry in result.prompt_logprobs if entry] == pytest.approx(wanted, abs=1e-3)
        for branch in result.outputs:
            check(path, parts, branch)


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.long)])
async def test_a_video_that_is_longer_than_it_is_large(architecture: str, sighted: Callable[..., Path]) -> None:
    """In time, it goes on further than the text behind it begins; what is said comes after both."""
    path, parts = sighted(architecture), (film(4, 24, 16, 16, fps=0.5), "?")
    messages, images, films = bare(*parts)
    async with engine(path, decoder_backend="transformers") as serving:
        found = await serving.chat(asking(*parts), greedy())
        assert list(found.token_ids) == reference(path, messages, images, TOKENS, films)
        answer = {"role": "assistant", "content": found.text, "token_ids": list(found.token_ids)}
        more = [*asking(*parts), answer, *asking("And?")]
        second = await serving.chat(more, greedy())
        assert second.usage.cached_tokens >= found.usage.prompt_tokens
        await serving.reset()
        assert list((await serving.chat(more, greedy())).token_ids) == list(second.token_ids)


async def test_a_prompt_without_a_template(sighted: Callable[..., Path]) -> None:
    path, text = sighted("qwen2_5_vl"), "say: <|image_pad|> then <|video_pad|>?"
    told = {"video_metadata": [FIRST.metadata], "do_sample_frames": False}
    given = processor(path)(
        text=[text], images=[[IMAGE]], videos=[FIRST.frames], videos_kwargs=told, return_tensors="pt"
    )
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    wanted = loaded(path).generate(**given, **settings)
    async with engine(path) as serving:
        found = await serving.generate(VideoPrompt(text, [Video(FIRST.frames, fps=2)], [IMAGE]), greedy())
        assert list(found.token_ids) == wanted[0, given["input_ids"].shape[1] :].tolist()
        for frames in (list(FIRST.frames), [Image.fromarray(frame) for frame in FIRST.frames]):
            same = await serving.generate(VideoPrompt(text, [Video(frames, fps=2)], [IMAGE]), greedy(1))
            assert same.usage.cached_tokens >= same.usage.prompt_tokens - 8


async def test_a_reload_carries_them_on(sighted: Callable[..., Path]) -> None:
    path, parts = sighted("qwen3_vl"), ("x", FIRST, "?")
    said: list[int] = []
    async with engine(path, decoder_backend="transformers") as serving:
        async for output in serving.chat(asking(*parts), greedy(30)):
            if not said:
                await serving.reload(serving.complete_engine_config, in_flight="carry")
            said += output.token_ids
    messages, images, films = bare(*parts)
    assert len(said) == 30
    assert said == likeliest(path, messages, images, said, films=films)


async def test_one_that_cannot_be_encoded_ends_its_own_requests(
    sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encode = sighted("qwen3_vl"), MediaEncoder._encode

    def failing(self: MediaEncoder, item: Any) -> Any:
        if item.kind == "video" and len(item.inputs["pixel_values_videos"]) == failing_patches:
            raise RuntimeError("no room")
        return encode(self, item)

    async with engine(path) as serving:
        failing_patches = len(inputs(path, *bare(SECOND))["pixel_values_videos"])
        monkeypatch.setattr(MediaEncoder, "_encode", failing)
        good, bad = await asyncio.gather(
            serving.chat(asking("see ", FIRST), greedy()),
            serving.chat(asking("see ", SECOND), greedy()),
            return_exceptions=True,
        )
        assert isinstance(bad, StepError)
        assert "a video cannot be encoded: no room" in str(bad.__cause__)
        check(path, ("see ", FIRST), good)


async def test_wrong_videos_end_before_they_reach_the_model(sighted: Callable[..., Path]) -> None:
    wrong = {
        r"videos\[1\]: a video has no frames": {"video": []},
        r"videos\[1\]: a video is 7; expected bytes": {"video": 7},
        r"videos\[1\]: 1 frames of 8 x 8 pixels are refused by the": {"video": np.zeros((1, 8, 8, 3), np.uint8)},
        r"videos\[1\]: a video has num_frames 2": {"video": FIRST.frames, "num_frames": 2},
        "fps is 0; expected frames in a second": {"video": FIRST.frames, "fps": 0},
        "has a video part with": {"video": None},
        "fps or num_frames beside a Video": {"video": Video(FIRST.frames), "fps": 2},
    }
    good = {"type": "video", "video": FIRST.frames}
    async with engine(sighted("qwen3_vl"), decoder_backend="transformers") as serving:
        for message, part in wrong.items():
            content = [good, {"type": "video", **part}]
            with pytest.raises(InvalidRequestError, match=message):
                await serving.chat([{"role": "user", "content": content}], greedy(1))
        for prompt, message in (
            (VideoPrompt("<|video_pad|><|video_pad|>", [FIRST.frames]), "more marks of videos"),
            (VideoPrompt("?", [FIRST.frames]), "has 0 marks of videos"),
            (VideoPrompt("<|video_pad|>" * 40, [FIRST.frames] * 40), "videos come to .* tokens; allowed: 399"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                await serving.generate(prompt, greedy(1))
        assert serving.metrics().counters.prompt_tokens == 0


async def test_they_can_be_left_out(sighted: Callable[..., Path]) -> None:
    for changes in ({"videos": False}, {"images": False, "videos": None}):
        async with engine(sighted("qwen3_vl"), **changes) as serving:
            with pytest.raises(InvalidRequestError, match=r"the model takes none: (videos|images) is False"):
                await serving.chat(asking(FIRST), greedy(1))
            assert serving.takes_images == ("images" not in changes)
            assert "refused" not in str(serving.health().notes)
            assert serving.complete_engine_config.videos is False


@pytest.mark.parametrize(("architecture", "why"), REFUSED.items())
async def test_what_cannot_be_served_says_so_and_serves_images(
    architecture: str, why: str, sighted: Callable[..., Path]
) -> None:
    path = sighted(architecture)
    async with engine(path, videos=None) as serving:
        assert serving.takes_images and not serving.takes_videos
        noted = [note for note in serving.health().notes if note.startswith("videos: refused: ")]
        assert bool(noted) == (why != "no encoder of videos")
        with pytest.raises(InvalidRequestError, match=why):
            await serving.chat(asking(FIRST), greedy(1))
        await are_as_told(serving, path, (IMAGE, "alone"))
    with pytest.raises(UnsupportedModelError, match=rf"videos is True; .* takes none: .*{why}"):
        async with engine(path):
            pass


async def test_a_model_that_is_to_take_few_tokens(sighted: Callable[..., Path]) -> None:
    """Its trials are no longer than it goes; of which there is none, that it says."""
    path = sighted("qwen3_vl")
    async with engine(path, max_single_sequence_length=100) as serving:
        await are_as_told(serving, path, ("See ", FIRST))
    async with engine(path, max_single_sequence_length=20, videos=None) as serving:
        assert not serving.takes_images
        assert len([note for note in serving.health().notes if "; the model is to take 20" in note]) == 2


async def test_a_trial_would_notice_that_seconds_are_not_counted(
    sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Axes.of

    def timeless(self: Axes, ids: Any, items: Any) -> Any:
        without = [{name: value for name, value in item.inputs.items() if "second" not in name} for item in items]
        return found(
            self, ids, [dataclasses.replace(item, inputs=own) for item, own in zip(items, without, strict=True)]
        )

    monkeypatch.setattr(Axes, "of", timeless)
    async with engine(sighted("qwen2_5_vl"), videos=None, decoder_backend="transformers") as serving:
        assert serving.takes_images and not serving.takes_videos
        assert "says something else than in transformers" in str(serving.health().notes)


@pytest.mark.parametrize("looked_ahead", [False, True])
def test_a_trial_without_images_tells_nothing_of_those_that_are_seen_at_once(
    looked_ahead: bool, sighted: Callable[..., Path]
) -> None:
    path = sighted("qwen3_vl")
    model, prepares = load(path), processor(path)
    architectures.attend_here(model)
    given = model, architectures.record(model), prepares, ["image", "video"], "", torch.device("cpu")
    if looked_ahead:
        with pytest.raises(UnsupportedModelError, match="it cannot be tried beside images"):
            MediaTrial(*given, most_tokens=64, looked_ahead=True)
        return
    assert {item.kind for item in MediaTrial(*given, most_tokens=64)._media.items} == {"video"}
    assert {item.kind for item in MediaTrial(*given, looked_ahead=True)._media.items} == {"image", "video"}
