"""One look at a CUDA device in under nine minutes: is it right, and how fast is it?

First parity with transformers (`gpu_parity.py`: median relative error of logits in mixed paged batches), then speed
(`gpu_speed.py`) with random weights, beside transformers (`gpu_peers.py`), in this order:

* ceilings: bandwidth of a copy (read plus written) and rate of a matrix product, measured here;
* attention (`gpu_attention.py`): our kernel, FlashInfer's and FlashAttention-3's where they are installed; parity, then
  decode and prefill of one layer; beside it, the kernels for a token of recurrent layers (`gpu_recurrent.py`);
* the 8 B shape: decode at batch 1, 8, 64 and 256 with a context of 1 k, as a share of the copy's bandwidth; prefill as
  a share of the product's rate; time to first token of 128 tokens; decode at batch 64 with a KV cache in fp8, with
  weights in fp8 as well, and over each of those other kernels; a compiled static-cache decode by transformers;
* the 0.6 B shape: 256 requests, inputs and outputs uniform in 100-1024, seed 0, and a share of them by transformers'
  continuous batching; gaps between steps that decode 1,024 sequences with nobody reading and with a task for each.

A part that fails is reported under "errors", one for which there is no time left under "skipped"; neither stops the
others. Each group is a process of its own, parity some beside each other, because most of its time goes to compiling on
one processor: what a process does to the device, or to torch, ends with it, and what it had found by then is kept. The
exit status is 1 if parity or any part failed. The last line is one JSON object, also when the program is told to end
(SIGTERM). With --keep all that was found lies in a directory, part by part, whatever happens; on a machine that is
there for a few minutes only, that is where its files are looked for.

    python -m benchmarks.gpu [--write] [--keep DIR] [--seconds 500] [--only parity attention 8b 0.6b] [--together]
    python -m benchmarks.gpu --tiny        # the same on the CPU with tiny shapes, to see that it runs
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import gc
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

RESULTS = Path(__file__).parent / "results"
GROUPS = {"parity": 120.0, "attention": 50.0, "8b": 200.0, "0.6b": 130.0}
"""What is done in one process, and the seconds that are kept for it."""
_GRACE = 20.0
"""Seconds after which a group that should have ended is ended."""
BESIDE = {"parity": 6}
"""Processes that a group is shared out to on a device; one, if it is not here."""
USUAL = {"copy_gb_per_s": 4300.0, "matmul_tflop_per_s": 790.0}
"""Of an H200: what shares are shares of, if they cannot be measured."""
_WEIGHTS = 40 << 30
"""Bytes that must be free in memory for checkpoints to be written there: a disk may take minutes."""


class Ended(BaseException):
    """The program was told to end."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    device: str
    dtype: str
    parity_dtypes: tuple[str, ...]
    parity_lengths: tuple[int, ...]
    long_context: int
    copy_megabytes: int
    matrix: int
    large: str
    small: str
    batches: tuple[int, ...]
    context: int
    decode_steps: int
    chunk: int
    first_token_prompt: int
    first_token_load: int
    repeats: int
    requests: int
    lengths: tuple[int, int]
    peer_requests: int
    readers: int
    reader_steps: int
    other_batch: int
    attention_heads: tuple[int, int]
    attention_head_dim: int


FULL = Scale(
    device="cuda", dtype="bfloat16", parity_dtypes=("float32", "bfloat16"),
    parity_lengths=(1, 2, 15, 16, 17, 33, 70, 300, 700), long_context=32768, copy_megabytes=4096, matrix=8192,
    large="L", small="M", batches=(1, 8, 64, 256), context=1024, decode_steps=64, chunk=2048, first_token_prompt=128,
    first_token_load=64, repeats=9, requests=256, lengths=(100, 1024), peer_requests=64, readers=1024, reader_steps=150,
    other_batch=64, attention_heads=(32, 8), attention_head_dim=128,
)  # fmt: skip
TINY = Scale(
    device="cpu", dtype="float32", parity_dtypes=("float32",), parity_lengths=(1, 17, 40), long_context=80,
    copy_megabytes=1, matrix=64, large="tiny", small="tiny", batches=(1, 4), context=24, decode_steps=8, chunk=16,
    first_token_prompt=8, first_token_load=2, repeats=2, requests=6, lengths=(4, 16), peer_requests=2, readers=8,
    reader_steps=12, other_batch=4, attention_heads=(4, 2),
    attention_head_dim=64,
)  # fmt: skip


