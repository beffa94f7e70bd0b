"""``/ui``: one page for looking at an engine and talking to it. Self-contained: no build step, no network."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from asyncengine.server.service import Service


def routes(service: Service) -> list[Route]:
    """The route; none unless the settings want it."""
    if not service.settings.ui:
        return []
    html = resources.files("asyncengine.server").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": _policy(html),
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    return [Route("/ui", page)]


def _policy(html: str) -> str:
    """What the page may do: run its own script, and talk to the server that it came from."""
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
