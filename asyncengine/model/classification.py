"""The classification head of a ``...ForSequenceClassification`` checkpoint: found by headers, tried on transformers.

The rest of such a checkpoint is a decoder like any other. It is loaded as the causal model whose language-model head it
does not have, and what its own head is given is what that head would be: the last hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from asyncengine.classifier import Activation, Classifier
from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model import architecture
from asyncengine.model.building import BUILDING
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.hidden_states import hidden_states
from asyncengine.step.batch import Float32

_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Error of the trial's logits, in parts of the sum of the sizes of what is added up: the sum itself may be nothing.
Transformers multiplies in the model's dtype, the head here in float32."""


@dataclass(frozen=True, slots=True)
class Head:
    """A head whose weights have not been read.

    Attributes:
        name: Of its module; its parameters are ``<name>.weight`` and perhaps ``<name>.bias``.
        has_bias: Whether there is the latter. The heads of transformers' decoders have none; one that is stored counts.
        labels: The labels' names.
        activation: What makes probabilities of its logits.
    """

    name: str
    has_bias: bool
    labels: tuple[str, ...]
    activation: Activation


def head_of(checkpoint: Checkpoint, hf_config: Any) -> Head | None:
    """The head of a checkpoint, if it says that it has one.

    Args:
        checkpoint: It.
        hf_config: Its configuration.

    Raises:
        UnsupportedModelError: It is more than one matrix on the last hidden state, or not stored as numbers.
        CheckpointError: Its weights are missing, or of another shape than the configuration says.
    """
    if not checkpoint.classifies:
        return None
    named = checkpoint.config["architectures"][0]
    model = _without_weights(hf_config, named)
    (name, linear), *others = [
        (name, module) for name, module in model.named_children() if name != model.base_model_prefix
    ] or [("", None)]
    if others or not isinstance(linear, nn.Linear):
        found = ", ".join([name, *(name for name, _ in others)])
        raise UnsupportedModelError(f"{named} classifies by {found}; only a head of one matrix can be served")
    stored, shapes = checkpoint.shapes, {name: tuple(value.shape) for name, value in linear.named_parameters()}
    if f"{name}.bias" in stored:
        shapes["bias"] = shapes["weight"][:1]
    for part, shape in shapes.items():
        wanted = f"{name}.{part}"
        if wanted in checkpoint.coded:
            raise UnsupportedModelError(f"{checkpoint.name}: {wanted} is stored as codes; expected numbers")
        if wanted not in stored:
            pickled = "" if checkpoint.tensors else "; in pickles it is not looked for: save it as safetensors"
            raise CheckpointError(f"{checkpoint.name}: {wanted}, of its classification head, is missing{pickled}")
        if stored[wanted] != shape:
            raise CheckpointError(f"{checkpoint.name}: {wanted} is {stored[wanted]}; config.json says {shape}")
    labels = labels_of(hf_config, linear.out_features)
    return Head(name, "bias" in shapes, labels, activation_of(hf_config, len(labels)))


def read(head: Head, checkpoint: Checkpoint) -> Classifier:
    """A head with its weights."""
    bias = _tensor(checkpoint, f"{head.name}.bias") if head.has_bias else None
    return Classifier(_tensor(checkpoint, f"{head.name}.weight"), bias, head.labels, head.activation)


def try_head(head: Head, classifier: Classifier, model: Any, hf_config: Any, device: torch.device) -> None:
    """Compares what the head makes of the last hidden state with what transformers' own class says of a few tokens.

    Args:
        head: The head.
        classifier: The same with its weights.
        model: The causal model, with its weights; its body is put into that class for as long as that takes.
        hf_config: The configuration that the head was found by.
        device: Where the model is.

    Raises:
        UnsupportedModelError: They differ by more than rounding.
    """
    judge = _without_weights(hf_config, type(model).__name__)
    dtype = next(model.parameters()).dtype
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(torch.from_numpy(classifier.weight).to(device, dtype), requires_grad=False)
    if classifier.bias is not None:
        linear.bias = nn.Parameter(torch.from_numpy(classifier.bias).to(device, dtype), requires_grad=False)
    setattr(judge, head.name, linear)
    setattr(judge, judge.base_model_prefix, model.base_model)
    text = hf_config.get_text_config()
    ids = torch.arange(1, _TOKENS + 1, device=device) % text.vocab_size
    padding = getattr(text, "pad_token_id", None)
    ids = torch.where(ids == padding, (ids + _TOKENS) % text.vocab_size, ids) if padding is not None else ids
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode(), hidden_states(model) as hidden:
            expected = judge.eval()(input_ids=ids[None], use_cache=False).logits[0].float().cpu().numpy()
    finally:
        architecture.attend_here(model)
    assert classifier.weight is not None
    last = hidden[0][-1].float().cpu().numpy()
    size = np.abs(classifier.weight) @ np.abs(last)
    error = float(np.max(np.abs(classifier.logits(last) - expected) / np.maximum(size, 1e-6)))
    if not error <= _TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"{type(judge).__name__} does not apply its head to the last token's hidden state: relative error "
            f"{error:.2g}, allowed {_TOLERANCE[dtype]:g} in {dtype}"
        )


def _without_weights(hf_config: Any, named: str) -> Any:
    """Transformers' model with a head, on the meta device."""
    mapping = AutoModelForSequenceClassification._model_mapping
    if type(hf_config) not in mapping:
        raise UnsupportedModelError(f"{named}: transformers has no such class for a {hf_config.model_type!r} model")
    with BUILDING, torch.device("meta"):
        return mapping[type(hf_config)]._from_config(hf_config, attn_implementation="eager")


def labels_of(hf_config: Any, count: int) -> tuple[str, ...]:
    """The names of a head's labels."""
    names = getattr(hf_config, "id2label", None) or {}
    return tuple(str(names.get(index, f"LABEL_{index}")) for index in range(count))


def activation_of(hf_config: Any, labels: int) -> Activation:
    """As transformers' pipeline for text classification has it."""
    problem = getattr(hf_config, "problem_type", None)
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or labels == 1 else "softmax"


def _tensor(checkpoint: Checkpoint, name: str) -> Float32:
    from safetensors import safe_open

    stored = next(tensor for tensor in checkpoint.plain if tensor.name == name)
    with safe_open(stored.file, "pt") as file:
        tensor: Float32 = file.get_tensor(name).float().numpy()
    assert tensor.size == prod(stored.shape)
    return tensor
