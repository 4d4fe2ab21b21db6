"""`expunge view` as a process of its own: from its first line to Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from conftest import HOSTILE, none_in
from expunge.web.serving import address

pytest.importorskip("gradio", reason="is in the extra web")


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped_and_leaves_nothing(
    served: dict[str, Path], tmp_path: Path, ended_by: signal.Signals
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "GRADIO_TEMP_DIR"), str(home))
    rows = ["--forget", str(served["forget"]), "--retain", str(served["retain"])]
    before = {path.name: path.stat().st_mtime_ns for path in served["run"].iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-m", "expunge", "view", str(served["run"]), *rows, "--port", "0",
         "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env={**os.environ, **places},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[0]
        assert url.startswith("http://127.0.0.1:"), line
        assert line.endswith("(open to everyone on this machine; Ctrl-C stops it)\n")
        with urlopen(f"{url}/config", timeout=20) as answer:
            config = json.load(answer)
        assert config["analytics_enabled"] is False
        assert all(each["api_visibility"] == "private" for each in config["dependencies"])
        process.send_signal(ended_by)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err
    told = json.dumps(config) + line + err
    rows_text = [json.loads(text) for text in served["forget"].read_text().splitlines()]
    texts = [row[column] for row in rows_text for column in ("input", "output")]
    assert HOSTILE["output"] in texts
    assert [text for text in texts if text in told or json.dumps(text)[1:-1] in told] == []
    none_in(texts, home)
    assert {path.name: path.stat().st_mtime_ns for path in served["run"].iterdir()} == before


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:5"), ("localhost", "http://localhost:5"),
        ("0.0.0.0", "http://127.0.0.1:5"), ("::", "http://[::1]:5"), ("::1", "http://[::1]:5"),
    ],
)  # fmt: skip
def test_the_address_can_be_opened_on_this_machine(host: str, expected: str) -> None:
    assert address(host, 5) == expected
