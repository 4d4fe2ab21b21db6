"""The page from files to a server: everything is checked, a port is bound, then models are loaded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from expunge.models.loading import load_model, resolve_dtype
from expunge.models.text_forms import text_policy
from expunge.web import drawing
from expunge.web.asking import Pair, Voice
from expunge.web.guard import Guard
from expunge.web.inputs import Checked, ViewInputs, check, is_loopback, listening, same_password

if TYPE_CHECKING:
    import uvicorn

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WRONG_PASSWORD_SECONDS = 1.0
_LAST_ANSWERS = 2
"""Seconds that open connections have to end when the server stops."""
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SF Mono", "DejaVu Sans Mono", "monospace"]


def serve(
    inputs: ViewInputs,
    ready: Callable[[str, bool], None],
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
) -> None:
    """Shows the page until it is interrupted; `ready` is told its address, and whether
    it asks for a password.

    Raises InputError before a model is loaded, KeyboardInterrupt when it is stopped.
    """
    checked = check(inputs)
    opened = listening(inputs.host, inputs.port)
    try:
        pair = load(checked, progress)
        with TemporaryDirectory(prefix="expunge-page-") as temporary:  # of mode 0700
            server = server_of(checked, pair, temporary)
            ready(address(inputs.host, opened.getsockname()[1]), checked.password is not None)
            server.run(sockets=[opened])
    finally:
        opened.close()


def load(
    checked: Checked,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
) -> Pair:
    """Both models in memory."""
    voices = []
    for done, model in enumerate((checked.target, checked.unlearned)):
        progress("loading the models", done, 2)
        voices.append(
            Voice(
                load_model(model, resolve_dtype(model, checked.inputs.dtype), checked.device),
                model.tokenizer,
                text_policy(model, chat_template=checked.chat_template, long_rows="window"),
            )
        )
    progress("loading the models", 2, 2)
    return Pair(*voices)


def server_of(checked: Checked, pair: Pair, temporary: str) -> uvicorn.Server:
    """The server of the page, not started. What Gradio might write goes to `temporary`."""
    os.environ["GRADIO_TEMP_DIR"] = temporary
    # Read as Gradio is imported: it would report its use and ask for a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from expunge.web.page import build

    page = build(checked, pair)
    # Gradio checks the paths of files only for an app that it launched by itself.
    page.has_launched = True
    inside: Any = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        auth=None if checked.password is None else _door(checked.password),
        # Gradio's form sends nothing, and says nothing, while the user name is empty.
        auth_message="Fill in both fields: <strong>any</strong> user name, and the password that"
        " expunge view was started with.",
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        footer_links=[],
        theme=gr.themes.Base(font=_FONT, font_mono=_MONO).set(
            # Gradio's own greys are too pale to read.
            block_info_text_color="#565d66",
            block_info_text_color_dark="#b3bac2",
            body_text_color_subdued="#565d66",
            body_text_color_subdued_dark="#b3bac2",
        ),
        head=f"<style>{drawing.stylesheet()}</style>",
    )
    host = checked.inputs.host
    hosts = (*_LOOPBACK, host) if is_loopback(host) else None
    return uvicorn.Server(
        uvicorn.Config(
            Guard(inside, hosts, {index: len(each.inputs) for index, each in page.fns.items()}),
            log_level="warning",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=_LAST_ANSWERS,
        )
    )


def address(host: str, port: int) -> str:
    """What to type into a browser on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _door(password: str) -> Callable[[str, str], Awaitable[bool]]:
    """Whether a login is right; a wrong one takes a while, and the guard lets few be tried at a time."""

    async def opens(_user: str, given: str) -> bool:
        if same_password(given, password):
            return True
        await asyncio.sleep(_WRONG_PASSWORD_SECONDS)
        return False

    return opens
