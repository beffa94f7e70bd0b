"""Transcripts as files of subtitles: SubRip and WebVTT."""

from __future__ import annotations

from collections.abc import Iterable

from asyncengine.outputs import TranscriptSegment

VTT_BEGIN = "WEBVTT\n"
"""What stands before all cues of a WebVTT file, and behind which is an empty line, as behind each of them."""


def srt(segments: Iterable[TranscriptSegment]) -> str:
    """SubRip."""
    return "\n".join(srt_cue(number, segment) for number, segment in enumerate(segments, 1))


def vtt(segments: Iterable[TranscriptSegment]) -> str:
    """WebVTT (W3C)."""
    return "\n".join((VTT_BEGIN, *map(vtt_cue, segments)))


def srt_cue(number: int, segment: TranscriptSegment) -> str:
    """One of SubRip, which are numbered from 1: with a comma before the milliseconds."""
    return f"{number}\n{_time(segment.start, ',')} --> {_time(segment.end, ',')}\n{_line(segment)}\n"


def vtt_cue(segment: TranscriptSegment) -> str:
    """One of WebVTT, in which what opens a tag is written as a reference."""
    line = _line(segment).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{_time(segment.start, '.')} --> {_time(segment.end, '.')}\n{line}\n"


def _line(segment: TranscriptSegment) -> str:
    return " ".join(segment.text.split())


def _time(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"
