"""Makes the embedded checkpoint: ``python -m asyncengine.tiny.train [--draft] [--output DIR] [--seed N] [--steps N]``.

Trains tokenizer and model from nothing on the generated corpus, in about two minutes on two cores, and prints the
held-out loss and the share of held-out prompts that are answered rightly. With ``--draft`` it makes the smaller model
that drafts for it in speculative decoding, from the same corpus and with the embedded model's tokenizer. Everything is
seeded: two runs on one machine write the same files. While other programs keep the cores busy,
``OMP_WAIT_POLICY=PASSIVE`` in the environment makes it several times faster, because torch's threads then do not spin
while they wait for each other.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from asyncengine.tiny import DRAFT_PATH, PATH, corpus
from asyncengine.tiny.packing import IGNORED, Document, Row, encode_chat, encode_text, pack
from asyncengine.tiny.tokenizer import BOS, CHAT_TEMPLATE, END, PAD, VOCAB_SIZE, token_id, train_tokenizer

STEPS = 460
ROWS = 12  # in a step
ROW_LENGTH = 256  # tokens; very few chats are longer, and left out
CONTEXT = 1024  # tokens
CHATS_PER_STEP = 58  # about as many as fit
TEXTS_PER_STEP = 2
WARM_UP = 20  # steps
MATRIX_RATE = 8e-3  # peak learning rates
OTHER_RATE = 4e-3
HELD_OUT = 24  # chats of each category
LONGEST_ANSWER = 160  # tokens
# Sums are split over the threads: another number of them would round differently.
THREADS = 2


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded tiny chat model.")
    parser.add_argument("--draft", action="store_true", help="train the draft model instead")
    parser.add_argument("--output", type=Path, help="checkpoint directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, initialisation and order")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT, help="chats of each category to test with; 0 tests nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    wall, cpu = time.perf_counter(), time.process_time()

    rng = random.Random(arguments.seed)
    known = corpus.chats(rng, CHATS_PER_STEP * arguments.steps)
    texts = corpus.texts(rng, TEXTS_PER_STEP * arguments.steps)
    other = random.Random(f"held out of {arguments.seed}")
    held_out = {category: corpus.held_out(other, category, arguments.held_out, known) for category in corpus.WEIGHTS}
    if arguments.draft:  # its tokens must be those of the model that it drafts for
        tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(itertools.chain(texts, *map(_contents, known)))
    documents = [
        *(encode_chat(tokenizer, chat) for chat in known),
        *(encode_text(tokenizer, text) for text in texts),
    ]
    rng.shuffle(documents)
    model = new_model(arguments.draft)
    print(f"{model.num_parameters():,} parameters, {len(documents):,} documents")
    train(model, batches(documents), arguments.steps)
    checkpoint = save(model, tokenizer, arguments.output or (DRAFT_PATH if arguments.draft else PATH))
    print(f"trained in {time.perf_counter() - wall:.0f} s ({time.process_time() - cpu:.0f} s of CPU time)")

    asked = list(itertools.chain.from_iterable(held_out.values()))
    if not asked:
        return
    print(f"held-out loss {held_out_loss(model, tokenizer, asked):.4f}")
    right = rightly_answered(model, checkpoint, asked)
    print(f"held-out prompts answered rightly: {len(right) / len(asked):.1%} of {len(asked)}")
    for category, chats in held_out.items():
        print(f"{category:>14}  {sum(chat in right for chat in chats)} of {len(chats)}")


def new_model(draft: bool = False) -> LlamaForCausalLM:
    """An untrained Llama of about one million parameters, with two query heads to each key and value head.

    The draft model has a sixth of that.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64 if draft else 128,
        intermediate_size=160 if draft else 320,
        num_hidden_layers=2 if draft else 5,
        num_attention_heads=2 if draft else 4,
        num_key_value_heads=1 if draft else 2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=token_id(BOS),
        eos_token_id=token_id(END),
        pad_token_id=token_id(PAD),
    )
    return LlamaForCausalLM(config)


def batches(documents: Sequence[Document]) -> Iterator[list[Row]]:
    """Rows in batches, without end: the documents are repeated when they run out."""
    rows = pack(itertools.cycle(documents), ROW_LENGTH)
    while True:
        yield list(itertools.islice(rows, ROWS))


def train(model: LlamaForCausalLM, source: Iterator[list[Row]], steps: int) -> None:
    """Trains in place; the learning rate rises over a few steps and then falls to nothing.

    The matrices inside the layers are trained by Muon (Jordan et al., 2024), which needs about half the steps that
    AdamW needs here; embeddings and norms are AdamW's.
    """
    model.train()
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight, *(weight for weight in model.parameters() if weight.ndim == 1)]
    optimisers = (
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )

    def share_of_peak(step: int) -> float:
        return min((step + 1) / WARM_UP, (steps - step) / steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, share_of_peak) for optimiser in optimisers]
    progress = tqdm(range(steps), desc="training", unit="step")
    for _ in progress:
        loss = batch_loss(model, next(source))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def batch_loss(model: LlamaForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """Mean cross entropy in nats over the labelled tokens of these rows."""
    labels = torch.tensor([row.labels for row in rows])  # (rows, length)
    segments = torch.tensor([row.segments for row in rows])
    same_document = segments[:, :, None] == segments[:, None, :]  # (rows, length, length)
    hidden = model.model(
        input_ids=torch.tensor([row.ids for row in rows]),
        position_ids=torch.tensor([row.positions for row in rows]),
        attention_mask=same_document.tril()[:, None],
    ).last_hidden_state  # (rows, length, hidden)
    labelled = labels != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[labelled]), labels[labelled])


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, chats: Iterable[corpus.Chat]) -> float:
    """Mean cross entropy in nats over the assistant's tokens."""
    documents = (encode_chat(tokenizer, chat) for chat in chats)
    return batch_loss(model, list(pack(documents, ROW_LENGTH))).item()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> PreTrainedTokenizerFast:
    """Writes the checkpoint directory. Returns the tokenizer as it was saved."""
    checkpoint = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    checkpoint.chat_template = CHAT_TEMPLATE
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=checkpoint.bos_token_id,
        eos_token_id=checkpoint.eos_token_id,
        pad_token_id=checkpoint.pad_token_id,
    )
    model.save_pretrained(directory)
    checkpoint.save_pretrained(directory)
    # safetensors files are written readable by their owner alone; a checkpoint is for everyone who has the package.
    (directory / "model.safetensors").chmod(0o644)
    return checkpoint


def rightly_answered(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chats: Sequence[corpus.Chat]
) -> list[corpus.Chat]:
    """The chats to which greedy decoding gives a right answer, and ends it."""
    inputs = tokenizer.apply_chat_template(
        [list(chat.prompt) for chat in chats],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    outputs = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER)
    answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
    right = []
    for chat, answer in zip(chats, answers, strict=True):
        text, end, _ = answer.partition(END)
        if end and chat.is_right(text):
            right.append(chat)
    return right


def _contents(chat: corpus.Chat) -> list[str]:
    return [*(message["content"] for message in chat.prompt), chat.answer]


if __name__ == "__main__":
    main()