class Report:
    """What was found, part by part, within a time; kept in a file, if there is one, whatever happens to the process."""

    def __init__(self, seconds: float, into: Path | None = None) -> None:
        self._until = time.monotonic() + seconds
        self._into = into
        self.results: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.skipped: list[str] = []
        self.about: dict[str, Any] = {}

    def has(self, name: str, needs: float) -> bool:
        """Whether so many seconds are left; if not, that is noted."""
        if time.monotonic() + needs <= self._until:
            return True
        self.skipped.append(name)
        print(f"{name}: skipped, it takes about {needs:.0f} s", flush=True)
        self.keep()
        return False

    def failed(self, name: str, error: str) -> None:
        """Notes an error."""
        self.errors[name] = error
        self.keep()

    def keep(self) -> None:
        """Writes down what there is."""
        if self._into is not None:
            names = ("results", "errors", "skipped", "about")
            new = self._into.with_suffix(".new")
            new.write_text(json.dumps({name: getattr(self, name) for name in names}))
            new.replace(self._into)

    def part(self, name: str, needs: float, function: Callable[[], Any]) -> Any:
        """Runs one part if its usual time is left; returns what it found, or None."""
        if not self.has(name, needs):
            return None
        begun = time.monotonic()
        try:
            found = function()
        except Exception as error:
            traceback.print_exc()
            self.failed(name, f"{type(error).__name__}: {error}")
            return None
        self.results[name] = found
        print(f"{name} ({time.monotonic() - begun:.1f} s): {found}", flush=True)
        self.keep()
        return found


def environment(device: Any) -> dict[str, str]:
    """What the figures were taken with."""
    import torch
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return found


def run_async(coroutine: Any) -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)


def parity(scale: Scale, report: Report, device: Any, share: tuple[int, int] = (0, 1)) -> None:
    import torch

    from benchmarks import gpu_parity

    dtypes = [getattr(torch, name) for name in scale.parity_dtypes]
    unknown = gpu_parity.unknown()
    names = [name for name in gpu_parity.ARCHITECTURES if name not in unknown]
    if not share[0]:  # it is said once
        report.skipped += [f"parity, {name}: {reason}" for name, reason in unknown.items()]
    found: dict[str, Any] = {}
    report.results["parity"] = found

    def run(case: str, check: Callable[[], dict[str, Any]]) -> None:
        found[case] = check()
        report.keep()

    lengths, fused = list(scale.parity_lengths), scale.device == "cuda"  # the interpreter would take its time
    checks = gpu_parity.checks(names, dtypes, lengths, scale.long_context, device, fused)
    for case, check in list(checks.items())[share[0] :: share[1]]:
        name = f"parity, {case}"
        if report.has(name, 10 if scale.device == "cuda" else 0):
            whole(report, name, functools.partial(run, case, check))
            if case in found and not found[case]["ok"]:
                report.failed(name, "not what transformers computes")


