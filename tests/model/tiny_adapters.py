"""Random adapters of the embedded model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from asyncengine import tiny
from tests.model.adapters import save_adapter


def write(path: Path, seed: int) -> Path:
    """Writes an adapter under which the embedded model says something else."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny.PATH))
    save_adapter(path, model, seed, scale=1.5)
    return path
