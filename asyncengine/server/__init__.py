"""HTTP over an engine, a thin layer: OpenAI's and Anthropic's shapes, metrics, a page. Needs ``asyncengine[server]``.

    app = create_app(engine)                 # an ASGI application; mount it, or run it with any ASGI server

The engine does not know that it is served. `asyncengine.server.serve` runs engine and server in one event loop.
"""

from asyncengine.server.app import create_app
from asyncengine.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
