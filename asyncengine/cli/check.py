"""``asyncengine check``: how far a server is what OpenAI's clients expect."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from asyncengine.cli import remote
from asyncengine.cli.remote import ApiKey, Url

if TYPE_CHECKING:
    from asyncengine.cli.conformance import Entry, Server

Verdict = Literal["ok", "differs", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a check."""

    name: str
    verdict: Verdict
    detail: str
    required: bool

    @property
    def bad(self) -> bool:
        """Whether clients would notice."""
        return self.verdict == "differs" or (self.verdict == "missing" and self.required)


def check(
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="What to ask for; the server's first if not given.")] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="A JSON object per check.")] = False,
    api_key: ApiKey = None,
) -> int:
    """Check any server against what clients of OpenAI's API rely on.

    ok: as OpenAI's. missing: not there, or refused by name, which a client can live with. differs: something else
    than a client expects. Exit status 1: something differs, or one of the basics is missing.
    """
    remote.root(url)
    from asyncengine.cli.conformance import ENTRIES, Server
    from asyncengine.cli.loading import runner
    from asyncengine.cli.progress import bar

    async def run() -> list[Finding]:
        async with remote.connected(url, api_key) as client:
            server = Server(client, await remote.model_name(client) if model is None else model)
            with bar("checking", len(ENTRIES)) as advance:
                found = []
                for entry in ENTRIES:
                    found.append(await _finding(entry, server))
                    advance()
            return found

    with runner() as running:
        findings = running.run(run())
    for finding in findings:
        if jsonl:
            print(json.dumps({"check": finding.name, "verdict": finding.verdict, "detail": finding.detail}))
        else:
            print(f"{finding.name:18} {finding.verdict:8} {textwrap.shorten(finding.detail, 100)}".rstrip())
    if not jsonl:
        count = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("ok", "differs", "missing")}
        print("\n" + ", ".join(f"{number} {verdict}" for verdict, number in count.items()))
    return int(any(finding.bad for finding in findings))


async def _finding(entry: Entry, server: Server) -> Finding:
    from asyncengine.cli.conformance import Differs, Missing

    try:
        await entry.check(server)
    except Differs as difference:
        return Finding(entry.name, "differs", str(difference), entry.required)
    except Missing as absence:
        return Finding(entry.name, "missing", str(absence), entry.required)
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # not of the shape that was looked into
        return Finding(entry.name, "differs", f"the answer has another shape: {error!r}", entry.required)
    return Finding(entry.name, "ok", "", entry.required)
