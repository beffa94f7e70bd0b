"""Transcripts as files of subtitles: SubRip and WebVTT."""

from __future__ import annotations

from collections.abc import Iterable

from asyncengine.outputs import TranscriptSegment


def srt(segments: Iterable[TranscriptSegment]) -> str:
    """SubRip: numbered, with a comma before the milliseconds."""
    shown = (
        f"{number}\n{_time(segment.start, ',')} --> {_time(segment.end, ',')}\n{_line(segment)}\n"
        for number, segment in enumerate(segments, 1)
    )
    return "\n".join(shown)


def vtt(segments: Iterable[TranscriptSegment]) -> str:
    """WebVTT (W3C), in which what opens a tag is written as a reference."""
    shown = (
        f"{_time(segment.start, '.')} --> {_time(segment.end, '.')}\n"
        + _line(segment).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        + "\n"
        for segment in segments
    )
    return "\n".join(("WEBVTT\n", *shown))


def _line(segment: TranscriptSegment) -> str:
    return " ".join(segment.text.split())


def _time(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"
