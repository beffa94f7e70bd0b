"""Tiny random checkpoints of models that look, and what transformers makes of them. None is downloaded."""

from __future__ import annotations

import functools
import importlib.util
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from asyncengine.model.media.processor import processor

VOCABULARY = 320
END = 0
GAIN = 1.6


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint is written from. A token's name in place of an index stands for the token's index."""

    config: str
    text: dict[str, Any]
    vision: dict[str, Any]
    values: dict[str, Any]
    """What the configuration holds beside those of text and vision."""
    processor: str
    image_processor: dict[str, Any]
    placeholder: str
    """What the chat template writes for an image."""
    tokens: tuple[str, ...]
    named_tokens: dict[str, str] = field(default_factory=dict)
    """Those that the processor asks the tokenizer for by name."""
    processor_values: dict[str, Any] = field(default_factory=dict)
    video_processor: dict[str, Any] | None = None
    needs: tuple[str, ...] = ()
    """Packages that transformers' processor of it asks for."""
    film: str = ""
    """What the chat template writes for a video."""


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": END,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
VISION_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
}  # fmt: skip

QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_VALUES: dict[str, Any] = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>", "tie_word_embeddings": False,
}  # fmt: skip
QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN_IMAGES: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 2560},
}  # fmt: skip
QWEN_VIDEOS = QWEN_IMAGES | {"image_processor_type": None}
QWEN_FILM = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN3_TOWER = QWEN_TOWER | {
    "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
INTERLEAVED = MROPE | {"mrope_interleaved": True}


def _qwen(config: str, text: dict[str, Any], vision: dict[str, Any], named: str, video: str) -> Architecture:
    return Architecture(
        config, text, vision, QWEN_VALUES, named, QWEN_IMAGES, "<|vision_start|><|image_pad|><|vision_end|>",
        QWEN_TOKENS, video_processor=QWEN_VIDEOS | {"video_processor_type": video}, film=QWEN_FILM,
    )  # fmt: skip


DELTA: dict[str, Any] = TEXT | {
    "num_hidden_layers": 4, "head_dim": 32, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "rope_parameters": INTERLEAVED | {
        "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
SMOLVLM_TOKENS = (
    "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)  # fmt: skip

PINPOINTS = [[16, 32], [32, 16], [32, 32]]
SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False}
TILES: dict[str, Any] = {"size": {"height": 16, "width": 16}, "min_patches": 1, "max_patches": 3}
COHERE2 = TEXT | {
    "model_type": "cohere2", "sliding_window": 24, "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}  # fmt: skip


GLM_TEXT = TEXT | {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
GLM_TOWER = QWEN_TOWER | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 32}
GLM_VALUES: dict[str, Any] = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
GLM_IMAGES = QWEN_IMAGES | {
    "image_processor_type": "Glm4vImageProcessor", "size": {"shortest_edge": 512, "longest_edge": 6144},
}  # fmt: skip
GLM_TOKENS = (
    "<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


def _gemma4(text: dict[str, Any]) -> Architecture:
    return Architecture(
        "Gemma4Config", TEXT | {
            "head_dim": 16, "global_head_dim": 32, "sliding_window": 24, "vocab_size_per_layer_input": VOCABULARY,
            "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        } | text, VISION_TOWER | {
            "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 64,
        }, {
            "audio_config": None, "boi_token_id": "<|image>", "eoi_token_id": "<image|>",
            "image_token_id": "<|image|>", "video_token_id": "<|video|>", "boa_token_id": "<|audio>",
            "eoa_token_index": "<audio|>", "audio_token_id": "<|audio|>",
        }, "Gemma4Processor", {
            "image_processor_type": "Gemma4ImageProcessor", "patch_size": 4, "pooling_kernel_size": 2,
            "max_soft_tokens": 70,
        }, "<|image|>", (
            "<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio>", "<audio|>", "<|audio|>",
        ), {
            "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "boa_token": "<|audio>",
            "eoa_token": "<audio|>", "audio_token": "<|audio|>",
        }, {"image_seq_length": 70, "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}},
        {"video_processor_type": "Gemma4VideoProcessor", "patch_size": 4, "pooling_kernel_size": 2,
         "max_soft_tokens": 70}, film="<|video|>",
    )  # fmt: skip


VISION: dict[str, Architecture] = {
    "qwen2_vl": _qwen(
        "Qwen2VLConfig", TEXT | {"rope_parameters": MROPE},
        QWEN_TOWER | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, "Qwen2VLProcessor", "Qwen2VLVideoProcessor",
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLConfig", TEXT | {"rope_parameters": MROPE},
        QWEN_TOWER | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
            "fullatt_block_indexes": [1],
        }, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor",
    ),
    "qwen3_vl": _qwen(
        "Qwen3VLConfig", TEXT | {"head_dim": 16, "rope_parameters": INTERLEAVED},
        QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]}, "Qwen3VLProcessor", "Qwen3VLVideoProcessor",
    ),
    "qwen3_vl_moe": _qwen(
        "Qwen3VLMoeConfig", TEXT | MOE | {"head_dim": 16, "decoder_sparse_step": 1, "rope_parameters": INTERLEAVED},
        QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]}, "Qwen3VLProcessor", "Qwen3VLVideoProcessor",
    ),
    "qwen3_5": _qwen("Qwen3_5Config", DELTA, QWEN3_TOWER, "Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_5_moe": _qwen(
        "Qwen3_5MoeConfig", DELTA | MOE | {"shared_expert_intermediate_size": 48}, QWEN3_TOWER, "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
    ),
    "llava": Architecture(
        "LlavaConfig", TEXT | {"model_type": "llama"},
        VISION_TOWER | {"model_type": "clip_vision_model", "image_size": 16},
        {"image_token_index": "<image>", "image_seq_length": 16, "vision_feature_layer": -2},
        "LlavaProcessor", {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
        }, "<image>\n", ("<image>",), {"image_token": "<image>"},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "mistral3": Architecture(
        "Mistral3Config", TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        VISION_TOWER | {"model_type": "pixtral", "image_size": 64, "head_dim": 16},
        {"image_token_index": "[IMG]", "spatial_merge_size": 2, "tie_word_embeddings": False}, "PixtralProcessor", {
            "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 48},
            "patch_size": {"height": 4, "width": 4},
        }, "[IMG]", ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), {}, {"patch_size": 4, "spatial_merge_size": 2},
        needs=("torchvision",),
    ),
    "gemma3": Architecture(
        "Gemma3Config",
        TEXT | {
            "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2,
            "num_hidden_layers": 4,
        }, VISION_TOWER | {"model_type": "siglip_vision_model", "image_size": 24, "vision_use_head": False}, {
            "mm_tokens_per_image": 9, "boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>", "eos_token_id": None,
        }, "Gemma3Processor", {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 24, "width": 24}},
        "<start_of_image>", ("<start_of_image>", "<end_of_image>", "<image_soft_token>"), {
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
        }, {"image_seq_length": 9},
    ),
    "internvl": Architecture(
        "InternVLConfig", TEXT | {"model_type": "qwen2"},
        VISION_TOWER | {"image_size": [16, 16], "patch_size": [4, 4], "layer_scale_init_value": 1.0},
        {"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4, "tie_word_embeddings": False}, "InternVLProcessor",
        {
            "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 16, "width": 16},
            "crop_to_patches": True, "min_patches": 1, "max_patches": 3,
        }, "<IMG_CONTEXT>\n", ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }, {"image_seq_length": 4}, {
            "video_processor_type": "InternVLVideoProcessor", "size": {"height": 16, "width": 16},
        }, film="<video>\n",
    ),
    "smolvlm": Architecture(
        "SmolVLMConfig", TEXT | {"model_type": "llama"}, VISION_TOWER | {"image_size": 16},
        {"image_token_id": "<image>", "scale_factor": 2, "pad_token_id": END}, "SmolVLMProcessor", {
            "image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16}, "do_image_splitting": True,
        }, "<image>", SMOLVLM_TOKENS, {}, {"image_seq_len": 4}, {
            "video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16},
        }, film="<video>",
        needs=("num2words",),
    ),
    "idefics3": Architecture(
        "Idefics3Config", TEXT | {"model_type": "llama"}, VISION_TOWER | {"image_size": 16},
        {"image_token_id": "<image>", "scale_factor": 2, "pad_token_id": END}, "Idefics3Processor", {
            "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16}, "do_image_splitting": True,
        }, "<image>", SMOLVLM_TOKENS, {}, {"image_seq_len": 4},
    ),
    "lfm2_vl": Architecture(
        "Lfm2VlConfig", TEXT | {
            "model_type": "lfm2", "layer_types": ["full_attention", "conv", "full_attention"], "conv_L_cache": 3,
        }, VISION_TOWER | {"model_type": "siglip2_vision_model", "num_patches": 64, "vision_use_head": False},
        {"image_token_id": "<image>", "projector_hidden_size": 48, "downsample_factor": 2}, "Lfm2VlProcessor", {
            "image_processor_type": "Lfm2VlImageProcessor", "encoder_patch_size": 4, "tile_size": 16,
            "min_image_tokens": 4, "max_image_tokens": 16, "min_tiles": 2, "max_tiles": 4, "max_num_patches": 64,
            "downsample_factor": 2,
        }, "<image>", (
            "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>",
            *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 3) for column in range(1, 3)),
        ), needs=("torchvision",),
    ),
    "llava_next": Architecture(
        "LlavaNextConfig", TEXT | {"model_type": "mistral", "sliding_window": None},
        VISION_TOWER | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        {"image_token_index": "<image>", "image_seq_length": 4, "image_grid_pinpoints": PINPOINTS},
        "LlavaNextProcessor", {
            "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16}, "image_grid_pinpoints": PINPOINTS,
        }, "<image>\n", ("<image>",), {"image_token": "<image>"},
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": Architecture(
        "LlavaOnevisionConfig", TEXT | {"model_type": "qwen2"}, VISION_TOWER | {
            "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "vision_use_head": False,
        }, {"image_token_index": "<image>", "video_token_index": "<video>", "image_grid_pinpoints": PINPOINTS},
        "LlavaOnevisionProcessor", {
            "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 16, "width": 16},
            "image_grid_pinpoints": PINPOINTS,
        }, "<image>\n", ("<image>", "<video>"), {"image_token": "<image>", "video_token": "<video>"}, {
            "num_image_tokens": 4, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        }, {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 16, "width": 16}},
        film="<video>\n",
    ),
    "glm4v": Architecture(
        "Glm4vConfig", GLM_TEXT, GLM_TOWER, GLM_VALUES, "Glm4vProcessor", GLM_IMAGES,
        "<|begin_of_image|><|image|><|end_of_image|>", GLM_TOKENS,
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        video_processor=GLM_IMAGES | {"image_processor_type": None, "video_processor_type": "Glm4vVideoProcessor"},
        film="<|begin_of_video|><|video|><|end_of_video|>",
    ),
    "aya_vision": Architecture(
        "AyaVisionConfig", COHERE2, VISION_TOWER | SIGLIP,
        {"image_token_index": "<|IMG_PATCH|>", "downsample_factor": 2}, "AyaVisionProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True} | TILES, "<image>", (
            "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE",
            "TILE_GLOBAL",
        ), {}, {"patch_size": 4, "img_size": 16, "downsample_factor": 2},
    ),
    "cohere2_vision": Architecture(
        "Cohere2VisionConfig", COHERE2, VISION_TOWER | SIGLIP,
        {"image_token_id": "<|IMG_PATCH|>", "downsample_factor": 2, "alignment_intermediate_size": 64},
        "Cohere2VisionProcessor", {"image_processor_type": "Cohere2VisionImageProcessor", "patch_size": 2} | TILES,
        "<|IMG_PATCH|>", ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"), {
            "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        }, needs=("torchvision",),
    ),
    "ovis2": Architecture(
        "Ovis2Config", TEXT | {"model_type": "qwen2"},
        VISION_TOWER | {"image_size": 16, "vocab_size": 37, "hidden_stride": 2}, {
            "image_token_id": "<IMG_ATOM>", "vocab_size": VOCABULARY, "hidden_size": 64, "visual_indicator_token_ids": [
                "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>",
            ],
        }, "Ovis2Processor", {"image_processor_type": "Ovis2ImageProcessor", "crop_to_patches": True} | TILES,
        "<image>\n",
        ("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"), {},
        {"image_seq_length": 4},
    ),
    "paddleocr_vl": Architecture(
        "PaddleOCRVLConfig", TEXT | {"head_dim": 16, "rope_parameters": MROPE},
        VISION_TOWER | {"image_size": 32, "spatial_merge_size": 2}, {
            "image_token_id": "<|IMAGE_PLACEHOLDER|>", "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|IMAGE_START|>", "vision_end_token_id": "<|IMAGE_END|>",
        }, "PaddleOCRVLProcessor", QWEN_IMAGES | {
            "image_processor_type": "PaddleOCRVLImageProcessor", "temporal_patch_size": 1,
        }, "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video_pad|>"),
        {"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "deepseek_vl": Architecture(
        "DeepseekVLConfig", TEXT | {"model_type": "llama"}, VISION_TOWER | SIGLIP,
        {"image_token_id": "<image_placeholder>"}, "DeepseekVLProcessor", {
            "image_processor_type": "DeepseekVLImageProcessor", "size": {"height": 16, "width": 16}, "min_size": 4,
        }, "<image_placeholder>", ("<image_placeholder>",), {"image_token": "<image_placeholder>"},
        {"num_image_tokens": 16},
    ),
    "gemma4": _gemma4({"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}),
    "gemma4_moe": _gemma4({
        "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 40,
    }),
    "granite4_vision": Architecture(
        "Granite4VisionConfig", TEXT | {
            "num_hidden_layers": 4, "logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0,
        }, VISION_TOWER | {
            "model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False, "hidden_size": 64,
        }, {
            "image_token_index": "<image>", "image_seq_length": 4, "image_grid_pinpoints": PINPOINTS,
            "downsample_rate": "1/2", "vision_feature_select_strategy": "full",
            "deepstack_layer_map": [[-1, 0], [-2, 1]], "spatial_target_layers": [0, 1, 2, 3], "qformer_config": {
                "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48,
                "cross_attention_frequency": 1, "max_position_embeddings": 64, "use_qformer_text_input": False,
            },
        }, "Granite4VisionProcessor", {
            "image_processor_type": "LlavaNextImageProcessor", "size": {"height": 16, "width": 16},
            "crop_size": {"height": 16, "width": 16}, "image_grid_pinpoints": PINPOINTS,
        }, "<image>\n", ("<image>",), {"image_token": "<image>"},
        {"patch_size": 4, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"},
    ),
    "kimi_k25": Architecture(
        "Kimi_K25Config", TEXT | {
            "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
            "first_k_dense_replace": 1, "n_shared_experts": 1,
        }, VISION_TOWER | {"pos_emb_height": 8, "pos_emb_width": 8}, {
            "projection_hidden_size": 32, "image_token_id": "<|media_pad|>",
            "video_token_id": "<|kimi_k25_video_placeholder|>", "vision_start_token_id": "<|media_begin|>",
            "vision_end_token_id": "<|media_end|>", "tie_word_embeddings": False,
        }, "Kimi_K25Processor", {
            "image_processor_type": "Kimi_K25ImageProcessor", "patch_size": 4, "merge_size": 2, "max_patches": 160,
            "size": {"max_height": 48, "max_width": 48},
        }, "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n", (
            "<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>",
        ), video_processor={
            "video_processor_type": "Kimi_K25VideoProcessor", "patch_size": 4, "merge_size": 2, "max_patches": 160,
        }, film="<|kimi_k25_video_placeholder|>", needs=("torchvision",),
    ),
    "minicpmv4_6": Architecture(
        "MiniCPMV4_6Config", DELTA | {"model_type": "qwen3_5_text"},
        VISION_TOWER | {"image_size": 32}, {
            "insert_layer_id": 0, "image_size": 32, "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
        }, "MiniCPMV4_6Processor", {
            "image_processor_type": "MiniCPMV4_6ImageProcessor", "patch_size": 4, "scale_resolution": 32,
            "max_slice_nums": 4,
        }, "<|image_pad|>", (
            "<|image_pad|>", "<|video_pad|>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>",
        ), {
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
            "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
        }, video_processor={
            "video_processor_type": "MiniCPMV4_6VideoProcessor", "slice_mode": True, "downsample_mode": "16x",
            "patch_size": 4, "scale_resolution": 32, "max_slice_nums": 1,
        }, film="<|video_pad|>",
    ),
    "idefics2": Architecture(
        "Idefics2Config", TEXT | {"model_type": "mistral", "sliding_window": None}, VISION_TOWER | {"image_size": 32}, {
            "image_token_id": "<image>", "pad_token_id": END, "perceiver_config": {
                "hidden_size": 64, "resampler_n_latents": 6, "resampler_depth": 1, "resampler_n_heads": 2,
                "resampler_head_dim": 16, "num_key_value_heads": 1,
            },
        }, "Idefics2Processor", {
            "image_processor_type": "Idefics2ImageProcessor", "size": {"shortest_edge": 16, "longest_edge": 32},
            "do_image_splitting": False,
        }, "<image>", ("<fake_token_around_image>", "<image>", "<end_of_utterance>"), {
            "image_token": "<image>", "image_boundary_token": "<fake_token_around_image>",
        }, {"image_seq_len": 6},
    ),
    "glm46v": Architecture(
        "Glm46VConfig", GLM_TEXT, GLM_TOWER, GLM_VALUES, "Glm46VProcessor",
        GLM_IMAGES | {"image_processor_type": "Glm46VImageProcessor"}, "<|begin_of_image|><|image|><|end_of_image|>",
        GLM_TOKENS, {"image_token": "<|image|>", "video_token": "<|video|>"},
        video_processor=GLM_IMAGES | {"image_processor_type": None, "video_processor_type": "Glm46VVideoProcessor"},
        film="<|begin_of_video|><|video|><|end_of_video|>",
    ),
    "ernie4_5_vl_moe": Architecture(
        "Ernie4_5_VLMoeConfig", TEXT | {
            "moe_intermediate_size": [48, 32], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1,
            "rope_parameters": MROPE | {"mrope_section": [3, 3, 2]},
        }, QWEN_TOWER | {"hidden_size": 32, "intermediate_size": 48, "temporal_patch_size": None}, {
            "image_start_token_id": "<|IMAGE_START|>", "image_end_token_id": "<|IMAGE_END|>",
            "image_token_id": "<|IMAGE_PLACEHOLDER|>", "video_start_token_id": "<|VIDEO_START|>",
            "video_end_token_id": "<|VIDEO_END|>", "video_token_id": "<|VIDEO_PLACEHOLDER|>",
        }, "Ernie4_5_VLMoeProcessor",
        QWEN_IMAGES | {"image_processor_type": "Ernie4_5_VLMoeImageProcessor", "temporal_patch_size": 1},
        "Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", (
            "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>",
            "<|VIDEO_PLACEHOLDER|>",
        ), {
            "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>",
            "image_token": "<|IMAGE_PLACEHOLDER|>", "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
        }, video_processor={"video_processor_type": "Ernie4_5_VLMoeVideoProcessor", "draw_on_frames": False},
    ),
    "lfm3_vl": Architecture(
        "Lfm3VlConfig", TEXT | {"model_type": "lfm3", "head_dim": 16, "sliding_window": 24}, VISION_TOWER | {
            "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"],
        }, QWEN_VALUES | {"projector_hidden_size": 48}, "Lfm3VlProcessor", QWEN_IMAGES,
        "<|vision_start|><|image_pad|><|vision_end|>", QWEN_TOKENS,
        video_processor=QWEN_VIDEOS | {"video_processor_type": "Qwen3VLVideoProcessor"}, film=QWEN_FILM,
    ),
    "lighton_ocr": Architecture(
        "LightOnOcrConfig", TEXT | {"model_type": "qwen3", "head_dim": 16},
        VISION_TOWER | {"model_type": "pixtral", "image_size": 64, "head_dim": 16},
        {"image_token_id": "<|image_pad|>", "spatial_merge_size": 2}, "LightOnOcrProcessor", {
            "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 48},
            "patch_size": {"height": 8, "width": 8},
        }, "<|image_pad|>", ("<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"), {
            "image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>",
        }, {"patch_size": 4, "spatial_merge_size": 2},
    ),
    "exaone4_5": Architecture(
        "Exaone4_5_Config", TEXT | {
            "model_type": "exaone4", "sliding_window": 24,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        }, QWEN_TOWER | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
            "fullatt_block_indexes": [1], "num_key_value_heads": 1,
        }, {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}, "Exaone4_5_Processor", QWEN_IMAGES,
        "<vision><|image_pad|></vision>", ("<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"),
        video_processor=QWEN_VIDEOS | {"video_processor_type": "Qwen2VLVideoProcessor"},
        film="<vision><|video_pad|></vision>",
    ),
}  # fmt: skip