def attention(scale: Scale, report: Report, device: Any, ceilings: dict[str, float], there: tuple[str, ...]) -> None:
    """Our kernels of attention and others'."""
    import torch

    from asyncengine.model.attention.protocol import LayerSpec
    from benchmarks import gpu_attention, gpu_recurrent

    for name in there:
        lengths = list(scale.parity_lengths)
        check = functools.partial(gpu_attention.parity, name, lengths, device)
        found = report.part(f"attention parity, {name}", 30 if scale.device == "cuda" else 0, check)
        wrong = [case for case, result in (found or {}).items() if not result["ok"]]
        if wrong:
            report.failed(f"attention parity, {name}", f"not what transformers computes: {', '.join(wrong)}")
    heads, kv_heads = scale.attention_heads
    dim = scale.attention_head_dim
    layer = gpu_attention.Layer(
        LayerSpec(heads, kv_heads, dim, dim, dim**-0.5), torch.bfloat16,
        ceilings["copy_gb_per_s"], ceilings["matmul_tflop_per_s"],
    )  # fmt: skip
    for name in ("ours", *there):
        measure = functools.partial(
            gpu_attention.measure, name, layer, scale.batches, scale.context, scale.chunk, device
        )
        report.part(f"attention, {name}", 15 if scale.device == "cuda" else 0, measure)
    rank, rotated = (512, 64) if scale.device == "cuda" else (32, 16)
    latent = LayerSpec(heads, 1, rank + rotated, rank, (rank + rotated) ** -0.5, values_in_keys=True)
    measure = functools.partial(
        gpu_attention.measure, "ours", dataclasses.replace(layer, spec=latent), scale.batches, scale.context,
        scale.chunk, device,
    )  # fmt: skip
    report.part("attention, ours, of latents", 15 if scale.device == "cuda" else 0, measure)
    name = "recurrent layers, one token"
    if (reason := gpu_recurrent.reason_against(device)) is not None:
        report.skipped.append(f"{name}: {reason}")
        return
    measure = functools.partial(
        gpu_recurrent.measure, scale.batches, getattr(torch, scale.dtype), device, ceilings["copy_gb_per_s"]
    )
    found = report.part(name, 15 if scale.device == "cuda" else 0, measure)
    wrong = [case for case, result in (found or {}).items() if not result["ok"]]
    if wrong:
        report.failed(name, f"not what torch computes: {', '.join(wrong)}")


