"""What `expunge view` is told, and everything that can be refused before a model is loaded."""

from __future__ import annotations

import hmac
import importlib.util
import ipaddress
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from expunge.data.chat_templates import Template, check_template, template_of
from expunge.data.rows import RowSet
from expunge.errors import InputError, install
from expunge.evaluation.scorecard import Material as Sets
from expunge.models.devices import resolve_device
from expunge.models.loading import AnyDtype, CheckedModel, check_model
from expunge.models.text_forms import text_policy
from expunge.reporting.content import content
from expunge.reporting.material import Material, ReportInputs, gather

PASSWORD = "EXPUNGE_PASSWORD"
"""The environment variable that may hold the password."""
_LEAST_PASSWORD = 8


@dataclass(frozen=True)
class ViewInputs:
    """Which run is shown, with which rows, where and to whom."""

    run: str
    """The run directory: what expunge run wrote."""
    original: Annotated[str | None, tyro.conf.arg(aliases=("--target",))] = None
    """The model before, if it has moved; null: the one that the run names."""
    forget: str | None = None
    """The run's forget set, to browse its rows."""
    retain: str | None = None
    """The run's retain set, to browse its rows."""
    reveal: bool = False
    """Show the text of the rows to everyone who opens the page."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a password."""
    port: int = 7860
    """Port to listen on; 0 takes any free one."""
    password_file: str | None = None
    """File whose first line is the password; null: the environment variable EXPUNGE_PASSWORD. Other
    users of the machine can read a command line, so it takes no password."""
    dtype: AnyDtype = "auto"
    """Dtype that both models are loaded and run in; auto: the one of their files, for float16 files
    float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    chat_template: Template = "auto"
    """Render prompts with the chat template. auto: as the run did."""
    trust_remote_code: bool = False
    """Run code that the models' directories bring along."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat_template", template_of(self.chat_template))
        if not 0 <= self.port < 2**16:
            raise InputError(f"--port {self.port}: must be from 0 to 65535")
        if self.reveal and self.forget is None:
            raise InputError("--reveal: shows the text of the rows; give --forget FILE")


@dataclass(frozen=True, repr=False)
class Checked:
    """Everything that was read and found right; no weights yet."""

    inputs: ViewInputs
    material: Material
    report: Mapping[str, Any]
    """What the run's report says, as JSON holds it."""
    target: CheckedModel
    unlearned: CheckedModel
    device: str
    chat_template: bool
    password: str | None = field(repr=False)

    @property
    def rows(self) -> Mapping[str, RowSet]:
        """Forget and retain set, where given."""
        return self.material.rows


def check(inputs: ViewInputs) -> Checked:
    """Reads and checks everything. Raises InputError that names the file, option and mend."""
    # Gradio draws the page, uvicorn and FastAPI come with it.
    if importlib.util.find_spec("gradio") is None:
        raise InputError(f"view: needs gradio, which is not installed; {install('web')}")
    try:
        Path.cwd()
    except FileNotFoundError:  # Gradio looks for files there
        raise InputError("view: the current directory is gone; change to one that is there") from None
    password = read_password(inputs)
    material = gather(
        ReportInputs(inputs.run, forget=inputs.forget, retain=inputs.retain, reveal=inputs.reveal)
    )
    report = json.loads(json.dumps(content(material), allow_nan=False, ensure_ascii=False))
    device = resolve_device(inputs.device)
    target, unlearned = _models(inputs, material.manifest)
    template = inputs.chat_template == "on"
    if inputs.chat_template == "auto":
        template = _text_of(material.manifest).get("chat_template") is True
    if material.rows:
        policy = text_policy(unlearned, chat_template=template, long_rows="window")
        some, *others = material.rows.values()
        Sets(some, others[0] if others else None).check(unlearned.tokenizer, policy)
    elif template and not unlearned.tokenizer.chat_template:
        raise InputError(f"--chat-template on: the tokenizer of {unlearned.name} has none; give off")
    elif template:
        check_template(unlearned.tokenizer)
    return Checked(
        inputs=inputs,
        material=material,
        report=report,
        target=target,
        unlearned=unlearned,
        device=device,
        chat_template=template,
        password=password,
    )


def read_password(inputs: ViewInputs) -> str | None:
    """The password, or None. Raises InputError for one that is missing or too short to help."""
    password, source = os.environ.get(PASSWORD), PASSWORD
    if inputs.password_file is not None:
        source = f"--password-file {inputs.password_file}"
        try:
            lines = Path(inputs.password_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "is not UTF-8"
            raise InputError(f"{source}: {why}; name a file that holds the password") from None
        password = lines[0] if lines else ""
    if password is None and not is_loopback(inputs.host):
        raise InputError(
            f"--host {inputs.host}: other machines could reach the page; give --password-file FILE,"
            f" or set {PASSWORD}"
        )
    if password is not None and len(password.strip()) < _LEAST_PASSWORD:
        raise InputError(
            f"{source}: holds {len(password.strip())} characters; a password has {_LEAST_PASSWORD} or"
            " more"
        )
    return password


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def same_password(given: str, expected: str) -> bool:
    """Compares in a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode(), expected.encode())


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that a port in use is found before a model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):  # the latter for a name with an empty part
        raise InputError(f"--host {host}: is no address of this machine; use 127.0.0.1") from None
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise InputError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another"
            " port, or 0 for any free one"
        ) from None
    opened.listen(128)
    return opened


def _models(inputs: ViewInputs, manifest: Mapping[str, Any]) -> tuple[CheckedModel, CheckedModel]:
    """Target and unlearned model. Raises InputError where the target is not that of the run."""
    trust = inputs.trust_remote_code
    unlearned = check_model(inputs.run, trust_remote_code=trust)
    named = inputs.original or manifest["settings"]["inputs"]["model"]
    if inputs.original is None and (beside := Path(inputs.run).absolute().parent / named).is_dir():
        named = str(beside)
    try:
        target = check_model(named, trust_remote_code=trust)
    except InputError as error:
        if inputs.original is not None:
            raise
        raise InputError(
            f"{error} (the run names it as its target; if it has moved, give --original DIR)"
        ) from None
    digests = target.files.sha256()
    recorded = manifest["model_sha256"]
    other = [
        name
        for name, digest in digests.items()
        if name.endswith(".safetensors") and recorded.get(name) != digest
    ]
    if other:
        raise InputError(
            f"--original {named}: {other[0]} is not that of the run's target (another SHA-256 than in"
            " expunge.json); name the model that the run started from"
        )
    if target.tokenizer.get_vocab() != unlearned.tokenizer.get_vocab():
        raise InputError(
            f"--original {named}: its tokenizer is not that of {inputs.run}; name the model that the run"
            " started from"
        )
    return target, unlearned


def _text_of(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    text = manifest["settings"]["training"].get("text")
    return text if isinstance(text, dict) else {}
