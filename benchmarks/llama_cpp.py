"""Tokens per second of one model step beside llama.cpp's, with the same random weights, on the same cores.

Both sides alternate within one run. ``decode N``: N sequences with 128 tokens behind them, one token each, greedy;
llama.cpp by ``llama-batched-bench`` (its own loop, S_TG), asyncengine by the model step that the engine calls, draw
included. ``prefill``: `--prefill` tokens at once, by ``llama-bench``. The ratio is asyncengine over llama.cpp, the
median of the rounds. The last line is one JSON object.

    python -m benchmarks.llama_cpp --bin DIR [--shape S] [--rows 1 16] [--quantization none] [--file-type T]

DIR has ``llama-bench`` and ``llama-batched-bench``, built with cmake's defaults. Needs the package ``gguf``. bfloat16
weights on both sides; with ``--quantization int8``, int8 with one scale for each output beside q8_0; with
``--quantization int4``, four bits with a scale for 32 inputs beside q4_0, and the embedding as with int8. With
``--file-type Q4_K_M`` or another of ``llama-quantize``, both sides load the file that it makes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes, step

_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(checkpoint: Path, path: Path, shape: str, quantization: str) -> None:
    """The checkpoint's weights as a GGUF file, with its vocabulary if it has a tokenizer."""
    import gguf
    import torch
    from safetensors.torch import load_file

    values = shapes.SHAPES[shape]
    writer = gguf.GGUFWriter(path, "qwen3" if shape == "M" else "llama")
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    writer.add_context_length(4096)
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(values["vocab_size"])
    if (checkpoint / "tokenizer.json").exists():
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
        writer.add_token_types([gguf.TokenType.NORMAL] * len(tokenizer["vocab"]))
        writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    else:
        writer.add_tokenizer_model("none")
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        found = _name(name)
        if found is None:
            continue
        if tensor.dim() == 1:
            writer.add_tensor(found, tensor.float().numpy())
        elif quantization != "none":
            kinds = gguf.GGMLQuantizationType
            kind = kinds.Q4_0 if quantization == "int4" and found != "token_embd.weight" else kinds.Q8_0
            writer.add_tensor(found, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            raw = tensor.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(found, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str | None:
    name = name.removeprefix("model.").removesuffix(".weight")
    if name == "embed_tokens":
        return "token_embd.weight"
    if name == "norm":
        return "output_norm.weight"
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return f"blk.{number}.{_LAYER[rest]}.weight"
    return None  # the head is the embedding


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def theirs(arguments: argparse.Namespace, model: Path, threads: int) -> dict[str, float]:
    """Tokens per second of llama.cpp."""
    rows = ",".join(map(str, arguments.rows))
    batched = _run(
        [
            f"{arguments.bin}/llama-batched-bench", "-m", str(model), "-t", str(threads), "-c", "4096", "-b", "2048",
            "-npp", "128", "-ntg", "32", "-npl", rows, "--output-format", "jsonl",
        ]
    )  # fmt: skip
    found = [json.loads(line) for line in batched.splitlines() if line.startswith("{")]
    rates = {f"decode {entry['pl']}": float(entry["speed_tg"]) for entry in found}
    bench = _run(
        [
            f"{arguments.bin}/llama-bench", "-m", str(model), "-t", str(threads), "-p", str(arguments.prefill),
            "-n", "0", "-r", "2", "-o", "json",
        ]
    )  # fmt: skip
    rates["prefill"] = float(json.loads(bench)[0]["avg_ts"])
    return rates


def ours(arguments: argparse.Namespace, model: Any, vocabulary: int) -> dict[str, float]:
    """Tokens per second of asyncengine's model step."""
    rates = {}
    for rows in arguments.rows:
        seconds = step.median_seconds(model, step.batch_of(rows, 1, arguments.context, vocabulary), 15)
        rates[f"decode {rows}"] = rows / seconds
    seconds = step.median_seconds(model, step.batch_of(1, arguments.prefill, 0, vocabulary), 3)
    rates["prefill"] = arguments.prefill / seconds
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=144)  # the middle of llama.cpp's 128 to 160
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--file-type", help="of llama-quantize; the file is read by both")
    arguments = parser.parse_args()
    if arguments.file_type and arguments.quantization != "none":
        parser.error("--file-type says how weights are stored, so --quantization cannot")
    arguments.dtype, arguments.decoder = "bfloat16", "compiled"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory), arguments.shape, "bfloat16")
        gguf_path = Path(directory) / "model.gguf"
        write_gguf(path, gguf_path, arguments.shape, arguments.quantization)
        if arguments.file_type:
            quantised = gguf_path.with_name(f"{arguments.file_type}.gguf")
            _run([f"{arguments.bin}/llama-quantize", str(gguf_path), str(quantised), arguments.file_type])
            gguf_path.unlink()
            path = gguf_path = quantised
            arguments.quantization = "auto"
        begun = time.perf_counter()
        loaded = step.load(arguments, path)
        print(f"loaded in {time.perf_counter() - begun:.1f} s: {'; '.join(loaded.notes) or 'nothing noted'}")
        rounds = []
        for _ in range(arguments.rounds):
            mine = ours(arguments, loaded.model, loaded.vocab_size)
            other = theirs(arguments, gguf_path, torch.get_num_threads())
            rounds.append({name: (mine[name], other[name], mine[name] / other[name]) for name in mine})
    results = {}
    for name in rounds[0]:
        mine_rate, other_rate, ratio = (statistics.median(r[name][i] for r in rounds) for i in range(3))
        results[name] = {
            "asyncengine": round(mine_rate, 1),
            "llama.cpp": round(other_rate, 1),
            "ratio": round(ratio, 3),
        }
        print(f"{name:>10}: asyncengine {mine_rate:8.1f}, llama.cpp {other_rate:8.1f} tokens/s, ratio {ratio:.2f}")
    names = {"benchmark": "llama_cpp", "shape": arguments.shape, "quantization": loaded.config.quantization}
    names |= {"file_type": arguments.file_type} if arguments.file_type else {}
    print(json.dumps({**names, "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
