"""The page in a real Chromium: what it shows, what it never sends, whom it lets in."""

from __future__ import annotations

import html
import itertools
import json
import math
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from conftest import HOSTILE, none_in
from expunge.data.rows import as_rows
from expunge.data.tokenization import TextPolicy, prompt_ids
from expunge.evaluation.generation import generate

pytest.importorskip("gradio", reason="is in the extra web")
pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium")
PASSWORD = "correct horse <b>battery"
WAIT = 60_000
"""Milliseconds that anything on the page may take; a machine under test is slow."""


@pytest.fixture(scope="module")
def checked(served: dict[str, Path]) -> Any:
    """The run, checked as `expunge view` checks it, with its text masked."""
    from expunge.web.inputs import ViewInputs, check

    return check(
        ViewInputs(
            str(served["run"]),
            forget=str(served["forget"]),
            retain=str(served["retain"]),
            port=0,
            device="cpu",
        )
    )


@pytest.fixture(scope="module")
def pair(checked: Any) -> Any:
    from expunge.web.serving import load

    return load(checked)


looked_up: set[str] = set()
"""Every host that this process, the page's server in it, asked the address of."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where everything that Gradio might write would lie."""
    directory = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(directory))
        patch.setattr("tempfile.tempdir", str(directory))
        real = socket.getaddrinfo

        def watched(host: Any, *rest: Any, **more: Any) -> Any:
            looked_up.add(str(host))
            return real(host, *rest, **more)

        patch.setattr(socket, "getaddrinfo", watched)
        yield directory


bodies: dict[str, bytearray] = {}
"""All that each server sent, by its address; the library's own scripts and styles left out."""


def kept(app: Any, body: bytearray) -> Any:
    """The application with what it sends kept, streams that a browser leaves early included."""

    async def keeping(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or re.search("/(assets|static)/", scope["path"]):
            await app(scope, receive, send)
            return
        plain = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]

        async def noted(message: Any) -> None:
            body.extend(message.get("body", b""))
            await send(message)

        await app({**scope, "headers": plain}, receive, noted)

    return keeping