def runs(architecture: str) -> bool:
    """Whether what transformers' processor of it asks for is installed."""
    return all(importlib.util.find_spec(package) is not None for package in VISION[architecture].needs)


def _indices(architecture: Architecture) -> dict[str, int]:
    first = 1 + len(pre_tokenizers.ByteLevel.alphabet())
    return {token: first + place for place, token in enumerate(architecture.tokens)}


def _resolved(values: Any, indices: dict[str, int]) -> Any:
    if isinstance(values, dict):
        return {name: _resolved(value, indices) for name, value in values.items()}
    if isinstance(values, list):
        return [_resolved(value, indices) for value in values]
    return indices.get(values, values) if isinstance(values, str) else values


def config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model; those of its text and vision are changed by the fields of a dict."""
    described = VISION[architecture]
    values = described.values | {"text_config": described.text, "vision_config": described.vision}
    for name, change in changes.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    return getattr(transformers, described.config)(**_resolved(values, _indices(described)))


def tokenizer_of(tokens: Sequence[str], named_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """Of single bytes and the special tokens, some of which are asked for by name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": END} | {letter: 1 + place for place, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", *tokens])
    named = set(named_tokens.values())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<end>",
        extra_special_tokens=[token for token in tokens if token not in named],
        model_specific_special_tokens=named_tokens,
    )


