"""`ServerSettings`: how an engine is served, as opposed to what it serves. A value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from asyncengine.errors import ConfigError
from asyncengine.media import Kind
from asyncengine.reranking import RerankPrompt

MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_IMAGE_BYTES = 20 * 1024 * 1024
MAX_AUDIO_BYTES = 20 * 1024 * 1024
MAX_VIDEO_BYTES = 20 * 1024 * 1024
MAX_HEADER_BYTES = 32 * 1024


_DOMAIN = re.compile(r"(?P<host>[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?", re.I | re.A)


@dataclass(frozen=True, slots=True)
class MediaDomain:
    """A host that may be asked for images, audio and videos.

    Attributes:
        host: As it stands in a URL, in lower case; of an IPv6 address, without its brackets.
        port: The only one; None is that of the scheme.
    """

    host: str
    port: int | None = None

    @classmethod
    def parse(cls, given: object) -> MediaDomain:
        """Out of ``HOST`` or ``HOST:PORT``.

        Raises:
            ConfigError: It is something else.
        """
        found = _DOMAIN.fullmatch(given) if isinstance(given, str) else None
        if found is None or not 0 < int(port := found["port"] or 80) < 1 << 16:
            raise ConfigError(
                f"allowed_media_domains has {given!r:.80}; expected HOST or HOST:PORT in ASCII, no URL and no *"
            )
        return cls(found["host"].lower().strip("[]"), None if found["port"] is None else int(port))

    def allows(self, host: str, port: int, implied: bool) -> bool:
        """Whether a URL leads there; `implied` says that its port is that of the scheme."""
        return host == self.host and (implied if self.port is None else port == self.port)


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Which images, audio and videos are taken.

    Attributes:
        image: Size of the largest image, as a file in bytes.
        audio: The same of audio.
        video: The same of videos.
        domains: Who may be asked for those that are somewhere else.
    """

    image: int
    audio: int
    video: int
    domains: tuple[MediaDomain, ...] = ()

    def of(self, kind: Kind) -> int:
        """Size of the largest of a kind."""
        return {"image": self.image, "audio": self.audio, "video": self.video}[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How an engine is served.

    Attributes:
        served_model_name: What the model is called on the wire. None is the name it was loaded by, of a path its
            last part.
        api_key: Asked for on every route but ``/health``: as bearer token, as ``x-api-key``, or as the password of
            basic authentication (which lets a browser open ``/ui``). None asks for nothing.
        admin: Whether there are routes that reload, unload, reset, abort, trace, and load adapters. They need an
            `api_key`.
        ui: Whether there is a page at ``/ui``.
        cors_origins: Web origins whose pages may call; ``"*"`` is all. None by default.
        max_body_bytes: Largest body of a request; larger ones are a 413.
        max_image_bytes: Largest image in a body, as a file; larger ones are a 400. As base64 it is a third larger.
        max_audio_bytes: The same of audio.
        max_video_bytes: The same of videos.
        allowed_media_domains: Hosts whose images, audio and videos are fetched where a request has the URL of one, as
            ``HOST`` or ``HOST:PORT``; none by default. They are trusted, whatever their address is.
        media_seconds: How long all that is fetched for one request may take to come.
        max_header_bytes: Largest sum of a request's headers; larger ones are a 431.
        max_concurrency: Most requests at a time that use the engine; more are a 429. None leaves it to
            ``max_queue_size`` of the engine.
        body_seconds: How long a client may take to send its body.
        ping_seconds: Silence on a stream after which a comment is sent, so that nothing between takes it for dead.
        retry_after_seconds: What is told to clients that should come back.
        engine_name: The ``engine`` label of metrics.
        rerank_prompt: How a query and a document become a prompt; None is as the checkpoint says.
    """

    served_model_name: str | None = None
    api_key: str | None = None
    admin: bool = False
    ui: bool = True
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    max_image_bytes: int = MAX_IMAGE_BYTES
    max_audio_bytes: int = MAX_AUDIO_BYTES
    max_video_bytes: int = MAX_VIDEO_BYTES
    allowed_media_domains: Sequence[str] = ()
    media_seconds: float = 10.0
    max_header_bytes: int = MAX_HEADER_BYTES
    max_concurrency: int | None = None
    body_seconds: float = 30.0
    ping_seconds: float = 15.0
    retry_after_seconds: int = 1
    engine_name: str = "0"
    rerank_prompt: RerankPrompt | None = None

    def __post_init__(self) -> None:
        for name in ("served_model_name", "api_key"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} is {value!r}; expected a non-empty string or None")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("api_key has other characters than printable ASCII, which a header cannot carry")
        if self.admin and self.api_key is None:
            raise ConfigError("admin is True and api_key is None; the admin routes need an API key")
        if self.rerank_prompt is not None and not isinstance(self.rerank_prompt, RerankPrompt):
            raise ConfigError(f"rerank_prompt is {self.rerank_prompt!r:.80}; expected RerankPrompt(...) or None")
        if isinstance(self.cors_origins, str):
            raise ConfigError(f"cors_origins is {self.cors_origins!r}; expected a list of origins")
        object.__setattr__(self, "cors_origins", tuple(self.cors_origins))
        if isinstance(self.allowed_media_domains, str):
            raise ConfigError(f"allowed_media_domains is {self.allowed_media_domains!r:.80}; expected a list of hosts")
        object.__setattr__(self, "allowed_media_domains", tuple(self.allowed_media_domains))
        for domain in self.allowed_media_domains:
            MediaDomain.parse(domain)
        sizes = ("max_body_bytes", "max_image_bytes", "max_audio_bytes", "max_video_bytes", "max_header_bytes")
        least = dict.fromkeys(sizes, 1) | {"retry_after_seconds": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{name} is {value!r}; expected an integer >= {minimum}")
        most = self.max_concurrency
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ConfigError(f"max_concurrency is {most!r}; expected an integer >= 1 or None")
        for name in ("body_seconds", "media_seconds", "ping_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"{name} is {value!r}; expected seconds > 0")

    @property
    def media(self) -> MediaLimits:
        """Which images, audio and videos are taken."""
        domains = tuple(MediaDomain.parse(domain) for domain in self.allowed_media_domains)
        return MediaLimits(self.max_image_bytes, self.max_audio_bytes, self.max_video_bytes, domains)
