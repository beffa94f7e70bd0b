"""Programs in benchmarks/ that nothing else runs, here with tiny shapes, so that they do not rot."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
import torch
import transformers

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.model.attention import flashinfer
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.fused.tiles import Tile
from asyncengine.model.loader import TransformersLoader
from benchmarks import four_bits, fused, gpu, gpu_parity, gpu_recurrent, gpu_speed, kv_scales, launches
from benchmarks.arrivals import arrivals, line_of
from benchmarks.gpu import Report
from benchmarks.lag import innermost, waited
from tests.model.attention import fake_libraries
from tests.model.fused import interpreted
from tests.together import Reports, together

ROOT = Path(__file__).parents[1]


Ended = tuple[int, dict[str, Any], str]  # exit status, the JSON object that is printed last, all that was said


def ended(status: int, out: str, err: str) -> Ended:
    assert out, err
    return status, json.loads(out.splitlines()[-1]), out + err


@pytest.fixture(autouse=True, scope="module")
def _settings_of_the_process() -> Iterator[None]:
    """The programs leave less to be logged in it, and draw numbers."""
    disabled, verbosity = logging.root.manager.disable, transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    with torch.random.fork_rng(devices=[]):
        yield
    logging.disable(disabled)
    transformers.logging.set_verbosity(verbosity)
    if bars:
        transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def plots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plots")


@pytest.fixture(scope="module")
def reports(plots: Path) -> Reports:
    """The programs that serve models."""
    return together(
        ["gpu", "--tiny", "--together"],
        ["lag", "--tiny", "--only", "serve", "load"],
        ["scale", "--tiny", "--write", str(plots)],
        ["arrivals", "--tiny", "--keep", "--rounds", "2"],
        ["parts", "--tiny"],
        ["images", "--shape", "tiny", "--dtype", "float32", "--pixels", "64", "--requests", "2", "--tokens", "4",
         "--rounds", "1", "--peer"],
        ["encoders", "--shape", "tiny", "--prompts", "6", "--lengths", "2", "20", "--rounds", "1"],
    )  # fmt: skip


@pytest.mark.long
def test_images_times_questions_and_those_of_transformers(reports: Reports) -> None:
    status, result, said = ended(*reports["images"])
    assert status == 0, said
    assert "a question has 38 tokens" in said
    assert set(result["seconds"]) == {"first", "again", "several", "peer first", "peer several"}
    assert set(result["ratios"]) == {"first", "several"}


@pytest.mark.long
def test_encoders_times_what_transformers_says_as_well(reports: Reports) -> None:
    status, result, said = ended(*reports["encoders"])
    assert status == 0, said
    assert result["error"] < 1e-5
    assert set(result["tokens_per_second"]) == {"many", "single", "peer"} and set(result["ratios"]) == {
        "many",
        "single",
    }


@pytest.fixture(scope="module")
def without_models() -> Reports:
    """The programs whose steps take as long as they are told to."""
    return together(
        ["scheduler", "--running", "4", "--waiting", "0", "50", "--steps", "20"],
        ["gap", "--requests", "4", "--steps", "20", "--rounds", "1", "--step-ms", "1"],
        ["fanout", "--readers", "1", "4", "--tokens", "2000", "--rounds", "1"],
        ["latency", "--readers", "1", "4", "--step-ms", "1", "--steps", "20"],
    )


@pytest.fixture(scope="module")
def compiled() -> Reports:
    """The programs that compile kernels for Hopper, in a process of their own, where nothing is interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    programs = [["attention_compile", "--quick"], ["fused_compile", "--quick"]]
    process = subprocess.run(
        [sys.executable, "-m", "tests.together", json.dumps(programs)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout)  # type: ignore[no-any-return]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_gpu_runs_end_to_end_on_the_cpu(reports: Reports) -> None:
    status, result, said = ended(*reports["gpu"])
    assert result["errors"] == {}, said
    unknown = gpu_parity.unknown()
    assert result["skipped"] == [f"parity, {name}: {reason}" for name, reason in unknown.items()]
    assert status == 0
    found = result["results"]
    assert all(case["ok"] for case in found["parity"].values())
    assert [case for case in found["parity"] if "fp8" in case] == [
        "llama bfloat16, fp8 weights and KV cache", "gemma3 bfloat16, fp8 weights and KV cache",
    ]  # fmt: skip
    assert {case.split()[0] for case in found["parity"]} == gpu_parity.ARCHITECTURES.keys() - unknown.keys()
    assert [name for name, case in found["recurrent layers, one token"].items() if case["ok"]] == [
        f"{kernel}, batch {rows}" for kernel in gpu_recurrent.CASES for rows in (1, 4)
    ]
    assert set(found) == {
        "ceilings", "parity", "attention, ours", "attention, ours, of latents", "recurrent layers, one token",
        "8b transformers static cache, batch 1", "8b load",
        "8b decode, batch 1", "8b decode, batch 4", "8b decode, batch 4, KV cache in fp8",
        "8b decode, batch 4, weights and KV cache in fp8", "8b first token, 0 others", "8b first token, 2 others",
        "0.6b load", "0.6b workload",
        "0.6b workload, share for the peer", "0.6b step gap, 0 readers", "0.6b step gap, 8 readers",
        "0.6b transformers continuous batching",
    }  # fmt: skip
    assert set(result["ratios"]) == {"workload_over_continuous_batching", "batch_1_over_static_cache"}
    if importlib.util.find_spec("flashinfer") is None:
        assert result["not_installed"]["flashinfer"].startswith("not installed: flashinfer, the module of FlashInfer,")


@pytest.mark.long
def test_gpu_compares_fused_kernels_with_transformers_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interpreted.require_triton()
    interpreted.large_tiles(monkeypatch)
    ran: list[int] = []
    forward = FusedDecoder.forward
    monkeypatch.setattr(FusedDecoder, "forward", lambda *given: ran.append(given[1].shape[1]) or forward(*given))
    checks = gpu_parity.checks(["llama"], [torch.float32], [9, 3], 16, torch.device("cpu"))
    fused = {case for case in checks if case.endswith(", fused")}
    assert {case.removesuffix(", fused") for case in fused} == checks.keys() - fused and len(fused) == 5
    assert checks["llama float32, fused"]()["ok"]
    assert set(ran) == {7, 2, 1}


def test_gpu_tells_kernels_of_recurrent_layers_that_compute_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outputs that are wrong, and states of others that are changed; or that there are no kernels to measure."""
    interpreted.require_triton()
    rule, convolution = gpu_recurrent.StepKernels.delta_rule, gpu_recurrent.StepKernels.convolution

    def beside(*args: Any, **kwargs: Any) -> Any:
        output = convolution(*args, **kwargs)
        args[4][-1] += 1
        return output

    kernels = gpu_recurrent.StepKernels
    monkeypatch.setattr(kernels, "delta_rule", lambda *args, **kwargs: 1.01 * rule(*args, **kwargs))
    monkeypatch.setattr(kernels, "convolution", beside)
    assert gpu.main(["--tiny", "--only", "attention", "--together"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = [f"{kernel}, batch {rows}" for kernel in ("delta rule", "convolution") for rows in (1, 4)]
    name = "recurrent layers, one token"
    assert result["errors"] == {name: f"not what torch computes: {', '.join(cases)}"}
    assert result["results"][name]["delta rule, batch 4"]["error"] == pytest.approx(0.01, rel=0.1)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert gpu.main(["--tiny", "--only", "attention", "--together"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["skipped"] == [f"{name}: there is neither a device nor Triton's interpreter"]


def test_gpu_leaves_out_what_transformers_is_too_old_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parity, "Cache", object)
    monkeypatch.setattr(gpu_parity, "checks", lambda names, *_: dict.fromkeys(names, lambda: {"ok": True}))
    assert gpu.main(["--tiny", "--only", "parity", "--together"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [said.split(":")[0] for said in result["skipped"]] == ["parity, qwen3_5", "parity, bamba"]
    assert "5.22" in result["skipped"][0]
    assert list(result["results"]["parity"])[-1] == "deepseek_v3"


def test_launches_of_a_layer_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    interpreted.require_triton()
    counted = launches.main(["llama"])["of_a_layer"]["llama"]
    assert (counted["fused, 64 tokens"], counted["fused, one token"]) == (11, 5)
    assert counted["modules"] > 30
    assert "{'project': 4, 'rotate': 1}" in capsys.readouterr().out


@pytest.mark.long
def test_gpu_measures_the_kernels_of_other_packages_where_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("transformers.integrations.flash_attention")  # it looks for the real ones
    for name, module in fake_libraries.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)
    assert gpu.main(["--tiny", "--only", "attention", "--together"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["errors"], result["not_installed"]) == ({}, {})
    found = result["results"]
    names = ["flashinfer", "flash_attention_3"]
    parities, measured = [f"attention parity, {name}" for name in names], [f"attention, {name}" for name in names]
    ours = ("attention, ours", "attention, ours, of latents")
    assert list(found) == ["ceilings", *parities, ours[0], *measured, ours[1], "recurrent layers, one token"]
    for name, parity, figures in zip(names, parities, measured, strict=True):
        assert {case: result["attention"] for case, result in found[parity].items()} == {"llama": name, "gemma3": name}
        assert found[figures]["attention"]["kernel"] == name
        assert list(found[figures])[1:] == ["decode, batch 1", "decode, batch 4", "prefill, 16 tokens"]
        assert all(row["us"] > 0 and row["host_us"] > 0 for row in list(found[figures].values())[1:])

    monkeypatch.setattr(fake_libraries, "attended", lambda query, *_: torch.zeros_like(query))
    assert gpu.main(["--tiny", "--only", "attention", "--together"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["errors"] == {parity: "not what transformers computes: llama, gemma3" for parity in parities}


async def test_a_probe_sees_steps_that_are_launched_ahead() -> None:
    """As they are on CUDA."""
    config = EngineConfig("tiny", device="cpu", dtype="float32", prefix_cache_mode="disable")
    async with AsyncEngine(config, loader=TransformersLoader(run_ahead=True)) as engine:
        with gpu_speed.probing(torch.device("cpu")) as probe:
            await engine.generate([5, 6, 7], gpu_speed.greedy(9))
        (run,) = probe.decodes(1)
        assert [step.tokens for step in probe.steps] == [3] + 8 * [1] and run == probe.steps[1:]
        assert all(step.begun <= step.ended for step in run)
        assert all(before.ended <= after.begun for before, after in itertools.pairwise(run))
        assert [step.context for step in run] == list(range(3, 11))


async def test_a_probe_records_an_event_before_and_after_each_step_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        recorded: ClassVar[list[Any]] = []

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.recorded.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    config = EngineConfig("tiny", device="cpu", dtype="float32", decoder_backend="transformers")
    async with AsyncEngine(config, loader=TransformersLoader(run_ahead=True)) as engine:
        with gpu_speed.probing(torch.device("cuda")) as probe:
            await engine.generate([5, 6, 7], gpu_speed.greedy(3))
    assert [event for step in probe.steps for event in step.events or ()] == Event.recorded
    assert len(probe.steps) == 3 and len(Event.recorded) == 6


@pytest.mark.long
def test_scales_of_a_kv_cache_help_where_numbers_are_cut_off_or_vanish_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_scales, "QUERIES", 12)
    found = kv_scales.measure()
    for kind, errors in found.items():
        needed = kind in ("keys x 200", "4 channels of keys x 300", "values x 0.005")
        assert (errors["one"] > 1.5 * errors["engine"]) == needed, kind
        assert errors["engine"] < 1.5 * errors["head"], kind


def test_a_part_of_gpu_that_fails_or_has_no_time_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(seconds=100)
    assert report.part("late", 1000, lambda: 1) is None
    assert report.part("broken", 0, lambda: {}["what"]) is None
    assert report.part("good", 10, lambda: 2) == 2
    assert report.skipped == ["late"]
    assert report.errors == {"broken": "KeyError: 'what'"}
    assert report.results == {"good": 2}
    assert "late: skipped, it takes about 1000 s" in capsys.readouterr().out


def test_groups_of_gpu_end_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a group had found is kept when its process dies or takes too long, and the next one begins anew."""
    seconds = dict[str, float]()

    def ended(commands: list[list[str]], timeout: float) -> list[int | None]:
        statuses = list[int | None]()
        for number, command in enumerate(commands):
            options = dict(itertools.pairwise(command))
            group = options["--only"]
            seconds[group] = float(options["--seconds"])
            assert command[-3:] == ["--share", str(number), str(6 if group == "parity" else 1)]
            report = Report(1, Path(options["--into"]))
            report.about = {"environment": {"device": group}, "not_installed": {}}
            if group == "parity":
                report.results["parity"] = {f"case {number}": {"ok": True}}
                report.keep()
            elif group != "attention":  # which dies before it finds anything
                report.part(f"a part of {group}", 0, lambda: {"ok": True})
                report.part("late", 9, dict)
            statuses.append({"parity": 0, "attention": -11, "8b": None, "0.6b": 1}[group])
        return statuses

    monkeypatch.setattr(gpu, "run_all", ended)
    assert gpu.main(["--seconds", "600", "--keep", str(tmp_path / "kept")]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["results"]["parity"]) == [f"case {number}" for number in range(6)]
    assert list(result["results"]) == ["parity", "a part of 8b", "a part of 0.6b"]
    assert result["errors"] == {"attention": "the process ended with -11", "8b": "not done after 490 s"}
    assert result["skipped"] == ["late"] * 2
    assert [round(each) for each in seconds.values()] == [220, 270, 470, 600]
    assert json.loads((tmp_path / "kept" / "gpu.json").read_text())["results"] == result["results"]
    assert {file.name for file in (tmp_path / "kept").iterdir()} >= {"parity-5.json", "8b-0.json"}

    gpu.main(["--seconds", "250"])  # then each has half of its usual time
    assert [round(each) for each in seconds.values()] == [60, 85, 185, 250]


def test_gpu_says_at_once_where_nothing_can_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--tiny", "--keep", str(tmp_path / "file" / "there")])
    assert "error: --keep: " in capsys.readouterr().err


def test_gpu_that_is_told_to_end_says_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ended(commands: list[list[str]], timeout: float) -> list[int | None]:
        options = dict(itertools.pairwise(commands[0]))
        if options["--only"] == "attention":
            Report(1, Path(options["--into"])).part("a part", 0, lambda: {"ok": True})
            signal.raise_signal(signal.SIGTERM)
        return [1] * len(commands)

    monkeypatch.setattr(gpu, "run_all", ended)
    assert gpu.main([]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["results"] == {"a part": {"ok": True}}
    assert result["errors"]["benchmark"] == "it was told to end" and "8b" not in result["errors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_programs_beside_each_other_are_ended_when_their_time_is_over() -> None:
    begun = time.monotonic()
    waits = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    assert gpu.run_all([[sys.executable, "-S", "-c", "raise SystemExit(3)"], waits, waits], 0.5) == [3, None, None]
    assert time.monotonic() - begun < 30


def test_a_part_of_gpu_that_never_ends_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(seconds=100)

    async def parts() -> None:
        await gpu.part(report, "endless", -9.99, asyncio.Event().wait)
        await gpu.part(report, "good", 1, asyncio.sleep, 0, 2)

    asyncio.run(parts())
    assert report.results == {"good": 2} and report.errors == {"endless": "TimeoutError: "}


def test_a_group_of_gpu_is_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which has the arguments of one and writes the file of one, but runs in this process, which has imported torch."""

    def started(commands: list[list[str]], timeout: float) -> list[int | None]:
        (command,) = commands
        python, *program = command[:3]
        assert (python, program) == (sys.executable, ["-m", "benchmarks.gpu"])
        status, _, said = together(["gpu", *command[3:]])["gpu"]
        assert "Timeout" not in said
        return [status]

    monkeypatch.setattr(gpu, "run_all", started)
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("of the module that is tested"))
    status = gpu.main(["--tiny", "--only", "attention"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, result["errors"]) == (0, {})
    assert list(result["results"]) == [
        "ceilings", "attention, ours", "attention, ours, of latents", "recurrent layers, one token",
    ]  # fmt: skip
    assert result["environment"]["torch"] == torch.__version__


@pytest.mark.long
@pytest.mark.timeout(300)
def test_attention_kernels_compile_for_hopper_without_spills_and_load_ahead(compiled: Reports) -> None:
    status, result, said = ended(*compiled["attention_compile"])
    assert (result["spilling"], result["waiting"]) == ([], []), said
    assert status == 0
    assert result["kernels"] == 8


@pytest.mark.long
@pytest.mark.timeout(300)
def test_fused_kernels_compile_for_hopper_without_spills_and_read_much_at_a_time(compiled: Reports) -> None:
    status, result, said = ended(*compiled["fused_compile"])
    assert (result["spilling"], result["narrow"], result["starving"]) == ([], [], []), said
    assert status == 0
    assert result["kernels"] == 7


def test_four_bits_measures_layers_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.require_triton()
    interpreted.large_tiles(monkeypatch)
    result = four_bits.main(["--tiny", "--tokens", "1", "5"])
    names = ("tiny layer", "tiny experts", "other tiny experts")
    assert list(result["results"]) == [f"{name}, {tokens}" for name in names for tokens in (1, 5)]
    for name, row in result["results"].items():
        assert row["off"] < 3e-2  # interpreted, what is stored in bfloat16 is cut off
        assert row["us"] > 0 and ("torch_us" in row) == ("layer" in name)


def test_fused_measures_every_product_and_finds_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.require_triton()
    interpreted.large_tiles(monkeypatch)
    monkeypatch.setattr(fused, "candidates", lambda tokens: [Tile(128, 64), Tile(256, 32)])
    result = fused.main(["--model", "tiny", "--sweep"])
    parts = ("gate and up", "qkv", "output", "down", "head")
    assert list(result["results"]) == [f"{part}, {tokens}" for part in parts for tokens in (1, 8)]
    for row in result["results"].values():
        assert row["off"] < 1e-2
        assert row["tile"].startswith("Tile(outputs=")
        assert row["fused_us"] > 0 and row["torch_us"] > 0 and row["best_us"] > 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_lag_measures_every_phase(reports: Reports) -> None:
    status, result, said = ended(*reports["lag"])
    assert status == 0, said
    assert list(result["results"]) == ["idle", "decode 2", "decode 4", "load", "reload"]
    for phase in result["results"].values():
        assert phase["timers"] > 3
        assert 0 <= phase["p50_ms"] <= phase["p99_ms"] <= phase["max_ms"]
        assert phase["any_p99_ms"] <= phase["max_ms"]


def test_lag_names_the_innermost_frames_of_the_threads_that_do_not_run_the_loop() -> None:
    dump = """Timeout (0:00:00.031000)!
Thread 0x00007f1 (most recent call first):
  File "/lib/json/decoder.py", line 353 in raw_decode
  File "/lib/json/__init__.py", line 346 in loads
  File "/lib/a/b.py", line 7 in load
  File "/lib/a/c.py", line 8 in run

Thread 0x00007f2 (most recent call first):
  File "/lib/asyncengine/instruction_queue.py", line 71 in wait

Thread 0x00007f3 (most recent call first):
  File "/lib/asyncio/base_events.py", line 1922 in _run_once
"""
    assert list(innermost(dump)) == ["json/decoder.py:353 raw_decode < json/__init__.py:346 loads < a/b.py:7 load"]


def test_a_call_that_holds_the_loop_counts_for_every_moment_that_it_takes() -> None:
    lags = [0.0] * 899 + [0.1]  # 0.1 s of 1 s
    assert sorted(lags)[int(len(lags) * 0.99)] == 0
    assert waited(lags, 0.99) == pytest.approx(0.09, abs=0.002)
    assert waited(lags, 0.85) == 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_scale_draws_every_curve(reports: Reports, plots: Path) -> None:
    status, result, said = ended(*reports["scale"])
    assert status == 0, said
    for name in ("running", "context", "waiting", "prefix"):
        assert len(result[name]) >= 2
        drawn = ElementTree.parse(plots / f"scale-{name}.svg")
        assert len(drawn.findall("{*}path")) > 10
    assert [row["hit_tokens"] for row in result["prefix"]] == [0, 32]
    assert [row["kv_mb"] for row in result["running"]] == sorted(row["kv_mb"] for row in result["running"])


@pytest.mark.long
@pytest.mark.timeout(300)
def test_parts_add_up_to_a_step(reports: Reports) -> None:
    status, result, said = ended(*reports["parts"])
    assert status == 0, said
    found = result["results"]["tiny"]
    assert list(found) == ["1", "2"]
    for parts in found.values():
        whole, launches = parts.pop("step"), parts.pop("launches")
        assert sum(parts.values()) == pytest.approx(whole, abs=1e-3)
        assert min(parts["weights"], parts["host"]) > 0
        assert launches > 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_arrivals_serves_the_same_requests_on_both_sides(reports: Reports) -> None:
    status, result, said = ended(*reports["arrivals"])
    assert status == 0, said
    assert set(result["results"]) == {"asyncengine", "transformers"}
    ours, theirs = result["results"].values()
    assert (ours["requests"], ours["failed"]) == (theirs["requests"], theirs["failed"]) == (4, 0)
    assert ours["completion_tokens"] == theirs["completion_tokens"]


def test_arrivals_says_where_there_was_no_time_between_tokens() -> None:
    found = {"seconds": 2.0, "tokens_per_second": 8.0, "ttft_ms": {"p50": 1.0, "p99": 2.0}}
    assert line_of("ours", found).split() == ["ours", "2.00", "8.0", "1.0", "2.0", "nan", "nan"]


def test_arrivals_are_the_same_for_the_same_seed() -> None:
    work = arrivals(64, 4.0, 1000, (16, 384), (16, 128))
    assert work == arrivals(64, 4.0, 1000, (16, 384), (16, 128))
    assert work != arrivals(64, 4.0, 1000, (16, 384), (16, 128), seed=1)
    assert 8 < work[-1].at < 32  # 64 at 4 per second
    assert all(16 <= len(each.prompt) <= 384 and 16 <= each.tokens <= 128 for each in work)


def test_scheduler_and_gap_measure_what_they_say(without_models: Reports) -> None:
    status, result, said = ended(*without_models["scheduler"])
    assert status == 0, said
    assert set(result["results"]["4"]) == {"0", "50"}
    status, result, said = ended(*without_models["gap"])
    assert status == 0, said
    assert set(result["results"]["4"]) == {"one by one", "ahead"}
    for found in result["results"]["4"].values():
        assert set(found) == {"idle", "readers", "application"}
        assert found["idle"]["kept"] == 1
        assert found["idle"]["of_the_device"] <= 1


def test_fanout_and_latency_measure_what_they_say(without_models: Reports) -> None:
    status, result, said = ended(*without_models["fanout"])
    assert status == 0, said
    assert set(result["results"]) == {"1", "4"}
    assert "bare" in said.lower()
    status, result, said = ended(*without_models["latency"])
    assert status == 0, said
    assert set(result["results"]) == {"1", "4"}
    for found in result["results"].values():
        assert 0 < found["p50_us"] <= found["p99_us"]


NAMED = ("fanout", "scheduler", "gap", "latency", "end_to_end")


@pytest.mark.parametrize("name", NAMED)
def test_says_what_it_measures_and_is_in_the_table(name: str) -> None:
    source = (ROOT / "benchmarks" / f"{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring is not None
    assert f"python -m benchmarks.{name}" in docstring
    assert "The last line is one JSON object." in " ".join(docstring.split())
    assert f"| `{name}.py` |" in (ROOT / "benchmarks" / "README.md").read_text()