@contextmanager
def running(checked: Any, pair: Any) -> Iterator[str]:
    """The page's server in a thread of its own; gives its address."""
    from expunge.web.inputs import listening
    from expunge.web.serving import address, server_of

    opened = listening(checked.inputs.host, 0)
    server = server_of(checked, pair, os.environ["GRADIO_TEMP_DIR"])
    url = address(checked.inputs.host, opened.getsockname()[1])
    server.config.app = kept(server.config.app, bodies.setdefault(url, bytearray()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 120
        while not server.started:
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.02)
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        opened.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def masked(checked: Any, pair: Any, written: Path) -> Iterator[str]:
    with running(checked, pair) as url:
        yield url


@pytest.fixture(scope="module")
def revealed(served: dict[str, Path], checked: Any, pair: Any, written: Path) -> Iterator[str]:
    from expunge.web.inputs import check

    with running(check(replace(checked.inputs, reveal=True)), pair) as url:
        yield url


@pytest.fixture(scope="module")
def locked(checked: Any, pair: Any, written: Path) -> Iterator[str]:
    with running(replace(checked, password=PASSWORD), pair) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    pytest.importorskip("playwright", reason="is in the extra dev")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """One open page, with everything that the server sent to it and every fault that it met."""

    def __init__(self, browser: Any) -> None:
        self.context = browser.new_context()
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.requests: list[Any] = []
        self.faults: list[str] = []
        self.url = ""
        self.start = 0
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "console",
            lambda message: self.faults.append(message.text) if message.type == "error" else None,
        )

    def goto(self, url: str) -> None:
        self.url, self.start = url, len(bodies[url])
        self.page.goto(url)

    def open(self, url: str) -> Any:
        self.goto(url)
        self.page.wait_for_selector("#x-prompt textarea")
        return self.page

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def choose(self, row: str) -> None:
        """Chooses a row by a click into the table."""
        self.tab("Rows")
        self.page.locator("#x-rows").get_by_text(row, exact=True).last.click()
        self.page.locator("#x-card").get_by_text(row, exact=True).wait_for()

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits, while the browser goes on, for what it does not show."""
        for _ in range(WAIT // 100):
            if holds():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError("it did not come to hold in time")

    def streamed(self) -> str:
        """All that the server sent since this page was opened."""
        return bodies[self.url][self.start :].decode("utf-8", "replace")

    def sent(self) -> str:
        """All that came from the server, and all that the page holds now."""
        return self.streamed() + "\n" + self.page.content()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    visit = Visit(browser)
    yield visit
    visit.context.close()


def answer(page: Any, side: str) -> str:
    """The text of an answer, the names of special tokens left out."""
    tokens = page.locator(f"[data-side={side}]:visible .x-token:not(.x-special)")
    return "".join(tokens.all_text_contents())


@pytest.fixture(scope="module")
def texts(forget_rows: list[dict[str, str]], retain_rows: list[dict[str, str]]) -> list[str]:
    """What a masked page may never hold: inputs, outputs, and what tells an output apart."""
    rows = [*forget_rows, *retain_rows, HOSTILE]
    numbers = [row["output"].split()[-1].rstrip(".") for row in rows]
    return [row[column] for row in rows for column in ("input", "output")] + numbers


def found(texts: list[str], where: str) -> list[str]:
    """The texts that are there, as they are or as JSON, HTML or both write them."""
    plain = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), where)
    plain = plain.replace('\\"', '"').replace("\\n", "\n")
    once = html.unescape(plain)
    twice = html.unescape(once)  # the report's frame holds HTML in HTML
    # An answer is in as many elements as it has tokens.
    joined = (html.unescape(re.sub(r"<[^>]*>", "", form)) for form in (plain, once))
    forms = (where, plain, once, twice, *joined)
    return [text for text in texts if any(text in form for form in forms)]


def test_both_answers_are_those_of_the_librarys_greedy_decoding(
    visit: Visit, masked: str, pair: Any, forget_rows: list[dict[str, str]]
) -> None:
    page = visit.open(masked)
    row = as_rows(forget_rows, "forget").rows[2]
    page.fill("#x-prompt textarea", row.input)
    page.click("#x-ask")
    page.wait_for_selector(".x-values")
    for side, voice in pair.voices.items():
        prompt = prompt_ids(row, voice.tokenizer, TextPolicy(128))
        (expected,) = generate(voice.model, voice.tokenizer, [prompt], 1)
        assert expected.text
        assert answer(page, side) == expected.text
        tokens = page.locator(f"[data-side={side}] .x-token")
        assert tokens.count() >= 5
        for place in range(tokens.count()):
            assert "probability " in tokens.nth(place).get_attribute("title")
    assert answer(page, "target") == f" {row.output}"
    # The same probabilities for those who see no colour.
    cells = page.locator(".x-values tbody tr")
    assert cells.count() == page.locator("[data-side] .x-token").count()
    assert visit.faults == []


def test_answers_appear_while_they_are_written(visit: Visit, masked: str, pair: Any) -> None:
    page = visit.open(masked)
    # Slowed down, so that a browser can see it between two tokens; counted where it is computed.
    steps = 0
    real = pair._next

    def slow(side: Any, tokens: Any) -> Any:
        nonlocal steps
        time.sleep(0.15)
        steps += 1
        return real(side, tokens)

    pair._next = slow
    try:
        page.fill("#x-prompt textarea", "Ben was born in a small house near the")
        page.click("#x-ask")
        page.get_by_text("writing").first.wait_for()
        page.wait_for_selector("[data-side=target] .x-token")
        page.click("#x-stop")
        page.wait_for_selector(".x-values")
    finally:
        del pair._next
    states = page.locator(".x-state:visible").all_text_contents()
    assert any("stopped" in state for state in states), states
    assert 1 <= page.locator("[data-side=target] .x-token").count() <= steps
    assert page.locator("[data-side] .x-token").count() <= steps


def test_nobody_reads_so_nothing_is_written_on(visit: Visit, masked: str, pair: Any) -> None:
    page = visit.open(masked)
    steps: list[float] = []

    def endless(side: Any, tokens: Any) -> Any:
        from expunge.web.asking import Token

        time.sleep(0.1)
        steps.append(time.monotonic())
        return Token(5, 0.5)

    pair._next = endless
    try:
        page.fill("#x-prompt textarea", "Ada")
        page.click("#x-ask")
        page.wait_for_selector("[data-side=target] .x-token")
        page.close()
        until = time.monotonic() + 15
        while time.monotonic() - steps[-1] < 1:
            assert time.monotonic() < until, "it is still writing"
            time.sleep(0.2)
    finally:
        del pair._next


def test_a_masked_page_never_holds_text_of_a_row(
    visit: Visit,
    masked: str,
    texts: list[str],
    served: dict[str, Path],
    forget_rows: list[dict[str, str]],
) -> None:
    page = visit.open(masked)
    for row in (forget_rows[0], forget_rows[3], HOSTILE):
        visit.choose(row["id"])
        for column in ("input", "output"):
            assert f"{len(row[column])} characters, masked" in page.inner_text("#x-card")
        page.click("#x-ask-row")
        page.wait_for_selector(".x-outcomes")
    assert "exact match" not in page.inner_text(".x-outcomes")  # the last one is a continuation
    for name in ("Report", "Prompt"):
        visit.tab(name)
    # Streams are among what is searched: the answers' lengths came by one.
    visit.until(lambda: "masked, " in visit.streamed())
    sent = visit.sent()
    assert forget_rows[0]["id"] in sent
    assert found(texts, sent) == []
    # Nor is it sent in the changes that a stream is made of: no answer was drawn at all.
    assert "data-side" not in sent
    assert visit.faults == []


def test_asking_with_a_row_gives_its_score_and_no_answer(
    visit: Visit, masked: str, served: dict[str, Path], forget_rows: list[dict[str, str]]
) -> None:
    page = visit.open(masked)
    files = (served["before"], served["run"] / "records.jsonl")
    read = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    scored = [{each["id"]: each["score"] for each in records} for records in read]
    for row in (forget_rows[3], forget_rows[4]):
        visit.choose(row["id"])
        page.click("#x-ask-row")
        page.wait_for_selector(".x-outcomes")
        lines = page.locator(".x-outcomes tbody tr").all_inner_texts()
        for line, side, scores in zip(lines, ("target", "unlearned"), scored, strict=True):
            cells = line.split("\t")
            assert cells[0] == side
            assert cells[1].startswith("masked, ")
            assert cells[2] == f"{scores[row['id']]:.3f}"


def test_the_page_asks_no_other_host_and_offers_no_interface(visit: Visit, masked: str) -> None:
    page = visit.open(masked)
    for name in ("Rows", "Report", "Prompt"):
        visit.tab(name)
        page.wait_for_timeout(200)
    outside = [request.url for request in visit.requests if not request.url.startswith(masked)]
    assert [url for url in outside if not url.startswith(("data:", "blob:", "about:"))] == []
    assert len(visit.requests) > 10
    assert "Use via API" not in page.content()
    assert visit.faults == []


def test_revealed_text_is_shown_and_a_script_in_it_stays_text(
    visit: Visit, revealed: str, texts: list[str]
) -> None:
    page = visit.open(revealed)
    assert "Text of the rows is shown here" in page.inner_text(".x-caution")
    visit.choose(HOSTILE["id"])
    card = page.locator("#x-card")
    shown = card.locator("dd").all_text_contents()
    assert shown == [HOSTILE["input"], HOSTILE["output"]]
    page.click("#x-ask-row")
    page.wait_for_selector(".x-outcomes")
    assert answer(page, "target")
    visit.tab("Prompt")
    page.fill("#x-prompt textarea", HOSTILE["input"])
    page.click("#x-ask")
    page.wait_for_selector(".x-values")
    assert page.evaluate("window.hit") is None
    assert page.locator("#x-card img, #x-card script, #x-card b").count() == 0
    # In the report, whose frame runs no script, the row stands as text too.
    visit.tab("Report")
    report = page.frame_locator("iframe.x-report")
    assert HOSTILE["output"] in report.locator(".revealed").inner_text()
    assert visit.faults == []
    # The search that finds nothing in a masked page finds every row here.
    assert set(found(texts, visit.sent())) == set(texts)


def test_an_answer_that_is_markup_stays_text(visit: Visit, masked: str, pair: Any) -> None:
    page = visit.open(masked)
    written = '<img src=x onerror="window.hit=5"><script>window.hit=6</script>${window.hit=7}{{id}}'
    ids = iter(pair.voices["target"].tokenizer(written)["input_ids"])
    real = pair._next

    def scripted(side: Any, tokens: Any) -> Any:
        from expunge.web.asking import Token

        if side == "unlearned":
            return real(side, tokens)
        token = next(ids, None)
        return None if token is None else Token(token, 0.5)

    pair._next = scripted
    try:
        page.fill("#x-prompt textarea", "<script>window.hit=8</script>")
        page.click("#x-ask")
        page.wait_for_selector(".x-values")
    finally:
        del pair._next
    assert answer(page, "target") == written
    assert page.evaluate("window.hit") is None
    assert visit.faults == []


def test_the_report_is_that_of_expunge_report(
    visit: Visit, masked: str, checked: Any, run_cli: Callable[..., tuple[int, str, str]],
    served: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    page = visit.open(masked)
    visit.tab("Report")
    frame = page.frame_locator("iframe.x-report")
    assert frame.locator("h1").inner_text() == "Unlearning report"
    rows = ("--forget", served["forget"], "--retain", served["retain"])
    given = (*rows, "--output", tmp_path, "--no-card", "--quiet")
    assert run_cli("report", served["run"], *given)[0] == 0
    whole = (tmp_path / "report.html").read_text()
    framed = page.get_attribute("iframe.x-report", "srcdoc")
    assert framed.replace('<base href="about:srcdoc"/>', "").strip() == whole.strip()
    # A link within it moves within it.
    frame.get_by_role("link", name="Record").click()
    assert frame.locator("h1").inner_text() == "Unlearning report"
    assert frame.locator("#record").bounding_box()["y"] < 900


def test_a_wrong_password_is_refused_and_the_right_one_opens(
    visit: Visit, locked: str, served: dict[str, Path], forget_rows: list[dict[str, str]]
) -> None:
    page = visit.page
    visit.goto(locked)
    password = page.locator("input[type=password]")
    password.wait_for()
    for path in ("/config", "/gradio_api/queue/data?session_hash=x"):
        assert status(locked + path) == 401
    before = visit.sent()
    assert forget_rows[0]["id"] not in before
    assert served["run"].name not in before
    assert PASSWORD not in before
    started = time.monotonic()
    log_in(page, "wrong")
    page.get_by_text("Incorrect").wait_for()
    assert time.monotonic() - started > 1  # guessing is slow
    assert page.locator("#x-prompt").count() == 0
    assert status(locked + "/config") == 401
    log_in(page, PASSWORD)
    page.wait_for_selector("#x-prompt textarea")
    page.fill("#x-prompt textarea", "Ada")
    page.click("#x-ask")
    page.wait_for_selector(".x-values")


def log_in(page: Any, password: str) -> None:
    page.locator("input[type=password]").fill(password)
    page.locator("input[type=text], textarea").first.fill("anyone")
    page.get_by_role("button", name="Login").click()


def status(url: str, **headers: str) -> int:
    request = Request(url, headers={name.replace("_", "-"): v for name, v in headers.items()})
    try:
        with urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_other_names_other_sites_and_other_paths_are_refused(masked: str) -> None:
    assert status(f"{masked}/") == 200
    assert status(f"{masked}/", Host="evil.example") == 403
    assert status(f"{masked}/", Host="localhost:1") == 200
    assert status(f"{masked}/config", Origin="http://evil.example") == 403
    assert status(f"{masked}/config", Origin=masked) == 200
    for path in ("gradio_api/info", "gradio_api/upload", "gradio_api/file=/etc/passwd",
                 "gradio_api/proxy=http://evil.example", "openapi.json", "docs", "monitoring",
                 "gradio_api/vibe-code", "gradio_api/mcp/", "assets/../../routes.py"):  # fmt: skip
        assert status(f"{masked}/{path}") == 404, path


def test_a_handler_called_past_the_page_masks_too(checked: Any, pair: Any, texts: list[str]) -> None:
    from expunge.web.page import Desk

    desk = Desk(checked, pair)
    for key in [*desk.rows, "forget/99", "../forget", None]:
        assert found(texts, desk.card(key)) == []
        if key in (None, "forget/0", "forget/8", "retain/1", "forget/99"):
            drawn = "".join("".join(each) for each in desk.ask_row(key, "session"))
            assert found(texts, drawn) == []
    assert desk._stops == {}


def test_a_fault_within_says_its_type_and_nothing_else(checked: Any, pair: Any) -> None:
    from expunge.web.asking import Question
    from expunge.web.page import Desk

    class Broken:
        voices = pair.voices

        def ask(self, *_: object) -> Any:
            raise RuntimeError("the number of Ada is 900-10-7700")

    desk = Desk(checked, Broken())  # type: ignore[arg-type]
    for drawn in (desk.ask(lambda: Question("x", 3), "s"), desk.ask_row("forget/0", "s")):
        *_, (_, _, below) = drawn
        assert "Internal error (RuntimeError)" in below
        assert "Ada" not in below


def post(url: str, body: bytes, cookie: str = "", kind: str = "application/json") -> int:
    headers = {"content-type": kind, **({"cookie": cookie} if cookie else {})}
    try:
        with urlopen(Request(url, data=body, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def logged_in(url: str) -> str:
    """The cookie of whoever knows the password."""
    body = urlencode({"username": "any", "password": PASSWORD}).encode()
    with urlopen(f"{url}/login", data=body, timeout=10) as answer:
        return str(answer.headers["set-cookie"]).split(";")[0]


@pytest.fixture(scope="module")
def handlers(masked: str) -> list[tuple[int, int]]:
    """Index and number of values of every handler."""
    with urlopen(f"{masked}/config", timeout=10) as answer:
        config = json.load(answer)
    return [(each["id"], len(each["inputs"])) for each in config["dependencies"]]


def queued(url: str, path: str, body: dict[str, Any], cookie: str = "") -> list[Any]:
    """The status of a call, and what the queue then says of it."""
    status = post(f"{url}{path}", json.dumps(body).encode(), cookie)
    told: list[Any] = [status]
    if status == 200 and path.endswith("join"):
        address = f"{url}/gradio_api/queue/data?session_hash={body['session_hash']}"
        with urlopen(Request(address, headers={"cookie": cookie}), timeout=20) as answer:
            told += [json.loads(line[5:]) for line in answer if line.startswith(b"data:")]
    return told


@pytest.mark.parametrize("where", ["local", "web"])
def test_no_handler_takes_a_file_in_the_place_of_a_value(
    masked: str, locked: str, handlers: list[tuple[int, int]], written: Path,
    tmp_path: Path, where: str,
) -> None:  # fmt: skip
    secret = tmp_path / "secret"
    secret.write_text("of this machine alone")
    path = str(secret) if where == "local" else f"{masked}/theme.css"
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "url": path}
    assert len(handlers) > 7
    visitors = [(masked, ""), (locked, logged_in(locked)), (locked, "")]
    calls = ("/gradio_api/queue/join", "/gradio_api/run/predict")
    for (url, cookie), (index, count), call, form in itertools.product(
        visitors, handlers, calls, (file, [file], {"x": file})
    ):
        body: dict[str, Any] = {"fn_index": index, "session_hash": "files"}
        assert queued(url, call, {**body, "data": [form] * max(count, 1)}, cookie) == [400], body
        # What a click brings along is read by no handler but one, as text.
        queued(url, call, {**body, "data": [None] * count, "event_data": {"x": form}}, cookie)
    assert [path for path in written.rglob("*") if path.name in ("secret", "theme.css")] == []


def test_gradio_by_itself_takes_no_file_either(
    checked: Any, pair: Any, handlers: list[tuple[int, int]], written: Path, tmp_path: Path
) -> None:
    """Behind the guard stands Gradio's own check, which it makes for an app that it launched."""
    from starlette.testclient import TestClient

    from expunge.web.serving import server_of

    inside = server_of(checked, pair, str(written)).config.app._app
    secret = tmp_path / "behind"
    secret.write_text("of this machine alone")
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    client, seen = TestClient(inside, base_url="http://127.0.0.1"), []
    for index, count in handlers:
        body = {"data": [file] * count, "fn_index": index, "session_hash": "behind"}
        told = client.post("/gradio_api/run/predict", json=body)
        assert told.status_code in ((200, 404) if count == 0 else (404, 500))
        seen.append(told.status_code)
    assert 500 in seen  # 404 is the queue's, which takes no call past it
    assert list(written.rglob("behind")) == []


