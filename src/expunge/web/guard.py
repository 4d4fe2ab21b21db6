"""What stands between the network and Gradio: who may ask, for what, and what a browser may load.

Gradio brings more than this page uses: uploads, files, a proxy, a described interface, an editor of its
own source. Here only what the page needs passes, and a browser loads nothing from another host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_STATIC = ("/assets/", "/static/", "/svelte/", "/_app/")
_NEEDED = frozenset({
    "/", "/config", "/login", "/login/", "/logout", "/theme.css", "/favicon.ico",
    "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/run/predict",
    "/gradio_api/heartbeat", "/gradio_api/startup-events", "/gradio_api/cancel", "/gradio_api/reset",
})  # fmt: skip
_POLICY = "; ".join(
    [
        "default-src 'self'",
        # Gradio compiles its templates in the browser; attributes such as onclick it does not use, and
        # they are the way in which text that became markup could run.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "script-src-attr 'none'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-src 'self'",
        "object-src 'none'",
        # about: is that of the report's frame, whose links lead to its own sections.
        "base-uri 'self' about:",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: App, hosts: Iterable[str] | None) -> None:
        """`hosts` are the names that the page may be asked for by; None allows any.

        A page of this machine alone must not answer to the name of another site whose address was
        made to point here (DNS rebinding).
        """
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or refuses with 403 or 404."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        if not self._may_ask(headers):
            await _refuse(send, 403, "This page answers to its own address only.")
        elif not needed(path):
            await _refuse(send, 404, "Not found.")
        else:
            await self._app(scope, receive, _with_headers(send, path))

    def _may_ask(self, headers: MutableMapping[bytes, str]) -> bool:
        host = headers.get(b"host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return False
        # A page of another site may send requests here, though it cannot read what they give.
        origin = headers.get(b"origin")
        return origin is None or urlsplit(origin).netloc == host


def _with_headers(send: Send, path: str) -> Send:
    """Adds to an answer what a browser may do with it."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = list(_HEADERS)
            if not path.startswith(_STATIC):
                # What was revealed must not lie in a browser's cache.
                added.append((b"cache-control", b"no-store"))
            names = {name for name, _ in added}
            kept = [(n, v) for n, v in message["headers"] if n.lower() not in names]
            message["headers"] = [*kept, *added]
        await send(message)

    return sending


def needed(path: str) -> bool:
    """Whether the page asks for this path."""
    if ".." in path:
        return False
    return path in _NEEDED or path.startswith((*_STATIC, "/gradio_api/heartbeat/"))


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _refuse(send: Send, status: int, why: str) -> None:
    body = why.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        *_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
