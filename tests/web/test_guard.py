"""Who may ask for what: refused before Gradio sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from expunge.web.guard import Guard, needed

LOCAL = ("localhost", "127.0.0.1", "::1")


async def inside(scope: Any, receive: Any, send: Any) -> None:
    """Stands for Gradio: says that it was asked, with headers that must not survive."""
    headers = [(b"content-type", b"text/html"), (b"cache-control", b"public, max-age=9"),
               (b"X-Frame-Options", b"ALLOWALL")]  # fmt: skip
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    await send({"type": "http.response.body", "body": b" whole"})


def ask(
    path: str = "/", hosts: Any = LOCAL, kind: str = "http", **headers: str
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of one request."""
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "method": "GET", "headers": pairs}
    asyncio.run(Guard(inside, hosts, {0: 1})(scope, receive, send))
    if kind != "http":
        return messages[0]["code"], {}, messages[0]["type"].encode()
    names = [name.lower() for name, _ in messages[0]["headers"]]
    assert len(names) == len(set(names))
    body = b"".join(message.get("body", b"") for message in messages[1:])
    return messages[0]["status"], {n.lower(): v for n, v in messages[0]["headers"]}, body


def test_what_is_needed_passes_with_headers_that_keep_it_here() -> None:
    status, headers, body = ask(host="127.0.0.1:7860")
    assert (status, body) == (200, b"half whole")
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-frame-options"] == b"DENY"
    policy = headers[b"content-security-policy"].decode()
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'self'"
    assert directives["connect-src"] == "'self'"
    assert directives["script-src-attr"] == "'none'"
    assert "http" not in policy


def test_files_of_gradio_may_be_kept_by_a_browser() -> None:
    assert ask("/assets/x.js", host="localhost")[1][b"cache-control"] == b"public, max-age=9"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:9000", 200), ("LOCALHOST", 200), ("[::1]:7860", 200), ("127.0.0.1", 200),
        ("evil.example", 403), ("evil.example:7860", 403), ("localhost.evil.example", 403),
        ("localhost@evil.example", 403), ("", 403), ("[::1", 403),
    ],
)  # fmt: skip
def test_only_its_own_names_are_answered(host: str, expected: int) -> None:
    assert ask(host=host)[0] == expected


def test_a_page_for_other_machines_answers_to_any_name() -> None:
    assert ask(hosts=None, host="model.example")[0] == 200
    # Its password guards it then, and still no other site may send to it.
    assert ask(hosts=None, host="model.example", origin="https://evil.example")[0] == 403


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://127.0.0.1:7860", 200), ("http://127.0.0.1:1", 403), ("http://localhost:7860", 403),
        ("null", 403), ("https://evil.example", 403), ("", 403),
    ],
)  # fmt: skip
def test_other_origins_send_nothing(origin: str, expected: int) -> None:
    assert ask(host="127.0.0.1:7860", origin=origin)[0] == expected


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/file/x", "/docs",
        "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/run/ask", "/gradio_api/call/x",
        "/gradio_api/proxy=http://x", "/gradio_api/vibe-edit/", "/monitoring", "/gradio_api/mcp/sse",
        "/assets/../gradio_api/info", "/gradio_api/heartbeat/../info", "/config/..", "//", "/runs",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(path: str) -> None:
    assert not needed(path)
    status, headers, body = ask(path, host="localhost")
    assert (status, body) == (404, b"Not found.")
    assert b"content-security-policy" in headers


def test_no_websocket() -> None:
    assert ask(kind="websocket", host="localhost") == (1008, {}, b"websocket.close")
