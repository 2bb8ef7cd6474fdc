"""Hugging Face's transformers, built from small configurations; nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case
from tests.zoo import torchvision_models

TOKENS, ANSWER, WORDS, SIDE = 12, 4, 60, 32

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**TEXT, **SPECIAL, "vocab_size": WORDS, "max_position_embeddings": 32}
LLAMA = {**BERT, "num_key_value_heads": 2}
WIDE_HEADS = {**LLAMA, "head_dim": 12}
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
VISION = {**TEXT, "image_size": SIDE, "patch_size": 8}
BOTH_SIDES = {
    **{
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))
    },
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "d_model": 32,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "vocab_size": WORDS,
    "n_positions": 32,
    **SPECIAL,
}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2}
T5 |= {"decoder_start_token_id": 0}
WHISPER = {
    **BOTH_SIDES,
    **SPECIAL,
    **{"vocab_size": WORDS, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16},
    "decoder_start_token_id": 1,
}
WAV2VEC2 = {
    **TEXT,
    **{"vocab_size": 20, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2)},
    **{"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
}
SEGFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]},
    **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
    **{"decoder_hidden_size": 24, "num_labels": 5},
}
SWIN = {
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [16, 24, 32, 40],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}

Make = Callable[[], Any]

MODELS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", WIDE_HEADS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", WIDE_HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VISION),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": BERT, "vision_config": VISION, "projection_dim": 24}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC2),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER),
    "detr": ("DetrForObjectDetection", "DetrConfig", {**BOTH_SIDES, "num_queries": 6, "num_labels": 5}),
}
"""By name: the class of the model, that of its configuration, and the configuration's options."""


def package() -> Any:
    """``transformers``; a test that asks for it is skipped where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install transformers")
    torchvision_models()  # some models import torchvision, whose operators must be declared first
    return importlib.import_module("transformers")


def cases() -> list[Case]:
    """One case for each line of ``MODELS``."""
    return [
        Case(name, partial(built, name), *INPUTS.get(name, (_text, f"{TOKENS} tokens")), "transformers")
        for name in MODELS
    ]


def built(name: str, **options: Any) -> nn.Module:
    """A model with random weights; ``options`` go to its configuration before those of ``MODELS``."""
    hf = package()
    model, config, fixed = MODELS[name]
    fixed = {**fixed, **options}
    if name == "detr":
        backbone = hf.ResNetConfig(**RESNET, out_features=["stage4"])
        fixed = {**fixed, "backbone_config": backbone, "backbone": None, "use_timm_backbone": False}
    return getattr(hf, model)(getattr(hf, config)(**fixed))


def tokens(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, WORDS, (batch, length))


def _text() -> dict[str, Tensor]:
    return {"input_ids": tokens(TOKENS)}


def _padded() -> dict[str, Tensor]:
    """Two texts, the second with padding at its end."""
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, TOKENS - 3 :] = 0
    return {"input_ids": tokens(TOKENS, 2), "attention_mask": mask}


def _answered() -> dict[str, Tensor]:
    return {"input_ids": tokens(TOKENS, 2), "decoder_input_ids": tokens(ANSWER, 2)}


def _spoken() -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, 8, 24), "decoder_input_ids": tokens(ANSWER)}


def _picture(side: int = SIDE, batch: int = 1) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, side, side)}


IMAGE = (_picture, f"3 x {SIDE} x {SIDE}")
PADDED = (_padded, f"2 texts of {TOKENS} tokens, one padded")
ANSWERED = (_answered, f"2 texts of {TOKENS} tokens, {ANSWER} of the decoder")
INPUTS: dict[str, tuple[Make, str]] = {
    **dict.fromkeys(("bert", "gemma2"), PADDED),
    **dict.fromkeys(("t5", "t5-gated"), ANSWERED),
    **dict.fromkeys(("vit", "deit", "swin", "segformer"), IMAGE),
    "clip": (lambda: {**_picture(), **_text()}, f"3 x {SIDE} x {SIDE}, {TOKENS} tokens"),
    "whisper": (_spoken, f"8 x 24, {ANSWER} tokens of the decoder"),
    "wav2vec2": (lambda: {"input_values": torch.randn(1, 400)}, "400 samples"),
    "detr": (lambda: _picture(64, 2), "two of 3 x 64 x 64"),
}
"""By name, where it is not plain text: what the model is called with, and that in words."""
