"""Settings of the server, as `unigen serve` reads them from its command line."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RequestLimits:
    """What a request must satisfy before it reaches a route.

    Raises:
        ValueError: a key is empty, or contains blanks or characters that a header cannot carry.
    """

    api_keys: tuple[str, ...] = ()
    """With keys, only the public paths are answered without one of them. Printable ASCII without blanks."""
    max_body_bytes: int = 32 << 20
    """Size of one request body."""
    max_pending_body_bytes: int = 256 << 20
    """Size of all bodies that are being read or answered; at least two bodies are always allowed."""
    requests_per_minute: int = 0
    """Per key, or per address where there are no keys; 0 is unlimited."""
    invalid_keys_per_minute: int = 20
    """Per address. When they are used up, keys from that address are no longer checked."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names of this server beside localhost and IP addresses; "*" is any. Without API keys, requests with another name
    in the header `Host` and requests from pages of other origins are rejected. None disables both checks."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of pages that may send requests nevertheless; "*" is any."""
    body_timeout: float = 20.0
    """Seconds that a body may take, plus one for each `min_body_bytes_per_second` bytes received."""
    min_body_bytes_per_second: int = 32 << 10

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key.strip():
                raise ValueError(
                    "an API key is empty (--api-key, UNIGEN_API_KEY) and would let all in: give one, or leave it out"
                )
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ValueError("an API key holds blanks or characters beyond ASCII, which no header carries")


@dataclass(frozen=True)
class ServerConfig:
    """How the server behaves.

    Raises:
        ValueError: a trusted proxy is neither an IP address nor a network.
    """

    model_name: str
    """Name of the model in requests and answers."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    request_timeout: float = 300.0
    """Seconds that an answer may take."""
    images_folder: Path | None = None
    """Where images are saved that clients request by URL; None rejects such requests."""
    allow_fetch: bool = False
    """Whether images are fetched from http(s) addresses in requests."""
    log_prompts: bool = False
    allowed_origins: tuple[str, ...] = ()
    """Origins of pages that may read answers in a browser (CORS)."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks of proxies whose header X-Forwarded-For is used."""
    heartbeat_timeout: float = 30.0
    """Seconds without a heartbeat after which the model's process is restarted."""
    unavailable_timeout: float = 300.0
    """Seconds without a model after which /health fails."""

    def __post_init__(self) -> None:
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise ValueError(
                    f"{proxy!r} is no address and no network: name a proxy as 10.0.0.1 or 10.0.0.0/8"
                ) from None
