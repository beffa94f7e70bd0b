"""Makes the draft head of the embedded model: ``python -m asyncengine.tiny.train_head [--output DIR] [--seed N]``.

An EAGLE-3 head (Li et al., 2025) with embedding and head of the embedded model, trained on what that says of the
generated corpus, in some minutes on two cores. As in the paper's training-time test, each batch goes through the
head several times: at first every entry is made of the model's state before it, then of the head's own one, as it will
be when the head guesses several tokens. Everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from asyncengine.model.draft_heads.eagle import EagleHead
from asyncengine.model.draft_heads.eagle_config import EagleConfig, eagle_config
from asyncengine.tiny import EAGLE_PATH, PATH, corpus
from asyncengine.tiny.packing import IGNORED, PADDING, Row, encode_chat, encode_text
from asyncengine.tiny.train import CHATS_PER_STEP, THREADS, WARM_UP, batches
from asyncengine.tiny.train import ROWS as BATCH

STEPS = 520
ROWS = 4  # in a step
TEXTS = 12  # that go on in a way that is hard to guess, beside the chats of a step of the model's training
TIMES = 3  # that a batch goes through the head
DECAY = 0.8  # of the weight of each time after the first
LAYERS = [1, 2, 4]
RATE = 3e-3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the draft head of the embedded chat model.")
    parser.add_argument("--output", type=Path, default=EAGLE_PATH, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, initialisation and order")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    begun = time.perf_counter()
    rng = random.Random(arguments.seed)
    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    needed = -(-arguments.steps * ROWS // BATCH)
    documents = [encode_chat(tokenizer, chat) for chat in corpus.chats(rng, CHATS_PER_STEP * needed)]
    documents += [encode_text(tokenizer, text) for text in corpus.texts(rng, TEXTS * needed)]
    rng.shuffle(documents)
    model = LlamaForCausalLM.from_pretrained(PATH).requires_grad_(False)
    config = configuration(model.config)
    head = new_head(model, eagle_config(config, model.config.num_hidden_layers))
    source = (rows[at : at + ROWS] for rows in batches(documents) for at in range(0, BATCH, ROWS))
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    print(f"{sum(weight.numel() for weight in trained):,} parameters")
    optimiser = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARM_UP, (arguments.steps - step) / arguments.steps)
    )
    progress = tqdm(range(arguments.steps), desc="training", unit="step")
    for _ in progress:
        losses, right = Times(head, model, next(source)).losses()
        sum(DECAY**at * loss for at, loss in enumerate(losses)).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        progress.set_postfix(right=" ".join(f"{share:.2f}" for share in right))
    save(head, config, arguments.output)
    print(f"trained in {time.perf_counter() - begun:.0f} s")


def configuration(model: Any) -> dict[str, Any]:
    """The head's ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "draft_vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_parameters["rope_theta"],
        "eagle_aux_hidden_state_layer_ids": LAYERS,
    }


def new_head(model: LlamaForCausalLM, about: EagleConfig) -> EagleHead:
    """An untrained head that shares the model's embedding and head."""
    head = EagleHead(about)
    weights = {}
    for name, weight in head.state_dict().items():
        if name == "embed_tokens.weight":
            weights[name] = model.get_input_embeddings().weight
        elif name == "lm_head.weight":
            weights[name] = model.lm_head.weight
        elif weight.dim() == 1:
            weights[name] = torch.ones(weight.shape)
        else:
            weights[name] = torch.randn(weight.shape) * weight.shape[1] ** -0.5
    head.load(weights, torch.device("cpu"))
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name not in ("embed_tokens.weight", "lm_head.weight"))
    return head


class Times:
    """A batch that goes through the head again and again.

    Args:
        head: It.
        model: Says what is right.
        rows: The batch.
    """

    def __init__(self, head: EagleHead, model: LlamaForCausalLM, rows: list[Row]) -> None:
        self.head = head
        self.ids = torch.tensor([row.ids for row in rows])  # (rows, length)
        self.positions = torch.tensor([row.positions for row in rows])
        segments = torch.tensor([row.segments for row in rows])
        same = (segments[:, :, None] == segments[:, None, :]).tril()  # (rows, length, length)
        with torch.no_grad():
            found = model(
                input_ids=self.ids,
                position_ids=self.positions,
                attention_mask=same[:, None],
                output_hidden_states=True,
            )
        self.states = torch.cat([found.hidden_states[layer] for layer in LAYERS], -1)
        self.likely = found.logits.softmax(-1)
        labelled = torch.tensor([row.labels for row in rows]) != IGNORED
        self.wanted = labelled & (segments != PADDING)
        # The first entry of a text is not there.
        self.attended = same & (self.positions > 0)[:, None, :]
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def losses(self) -> tuple[list[torch.Tensor], list[float]]:
        """Mean cross entropy in nats of each time, and the shares of the likeliest tokens that are the model's."""
        before, losses, right = shifted(self.head.enter(self.states)), [], []
        for turn in range(TIMES):
            out = self.layer(before, turn)
            wanted = self.wanted & (self.positions > turn)
            logits, likely = self.head.logits(out[wanted]), self.likely[wanted]
            losses.append(functional.cross_entropy(logits, likely))
            right.append(float((logits.argmax(-1) == likely.argmax(-1)).float().mean()))
            before = shifted(out)
        return losses, right

    def layer(self, before: torch.Tensor, time: int) -> torch.Tensor:
        """(rows, length, hidden) states behind entries, of which those of the newest `time` tokens are the head's."""
        first, attention = self.head.midlayer, self.head.midlayer.self_attn
        both = torch.cat([first.input_layernorm(self.head.embed_tokens(self.ids)), first.hidden_norm(before)], -1)

        def heads(project: nn.Module) -> torch.Tensor:
            return project(both).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]

        query, key, value = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
        query, key = apply_rotary_pos_emb(query, key, *self.head.rotary(before, self.positions))
        self.keys.append(repeat_kv(key, attention.num_key_value_groups))
        self.values.append(repeat_kv(value, attention.num_key_value_groups))
        scores = query @ self.keys[0].transpose(2, 3)
        length = scores.shape[-1]
        scores = scores.masked_fill(~(self.attended.tril(-time) | torch.eye(length).bool())[:, None], -torch.inf)
        own = []
        for at in range(1, time + 1):
            back = time - at
            moved = functional.pad(self.keys[at], (0, 0, back, 0))[:, :, :length]
            known = (self.positions >= back + 1)[:, None]
            own.append((query * moved).sum(-1).masked_fill(~known, -torch.inf))
        if time:  # the entry of the token itself is the head's then
            scores = scores.masked_fill(torch.eye(length).bool() & (self.positions > 0)[:, None, :, None], -torch.inf)
        every = torch.cat([scores, *(each[..., None] for each in own)], -1) * attention.scaling
        weights = every.softmax(-1)
        attended = weights[..., :length] @ self.values[0]
        for at in range(1, time + 1):
            moved = functional.pad(self.values[at], (0, 0, time - at, 0))[:, :, :length]
            attended = attended + weights[..., length + at - 1, None] * moved
        hidden = before + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + first.mlp(first.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


def shifted(states: torch.Tensor) -> torch.Tensor:
    """(rows, length, hidden) of which each is the one before."""
    return functional.pad(states, (0, 0, 1, 0))[:, :-1]


def save(head: EagleHead, config: dict[str, Any], directory: Path) -> None:
    """Writes the directory, in the layout of the method's authors. What is the model's is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().half().contiguous()
        for name, weight in head.named_parameters()
        if name not in ("embed_tokens.weight", "lm_head.weight")
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