def template(architecture: str) -> str:
    """A chat template that writes parts as the published ones do."""
    return (
        "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{{ " + json.dumps(VISION[architecture].placeholder) + " }}{% elif part['type'] == 'video' %}"
        "{{ " + json.dumps(VISION[architecture].film) + " }}{% elif part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )


def _spread(model: Any) -> None:
    """Weights by which activations keep their size, so that logits differ by what an image shows."""
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings  # a token would only say itself again
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.normal_(-3.0, 0.3)  # what is seen is remembered for as long as a conversation is
        elif parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            gain = GAIN if parameter is not embeddings else 0.4 if tied else 1.0
            inputs = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
            parameter.normal_(0.0, gain * inputs**-0.5)


def write(path: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Writes a random checkpoint with its tokenizer, processor and chat template."""
    described = VISION[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config(architecture, **changes), dtype=torch.float32)
        with torch.no_grad():
            _spread(model)
    model.save_pretrained(path)
    tokenizer_of(described.tokens, described.named_tokens).save_pretrained(path)
    parts = {"image_processor": described.image_processor}
    if described.video_processor is not None:
        parts["video_processor"] = {name: value for name, value in described.video_processor.items() if value}
    written = {"processor_class": described.processor} | described.processor_values | parts
    (path / "processor_config.json").write_text(json.dumps(written, indent=2))
    (path / "chat_template.jinja").write_text(template(architecture))
    return path


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A random picture, always the same for a seed."""
    drawn = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(drawn)


_processor = functools.lru_cache(maxsize=4)(processor)


@dataclass(frozen=True, eq=False)
class Film:
    """Frames that are all looked at, and how many of them there were in a second."""

    frames: numpy.ndarray[Any, numpy.dtype[numpy.uint8]]
    fps: float

    @property
    def metadata(self) -> dict[str, Any]:
        """What transformers is told of it."""
        count, height, width, _ = self.frames.shape
        return {
            "total_num_frames": count, "fps": self.fps, "duration": count / self.fps, "height": height, "width": width,
            "frames_indices": list(range(count)),
        }  # fmt: skip


def film(seed: int, frames: int, width: int, height: int, fps: float = 2.0) -> Film:
    """A random film, always the same for a seed."""
    drawn = numpy.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=numpy.uint8)
    return Film(drawn, fps)


def _filmed(films: Sequence[Film]) -> dict[str, Any]:
    if not films:
        return {}
    told = {"video_metadata": [each.metadata for each in films], "do_sample_frames": False}
    return {"videos": [each.frames for each in films], "videos_kwargs": told}


def inputs(path: Path, messages: list[dict[str, Any]], images: list[Image.Image], films: Sequence[Film] = ()) -> Any:
    """What transformers' processor makes of a conversation."""
    made = _processor(path)
    rendered = made.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, for how one of the processors copies a tensor
        given = {"images": [images] if images else None, **_filmed(films)}
        return made(text=[rendered], return_tensors="pt", **given).to(torch.float32)


def load(path: Path) -> Any:
    """The model as transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@functools.lru_cache(maxsize=4)
def loaded(path: Path) -> Any:
    """The model, for those who ask it something and leave it as it is."""
    return load(path)


def reference(
    path: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    max_tokens: int,
    films: Sequence[Film] = (),
    **more: Any,
) -> list[int]:
    """Greedy tokens by transformers alone; no token ends it.

    Args:
        path: Of the checkpoint.
        messages: The conversation.
        images: In it.
        max_tokens: How many tokens.
        films: In it.
        more: For its `generate`.
    """
    given = inputs(path, messages, images, films)
    settings = {"do_sample": False, "max_new_tokens": max_tokens, "eos_token_id": None, "pad_token_id": END}
    made = loaded(path).generate(**given, **settings, **more)
    return made[0, given["input_ids"].shape[1] :].tolist()


def likeliest(
    path: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    tokens: Sequence[int],
    allowed: Sequence[int] = range(VOCABULARY),
    films: Sequence[Film] = (),
) -> list[int]:
    """What transformers finds the likeliest after a conversation, after it and the first token, and so on.

    As in `tests.model.reference`: whoever said just these tokens said what `reference` would find, which takes longer.

    Args:
        path: Of the checkpoint.
        messages: The conversation.
        images: In it.
        tokens: What was said.
        allowed: All that may be said.
        films: In it.
    """
    model = loaded(path)
    standing = {model.config.image_token_id, getattr(model.config, "video_token_id", None)}
    if not standing.isdisjoint(tokens):  # in one forward, it would be taken for what stands for an image
        forbidden = sorted({*range(VOCABULARY)} - {*allowed})
        return reference(path, messages, images, len(tokens), films, suppress_tokens=forbidden)
    given = dict(inputs(path, messages, images, films))
    prompt, said = given["input_ids"], torch.tensor([tokens[:-1]])
    more = {"input_ids": said, "attention_mask": torch.ones_like(said)}
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.shape == prompt.shape:
            given[name] = torch.cat([value, more.get(name, torch.zeros_like(said)).to(value.dtype)], 1)
    with torch.inference_mode():
        logits = model(**given, use_cache=False).logits[0, prompt.shape[1] - 1 :, list(allowed)]
    return [allowed[place] for place in logits.argmax(-1).tolist()]
