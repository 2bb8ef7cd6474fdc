"""Hugging Face's transformers, built from small configurations; nothing is downloaded."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.case import Case
from tests.zoo import torchvision_models

TOKENS, WORDS = 12, 100
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", {**TEXT, "vocab_size": WORDS}),
}
"""By name: the class of the model, that of its configuration, and the configuration's options."""


def cases() -> list[Case]:
    """One case for each line of ``MODELS``."""
    return [
        Case(name, partial(_built, *line), _text, f"{TOKENS} tokens", "transformers")
        for name, line in MODELS.items()
    ]


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, WORDS, (1, TOKENS))}


def _built(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    torchvision_models()  # some models import torchvision, whose operators must be declared first
    package = importlib.import_module("transformers")
    return getattr(package, model)(getattr(package, config)(**options))
