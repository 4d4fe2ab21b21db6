"""Counts what people read, and the code behind it.

    python scripts/prose.py                        # every page, then what src/ says
    python scripts/prose.py --worst 20 docs/*.md   # and the sentences over 25 words, longest first

Of each page: words, sentences, the shares of sentences over 25 and over 30 words, the longest. Tables,
code blocks and headings are left out; a list item ends its sentence. Of src/: the same of help, errors,
other texts (findings, warnings, reports) and templates; what is put in counts as a word. Then lines and
long files.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "expunge"
ERRORS = ("InputError", "RefusedRun", "RunError", "NothingKept", "Interrupted")
LIMIT, LONG, FILE_LINES = 25, 30, 400
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
_END = re.compile(r"(?<=[.!?])[)\"'*_]*\s+(?=[\"'(`*_\[]*[A-Z0-9`-])")
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|vs|cf|et al)\. ")


def paragraphs(text: str) -> Iterator[str]:
    """Running text of a page, a paragraph or a list item at a time."""
    kept: list[str] = []
    fence = False
    for line in [*re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines(), ""]:
        marks = line.lstrip().startswith("```")
        fence ^= marks
        code = marks or fence or (line.startswith("    ") and not kept)
        skipped = code or not line.strip() or line.lstrip().startswith(("#", "|", "<"))
        if kept and (skipped or _ITEM.match(line)):
            yield " ".join(kept)
            kept = []
        if not skipped:
            kept.append(_ITEM.sub("", line).strip())


def sentences(text: str) -> Iterator[list[str]]:
    """Sentences as lists of words: what holds a letter or a digit, links by their text."""
    for paragraph in paragraphs(text):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
        for sentence in _END.split(_ABBREVIATIONS.sub(r"\1 ", plain)):
            if words := [word for word in sentence.split() if re.search(r"\w", word)]:
                yield words


def below(node: ast.AST) -> Iterator[ast.AST]:
    """What a node is made of, but for annotations and docstrings."""
    for name, value in ast.iter_fields(node):
        for each in value if isinstance(value, list) else [value]:
            is_doc = isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
            if isinstance(each, ast.AST) and not is_doc and name not in ("annotation", "returns"):
                yield each


def texts(node: ast.AST) -> Iterator[str]:
    """What is written in a node, an f-string as one text; what is put in reads {}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    parts = list(below(node))
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)
        parts = [part for part in parts if not isinstance(part, ast.Constant)]
    for part in parts:
        yield from texts(part)


def running(text: str) -> str:
    """What of a text is prose: no examples, tables of a database or lists of words; {x} is put in."""
    prose = text.partition("Examples:\n")[0].replace("{}", "{x}")
    return prose if re.search("[.,;:]", prose) and "CREATE TABLE" not in prose else ""


def said() -> dict[str, list[tuple[str, list[str]]]]:
    """Place and text of what the package says: help, errors, other texts, templates."""
    sys.path.insert(0, str(ROOT / "src"))
    import site_commands

    found: dict[str, list[tuple[str, list[str]]]] = {}
    seen: set[str] = set()
    for command in site_commands.commands():
        options = [*command.options, *command.of_run, *sum(command.of_methods.values(), ())]
        about = [command.about.partition("\n\n")[2], *(option.about for option in options)]
        # Options that commands share are counted once.
        found.setdefault("help", []).append((command.prog, sorted({*about} - seen)))
        seen.update(about)
    for path in sorted(SOURCE.rglob("*.py")):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(SOURCE))
        raised = [
            text
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS
            for text in texts(node)
        ]
        found.setdefault("errors", []).append((name, raised))
        others = [text for text in texts(tree) if text not in raised]
        found.setdefault("other texts", []).append((name, others))
    for path in sorted(SOURCE.rglob("templates/*")):
        text = re.sub(r"{{.*?}}", "{x}", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = re.sub(r"{[%#].*?[%#]}|<(style|script)\b.*?</\1>", "\n\n", text, flags=re.DOTALL)
        if path.suffix != ".css":
            found.setdefault("templates", []).append((path.name, [re.sub("<[^>]*>", "\n\n", text)]))
    return found


def row(name: str, lengths: list[int]) -> str:
    over = [sum(n > limit for n in lengths) / (len(lengths) or 1) for limit in (LIMIT, LONG)]
    shares = f"{over[0]:7.1%} {over[1]:7.1%} {max(lengths, default=0):8}"
    return f"{name:44} {sum(lengths):7} {len(lengths):9} {shares}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown pages; all if none is given")
    parser.add_argument("--worst", type=int, default=0, help="show so many of the long sentences")
    given = parser.parse_args()
    write = sys.stdout.write
    pages = given.pages or [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    write(f"{'page':44} {'words':>7} {'sentences':>9} {'>25':>7} {'>30':>7} {'longest':>8}\n")
    every = []
    for page in pages:
        name = str(page).removeprefix(f"{ROOT}/")
        found = [(len(words), name, words) for words in sentences(page.read_text(encoding="utf-8"))]
        write(row(name, [length for length, *_ in found]))
        every += found
    write(row("all pages", [length for length, *_ in every]))
    for kind, places in said().items() if not given.pages else ():
        found = [
            (len(words), f"{kind}, {name}", words)
            for name, texts in places
            for text in texts
            for words in sentences(running(text))
        ]
        write(row(kind, [length for length, *_ in found]))
        every += found
    for length, name, words in sorted(every, reverse=True)[: given.worst]:
        if length > LIMIT:
            write(f"\n{length} {name}: {' '.join(words)}\n")
    lines = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    big = sorted(f"{path.relative_to(ROOT)} {n}" for path, n in lines.items() if n > FILE_LINES)
    write(f"\nsrc: {len(lines)} files, {sum(lines.values())} lines of Python\n")
    write(f"over {FILE_LINES} lines: {', '.join(big) or 'none'}\n")


if __name__ == "__main__":
    main()
