"""``asyncengine transcribe``: files in their order, in several forms, and what goes wrong with one of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from typer.testing import CliRunner

from asyncengine.fallback import TranscriptionFallback, Verdict
from asyncengine.model.loader import TransformersLoader
from asyncengine.transcription import Quality
from tests.cli.programs import APP, ENVIRONMENT, Done, run, scripted_loader
from tests.model.speech import checkpoints

pytestmark = pytest.mark.loops("either")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("whisper"), times=True)


def heard(*arguments: str) -> Done:
    return run("transcribe", *arguments, loader=TransformersLoader())


def files(path: Path, count: int) -> list[str]:
    written = []
    for number in range(count):
        written.append(str(path / f"{number}.wav"))
        soundfile.write(written[-1], checkpoints.sound(number, 1.2), checkpoints.RATE)
    return written


def test_files_are_written_in_their_order(tmp_path: Path) -> None:
    """By a scripted model, to which any bytes are audio: it says how much of it it hears."""
    paths = []
    for count in (9, 2, 5):
        paths.append(str(tmp_path / f"{count}.bin"))
        Path(paths[-1]).write_bytes(b"x" * count)
    loader = scripted_loader(script=lambda prompt, branch: str(len(prompt)).encode(), takes_audio=True)
    done = run("transcribe", "scripted", *paths, loader=loader)
    assert done.status == 0
    lengths = [len(Path(path).read_bytes()) for path in paths]
    assert done.out.splitlines() == [f"{path}: {3 + length % 7}" for path, length in zip(paths, lengths, strict=True)]
    done = run("transcribe", "scripted", paths[0], "--hint", "abc", loader=loader)
    assert (done.status, done.out) == (0, "8\n")
    done = run("transcribe", "scripted", paths[0], "--translate", loader=loader)
    assert (done.status, done.out) == (1, "") and "the model only transcribes" in done.err
    done = run("transcribe", "scripted", paths[0], "--format", "srt", loader=loader)
    assert (done.status, done.out) == (1, "")
    assert f"{paths[0]}: --format is srt, and the model knows no times; allowed: text" in done.err


def test_forms(whisper: Path, tmp_path: Path) -> None:
    one, other = files(tmp_path, 2)
    flags = ("--dtype", "float32", "--device", "cpu", "--max-num-seqs", "4")
    plain = heard(str(whisper), one, "--language", "german", *flags)
    assert plain.status == 0 and plain.out.strip()
    done = heard(str(whisper), one, other, "--language", "german", "--format", "json", *flags)
    assert done.status == 0
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [each["file"] for each in found] == [one, other]
    assert all(each["language"] == "de" and each["seconds"] == 1.2 and each["segments"] for each in found)
    assert not any("words" in segment for segment in found[0]["segments"])
    done = heard(str(whisper), one, "--language", "german", "--format", "words", *flags)
    again = json.loads(done.out)
    words = [word for segment in again["segments"] for word in segment.pop("words")]
    assert (again["text"], len(again["segments"])) == (found[0]["text"], len(found[0]["segments"]))
    assert words and all({*word} == {"word", "start", "end", "probability"} for word in words)
    for form, begin in (("srt", "1\n00:00:0"), ("vtt", "WEBVTT\n\n00:00:0")):
        done = heard(str(whisper), one, "--language", "de", "--format", form, *flags)
        assert done.status == 0 and done.out.startswith(begin)
        assert len(re.findall(" --> ", done.out)) == len(found[0]["segments"])


def test_words_of_a_model_that_does_not_know_when_they_are_said(tmp_path: Path) -> None:
    path, [one] = checkpoints.write(tmp_path / "whisper", times=True, heads=()), files(tmp_path, 1)
    done = heard(str(path), one, "--format", "words", "--device", "cpu", "--max-num-seqs", "4")
    assert done.status == 1 and "--format is words, and the model knows no times of words: there are no" in done.err
    assert "allowed: text, json, srt, vtt" in done.err


def test_what_is_wrong_with_files(whisper: Path, tmp_path: Path) -> None:
    [good] = files(tmp_path, 1)
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    done = heard(str(whisper), str(bad), good, "--dtype", "float32", "--device", "cpu")
    assert done.status == 1
    assert f"asyncengine: {bad}: audio[0]: an audio of 8 bytes is damaged" in done.err
    assert done.out.startswith(f"{good}: ") and len(done.out.splitlines()) == 1
    done = heard(str(whisper), good, str(tmp_path / "none.wav"))
    assert done.status == 2 and "none.wav' is not a file" in done.err
    done = heard(str(whisper), good, good, "--format", "srt")
    assert done.status == 2 and "--format is srt, and there are 2 files" in done.err
    done = heard(str(whisper))
    assert done.status == 2


def test_the_estimate_knows_what_an_audio_takes(whisper: Path) -> None:
    done = run("estimate", str(whisper), "--memory", "1", "--max-num-seqs", "7", "--device", "cpu")
    assert done.status == 0, done.err
    for text in (
        "WhisperForConditionalGeneration",
        "in float32",
        "an audio of 128 tokens and the 40",
        "7 audio at once",
    ):
        assert text in done.out
    done = run("estimate", str(whisper), "--memory", "0.1", "--device", "cpu")
    assert done.status == 1 and "does not fit" in done.out
    done = run("estimate", str(whisper), "--max-model-len", "128")
    assert done.status == 1 and "(max_single_sequence_length) is 128; an audio takes 128" in done.err


SPEAKING = """
import sys
from asyncengine.cli import main
from tests.cli.programs import scripted_loader
main(scripted_loader(script=lambda prompt, branch: b"x", takes_audio=True))
"""


SLOWLY = SPEAKING.replace("scripted_loader(", "scripted_loader(step_seconds=0.05, ").replace('b"x"', 'b"ab " * 8')


def test_a_single_file_is_written_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    command = [sys.executable, "-W", "error", "-c", SLOWLY, "transcribe", "scripted", str(path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(2)
        assert process.poll() is None  # a second passes until all is said
        assert first + process.stdout.read() == b"ab " * 7 + b"ab\n"
        assert process.wait(timeout=30) == 0


def test_what_looks_wrong_is_written_down_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a scripted model finds of all that it says."""
    path, verdicts = tmp_path / "a.bin", list[Verdict]()
    path.write_bytes(b"x")
    judge = TranscriptionFallback.verdict

    def judged(self: TranscriptionFallback, quality: Quality) -> Verdict:
        verdicts.append(judge(self, quality))
        return verdicts[-1]

    monkeypatch.setattr(TranscriptionFallback, "verdict", judged)
    loader = scripted_loader(script=lambda prompt, branch: b"abcd", takes_audio=True)
    done = run("transcribe", "scripted", str(path), "--fallback", loader=loader)
    assert (done.status, done.out, verdicts) == (0, "abcd\n", [Verdict.DOUBTED] * 6)
    done = run("transcribe", "scripted", str(path), "--fallback", "--temperature", "0.3", loader=loader)
    assert done.status == 1 and "temperature is 0.3, and the fallback says which" in done.err


@pytest.mark.long
def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for path in paths:
        path.write_bytes(b"x")
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SPEAKING, "transcribe", "scripted", *map(str, paths)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert "Traceback" not in process.stderr.read()


def test_characters_that_standard_output_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    loader = scripted_loader(script=lambda prompt, branch: "\u00fcber".encode(), takes_audio=True)
    done = CliRunner(charset="ascii").invoke(APP, ["transcribe", "scripted", str(path)], obj=loader)
    assert (done.exit_code, done.stdout) == (0, "?ber\n")
