"""What it takes a layer of multi-head latent attention to keep latents, and to keep keys and values of all heads.

Of both, on this machine's CPU: all that differs. That is attention itself, with latents the products of queries and of
what comes out of it with each head's matrix, and without them the product that makes keys and values of all heads, each
by compiled code. Numbers are random, shapes are those of published models; the rest of a layer is the same.

* ``decode``: 1 and 16 sequences of one token each, on contexts of some lengths.
* ``prefill``: 512 tokens of one sequence, on nothing and on 1,536 tokens.

Milliseconds of CPU time of all threads together, so that what else runs is not counted; both alternate, and figures are
medians. `ratio` is latents over keys and values. `bytes` are those of a token in one layer's cache; the kernel for the
CPU keeps values in an order of their own, also where they are the beginning of keys, which the others do not.
The last line is one JSON object.

    python -m benchmarks.latents [--dtype bfloat16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.decoder.compiled_layers import compile_layers
from asyncengine.model.decoder.compiled_linear import Products
from asyncengine.model.decoder.head_products import LatentMatrix
from benchmarks.attention import CPU, batch_of

# (heads, key without what is rotated, rotated, value, rank)
SHAPES = {"DeepSeek-V2-Lite": (16, 128, 64, 128, 512), "GLM-4.7-Flash": (20, 192, 64, 256, 512)}
STEPS = {
    "decode 1 on 512": ([1], [512]),
    "decode 1 on 4096": ([1], [4096]),
    "decode 1 on 16384": ([1], [16384]),
    "decode 16 on 1024": ([1] * 16, [1024] * 16),
    "prefill 512 on 0": ([512], [0]),
    "prefill 512 on 1536": ([512], [1536]),
}
PAGE = 32


def layers(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, backend: CpuAttention
) -> dict[str, tuple[LayerSpec, Callable[[Any, Any, int], Any]]]:
    """Of both forms, what the cache is for, and what makes a step of it, of a cache, a plan and a number of tokens."""
    heads, plain, rotated, value, rank = shape
    kind: Any = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}[dtype]
    products = Products(backend.library(kind), dtype, "none")
    whole = LayerSpec(heads, heads, plain + rotated, value, (plain + rotated) ** -0.5)
    latent = LayerSpec(heads, 1, rank + rotated, rank, whole.scaling, values_in_keys=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kv_b_proj = nn.Linear(rank, heads * (plain + value), bias=False, dtype=dtype)

        def get_output_embeddings(self) -> None:
            return None

    model = Model().requires_grad_(False)
    matrix = LatentMatrix(products, model.kv_b_proj, (plain, value), "none")
    compile_layers(model, products)

    def of_latents(cache: Any, plan: Any, tokens: int) -> Any:
        query = torch.ones(tokens, heads, plain + rotated, dtype=dtype)
        latents = torch.ones(tokens, 1, rank + rotated, dtype=dtype)
        absorbed = torch.cat((matrix.into_latents(query[..., :plain]), query[..., plain:]), -1)
        attended = backend.attend(latent, cache, plan, absorbed, latents, latents[..., :rank], None)
        return matrix.out_of_latents(attended)

    def of_heads(cache: Any, plan: Any, tokens: int) -> Any:
        query = torch.ones(tokens, heads, plain + rotated, dtype=dtype)
        made = model.kv_b_proj(torch.ones(tokens, rank, dtype=dtype)).view(tokens, heads, -1)
        turned = torch.ones(tokens, 1, rotated, dtype=dtype).expand(-1, heads, -1)
        key = torch.cat((made[..., :plain], turned), -1)
        return backend.attend(whole, cache, plan, query, key, made[..., plain:], None)

    return {"latents": (latent, of_latents), "heads": (whole, of_heads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    backend = CpuAttention(arguments.dtype)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            forms = layers(shape, dtype, backend)
            sizes = {form: backend.bytes_per_block(spec, 1, dtype) for form, (spec, _) in forms.items()}
            print(f"{name}, {arguments.dtype}: bytes of a token {sizes}")
            results[name] = {"bytes": sizes}
            for step, (new, contexts) in STEPS.items():
                batch, blocks = batch_of(new, contexts, PAGE)
                plan = backend.plan(batch, PAGE, CPU)
                times: dict[str, list[float]] = {form: [] for form in forms}
                caches = {}
                for form, (spec, run) in forms.items():
                    caches[form] = backend.allocate(spec, blocks, PAGE, dtype, CPU)
                    caches[form].keys.normal_()
                    caches[form].values.normal_()
                    run(caches[form], plan, sum(new))
                for _ in range(arguments.rounds):
                    for form, (_, run) in forms.items():
                        start = time.process_time()
                        run(caches[form], plan, sum(new))
                        times[form].append(time.process_time() - start)
                medians = {form: statistics.median(each) * 1e3 for form, each in times.items()}
                ratio = medians["latents"] / medians["heads"]
                results[name][step] = medians | {"ratio": ratio}
                print(
                    f"  {step}: heads {medians['heads']:.2f} ms, latents {medians['latents']:.2f} ms, ratio {ratio:.2f}"
                )
    print(json.dumps({"benchmark": "latents", "dtype": arguments.dtype, "torch": torch.__version__, "shapes": results}))


if __name__ == "__main__":
    main()