def test_what_gradio_might_write_lies_in_a_directory_that_goes(
    checked: Any, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    from expunge.web import serving

    seen: list[tuple[Path, int]] = []

    def stopped(_server: Any, sockets: Any) -> None:
        directory = Path(os.environ["GRADIO_TEMP_DIR"])
        seen.append((directory, directory.stat().st_mode & 0o777))
        raise KeyboardInterrupt

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "of everyone"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(serving, "check", lambda _inputs: checked)
    monkeypatch.setattr(serving, "load", lambda *_: pair)
    monkeypatch.setattr(uvicorn.Server, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        serving.serve(checked.inputs, lambda _url, _locked: None)
    [(directory, mode)] = seen
    assert (directory.parent, mode) == (tmp_path, 0o700)
    assert list(tmp_path.iterdir()) == []


MALFORMED: list[Any] = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 90_000, b'{"data": 1}', b'{"data": []}',
    {"fn_index": 0}, {"fn_index": 99, "data": []}, {"fn_index": "0", "data": []},
    {"fn_index": 0, "data": ["x"]}, {"fn_index": 0, "data": ["x"] * 9},
    {"fn_index": 0, "data": ["x", 1, "greedy", 1, 0], "trigger_id": "x", "session_hash": "m"},
    {"fn_index": 0, "data": ["x", 1, "greedy", 1, 0], "session_hash": 7},
    {"fn_index": 0, "data": ["x", 1, "greedy", 1, 0], "event_data": 3, "session_hash": "m"},
    {"fn_index": True, "data": ["x"] * 5},
]  # fmt: skip


def test_malformed_requests_leave_one_line_at_most(
    masked: str, handlers: list[tuple[int, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    calls = ("/gradio_api/queue/join", "/gradio_api/run/predict")
    for body, call in itertools.product(MALFORMED, calls):
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        assert 400 <= post(masked + call, sent) < 500, body
    values: list[Any] = [None, "", "x", -1, 0, 1e300, 10**30, True, "\ud800", float("nan")]
    for (index, count), value, call in itertools.product(handlers, values, calls):
        body = {"data": [value] * count, "fn_index": index, "session_hash": f"s{index}",
                "trigger_id": 99999, "event_data": {"row_value": value}}  # fmt: skip
        assert queued(masked, call, body)[0] in (200, 404, 500), body
    for path in ("cancel", "reset", "startup-events", "queue/join", "heartbeat/x", "queue/data"):
        for sent in (b"", b"{", b"[1]", b'{"event_id": 3}', b'{"event_id": "x"}'):
            assert post(f"{masked}/gradio_api/{path}", sent) < 500
    assert status(f"{masked}/gradio_api/queue/data?session_hash=nobody") == 200
    assert status(f"{masked}/%ff%fe") == 404
    assert status(masked, Origin="http://[") == 403
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert all(line.startswith("a request was not answered (") for line in told.splitlines()), told


def test_a_request_has_an_end(masked: str) -> None:
    body = {"data": ["x" * 2**20, 1, "greedy", 1, 0], "fn_index": 0, "session_hash": "long"}
    assert post(f"{masked}/gradio_api/queue/join", json.dumps(body).encode()) == 413


def test_generations_are_asked_for_through_the_queue_alone(masked: str) -> None:
    with urlopen(f"{masked}/config", timeout=10) as answer:
        dependencies = json.load(answer)["dependencies"]
    queued_ones = [each for each in dependencies if each["queue"] is not False]
    assert len(queued_ones) >= 2
    for each in queued_ones:
        body = {"data": [None] * len(each["inputs"]), "fn_index": each["id"]}
        assert post(f"{masked}/gradio_api/run/predict", json.dumps(body).encode()) == 404


def test_passwords_are_not_guessed_in_parallel(locked: str) -> None:
    guesses = [urlencode({"username": "x", "password": f"wrong{n}"}).encode() for n in range(40)]
    form = "application/x-www-form-urlencoded"
    with ThreadPoolExecutor(40) as pool:
        told = list(pool.map(lambda body: post(f"{locked}/login", body, kind=form), guesses))
    # Whoever was tried took a second, and the others were not.
    assert told.count(400) in (1, 2)
    assert told.count(429) == 40 - told.count(400)
    assert status(f"{locked}/config", cookie=logged_in(locked)) == 200


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (([], 5, "greedy", 1.0, 0), "is no text"),
        (("x", "5", "greedy", 1.0, 0), "are numbers"),
        (("x", 10**30, "greedy", 1.0, 0), "must be from 1 to 1024"),
        (("x", 5, "sample", math.nan, 0), "are numbers"),
        (("", 5, "greedy", 1.0, 0), "the prompt is empty"),
        ((None, 5, "greedy", None, None), "the prompt is empty"),
        (("x " * 150, 5, "greedy", 1.0, 0), "fills the context of 128"),
        (("x", 5, "sample", None, 0), "fill both fields"),
        (("x", 5, "sample", 1.0, None), "fill both fields"),
        (("x", 5, "sample", 99.0, 1), "must be from 0 to 10"),
    ],
)
def test_a_form_that_cannot_be_asked_says_why(
    checked: Any, pair: Any, values: tuple[Any, ...], told: str
) -> None:
    from expunge.web.page import Desk, question_of

    *_, (_, _, below) = Desk(checked, pair).ask(lambda: question_of(*values), "session")
    assert told in below


def test_nothing_was_written(written: Path, texts: list[str], served: dict[str, Path]) -> None:
    """Stands last: after all of the above no file holds a row, a prompt or an answer."""
    none_in([*texts, "Ben was born in a small house"], written)
    assert not (Path.cwd() / ".gradio").exists()
    assert os.environ["GRADIO_TEMP_DIR"] == str(written)
    assert {path.name for path in served["run"].iterdir()} >= {"expunge.json", "scores.json"}
    none_in(texts, served["run"])


def test_the_server_asked_for_no_other_host(written: Path) -> None:
    """Stands last too: no news of versions, no report of use."""
    assert looked_up == {"127.0.0.1"}
