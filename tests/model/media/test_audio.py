"""Audio in prompts, to models that listen: what they say of it is what they say in transformers alone."""

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
import soundfile
import torch

from asyncengine import (
    AsyncEngine,
    AudioPrompt,
    EngineConfig,
    GenerationConfig,
    InvalidRequestError,
    StepError,
    UnsupportedModelError,
)
from asyncengine.model import architecture as architectures
from asyncengine.model.media import door
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.media.processor import processor
from asyncengine.model.media.trial import MediaTrial
from tests.model.media import listening
from tests.model.media.checkpoints import picture
from tests.model.media.listening import LISTENING, RATE, sound

pytestmark = pytest.mark.loops("either")

FIRST, SECOND = sound(1, 0.7), sound(2, 1.13)
TOKENS = 10


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random checkpoint once and returns its directory."""
    written: dict[object, Path] = {}

    def get(architecture: str, seed: int = 0) -> Path:
        key = architecture, seed
        if key not in written:
            written[key] = listening.write(tmp_path_factory.mktemp(architecture), architecture, seed)
        return written[key]

    return get


def engine(path: Path, **changes: Any) -> AsyncEngine:
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "prefill_chunk_size": 8, "kv_cache_page_size": 4, "max_num_sequence": 4,
        "max_single_sequence_length": 400, "max_total_sequence_length": 800, "audio": True,
    }  # fmt: skip
    return AsyncEngine(EngineConfig(str(path), **(values | changes)))


def greedy(tokens: int = TOKENS, **more: Any) -> GenerationConfig:
    return GenerationConfig(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


def asking(*parts: Any) -> list[dict[str, Any]]:
    """One message of texts, sounds and pictures."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, np.ndarray):
            content.append({"type": "audio", "audio": (part, RATE)})
        else:
            content.append({"type": "image", "image": part})
    return [{"role": "user", "content": content}]


def told(path: Path, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers says."""
    parts = messages[0]["content"]
    sounds = [part["audio"][0] for part in parts if part["type"] == "audio"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    marks = [part if part["type"] == "text" else {"type": part["type"]} for part in parts]
    return listening.reference(path, [{"role": "user", "content": marks}], sounds, TOKENS, images)


def encoded(serving: AsyncEngine) -> int:
    loaded = serving._thread.core.loaded
    assert loaded is not None
    return loaded.model._media.encoded  # type: ignore[attr-defined, no-any-return]


CHANGES: dict[str, dict[str, Any]] = {
    "glmasr": {"speculative_mode": "ngram"},
    "qwen3_asr": {"max_single_sequence_length": 56, "max_total_sequence_length": 60, "prefix_cache_mode": "disable"},
    "omniasr": {"decoder_backend": "transformers"},
    "gemma4": {"images": False},
}
"""What some of them are tried with besides: guesses, preemptions, the model's own modules."""


IN_WINDOWS = ("glmasr", "audioflamingo3", "musicflamingo", "moss_transcribe_diarize")
"""Those whose processors cut what is longer than two seconds into windows, here."""


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.long if name == "gemma4" else ()) for name in LISTENING],  # see beside images
)
@pytest.mark.in_short("omniasr", "moss_transcribe_diarize", "qwen2_audio", "qwen3_asr", "audioflamingo3")
async def test_greedy_equals_transformers(architecture: str, hearing: Callable[..., Path]) -> None:
    """Two in one step, one in two branches, in chunks that part them, and again where all of it is cached."""
    path = hearing(architecture)
    longer = sound(3, 2.6) if architecture in IN_WINDOWS else SECOND
    asked = [asking("hear ", FIRST, " what?"), asking(longer, "and?")]
    expected = [told(path, each) for each in asked]
    assert expected[0] != expected[1]
    changes = CHANGES.get(architecture, {})
    async with engine(path, **changes) as serving:
        assert serving.takes_audio and not serving.takes_images
        several = [serving.chat(each, greedy(n=2)) for each in asked]
        for result, wanted in zip(await asyncio.gather(*several), expected, strict=True):
            assert [list(branch.token_ids) for branch in result.outputs] == [wanted] * 2
        assert encoded(serving) == 2
        preempted = serving.metrics().counters.preemptions
        assert preempted > 0 if architecture == "qwen3_asr" else preempted == 0
        again = await serving.chat(asked[0], greedy())
        assert list(again.token_ids) == expected[0]
        if "prefix_cache_mode" not in changes:
            assert again.usage.cached_tokens == (again.usage.prompt_tokens - 1) // 4 * 4
        assert encoded(serving) == 2


