"""`EngineConfig`: the one way to configure an engine. Immutable values; no torch, no asyncio."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from asyncengine.errors import ConfigError

Mode = Literal["local", "interactive", "server"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
PrefixCacheMode = Literal["radix", "disable"]
PrefillMode = Literal["hybrid", "chunked"]
SpeculativeMode = Literal["disable", "ngram", "small_draft", "eagle3", "mtp"]
AttentionBackend = Literal["auto", "cpu", "torch", "triton", "flashinfer", "flash_attention_3"]
DecoderBackend = Literal["auto", "compiled", "transformers"]
Quantization = Literal["auto", "none", "int8", "int4", "fp8"]
KVCacheDType = Literal["auto", "fp8_e4m3"]
GraphCapture = Literal["idle", "load"]
GrammarLibrary = Literal["auto", "llguidance", "xgrammar"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to serve and within which limits. Fields that are None are derived when the model is loaded.

    `AsyncEngine.complete_engine_config` is the same object with every None filled in.

    Attributes:
        model: A checkpoint directory, a GGUF file or a directory with one, the id of a model in the local Hugging Face
            cache (``"owner/name:Q4_K_M"`` for a GGUF file with that in its name), or ``"tiny"`` for the embedded model.
            Nothing is ever downloaded.
        tokenizer: Where to read the tokenizer from instead, named likewise.
        device: ``"auto"`` (CUDA if there is one, else CPU), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype: Of weights and KV cache. ``"auto"`` is the checkpoint's own.
        kv_cache_dtype: ``"fp8_e4m3"`` keeps keys and values as one byte each, so that the same memory holds twice as
            many tokens as in 16 bits; needs the attention back end ``"triton"`` (compute capability 8.9 or later) or
            ``"torch"``. ``"auto"`` keeps them in `dtype`.
        mode: How limits that are not given are derived, after MLC LLM. ``"interactive"``: one sequence.
            ``"local"``: at most 4 sequences. Both keep one context window of KV cache per sequence.
            ``"server"``: many sequences, and as much KV cache as memory allows.
        max_num_sequence: Most sequences in one step.
        max_total_sequence_length: KV cache capacity in tokens, over all sequences.
        max_single_sequence_length: Most tokens in one sequence, prompt and output together. By default as many as the
            model allows, or up to which its positions do not change with the length.
        prefill_chunk_size: Most prompt tokens computed in one step.
        kv_cache_page_size: Tokens per KV cache block.
        gpu_memory_utilization: Share of memory that may be used. On CUDA: share of the device's memory for weights,
            activations and KV cache together (default 0.9). On CPU: share of the memory that is free once the
            weights are loaded, for the KV cache alone (default 0.4).
        prefix_cache_mode: ``"radix"`` keeps computed prompts for reuse; ``"disable"`` does not.
        prefix_cache_max_num_recycling_seqs: Most finished sequences whose blocks are kept; None is unlimited.
        prefill_mode: ``"hybrid"`` computes prefill chunks and decodes in one step; ``"chunked"`` in separate steps.
        additional_models: The draft model of ``speculative_mode="small_draft"``, or the draft head of ``"eagle3"``,
            named as `model` is: one with the same vocabulary. Empty otherwise.
        speculative_mode: Who guesses tokens ahead, which one step of the model then verifies: ``"ngram"`` looks for the
            last tokens further up in the text, ``"small_draft"`` asks a smaller model, ``"eagle3"`` a head that sees
            the model's hidden states, ``"mtp"`` the head that the model's own checkpoint has for that, ``"disable"``
            guesses none. The output is the same.
        spec_draft_length: Most tokens guessed for each sequence in a step; 0 decides by load and by how many guesses
            were right so far.
        adapters: LoRA adapters that are loaded with the model: directories as PEFT saves them, by the names that
            requests call them. `AsyncEngine.load_adapter` loads more.
        tensor_parallel_shards: Must be 1: not available yet.
        attention_backend: ``"cpu"`` is the compiled kernel for the CPU, ``"triton"`` the one for CUDA, ``"torch"``
            needs no compiler and runs on any device, ``"auto"`` takes the fastest of these that works. ``"flashinfer"``
            and ``"flash_attention_3"`` are the kernels of those packages, if they are installed: for bfloat16 and
            float16, without attention sinks or the promise that the batch changes no bits.
        decoder_backend: ``"compiled"`` runs, for the family of models that it knows, a whole step in compiled code on
            the CPU, and its products between fused kernels on CUDA; ``"transformers"`` runs the model's own modules
            around the attention, on the CPU with compiled products in them; ``"auto"`` takes the first where it can,
            and on CUDA where it was measured to be faster when the model was loaded.
        quantization: How weights are kept while the model serves, however the checkpoint stores them. ``"auto"`` keeps
            codes of four bits as ``"int4"``, and of GGUF's blocks those of more as ``"int8"``, on the CPU where `dtype`
            and back ends allow it and there is a compiler; all else as ``"none"``, which keeps them in `dtype`.
            ``"int8"`` keeps one byte each, with one scale for each output, or a GGUF file's codes with its scales;
            needs the compiled code of the CPU.
            ``"int4"`` keeps four bits each: the codes of a checkpoint that has such (GPTQ, AWQ, MXFP4, GGUF and
            others), else the nearest of sixteen multiples of a scale that 32 weights share; needs the compiled code of
            the CPU, or CUDA. ``"fp8"`` keeps and multiplies linear layers in fp8, with one scale for each output and
            for each token; needs a CUDA device of compute capability 8.9 or later (a CPU computes the same, slowly).
            The last three need dtype bfloat16, which ``"auto"`` then is.
        graph_capture: When CUDA graphs are captured. ``"idle"``: a few when the model is loaded, so that it is ready
            soon, and the others while there are no requests. ``"load"``: all when it is loaded, so that it is as fast
            as it will be when it is ready; for benchmarks, for engines that are never idle, and for programs that wait
            for the whole device, empty torch's cache or draw the device's random numbers by themselves, which must not
            be done beside a capture.
        images: Whether prompts may have images in them. None: if the checkpoint has an encoder for them, Pillow is
            installed, and a trial shows that the model says of images what it says in transformers;
            `AsyncEngine.health` says why not. True: the same, or the load fails. False: images are refused, and the
            encoder is not loaded where the model can do without.
        audio: Whether prompts may have audio in them; None, True and False as of `images`.
        videos: Whether prompts may have videos in them; None, True and False as of `images`. Where `images` is False,
            None is as False.
        mla: Whether layers of multi-head latent attention (DeepSeek, GLM-4.7-Flash, Kimi-Linear and others) keep their
            latents, some hundred numbers per token, and not the keys and values of all heads that are made of them.
            None: where a model has such layers, unless the attention back end is ``"flashinfer"`` or
            ``"flash_attention_3"``. True: the same, or the load fails. False: keys and values; steps of many prompt
            tokens then have less to compute.
        grammar_backend: Compiles `GenerationConfig.response_format`: ``"llguidance"``, ``"xgrammar"``, or ``"auto"``,
            which takes the first of these that is installed.
        max_queue_size: Most requests that wait for their first step; None is unlimited.
        step_timeout: Seconds after which `AsyncEngine.health` calls a step stalled.
    """

    model: str
    tokenizer: str | None = field(default=None, kw_only=True)
    device: str = field(default="auto", kw_only=True)
    dtype: DType = field(default="auto", kw_only=True)
    kv_cache_dtype: KVCacheDType = field(default="auto", kw_only=True)
    mode: Mode = field(default="server", kw_only=True)
    max_num_sequence: int | None = field(default=None, kw_only=True)
    max_total_sequence_length: int | None = field(default=None, kw_only=True)
    max_single_sequence_length: int | None = field(default=None, kw_only=True)
    prefill_chunk_size: int | None = field(default=None, kw_only=True)
    kv_cache_page_size: int | None = field(default=None, kw_only=True)
    gpu_memory_utilization: float | None = field(default=None, kw_only=True)
    prefix_cache_mode: PrefixCacheMode = field(default="radix", kw_only=True)
    prefix_cache_max_num_recycling_seqs: int | None = field(default=None, kw_only=True)
    prefill_mode: PrefillMode = field(default="hybrid", kw_only=True)
    additional_models: tuple[str, ...] = field(default=(), kw_only=True)
    speculative_mode: SpeculativeMode = field(default="disable", kw_only=True)
    spec_draft_length: int = field(default=0, kw_only=True)
    adapters: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)
    tensor_parallel_shards: int = field(default=1, kw_only=True)
    attention_backend: AttentionBackend = field(default="auto", kw_only=True)
    grammar_backend: GrammarLibrary = field(default="auto", kw_only=True)
    decoder_backend: DecoderBackend = field(default="auto", kw_only=True)
    quantization: Quantization = field(default="auto", kw_only=True)
    graph_capture: GraphCapture = field(default="idle", kw_only=True)
    images: bool | None = field(default=None, kw_only=True)
    audio: bool | None = field(default=None, kw_only=True)
    videos: bool | None = field(default=None, kw_only=True)
    mla: bool | None = field(default=None, kw_only=True)
    max_queue_size: int | None = field(default=None, kw_only=True)
    step_timeout: float = field(default=60.0, kw_only=True)

    def __post_init__(self) -> None:
        _text("model", self.model)
        if self.tokenizer is not None:
            _text("tokenizer", self.tokenizer)
        _text("device", self.device)
        if self.device not in ("auto", "cpu", "cuda") and not (
            self.device.startswith("cuda:") and self.device.isascii() and self.device[5:].isdigit()
        ):
            raise ConfigError(f"device is {self.device!r}; allowed: 'auto', 'cpu', 'cuda', 'cuda:N'")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                allowed = ", ".join(repr(choice) for choice in choices)
                raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")
        for name, given in (("images", self.images), ("audio", self.audio), ("videos", self.videos), ("mla", self.mla)):
            if given is not None and not isinstance(given, bool):
                raise ConfigError(f"{name} is {given!r}; allowed: True, False, None")
        for name in (
            "max_num_sequence",
            "max_total_sequence_length",
            "max_single_sequence_length",
            "prefill_chunk_size",
            "kv_cache_page_size",
            "max_queue_size",
        ):
            _integer(name, getattr(self, name), minimum=1)
        _integer("prefix_cache_max_num_recycling_seqs", self.prefix_cache_max_num_recycling_seqs, minimum=0)
        if self.gpu_memory_utilization is not None:
            _number("gpu_memory_utilization", self.gpu_memory_utilization, low=0.0, high=1.0)
        _number("step_timeout", self.step_timeout, low=0.0, high=math.inf)
        if not isinstance(self.additional_models, (list, tuple)):
            raise ConfigError(f"additional_models is {self.additional_models!r}; expected a list")
        object.__setattr__(self, "additional_models", tuple(self.additional_models))
        for model in self.additional_models:
            _text("additional_models", model)
        wanted = {"small_draft": "draft model", "eagle3": "draft head"}.get(self.speculative_mode)
        if len(self.additional_models) != int(wanted is not None):
            raise ConfigError(
                f"additional_models is {self.additional_models!r} with speculative_mode {self.speculative_mode!r}; "
                + (f"expected one {wanted}" if wanted else "only 'small_draft' and 'eagle3' take a model")
            )
        if self.spec_draft_length is None:
            raise ConfigError("spec_draft_length is None; expected an integer in 0..32")
        _integer("spec_draft_length", self.spec_draft_length, minimum=0)
        if self.spec_draft_length > 32:
            raise ConfigError(f"spec_draft_length is {self.spec_draft_length}; expected an integer in 0..32")
        if self.spec_draft_length and self.speculative_mode == "disable":
            raise ConfigError(
                f"spec_draft_length is {self.spec_draft_length} with speculative_mode 'disable'; expected 0, or "
                "another speculative_mode"
            )
        if not isinstance(self.adapters, Mapping):
            raise ConfigError(f"adapters is {self.adapters!r:.80}; expected directories by names")
        for name, path in self.adapters.items():
            if not (isinstance(name, str) and name and isinstance(path, str) and path):
                raise ConfigError(f"adapters is {{{name!r:.80}: {path!r:.80}}}; expected non-empty strings")
        object.__setattr__(self, "adapters", dict(self.adapters))
        if self.tensor_parallel_shards != 1:
            raise ConfigError(
                f"tensor_parallel_shards is {self.tensor_parallel_shards!r}; only 1 is available in this version"
            )

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """Reads the JSON object that `to_json` writes; fields may be left out.

        Raises:
            ConfigError: Not a JSON object, an unknown key (with the nearest known one), or a wrong value.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"the configuration is not JSON ({error}); to name a model, pass EngineConfig(model={text[:80]!r})"
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"the configuration is a JSON {type(values).__name__}; expected an object")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Builds a configuration from a mapping of field names; unknown keys are errors.

        Raises:
            ConfigError: As `from_json`.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown configuration key {key!r}{hint}")
        if "model" not in values:
            raise ConfigError("the configuration has no 'model'")
        return cls(**values)

    def to_json(self) -> str:
        """Writes every field as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed.

        Raises:
            ConfigError: As `from_json`.
        """
        return EngineConfig.from_dict({f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes)


_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": get_args(DType),
    "kv_cache_dtype": get_args(KVCacheDType),
    "graph_capture": get_args(GraphCapture),
    "mode": get_args(Mode),
    "prefix_cache_mode": get_args(PrefixCacheMode),
    "prefill_mode": get_args(PrefillMode),
    "speculative_mode": get_args(SpeculativeMode),
    "attention_backend": get_args(AttentionBackend),
    "grammar_backend": get_args(GrammarLibrary),
    "decoder_backend": get_args(DecoderBackend),
    "quantization": get_args(Quantization),
}


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} is {value!r}; expected a non-empty string")


def _integer(name: str, value: object, *, minimum: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; expected an integer >= {minimum}")


def _number(name: str, value: object, *, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise ConfigError(f"{name} is {value!r}; expected a number in ({low}, {high}]")
