"""Counts what people read, and the code behind it.

    python scripts/prose.py                        # every page, then src/
    python scripts/prose.py --worst 20 docs/*.md   # and the sentences over 25 words, longest first

Of each page: words, sentences, the shares of sentences over 25 and over 30 words, the longest. Tables,
code blocks and headings are left out; a list item ends its sentence. Of src/: lines and long files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
    found = {str(page): list(sentences(page.read_text(encoding="utf-8"))) for page in pages}
    write(f"{'page':44} {'words':>7} {'sentences':>9} {'>25':>7} {'>30':>7} {'longest':>8}\n")
    for name, page in found.items():
        write(row(name.removeprefix(f"{ROOT}/"), [len(words) for words in page]))
    every = [(len(words), name, words) for name in found for words in found[name]]
    write(row("all", [length for length, *_ in every]))
    for length, name, words in sorted(every, reverse=True)[: given.worst]:
        if length > LIMIT:
            write(f"\n{length} {name}: {' '.join(words)}\n")
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / "src").rglob("*.py")}
    big = sorted(f"{path.relative_to(ROOT)} {n}" for path, n in lines.items() if n > FILE_LINES)
    write(f"\nsrc: {len(lines)} files, {sum(lines.values())} lines of Python\n")
    write(f"over {FILE_LINES} lines: {', '.join(big) or 'none'}\n")


if __name__ == "__main__":
    main()
