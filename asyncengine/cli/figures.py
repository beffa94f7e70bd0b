"""Figures of a benchmark: percentiles, rates, the table and the JSON object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from asyncengine.cli.workload import Sample

PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of sorted `values` that at least `percent` per cent of them do not exceed."""
    return values[max(math.ceil(len(values) * percent / 100) - 1, 0)]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run amounts to.

    Attributes:
        first_token: Seconds from a request's arrival to its first token, sorted.
        inter_token: Seconds between two tokens of a request, sorted.
        end_to_end: Seconds from a request's arrival to its end, sorted.
        seconds: From the first arrival to the last end.
        requests: That succeeded.
        errors: Of those that did not.
        tokens: Generated.
        prompt_tokens: Read.
        deltas: Seconds since the first arrival, and tokens that came then.
    """

    first_token: list[float]
    inter_token: list[float]
    end_to_end: list[float]
    seconds: float
    requests: int
    errors: list[str]
    tokens: int
    prompt_tokens: int
    deltas: list[tuple[float, int]]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Figures:
        """Sums a run up; what failed counts as an error and as nothing else."""
        good = [sample for sample in samples if sample.ended is not None]
        begun = min((sample.arrived for sample in samples), default=0.0)
        return cls(
            first_token=sorted(sample.first_token for sample in good if sample.first_token is not None),
            inter_token=sorted(gap for sample in good for gap in sample.gaps),
            end_to_end=sorted(sample.ended - sample.arrived for sample in good if sample.ended is not None),
            seconds=max((sample.ended - begun for sample in good if sample.ended is not None), default=0.0),
            requests=len(good),
            errors=[sample.error for sample in samples if sample.error is not None],
            tokens=sum(sample.tokens for sample in good),
            prompt_tokens=sum(sample.prompt_tokens for sample in good),
            deltas=sorted((at - begun, count) for sample in good for at, count in sample.deltas),
        )

    @property
    def latencies(self) -> dict[str, list[float]]:
        """The three distributions by name."""
        return {"first token": self.first_token, "inter-token": self.inter_token, "end to end": self.end_to_end}

    @property
    def tokens_per_second(self) -> float:
        """Generated, over the whole run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def table(self) -> Iterator[str]:
        """Lines for a reader."""
        yield f"{self.requests} requests in {self.seconds:.2f} s" + (
            f", {len(self.errors)} failed" if self.errors else ""
        )
        yield f"{self.prompt_tokens:,} prompt tokens, {self.tokens:,} generated: {self.tokens_per_second:,.1f} tokens/s"
        yield ""
        yield f"{'ms':12}{'mean':>10}" + "".join(f"{f'p{percent}':>10}" for percent in PERCENTILES) + f"{'max':>10}"
        for name, values in self.latencies.items():
            if values:
                shown = [sum(values) / len(values), *(percentile(values, p) for p in PERCENTILES), values[-1]]
                yield f"{name:12}" + "".join(f"{1000 * value:10.2f}" for value in shown)

    def json(self) -> dict[str, Any]:
        """The same for a program; times in milliseconds."""
        found: dict[str, Any] = {
            "requests": self.requests,
            "failed": len(self.errors),
            "seconds": round(self.seconds, 4),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "requests_per_second": round(self.requests / self.seconds, 3) if self.seconds else 0.0,
        }
        for name, values in zip(("ttft_ms", "inter_token_ms", "e2e_ms"), self.latencies.values(), strict=True):
            if values:
                found[name] = {"mean": round(1000 * sum(values) / len(values), 3)} | {
                    f"p{percent}": round(1000 * percentile(values, percent), 3) for percent in PERCENTILES
                }
        return found