def description(model: Any, scale: Scale, ceilings: dict[str, float]) -> dict[str, Any]:
    """What the roofline needs to know of a model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = next(model.parameters()).dtype.itemsize
    table = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    embedding = model.get_input_embeddings().weight.numel()
    return ceilings | {
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()) - table,
        # A product with the output matrix is made for the last token of a prompt alone.
        "parameters": sum(p.numel() for p in model.parameters()) - embedding * (1 if config.tie_word_embeddings else 2),
        "weight_table_bytes": table,
        "itemsize": itemsize,
        "kv_bytes_per_token": config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * itemsize,
        "chunk": scale.chunk,
        "vocab": config.vocab_size,
    }


def engine_config(path: Path, scale: Scale, sequences: int, length: int, **changes: Any) -> Any:
    from asyncengine import EngineConfig

    length = -(-length // 64) * 64  # whole pages, so that all sequences fit at once
    tokens = None if scale.device == "cuda" else sequences * length
    return EngineConfig(
        str(path), device=scale.device, dtype=scale.dtype, max_num_sequence=sequences, prefill_chunk_size=scale.chunk,
        max_single_sequence_length=length, max_total_sequence_length=tokens, max_queue_size=None,
        graph_capture="load",
    ).replace(**changes)  # fmt: skip


def large(
    scale: Scale, report: Report, device: Any, ceilings: dict[str, float], directory: Path, others: tuple[str, ...]
) -> None:
    """The 8 B shape."""
    from benchmarks import gpu_peers, gpu_speed, shapes

    path = directory / "large"
    model = shapes.make(scale.large, scale.dtype, scale.device)
    known = description(model, scale, ceilings)
    vocab = known["vocab"]
    model.save_pretrained(path)
    del model
    release()

    async def measure() -> None:
        from asyncengine import AsyncEngine

        length = scale.context + scale.decode_steps
        length += gpu_speed.until_all_decode(max(scale.batches), scale.context, scale.chunk)
        begun = time.monotonic()
        async with AsyncEngine(engine_config(path, scale, max(scale.batches), length)) as engine:
            report.part("8b load", 0, lambda: loaded(engine, begun))
            with gpu_speed.probing(device) as probe:
                for batch in scale.batches:
                    await part(
                        report, f"8b decode, batch {batch}", 5 + batch / 8,
                        gpu_speed.decode, engine, probe, device, batch, scale.context, scale.decode_steps, known,
                    )  # fmt: skip
                for load in (0, scale.first_token_load):
                    await part(
                        report, f"8b first token, {load} others", 5,
                        gpu_speed.first_token, engine, probe, vocab, load, scale.repeats, scale.first_token_prompt,
                    )  # fmt: skip

    whole(report, "8b", lambda: run_async(measure()))
    in_fp8: dict[str, Any] = {"kv_cache_dtype": "fp8_e4m3"}
    if scale.device == "cpu":
        in_fp8["attention_backend"] = "torch"
    ways = {
        "KV cache in fp8": in_fp8,
        # Products are quantised from bfloat16 alone.
        "weights and KV cache in fp8": in_fp8 | {"quantization": "fp8", "dtype": "bfloat16"},
    }
    if scale.device == "cuda":
        ways |= {name: {"attention_backend": name} for name in others}
    for way, changes in ways.items():
        otherwise = functools.partial(large_otherwise, scale, report, device, path, known, way, changes)
        whole(report, f"8b decode, batch {scale.other_batch}, {way}", lambda way=otherwise: run_async(way()))
    release()
    # Last, because it compiles, for as long as that takes.
    report.part(
        "8b transformers static cache, batch 1",
        90,
        lambda: gpu_peers.static_cache_decode(
            shapes.make(scale.large, scale.dtype, scale.device), scale.context, scale.decode_steps, vocab
        ),
    )


async def large_otherwise(
    scale: Scale, report: Report, device: Any, path: Path, known: dict[str, Any], way: str, changes: dict[str, Any]
) -> None:
    """Decode of the 8 B shape with something changed in the configuration."""
    from asyncengine import AsyncEngine
    from benchmarks import gpu_speed

    name = f"8b decode, batch {scale.other_batch}, {way}"
    if not report.has(name, 40.0 if scale.device == "cuda" else 0.0):
        return
    length = scale.context + scale.decode_steps
    length += gpu_speed.until_all_decode(scale.other_batch, scale.context, scale.chunk)
    config = engine_config(path, scale, scale.other_batch, length, **changes)
    release()
    async with AsyncEngine(config) as engine:
        layers = await engine.debug_call_func_on_all_workers("weight_bytes")
        table = known["weight_table_bytes"]
        in_bytes = "kv_cache_dtype" in changes
        small = known | {
            "weight_bytes": layers[0] - table,
            "kv_bytes_per_token": known["kv_bytes_per_token"] // (known["itemsize"] if in_bytes else 1),
        }
        print(f"{name}: {engine.health().notes}", flush=True)
        with gpu_speed.probing(device) as probe:
            await part(
                report, name, 0,
                gpu_speed.decode, engine, probe, device, scale.other_batch, scale.context, scale.decode_steps, small,
            )  # fmt: skip


def small(scale: Scale, report: Report, device: Any, directory: Path) -> None:
    """The 0.6 B shape."""
    from benchmarks import gpu_peers, gpu_speed, shapes

    path = directory / "small"
    loads = 25.0 if scale.device == "cuda" else 0.0  # and captures
    model = shapes.make(scale.small, scale.dtype, scale.device)
    model.save_pretrained(path)
    vocab = model.config.vocab_size
    given, outputs = gpu_speed.workload(scale.requests, *scale.lengths, vocab)
    share = slice(scale.peer_requests)

    async def serve() -> None:
        from asyncengine import AsyncEngine

        begun = time.monotonic()
        async with AsyncEngine(engine_config(path, scale, scale.requests, 2 * scale.lengths[1])) as engine:
            report.part("0.6b load", 0, lambda: loaded(engine, begun))
            await gpu_speed.serve(engine, given[share], [2] * len(given[share]))  # compiles what is compiled
            await part(report, "0.6b workload", 20, gpu_speed.serve, engine, given, outputs)
            mean = [round(sum(outputs[share]) / len(outputs[share]))] * len(outputs[share])
            await part(report, "0.6b workload, share for the peer", 10, gpu_speed.serve, engine, given[share], mean)

    async def gaps() -> None:
        from asyncengine import AsyncEngine

        steps = scale.reader_steps
        steps += gpu_speed.until_all_decode(scale.readers, gpu_speed.READER_PROMPT, scale.chunk)
        length = gpu_speed.READER_PROMPT + steps
        async with AsyncEngine(engine_config(path, scale, scale.readers, length)) as engine:
            with gpu_speed.probing(device) as probe:
                for read in (False, True):
                    await part(
                        report, f"0.6b step gap, {scale.readers if read else 0} readers", 15,
                        gpu_speed.readers, engine, probe, device, scale.readers, steps, vocab, read,
                    )  # fmt: skip

    for name, needs, measured in (("0.6b workload", 20, serve), ("0.6b step gap", 15, gaps)):
        if report.has(name, loads + needs):
            whole(report, name, lambda measured=measured: run_async(measured()))
    release()
    # Last, because it can be neither bounded nor interrupted.
    report.part(
        "0.6b transformers continuous batching",
        60,
        lambda: gpu_peers.continuous_batching(model, given[share], outputs[share]),
    )


def loaded(engine: Any, begun: float) -> dict[str, Any]:
    """What a load took, and what it has to say: which captures failed, say."""
    health = engine.health()
    seconds = round(time.monotonic() - begun, 1)
    return {"seconds": seconds, "notes": health.notes, "graph_bytes": health.warm_up.nbytes}


async def part(report: Report, name: str, needs: float, function: Any, *arguments: Any) -> None:
    """As `Report.part`, for a coroutine function, which may take three times as long as usual, and half a minute."""
    found: Any = None
    error: Exception | None = None
    if time.monotonic() + needs <= report._until:
        try:
            async with asyncio.timeout(3 * needs + 30):
                found = await function(*arguments)
        except Exception as raised:
            error = raised

    def outcome() -> Any:
        if error is not None:
            raise error
        return found

    report.part(name, needs if found is None and error is None else 0, outcome)


def release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # of an error before
            torch.cuda.empty_cache()


def summary(report: Report) -> dict[str, float]:
    """The ratios that the targets speak of."""
    found = report.results
    ratios: dict[str, float] = {}

    def ratio(name: str, a: str, b: str, key: str, inverse: bool = False) -> None:
        if a in found and b in found and found[a].get(key) and found[b].get(key):
            value = found[a][key] / found[b][key]
            ratios[name] = round(1 / value if inverse else value, 3)

    ratio(
        "workload_over_continuous_batching",
        "0.6b workload, share for the peer",
        "0.6b transformers continuous batching",
        "tokens_per_s",
    )
    ratio(
        "batch_1_over_static_cache",
        "8b decode, batch 1",
        "8b transformers static cache, batch 1",
        "ms_per_step",
        inverse=True,
    )
    return ratios


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--seconds", type=float, default=500.0, help="no part begins that would end after this time")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--together", action="store_true", help="all groups in this process")
    parser.add_argument("--keep", type=Path, help="a directory for what was found, written part by part")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.keep is not None:
        try:
            options.keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--keep: {error}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    begun = time.monotonic()
    report = Report(options.seconds, options.into)
    scale = TINY if options.tiny else FULL
    groups = [group for group in GROUPS if group in options.only]
    if options.into is not None:  # one process of several, which says where it is before it is ended
        faulthandler.dump_traceback_later(options.seconds + _GRACE / 2, file=sys.__stderr__)
        try:
            measure(scale, report, groups, tuple(options.share))
        finally:
            faulthandler.cancel_dump_traceback_later()
        return bool(report.errors)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        if options.together:
            measure(scale, report, groups)
        else:
            apart(report, groups, options)
    except (Ended, KeyboardInterrupt):
        report.failed("benchmark", "it was told to end")
    finally:
        signal.signal(signal.SIGTERM, before)
    result = {
        "benchmark": "gpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m benchmarks.gpu " + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "seconds": round(time.monotonic() - begun, 1),
        "environment": report.about.get("environment"),
        "shapes": {"8b": scale.large, "0.6b": scale.small, "dtype": scale.dtype},
        "results": report.results,
        "ratios": summary(report),
        "not_installed": report.about.get("not_installed"),
        "skipped": report.skipped,
        "errors": report.errors,
    }
    if options.write and report.about:
        RESULTS.mkdir(exist_ok=True)
        name = report.about["environment"]["device"].replace(" ", "-")
        (RESULTS / f"gpu-{name}-{result['date']}.json").write_text(json.dumps(result, indent=2) + "\n")
    if options.keep is not None:
        (options.keep / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return bool(report.errors)


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended


def apart(report: Report, groups: list[str], options: argparse.Namespace) -> None:
    """Each group in processes of its own, which have what the later ones leave them of the time."""
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        until = time.monotonic() + options.seconds
        scarce = min(options.seconds / sum(GROUPS[group] for group in groups), 1.0)
        for number, group in enumerate(groups):
            later = scarce * sum(GROUPS[each] for each in groups[number + 1 :])
            seconds = max(until - time.monotonic() - later, 0.0)
            count = 1 if options.tiny else BESIDE.get(group, 1)
            files = [directory / f"{group}-{share}.json" for share in range(count)]
            for into in files:
                into.unlink(missing_ok=True)  # of an earlier run
            command = [sys.executable, "-m", "benchmarks.gpu", "--only", group, "--seconds", str(seconds)]
            command += ["--tiny"] if options.tiny else []
            commands = [
                [*command, "--into", str(into), "--share", str(share), str(count)] for share, into in enumerate(files)
            ]
            ended: list[int | None] = [0] * count
            try:
                ended = run_all(commands, seconds + _GRACE)
            finally:
                for into, status in zip(files, ended, strict=True):
                    take(report, into)
                    if status is None:
                        report.failed(group, f"not done after {seconds + _GRACE:.0f} s")
                    elif status not in (0, 1) or not into.exists():
                        report.failed(group, f"the process ended with {status}")


def run_all(commands: list[list[str]], seconds: float) -> list[int | None]:
    """Runs programs beside each other, no longer than that; their exit statuses, None of those that had to be ended."""
    processes: list[subprocess.Popen[bytes]] = []
    ended: list[int | None] = []
    try:
        processes.extend(subprocess.Popen(command) for command in commands)
        until = time.monotonic() + seconds
        for process in processes:
            try:
                ended.append(process.wait(max(until - time.monotonic(), 0.0)))
            except subprocess.TimeoutExpired:
                ended.append(None)
        return ended
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that a device holds
                process.wait(5)


def take(report: Report, file: Path) -> None:
    """Adds what a process has kept."""
    if not file.exists():
        return
    found = json.loads(file.read_text())
    report.results.setdefault("parity", {}).update(found["results"].pop("parity", {}))
    if not report.results["parity"]:
        del report.results["parity"]
    for name in ("results", "errors", "about"):
        getattr(report, name).update(found[name])
    report.skipped += found["skipped"]


def measure(scale: Scale, report: Report, groups: list[str], share: tuple[int, int] = (0, 1)) -> None:
    """Groups, or a share of one, in this process."""
    import torch
    from transformers.utils import logging as hf_logging

    from benchmarks import gpu_attention, gpu_speed

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; --tiny runs on the CPU")
    device = torch.device(scale.device, 0) if scale.device == "cuda" else torch.device("cpu")
    others, missing = gpu_attention.installed()
    report.about = {"environment": environment(device), "not_installed": missing}
    ceilings = USUAL
    if {"attention", "8b"} & set(groups):
        dtype = getattr(torch, scale.dtype)
        limits = functools.partial(gpu_speed.ceilings, device, scale.copy_megabytes, scale.matrix, dtype)
        ceilings = report.part("ceilings", 0, limits) or USUAL
    memory = Path("/dev/shm")
    fits = scale.device == "cuda" and memory.exists() and shutil.disk_usage(memory).free > _WEIGHTS
    with tempfile.TemporaryDirectory(dir=memory if fits else None) as directory:
        path = Path(directory)
        of = {
            "parity": lambda: parity(scale, report, device, share),
            "attention": lambda: attention(scale, report, device, ceilings, others),
            "8b": lambda: large(scale, report, device, ceilings, path, others),
            "0.6b": lambda: small(scale, report, device, path),
        }
        for group in groups:
            whole(report, group, of[group])
            release()


def whole(report: Report, name: str, function: Callable[[], None]) -> None:
    """A group of parts; what fails outside of a part counts against the group."""
    try:
        function()
    except Exception as error:
        traceback.print_exc()
        report.failed(name, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
