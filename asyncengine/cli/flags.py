"""Flags that several commands have, each written once. vLLM's spelling where the meaning is vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from asyncengine.config import EngineConfig
    from asyncengine.generation import GenerationConfig
    from asyncengine.loop.prepare import RequestOptions

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, GGUF file, id in the local cache, or 'tiny'.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """What a model is loaded with; every one has a default that fits the model and the machine."""

    max_model_len: Annotated[int | None, typer.Option(help="Most tokens in one sequence, prompt and output.")] = None
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences in one step.")] = None
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most prompt tokens in one step.")] = None
    block_size: Annotated[int | None, typer.Option(help="Tokens in a block of the KV cache.")] = None
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Share of memory to use: on CUDA of all of it, else of what is free, for the KV cache."),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of weights and KV cache.")
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8_e4m3"], typer.Option(help="fp8_e4m3: keys and values of one byte each, on CUDA.")
    ] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    quantization: Annotated[
        Literal["auto", "none", "int8", "int4", "fp8"],
        typer.Option(
            help="Keep weights in fewer bits, with bfloat16: int8 on the CPU, int4, fp8 on CUDA; auto keeps codes."
        ),
    ] = "auto"
    speculative_model: Annotated[
        str | None,
        typer.Option(
            help="Who guesses tokens ahead: a smaller model of the same vocabulary, a head, 'mtp' or 'ngram'."
        ),
    ] = None
    num_speculative_tokens: Annotated[int, typer.Option(help="Most tokens guessed at a time; 0 adapts.")] = 0
    images: Annotated[
        bool | None, typer.Option(help="Take images in prompts, or the load fails; without, if the model can.")
    ] = None
    audio_input: Annotated[
        bool | None, typer.Option(help="Take audio in prompts, or the load fails; without, if the model can.")
    ] = None
    videos: Annotated[
        bool | None, typer.Option(help="Take videos in prompts, or the load fails; without, if the model can.")
    ] = None
    mla: Annotated[
        bool | None,
        typer.Option(help="Keep latents in the KV cache, or the load fails; without, if the model has some."),
    ] = None
    enable_prefix_caching: Annotated[bool, typer.Option(help="Keep computed prompts for reuse.")] = True
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A LoRA adapter as PEFT saves it; may be given several times."),
    ] = None

    def config(self, model: str, loader: object = None, **more: Any) -> EngineConfig:
        """The engine's configuration.

        Args:
            model: What is to be loaded.
            loader: How, as in `AsyncEngine`. If None, what is not on disk is refused here, before anything that takes
                time is imported.
            **more: Fields that no flag stands for.

        Raises:
            ConfigError: A value is wrong.
            CheckpointError: A model is not there.
            AdapterError: An adapter is not there.
            Failure: An adapter has no name, or that of another one.
        """
        from asyncengine.config import EngineConfig
        from asyncengine.model.location import names_head

        guesses, drafts = self.speculative_model, dict[str, Any]()
        if guesses in ("ngram", "mtp"):
            drafts = {"speculative_mode": guesses}
        elif guesses is not None:
            mode = "eagle3" if names_head(guesses) else "small_draft"
            drafts = {"speculative_mode": mode, "additional_models": (guesses,)}
        config = EngineConfig(
            model,
            **drafts,
            spec_draft_length=self.num_speculative_tokens,
            max_single_sequence_length=self.max_model_len,
            max_num_sequence=self.max_num_seqs,
            prefill_chunk_size=self.max_num_batched_tokens,
            kv_cache_page_size=self.block_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            device=self.device,
            quantization=self.quantization,
            images=self.images,
            audio=self.audio_input,
            videos=self.videos,
            mla=self.mla,
            prefix_cache_mode="radix" if self.enable_prefix_caching else "disable",
            adapters=self.adapters(),
            **more,
        )
        if loader is None:
            from asyncengine.model.location import check_there

            check_there(config)
        return config

    def adapters(self) -> dict[str, str]:
        """The directories of the adapters, by their names.

        Raises:
            Failure: One of them has no name, or that of another one.
        """
        from asyncengine.cli.command import Failure

        found: dict[str, str] = {}
        for value in self.lora_modules or ():
            name, _, path = value.partition("=")
            if not name or not path:
                raise Failure(f"--lora-modules is {value!r}; expected NAME=DIR", 2)
            if name in found:
                raise Failure(f"--lora-modules is {value!r}; {name!r} is {found[name]!r} already", 2)
            found[name] = path
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweringFlags(EngineFlags):
    """What a model is loaded with that answers in this process, and which of its adapters it answers with."""

    adapter: Annotated[
        str | None, typer.Option(help="Answer with this one of --lora-modules; without, MODEL alone does.")
    ] = None

    def options(self) -> RequestOptions:
        """How a request is handled.

        Raises:
            Failure: The adapter is not among those that are loaded.
        """
        from asyncengine.cli.command import Failure
        from asyncengine.loop.prepare import RequestOptions

        known = self.adapters()
        if self.adapter is not None and self.adapter not in known:
            names = ", ".join(map(repr, known)) or "none"
            raise Failure(f"--adapter is {self.adapter!r}; named by --lora-modules: {names}", 2)
        return RequestOptions(adapter=self.adapter)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFlags:
    """How answers are generated; where nothing is given, the model's own defaults hold."""

    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answers.")] = None
    num_beams: Annotated[int, typer.Option(help="More than 1: the best answer of a beam search of this width.")] = 1

    def config(self) -> GenerationConfig:
        """What a request asks for.

        Raises:
            InvalidRequestError: A value is wrong.
        """
        from asyncengine.generation import GenerationConfig

        return GenerationConfig(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            num_beams=self.num_beams,
        )


ENGINE_FLAGS = tuple(field.name for field in fields(EngineFlags))
GENERATION_FLAGS = tuple(field.name for field in fields(GenerationFlags))

FLAG_OF_FIELD = {
    "max_single_sequence_length": "--max-model-len",
    "max_num_sequence": "--max-num-seqs",
    "prefill_chunk_size": "--max-num-batched-tokens",
    "kv_cache_page_size": "--block-size",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "adapters": "--lora-modules",
    "additional_models": "--speculative-model",
    "speculative_mode": "--speculative-model",
    "spec_draft_length": "--num-speculative-tokens",
    "max_queue_size": "--max-queue-size",
    "max_concurrency": "--max-concurrency",
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "seed": "--seed",
    "num_beams": "--num-beams",
    "api_key": "--api-key",
    "allowed_media_domains": "--allowed-media-domains",
    "prefix_cache_file": "--prefix-cache-file",
}
"""How a setting of the engine or the server is called here."""
