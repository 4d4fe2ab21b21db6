"""The documentation is whole, and what it says of options and defaults is so."""

from __future__ import annotations

import csv
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_origin, get_type_hints

import pytest
import yaml
from markdown.extensions.toc import slugify, unique

import site_check
import site_commands
import site_hooks
from expunge.audits.catalog import ATTACKS
from expunge.cli.help import options_of
from expunge.cli.main import COMMANDS
from expunge.methods.catalog import METHODS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    """A page as the site has it."""
    text = page.read_text(encoding="utf-8")
    if page == DOCS / site_hooks.COMMANDS_PAGE:
        text, found = site_hooks.COMMANDS_BODY.subn(lambda _: site_commands.markdown(), text)
        assert found == 1
    return text


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """The code blocks of a page: the fence's language, `indented` or `text`, and their lines."""
    fence: str | None = None
    kept: list[str] = []
    previous = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            if fence is not None:
                yield fence, kept
            fence, kept = (line[3:].strip() or "plain" if fence is None else None), []
        elif fence is not None:
            kept.append(line)
        elif line.startswith("    ") and (kept or not previous.strip()):
            kept.append(line[4:])
        elif line.strip() and kept:
            yield "indented", kept
            kept = []
        previous = line
    if kept:
        yield "indented", kept


def prose(text: str) -> list[str]:
    """The lines of a page that are in no code block."""
    lines: list[str] = []
    inside = code = False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            code = line.startswith("    ") and (code or not lines or not lines[-1].strip())
            lines.append("" if code else line)
    return lines


@cache
def anchors(text: str) -> set[str]:
    """What the headings of a page can be linked by."""
    taken: set[str] = set()
    for line in prose(text):
        heading = re.match(r"#{1,6} (.+)$", line)
        if heading:
            plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading[1])
            unique(slugify(plain, "-"), taken)
    return taken


def logical_lines(lines: list[str]) -> Iterator[str]:
    """Commands of a code block, each with its continuation lines."""
    joined = ""
    for line in [*lines, ""]:
        continues = joined.endswith("\\") or line.startswith("  ")
        if not continues and joined:
            yield joined
            joined = ""
        joined = " ".join([*joined.removesuffix("\\").split(), *line.split()])
    if joined:
        yield joined


def shown_commands(page: Path) -> Iterator[str]:
    """Every `expunge ...` that a page shows, in a code block or in a line."""
    text = page.read_text(encoding="utf-8")
    for language, lines in blocks(text):
        if language == "math":
            continue
        for line in logical_lines(lines):
            found = re.match(r"(?:\S+=\S+ )?(?:accelerate launch .*-m )?(expunge .+)", line)
            if found:
                yield found[1].split(" #")[0]
    for line in prose(text):
        yield from re.findall(r"`(expunge [^`]+)`", line)


def options_in(words: str) -> list[str]:
    found = re.findall(r"(?<![\w-])--[a-z][\w.-]*", words)
    return [option.replace("_", "-").rstrip(".") for option in found]


@cache
def every_option() -> set[str]:
    everywhere = {"--help", "--version"}
    for command in site_commands.commands():
        for method in METHODS:
            everywhere |= command.accepts(method)
    return everywhere


def unknown_options(line: str) -> list[str]:
    """Options of a shown command that it does not have."""
    words = [re.sub(r"[\[\]]", "", word) for word in line.split()]
    command = site_commands.command_of(words)
    if command is None:
        known = len(words) == 1 or words[1] in (*COMMANDS, "COMMAND", "X", "--help", "--version")
        everywhere = {"--help", "--help-all", "--version"}
        return [] if known and not set(options_in(line)) - everywhere else [line]
    method = re.search(r"--method[ =]([a-z-]+)", line)
    accepted = command.accepts(method[1] if method else None) | {"--help"}
    return [f"{command.prog} {option}" for option in options_in(line) if option not in accepted]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(text_of(page)))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link} leaves the repository"
        if page.is_relative_to(DOCS):
            assert target.is_file(), f"{name_of(page)}: {link} is a folder, the site has none"
        if anchor:
            assert anchor in anchors(text_of(target)), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_that_a_page_shows_exist(page: Path) -> None:
    wrong = [fault for line in shown_commands(page) for fault in unknown_options(line)]
    assert not wrong, f"{name_of(page)}: {wrong}"
    spans = re.findall(r"`(--[^`]+)`", "\n".join(prose(page.read_text(encoding="utf-8"))))
    missing = {o for span in spans for o in options_in(span)} - every_option()
    missing -= {"--method."}
    assert not missing, f"{name_of(page)}: {missing}"


