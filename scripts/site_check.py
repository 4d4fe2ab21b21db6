"""Checks a built site: it must load nothing from another host, and have every page.

    python scripts/site_check.py build/site

A link that a reader may follow is no load; a style sheet, script, font, picture or frame is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADS = {
    ("script", "src"), ("img", "src"), ("img", "srcset"), ("source", "src"), ("source", "srcset"),
    ("iframe", "src"), ("embed", "src"), ("object", "data"), ("video", "src"), ("audio", "src"),
    ("video", "poster"), ("track", "src"), ("input", "src"), ("use", "href"), ("image", "href"),
    ("base", "href"), ("form", "action"),
}  # fmt: skip
NOT_LOADED = {"canonical", "prev", "next", "license", "author", "help"}
"""Relations of <link> that a browser does not fetch."""
_ELSEWHERE = re.compile(r"^\s*(?:[a-z]+:)?//", re.IGNORECASE)
_CSS = re.compile(r"(?:url\(\s*|@import\s+)[\"']?((?:[a-z]+:)?//[^\"')\s;]+)", re.IGNORECASE)
# What a script could fetch is a string that begins with a host.
_SCRIPT = re.compile(r"[\"'`]((?:https?:)?//(?:(?:[\w-]+\.)+[a-z]{2,}|\$\{)[^\"'`\s]*)")
_NAMES = ("http://www.w3.org/", "https://www.w3.org/")
"""Names of XML that look like addresses."""
IF_ASKED = {
    "https://unpkg.com/mermaid@": re.compile(r"class=\"[^\"]*\bmermaid\b"),
    "https://api.github.com/": re.compile(r"data-md-component=\"source\""),
    "https://${e}/api/v4/projects/": re.compile(r"data-md-component=\"source\""),
    # Only for browsers without ResizeObserver, which none that draws MathML is.
    "https://unpkg.com/resize-observer-polyfill": re.compile(r"(?!)"),
}
"""What the theme's script fetches for pages that hold the pattern; no page may hold it."""


class _Page(HTMLParser):
    """Collects what a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        for name, value in values.items():
            if (tag, name) in LOADS and _ELSEWHERE.match(value):
                self.found.append(f"<{tag} {name}={value}>")
            if name == "style":
                self.found += [f"<{tag} style: {url}>" for url in _CSS.findall(value)]
        relations = set(values.get("rel", "").split())
        if tag == "link" and not relations & NOT_LOADED and _ELSEWHERE.match(values.get("href", "")):
            self.found.append(f"<link rel={values.get('rel')} href={values['href']}>")
        self._inside = tag if tag in ("style", "script") else None

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.found += [f"<style>: {url}" for url in _CSS.findall(data)]
        elif self._inside == "script":
            self.found += [f"<script>: {url}" for url in _addresses(data)]


def _addresses(script: str) -> Iterator[str]:
    for address in _SCRIPT.findall(script):
        if not address.startswith(_NAMES):
            yield address


def loads(site: Path) -> list[str]:
    """What each file of the site would fetch from another host, as `FILE: what`."""
    found = []
    for path in sorted(p for p in site.rglob("*") if p.is_file()):
        name = path.relative_to(site).as_posix()
        if path.suffix == ".html":
            text = path.read_text(encoding="utf-8")
            page = _Page()
            page.feed(text)
            found += [f"{name}: {what}" for what in page.found]
            for address, pattern in IF_ASKED.items():
                if pattern.search(text):
                    found.append(f"{name}: makes the theme fetch {address}")
        elif path.suffix == ".css":
            text = path.read_text(encoding="utf-8")
            found += [f"{name}: {url}" for url in _CSS.findall(text)]
        elif path.suffix == ".js" and path.name != "search_index.js":
            text = path.read_text(encoding="utf-8")
            theme = "/javascripts/bundle." in name
            found += [
                f"{name}: {url}"
                for url in _addresses(text)
                if not (theme and url.startswith(tuple(IF_ASKED)))
            ]
    return found


def main(arguments: list[str]) -> int:
    """Checks the site that the one argument names; 1 where something is wrong."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "index.html").is_file():
        sys.stderr.write("site_check.py: give the folder of a built site, with its index.html\n")
        return 2
    site = Path(arguments[0])
    found = loads(site)
    for line in found:
        sys.stderr.write(f"loads from another host: {line}\n")
    pages = len(list(site.rglob("*.html")))
    sys.stdout.write(f"site: {pages} pages, {len(found)} loads from other hosts\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