@pytest.mark.parametrize("backend", ["auto", pytest.param("transformers", marks=pytest.mark.long)])
async def test_several_in_one_prompt(backend: str, hearing: Callable[..., Path]) -> None:
    path = hearing("qwen2_audio")
    asked = asking("hear ", SECOND, " and ", FIRST, " and ", SECOND)
    async with engine(path, decoder_backend=backend) as serving:
        result = await serving.chat(asked, greedy())
        assert list(result.token_ids) == told(path, asked)
        assert encoded(serving) == 2  # one of them is there twice
        counters = serving.metrics().counters
        assert counters.image_tokens == 0 < counters.audio_tokens < counters.prompt_tokens


async def test_scores_of_a_prompt(hearing: Callable[..., Path]) -> None:
    path = hearing("qwen2_audio")
    parts = [{"type": "text", "text": "hear "}, {"type": "audio"}, {"type": "text", "text": " what?"}]
    messages = [{"role": "user", "content": parts}]
    given = listening.inputs(path, messages, [FIRST])
    with torch.inference_mode():
        logprobs = listening.loaded(path)(**given).logits[0].log_softmax(-1)
    ids = given["input_ids"][0]
    async with engine(path) as serving:
        result = await serving.chat(asking("hear ", FIRST, " what?"), greedy(1, prompt_logprobs=0))
    assert result.prompt_token_ids is not None and result.prompt_logprobs is not None
    assert list(result.prompt_token_ids) == ids.tolist()
    wanted = logprobs[:-1].gather(-1, ids[1:, None])[:, 0].tolist()
    assert [entry.logprob for entry in result.prompt_logprobs if entry] == pytest.approx(wanted, abs=1e-3)


async def test_beside_images(hearing: Callable[..., Path]) -> None:
    path, image = hearing("gemma4"), picture(1, 40, 32)
    asked = [asking("see ", image, " hear ", FIRST, "?"), asking(SECOND, image), asking(image, "?")]
    async with engine(path, images=True, prefill_chunk_size=16) as serving:
        found = await asyncio.gather(*(serving.chat(each, greedy()) for each in asked))
        assert [list(each.token_ids) for each in found] == [told(path, each) for each in asked]
        text = "<|audio|><|image|>?"
        prompt = AudioPrompt(text, [(FIRST, RATE)], [image])
        with pytest.raises(InvalidRequestError, match=r"2 marks of audio .*; expected 3|0 marks of images"):
            await serving.generate(AudioPrompt("<|audio|>", [(FIRST, RATE)], [image]))
        assert len((await serving.generate(prompt, greedy(3))).token_ids) == 3


async def test_wrong_audio(hearing: Callable[..., Path]) -> None:
    """Nothing of it reaches the model."""
    wrong: dict[str, Any] = {
        "no samples": (FIRST[:0], RATE),
        "not finite": (FIRST * np.float32("nan"), RATE),
        "without its sampling rate": FIRST,
        "no file that libsndfile reads": b"not audio",
        r"audio of 2\.50 s is too long .* leaves out the end of one of 2\.50 s": (sound(3, 2.5), RATE),
        r"audio of 3\.00 s is too long .* leaves out the end of one of 2\.50 s": (sound(3, 3.0), RATE),
    }
    async with engine(hearing("qwen2_audio")) as serving:
        for message, audio in wrong.items():
            content = [{"type": "audio", "audio": each} for each in ((FIRST, RATE), audio)]
            with pytest.raises(InvalidRequestError, match=rf"audio\[1\]: .*{message}"):
                await serving.chat([{"role": "user", "content": content}])
        with pytest.raises(InvalidRequestError, match=r"first 8 audio come to .* tokens; allowed: 399"):
            await serving.chat(asking(*[sound(seed, 2.0) for seed in range(20)]))
        with pytest.raises(InvalidRequestError, match="more marks of audio"):
            await serving.chat(asking("<|AUDIO|>", FIRST))
        assert serving.metrics().counters.steps == 0
        assert len((await serving.chat(asking(sound(4, 2.0)), greedy(3))).token_ids) == 3  # as long as it may be
        with pytest.raises(InvalidRequestError, match="does not say how it is asked to transcribe"):
            await serving.transcribe((FIRST, RATE))