def test_the_check_of_options_finds_what_it_should() -> None:
    assert unknown_options("expunge run M --method libu-published --method.gamma 2") == []
    assert unknown_options("expunge run M --method.gamma 2") == ["expunge run --method.gamma"]
    assert unknown_options("expunge analyze layers M --method.beta 2") == []
    assert unknown_options("expunge evaluate M [--mmlu DIR] --epochs 2") == ["expunge evaluate --epochs"]
    assert unknown_options("expunge requests add --ledger L --model M") == [
        "expunge requests add --model"
    ]
    assert unknown_options("expunge nothing --here") != []
    assert list(logical_lines(["expunge run M \\", "    --seed 1", "expunge plan M"])) == [
        "expunge run M --seed 1",
        "expunge plan M",
    ]
    shown = [line for page in PAGES for line in shown_commands(page)]
    assert len(shown) > 60
    assert {"run", "audit", "evaluate", "plan"} <= {line.split()[1] for line in shown}


def nav_pages(entries: Any) -> Iterator[str]:
    for entry in entries:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            if isinstance(value, str):
                yield value
            else:
                yield from nav_pages(value)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(nav_pages(config["nav"]))
    assert len(listed) == len(set(listed))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(listed) == pages | set(site_hooks.REPOSITORY_PAGES.values())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_has_a_page_with_its_defaults(method: Any) -> None:
    page = DOCS / "methods" / f"{method.name}.md"
    text = page.read_text(encoding="utf-8")
    defaults = {o.name: o.default for o in options_of(method, "method.")}
    told: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| `--"):
            name, default = cells(line)[:2]
            told[name.strip("`")] = default
    assert told == {name: defaults[name] for name in told}
    hints = get_type_hints(method)
    own = {name for name in inspect.get_annotations(method) if get_origin(hints[name]) is not ClassVar}
    missing = {f"--method.{name}".replace("_", "-") for name in own} - set(told)
    assert not missing, f"{name_of(page)}: say what these do: {sorted(missing)}"

    run = re.search(
        r"Defaults of the run: (\d+) epochs(?: or (\d+) steps, whichever is more)?, batch size (\d+),"
        r" learning rate (\S+) at width 256, (\w+)",
        " ".join(text.split()),
    )
    assert run is not None
    assert (int(run[1]), int(run[2] or 1), int(run[3]), float(run[4]), run[5]) == (
        method.defaults.epochs,
        method.defaults.least_steps,
        method.defaults.batch_size,
        method.defaults.learning_rate,
        method.defaults.schedule,
    )
    for preset in method.presets:
        assert f"`{preset}`" in text, f"{name_of(page)}: preset {preset}"
    assert "```math" in text
    assert "**When to use it.**" in text
    assert "**When not:**" in text
    module = importlib.import_module(method.__module__)
    papers = re.findall(r"\d{4}\.\d{5}", module.__doc__ or "")
    assert papers
    assert set(papers) <= set(re.findall(r"\d{4}\.\d{5}", text))


def test_the_overview_names_every_method() -> None:
    text = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert f"| [`{name}`]({name}.md)" in text


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=lambda attack: attack.name)
def test_every_attack_is_in_both_tables(attack: Any) -> None:
    text = (DOCS / "audits.md").read_text(encoding="utf-8")
    begin = f"| `{attack.name}` | {attack.kind} |"
    [row] = [line for line in text.splitlines() if line.startswith(begin)]
    assert all(cells(row))
    assert set(re.findall(r"\d{4}\.\d{5}", attack.reference)) <= set(re.findall(r"\d{4}\.\d{5}", row))
    asked = re.search(r"^\| attack \| asks for .*?\n\n", text, re.DOTALL | re.MULTILINE)
    assert asked is not None
    assert f"`{attack.name}`" in asked[0]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lists_and_tables_follow_an_empty_line(page: Path) -> None:
    """MkDocs reads them as part of the paragraph otherwise; forges do not."""
    lines = prose(page.read_text(encoding="utf-8"))
    item = re.compile(r"(?:[-*+]|\d+\.) ")
    for before, line in pairwise(lines):
        starts = item.match(line) and not item.match(before) and not before.startswith(" ")
        starts = starts or (line.startswith("|") and not before.startswith("|"))
        assert not (starts and before.strip()), f"{name_of(page)}: {line[:60]}"


def test_every_formula_becomes_mathml() -> None:
    formulas = [
        "\n".join(lines)
        for page in DOCS.rglob("*.md")
        for language, lines in blocks(page.read_text(encoding="utf-8"))
        if language == "math"
    ]
    assert len(formulas) > 12
    for latex in formulas:
        assert site_hooks.formula(latex).startswith("<math aria-label=")


def test_an_unknown_formula_is_an_error() -> None:
    assert "<mfrac>" in site_hooks.formula(r"\frac{1}{2}")
    with pytest.raises(ValueError, match="not known to latex2mathml"):
        site_hooks.formula(r"\nosuchcommand x")


