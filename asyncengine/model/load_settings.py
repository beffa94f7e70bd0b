"""What a configuration comes to on a device and with a checkpoint, and what it may not ask for there."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch

from asyncengine.builds import BuildError, find_compiler
from asyncengine.config import EngineConfig, Quantization
from asyncengine.errors import ConfigError, UnsupportedModelError
from asyncengine.model.attention.protocol import LayerSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `EngineConfig.dtype` may be, besides "auto"."""
KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn}
"""What `EngineConfig.kv_cache_dtype` may be, besides "auto"."""
DEFAULT_LONGEST = 2048
"""Tokens in one sequence, where the configuration does not say how many positions there are."""


def device_of(name: str) -> torch.device:
    """The device that `EngineConfig.device` means.

    Raises:
        ConfigError: It is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch {torch.__version__} finds no CUDA device")
    index = int(name[5:]) if ":" in name else 0
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}; there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def dtype_of(config: EngineConfig, checkpoint: Any) -> torch.dtype:
    """The dtype of weights and activations."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    dtype: torch.dtype = checkpoint.dtype if config.quantization == "none" else torch.bfloat16
    return dtype


def settled(config: EngineConfig, checkpoint: Any, device: torch.device) -> EngineConfig:
    """The same with what weights are kept as, where that is left to the engine: codes stay codes where they can."""
    if config.quantization != "auto":
        return config
    form: Quantization = "none"
    if (
        device.type == "cpu"
        and config.dtype in ("auto", "bfloat16")
        and config.decoder_backend in ("auto", "compiled")
        and config.attention_backend in ("auto", "cpu")
    ):
        with contextlib.suppress(BuildError):
            find_compiler()
            form = checkpoint.narrowest
    return config.replace(quantization=form)


def longest_of(text: Any, config: EngineConfig) -> int:
    """Most tokens in one sequence, by a model's configuration; one that says nothing about positions limits nothing."""
    stated = getattr(text, "max_position_embeddings", None)
    return int(stated or max(DEFAULT_LONGEST, config.max_single_sequence_length or 0))


def sequences_of(config: EngineConfig, device: torch.device) -> int:
    """Most sequences in a step, where there is memory for them."""
    many = 256 if device.type == "cuda" else 64
    return config.max_num_sequence or {"interactive": 1, "local": 4, "server": many}[config.mode]


def keeps_latents(config: EngineConfig) -> bool:
    """Whether a model keeps latents if it has some: the kernels of other packages do not know these.

    Raises:
        ConfigError: They are wanted with such kernels.
    """
    knows = config.attention_backend not in ("flashinfer", "flash_attention_3")
    if config.mla and not knows:
        raise ConfigError(
            f"mla is True with attention_backend {config.attention_backend!r}, which knows no latents; allowed: "
            "'auto', 'triton', 'cpu', 'torch'"
        )
    return knows and config.mla is not False


def check_latents(config: EngineConfig, specs: Collection[LayerSpec] | None) -> None:
    """Looks whether a model has the latents that a configuration wants to be kept.

    Args:
        config: It.
        specs: Of its layers that attend; None if they are not known yet.

    Raises:
        UnsupportedModelError: It has none.
    """
    if config.mla and specs is not None and not any(spec.values_in_keys for spec in specs):
        raise UnsupportedModelError(
            f"mla is True; {config.model!r} has no multi-head latent attention that transformers would let be kept so"
        )


def select_attention(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """An attention back end, as `asyncengine.model.attention.select` chooses it.

    Raises:
        ConfigError: The one that is wanted cannot be had.
    """
    from asyncengine.model.attention.kernel import kind_of
    from asyncengine.model.attention.protocol import BackendUnavailableError
    from asyncengine.model.attention.select import select

    try:
        return select(config.attention_backend, device, kind_of(dtype, config.quantization))
    except BackendUnavailableError as error:
        raise ConfigError(f"attention_backend is {config.attention_backend!r}: {error}") from error


def serves_all(config: EngineConfig, device: torch.device) -> bool:
    """Whether whatever comes to attend serves any model as it is configured."""
    return device.type == "cpu" and config.attention_backend == "auto" and config.kv_cache_dtype == "auto"


def check_kv_dtype(config: EngineConfig, backend: Any, kv_dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a KV cache that the attention back end cannot keep.

    Raises:
        ConfigError: As it says.
    """
    from asyncengine.model.attention.protocol import BackendUnavailableError

    if config.kv_cache_dtype == "auto":
        return
    try:
        backend.check_dtype(kv_dtype, device)
    except BackendUnavailableError as error:
        raise ConfigError(
            f"kv_cache_dtype is {config.kv_cache_dtype!r} with attention_backend {config.attention_backend!r} on "
            f"{device}: {error}; allowed: 'auto', or attention_backend 'torch' or, on CUDA, 'triton'"
        ) from error


def check_layers(
    config: EngineConfig, backend: Any, watched: dict[str, Any] | None, kv_dtype: torch.dtype, device: torch.device
) -> None:
    """Refuses a model for which an attention back end that is particular has no kernels, as far as it was watched.

    Raises:
        ConfigError: As it says.
    """
    from asyncengine.model.attention.protocol import BackendUnavailableError, ParticularBackend

    if not isinstance(backend, ParticularBackend):
        return
    try:
        backend.check_dtype(kv_dtype, device)
        for spec in (watched or {}).values():
            backend.check_layer(spec)
    except BackendUnavailableError as error:
        raise ConfigError(f"attention_backend is {config.attention_backend!r}: {error}") from error


def check_quantization(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses weights in a form in which nothing multiplies them."""
    if config.quantization != "none" and dtype is not torch.bfloat16:
        given = str(dtype).removeprefix("torch.")
        raise ConfigError(f"quantization is {config.quantization!r} with dtype {given}; allowed: bfloat16")
    if config.quantization == "fp8":
        check_fp8(config, device)
    elif config.quantization == "int8" and device.type != "cpu":
        raise ConfigError(f"quantization is 'int8' on {device}; it is for the CPU; allowed: 'int4', 'fp8', 'none'")
    elif config.quantization != "none" and device.type == "cpu" and config.attention_backend not in ("auto", "cpu"):
        raise ConfigError(
            f"quantization is {config.quantization!r} on the CPU with attention_backend "
            f"{config.attention_backend!r}; allowed: 'auto', 'cpu'"
        )


def check_fp8(config: EngineConfig, device: torch.device) -> None:
    """Refuses weights in fp8 where nothing multiplies them."""
    if config.decoder_backend == "compiled" and device.type == "cpu":
        raise ConfigError(
            "quantization is 'fp8' with decoder_backend 'compiled', which has no products in fp8 on the CPU; allowed: "
            "'auto', 'transformers'"
        )
    here = device.type == "cuda" and torch.cuda.is_available()  # else it is reckoned what a load would take elsewhere
    if here and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ConfigError(
            f"quantization is 'fp8' on a device of compute capability {capability[0]}.{capability[1]} "
            f"({torch.cuda.get_device_name(device)}); allowed: 8.9 and later"
        )