async def test_files_and_other_rates(hearing: Callable[..., Path]) -> None:
    path = hearing("qwen2_audio")
    held = io.BytesIO()
    soundfile.write(held, np.repeat(FIRST, 2), 2 * RATE, format="WAV", subtype="FLOAT")
    data = {"data": base64.b64encode(held.getvalue()).decode(), "format": "wav"}
    async with engine(path) as serving:
        asked = [{"role": "user", "content": [{"type": "input_audio", "input_audio": data}]}]
        result = await serving.chat(asked, greedy())
        given = [{"role": "user", "content": [{"type": "audio", "audio": (np.repeat(FIRST, 2), 2 * RATE)}]}]
        assert list((await serving.chat(given, greedy())).token_ids) == list(result.token_ids)
        assert result.usage.audio_tokens > 0 and encoded(serving) == 1  # it is the same to the prefix cache, too


@pytest.mark.parametrize("backend", ["auto", pytest.param("transformers", marks=pytest.mark.long)])
async def test_one_that_cannot_be_encoded_ends_its_own_requests(
    backend: str, hearing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hearing("qwen2_audio")
    asked = [asking("text"), asking(FIRST), asking(SECOND)]
    encode = MediaEncoder._encode

    def failing(self: MediaEncoder, item: Any) -> Any:
        if len(item.places) < 20:  # which FIRST has, and SECOND has not
            raise MemoryError("no memory for so long an audio")
        return encode(self, item)

    async with engine(path, decoder_backend=backend) as serving:
        with monkeypatch.context() as patch:
            patch.setattr(MediaEncoder, "_encode", failing)
            found: list[Any] = await asyncio.gather(
                *(serving.chat(each, greedy()) for each in asked), return_exceptions=True
            )
        assert isinstance(found[1], StepError)
        assert "an audio cannot be encoded: no memory for so long an audio" in str(found[1])
        assert [list(found[at].token_ids) for at in (0, 2)] == [told(path, asked[at]) for at in (0, 2)]


async def test_what_says_something_else_is_refused_and_serves_text(
    hearing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hearing("qwen2_audio")
    embeddings, noise = door.embeddings, 0.0

    def louder(*given: Any, **named: Any) -> Any:
        found = embeddings(*given, **named)
        return found * 1.5 if not noise else found + torch.randn_like(found) * noise

    monkeypatch.setattr(door, "embeddings", louder)
    async with engine(path, audio=None) as serving:
        assert not serving.takes_audio
        [note] = [note for note in serving.health().notes if "audio" in note]
        assert note.startswith("audio: refused: of audio it says something else than in transformers: relative error")
        with pytest.raises(InvalidRequestError, match="the model takes none: of audio it says something else"):
            await serving.chat(asking(FIRST))
        assert list((await serving.chat(asking("text"), greedy())).token_ids) == told(path, asking("text"))
    noise = 1e-6
    reason = "its encoder makes something else of the same audio each time"
    with pytest.raises(UnsupportedModelError, match=rf"audio is True; .* takes none: {reason}"):
        async with engine(path):
            pass


@pytest.mark.parametrize(("architecture", "seconds"), [("qwen2_audio", 1.0), ("glmasr", 30.0)])
def test_a_device_has_room_for_as_long_as_is_heard(
    architecture: str, seconds: float, hearing: Callable[..., Path]
) -> None:
    path = hearing(architecture)
    model, prepares = listening.load(path), processor(path, ("audio",))
    architectures.attend_here(model)
    layers, device = architectures.record(model), torch.device("cpu")
    trial = MediaTrial(model, layers, prepares, ["audio"], "", device, one_audio=architecture == "glmasr")
    [item] = trial.large()
    asked = [{"role": "user", "content": [{"type": "audio"}]}]
    tokens = len(listening.inputs(path, asked, [sound(1, seconds)])["input_ids"][0])
    assert len(item.places) == len(trial.encoder(model).features(item).rows)
    assert 0 < tokens - len(item.places) < 40  # those of the text around it


async def test_narrow_weights_of_which_nothing_is_left(hearing: Callable[..., Path]) -> None:
    """What listens is not rounded, and the trial allows for what rounding of the rest does."""
    async with engine(hearing("qwen2_audio"), dtype="bfloat16", quantization="int8") as serving:
        assert len((await serving.chat(asking(FIRST), greedy(2))).token_ids) == 2
        core = serving._thread.core
        assert core.loaded is not None and core.view is not None
        reader = core.view.media_reader
        model: Any = core.loaded.model
        weights = [weakref.ref(each) for each in model._model.parameters()]
        del model
        await serving.unload()
        gc.collect()
        assert reader is not None and not any(weight() is not None for weight in weights)


@pytest.mark.parametrize(
    ("architecture", "asked"),
    [
        ("glmasr", {"prompt": "Write it down."}),
        ("qwen3_asr", {"language": "en"}),
        ("omniasr", {}),
        ("moss_transcribe_diarize", {}),
        ("audioflamingo3", {}),
    ],
)
@pytest.mark.in_short("moss_transcribe_diarize", "audioflamingo3", "omniasr")
async def test_transcripts_are_asked_for_as_transformers_does(
    architecture: str, asked: dict[str, str], hearing: Callable[..., Path]
) -> None:
    path = hearing(architecture)
    made = listening._processor(path, ("audio",))
    more = {} if hasattr(made, "text_kwargs") else {"return_tensors": "pt"}
    given = made.apply_transcription_request(audio=FIRST, **asked, **more).to(torch.float32)
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    tokens = listening.loaded(path).generate(**given, **settings)[0, given["input_ids"].shape[1] :].tolist()
    parsed = {"return_format": "transcription_only"} if architecture == "qwen3_asr" else {}
    wanted = made.decode(tokens, skip_special_tokens=True, **parsed)
    async with engine(path) as serving:
        ours = {"hint" if name == "prompt" else name: value for name, value in asked.items()}
        found = await serving.transcribe((FIRST, RATE), greedy(), **ours)
        assert found.text == wanted.strip()
        assert found.usage.prompt_tokens == given["input_ids"].shape[1]
        if architecture == "glmasr":
            with pytest.raises(InvalidRequestError, match="language is 'en'; the model is not told any"):
                await serving.transcribe((FIRST, RATE), language="en")
            with pytest.raises(InvalidRequestError, match="the prompt has 2 audio; the model takes 1"):
                await serving.chat(asking(FIRST, SECOND))


async def test_it_can_be_left_out(hearing: Callable[..., Path]) -> None:
    async with engine(hearing("gemma4"), audio=False, images=True) as serving:
        assert serving.takes_images and not serving.takes_audio
        with pytest.raises(InvalidRequestError, match="the model takes none: audio is False"):
            await serving.chat(asking(FIRST))
        assert not any("audio" in note for note in serving.health().notes)
    with pytest.raises(UnsupportedModelError, match=r"audio is True; .* takes none: its checkpoint has no encoder of"):
        async with engine(Path("tiny")):
            pass


async def test_a_checkpoint_with_an_adapter_for_audio_is_refused(hearing: Callable[..., Path], tmp_path: Path) -> None:
    for file in hearing("qwen2_audio").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="an adapter beside its weights"):
        async with engine(tmp_path):
            pass