def test_the_page_of_commands_names_every_command_and_method() -> None:
    text = site_commands.markdown()
    for name in COMMANDS:
        assert re.search(rf"^## expunge {name}( |$)", text, re.MULTILINE)
    for name in METHODS:
        assert f"### Options of {name}\n" in text
    assert "| `--seed` | whole number | 0 | Seed of every random draw. |" in text
    assert "| `--forget` | text | required |" in text
    for default in ("spectral", "adaptive-rmu"):  # of runs, and where a layer is looked for
        assert f"| `--method` | method | {default} |" in text
    assert "`--method.retain-ratio` | whole number | 7 |" in text
    assert "--method.layer 26" in text
    for line in text.splitlines():
        if line.startswith("| `--"):
            assert len(cells(line)) == 4
            assert cells(line)[3], f"nothing is said of {line}"


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>', 1),
        ("a.html", '<script src="//cdn.example/x.js"></script>', 1),
        ("a.html", '<link rel="stylesheet" href="https://fonts.example/css">', 1),
        ("a.html", '<link rel="preconnect" href="https://fonts.example">', 1),
        ("a.html", '<img src="http://a.example/x.png">', 1),
        ("a.html", '<p style="background: url(//a.example/x.png)">', 1),
        ("a.html", "<style>@import 'https://a.example/x.css'</style>", 1),
        ("a.html", "<script>fetch('https://a.example/x.json')</script>", 1),
        ("a.html", '<a href="https://arxiv.org/abs/1">x</a><script src="x.js"></script>', 0),
        ("a.html", '<link rel="canonical" href="https://a.example/">', 0),
        ("a.html", "<pre>url(https://a.example/x.png)</pre>", 0),
        ("a.css", "a { background: url(https://a.example/x.png) }", 1),
        ("a.css", '@import "//a.example/x.css";', 1),
        ("a.css", "a { background: url(x.png) } /* https://a.example */", 0),
        ("a.js", 'import("https://a.example/x.js")', 1),
        ("a.js", "x = `https://${host}/x.json`", 1),
        ("a.html", '<pre class="x mermaid">graph</pre>', 1),
        ("a.html", '<div data-md-component="source"></div>', 2),
        ("a.js", 'import("https://unpkg.com/mermaid@11")', 1),
        ("a.js", 'x = "//nbsp"', 0),
        ("a.js", 'x = "http://www.w3.org/2000/svg"; // see https://a.example', 0),
    ],
)
def test_loads_from_other_hosts_are_found(
    file: str, content: str, found: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("<p>x</p>", encoding="utf-8")
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert len(site_check.loads(tmp_path)) == found
    assert site_check.main([str(tmp_path)]) == (1 if found else 0)
    assert ("loads from another host" in capsys.readouterr().err) == bool(found)


def test_links_out_of_the_docs_lead_to_copies(tmp_path: Path) -> None:
    linked = set(site_hooks.linked_outside(DOCS / "ledger.md"))
    assert linked == {Path("src/expunge/ledger/schema.py")}
    assert site_hooks.copy_of(*linked) == "files/src/expunge/ledger/schema.py.txt"
    assert not set(site_hooks.linked_outside(DOCS / "methods" / "libu.md"))


def tables(text: str, column: str) -> Iterator[dict[str, list[str]]]:
    """The tables that have such a column: their rows by the first cell, the header under ""."""
    found: dict[str, list[str]] = {}
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found["" if not found else first.split(",")[0]] = cells
        elif found:
            if any(column in cell for cell in found[""]):
                yield found
            found = {}


def test_the_experiment_log_has_a_record_for_every_topic() -> None:
    told = " ".join((DOCS / "decisions.md").read_text(encoding="utf-8").split())
    with (DOCS / "experiments.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == [
        "date", "topic", "model", "setting", "metric", "value", "baseline", "adopted", "note",
    ]  # fmt: skip
    assert len(rows) > 1000
    for date, topic, model, setting, metric, value, _, adopted, _ in rows:
        assert re.fullmatch(r"2026-\d\d-\d\d", date)
        assert topic in told, topic
        assert model, setting
        assert setting
        assert metric, setting
        assert value, setting
        assert adopted in ("yes", "no", "")


def test_the_readme_has_the_results_that_the_benchmark_has() -> None:
    [shown] = tables((ROOT / "README.md").read_text(encoding="utf-8"), "task aggregate")
    table = next(tables((DOCS / "benchmark.md").read_text(encoding="utf-8"), "task aggregate ↑"))
    columns = ("task aggregate ↑", "MIA AUC → 0.5", "utility ↑")
    methods = [name for name in shown if name and not name.startswith("-")]
    assert methods == ["target", "oracle", "spectral", "libu", "adaptive-rmu"]
    for method in methods:
        for cell, name in zip(shown[method], columns, strict=True):
            value = table[method][table[""].index(name)]
            assert value.split(" ")[0] == cell, (method, name)
