"""Models that write one text of another, over HTTP and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.model.loader import TransformersLoader
from tests.cli.programs import Done, run
from tests.model.text_to_text import checkpoints
from tests.server.serving import error, events, served

pytestmark = [pytest.mark.loops("either"), pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_nllb(tmp_path_factory.mktemp("nllb"))


def expected(path: Path, text: str, src_lang: str = "eng_Latn", tgt_lang: str = "fra_Latn") -> str:
    tokenizer = checkpoints.nllb()
    tokenizer.src_lang = src_lang
    ids = checkpoints.reference(
        path, tokenizer(text)["input_ids"], begun=2, forced_bos_token_id=checkpoints.LANGUAGE[tgt_lang]
    )
    written: str = tokenizer.decode(ids[:6], skip_special_tokens=True)
    return written


def engine(path: Path) -> AsyncEngine:
    return AsyncEngine(EngineConfig(str(path), device="cpu", dtype="float32", max_num_sequence=4))


async def test_a_prompt_is_what_is_translated(nllb: Path) -> None:
    async with served(engine(nllb), served_model_name="nllb") as client:

        async def ask(prompt: Any, **changes: Any) -> Any:
            body = {"model": "nllb", "prompt": prompt, "max_tokens": 6, **changes}
            return await client.post("/v1/completions", json=body)

        found = (await ask(["abc", "fed cab"], tgt_lang="fra_Latn")).json()
        assert [each["text"] for each in found["choices"]] == [expected(nllb, each) for each in ("abc", "fed cab")]
        tokens = sum(len(checkpoints.nllb()(each)["input_ids"]) for each in ("abc", "fed cab"))
        assert found["usage"]["prompt_tokens"] == tokens + 2 * 2
        streamed = events((await ask("abc", src_lang="ron_Latn", tgt_lang="deu_Latn", stream=True)).text)
        text = "".join(choice["text"] for chunk in streamed for choice in chunk["choices"])
        assert text == expected(nllb, "abc", "ron_Latn", "deu_Latn")
        assert "near it: 'fra_Latn'" in error(await ask("abc", tgt_lang="french"))["message"]
        talk = {"model": "nllb", "messages": [{"role": "user", "content": "abc"}]}
        refused = error(await client.post("/v1/chat/completions", json=talk))
        assert "writes one text of another" in refused["message"]
        embedding = await client.post("/v1/embeddings", json={"model": "nllb", "input": "abc"})
        assert "embed" in error(embedding)["message"] or "hidden" in error(embedding)["message"]


def complete(*arguments: str, stdin: str) -> Done:
    flags = ("--device", "cpu", "--dtype", "float32", "--max-tokens", "6")
    return run("complete", *arguments, *flags, stdin=stdin, loader=TransformersLoader())


def test_lines_are_translated(nllb: Path) -> None:
    done = complete(str(nllb), "--tgt-lang", "fra_Latn", stdin="abc\nfed cab\n")
    assert (done.status, done.out.splitlines()) == (0, [expected(nllb, each) for each in ("abc", "fed cab")])
    lines: list[Any] = [
        {"prompt": "abc", "src_lang": "ron_Latn", "tgt_lang": "deu_Latn"},
        {"prompt": "abc", "tgt_lang": "french"},
        {"messages": [], "decoder": "a"},
    ]
    done = complete(str(nllb), "--tgt-lang", "fra_Latn", "--jsonl", stdin="\n".join(map(json.dumps, lines)))
    first, *others = [json.loads(line) for line in done.out.splitlines()]
    assert done.status == 1 and first["text"] == expected(nllb, "abc", "ron_Latn", "deu_Latn")
    assert "near it: 'fra_Latn'" in others[0]["error"]["message"]
    assert "'decoder' beside 'messages'" in others[1]["error"]["message"]


def test_what_it_takes(nllb: Path) -> None:
    done = run("estimate", str(nllb), "--memory", "1", "--max-num-seqs", "7")
    assert done.status == 0, done.err
    for text in (
        "M2M100ForConditionalGeneration",
        "a source of up to 48 tokens and up to 48 of its text",
        "7 sources at once",
    ):
        assert text in done.out
    assert run("estimate", str(nllb), "--memory", "0.1").status == 1


def test_what_a_model_without_positions_takes(tmp_path: Path) -> None:
    """Whose heads are of a size of their own, and whose decoder has fewer layers than its encoder."""
    path = str(checkpoints.write(tmp_path, "t5"))
    done = run("estimate", path, "--memory", "1", "--device", "cpu")
    assert done.status == 0, done.err
    mib = 2 * 2 * (24 + 24) * 4 * 4096 / 1024**2
    assert mib == 3.0
    assert "3.0 MiB for a source of up to 2,048 tokens and up to 2,048 of its text" in done.out
    done = run("estimate", path, "--memory", "1", "--device", "cpu", "--max-model-len", "3000")
    assert "a source of up to 3,000 tokens and up to" in done.out
