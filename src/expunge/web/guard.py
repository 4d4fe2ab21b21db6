"""What stands between the network and Gradio: who may ask, for what, and what a browser may load.

Gradio brings more than this page uses: uploads, files, a proxy, a described interface, an editor of its
own source. Here only what the page needs passes, and a browser loads nothing from another host.
Gradio takes an object in the place of a value for a file to copy, so a value is text, a number, yes, no
or nothing here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from expunge.errors import place_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOG = logging.getLogger(__name__)
_MOST_BYTES = 2**20
"""Of a request's body. No context holds a longer prompt, and its tokens would take the memory."""
_MOST_GUESSES = 8
"""Passwords that are tried at a time, by whomever."""
_LOGIN = ("/login", "/login/")
_CALLS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
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

    def __init__(self, app: App, hosts: Iterable[str] | None, handlers: Mapping[int, int]) -> None:
        """`hosts` are the names that the page may be asked for by; None allows any. `handlers` are the
        page's, by their index, with the number of values that each takes.

        A page of this machine alone must not answer to the name of another site whose address was
        made to point here (DNS rebinding).
        """
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)
        self._handlers = handlers
        self._guessing: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or refuses with 400, 403, 404, 413 or 429."""
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
        elif (body := await _body(receive)) is None:
            await _refuse(send, 413, f"A request has at most {_MOST_BYTES} bytes.")
        elif path in _CALLS and not self._is_call(body):
            await _refuse(send, 400, "This is no call of the page's.")
        elif path in _LOGIN and scope["method"] == "POST":
            await self._guess(scope, body, receive, send)
        else:
            await self._pass(scope, body, receive, send)

    def _may_ask(self, headers: MutableMapping[bytes, str]) -> bool:
        host = headers.get(b"host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return False
        # A page of another site may send requests here, though it cannot read what they give.
        origin = headers.get(b"origin")
        return origin is None or origin.partition("://")[2] == host

    def _is_call(self, body: bytes) -> bool:
        """Whether a handler of the page is called with as many plain values as it takes."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict):
            return False
        index, values, event = (call.get(key) for key in ("fn_index", "data", "event_data"))
        return (
            type(index) is int
            and isinstance(values, list)
            and len(values) == self._handlers.get(index)
            and all(isinstance(value, str | int | float | None) for value in values)
            and isinstance(event, dict | None)
        )

    async def _guess(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """A login, one at a time from each client: a wrong one takes a while."""
        client = str((scope.get("client") or ("",))[0])
        if client in self._guessing or len(self._guessing) >= _MOST_GUESSES:
            await _refuse(send, 429, "Another password is being tried; wait a second.")
            return
        self._guessing.add(client)
        try:
            await self._pass(scope, body, receive, send)
        finally:
            self._guessing.discard(client)

    async def _pass(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """On to Gradio, whose errors end here: their messages may quote a row."""
        begun = read = False

        async def again() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, again, _with_headers(sending, scope["path"]))
        except Exception as error:
            _LOG.warning("a request was not answered (%s)", place_of(error))
            if not begun:
                await _refuse(send, 500, "Internal error.")
            else:
                with suppress(RuntimeError):  # of an answer whose length was promised
                    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(receive: Receive) -> bytes | None:
    """The request's body; None for one that is too long."""
    body, more = bytearray(), True
    while more and len(body) <= _MOST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return None if more or len(body) > _MOST_BYTES else bytes(body)


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
