"""What the build of the site adds to MkDocs: formulas, the commands, files that pages link to.

Formulas are fences called `math`, which forges show too; here LaTeX becomes MathML, which browsers draw
themselves, so that the site needs no script and no font for it.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COMMANDS_PAGE = "commands.md"
COMMANDS_BODY = re.compile(r"<!-- commands: begin -->.*<!-- commands: end -->", re.DOTALL)
REPOSITORY_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository that are pages of the site."""
FILES = "files"
"""Folder of the site with copies of what pages link to outside of docs/."""
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
_SHOWN_AS_TEXT = (".py", ".yaml", ".toml")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Registers the fence for formulas."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(
        {"name": "math", "class": "math", "format": math_fence}
    )
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages made of files of the repository, and copies of files that pages link to."""
    from mkdocs.structure.files import File

    docs = Path(config.docs_dir)
    for name, page in REPOSITORY_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    for linked in sorted({path for page in docs.rglob("*.md") for path in linked_outside(page)}):
        if linked.as_posix() in REPOSITORY_PAGES:
            continue
        files.append(File.generated(config, copy_of(linked), content=(ROOT / linked).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the commands; turns links to files of the repository to their copies."""
    del config, files
    source = PurePosixPath(page.file.src_uri)
    if source == PurePosixPath(COMMANDS_PAGE):
        sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "src")]
        from site_commands import markdown as commands

        tables = commands()
        markdown, found = COMMANDS_BODY.subn(lambda _: tables, markdown)
        if found != 1:
            raise ValueError(f"{COMMANDS_PAGE}: must have the two marks of the tables once")
    up = "../" * (len(source.parts) - 1)

    def turned(link: re.Match[str]) -> str:
        inside = _inside(ROOT / "docs" / source.parent, link[1])
        if inside is None:
            return link[0]
        target = REPOSITORY_PAGES.get(inside.as_posix(), copy_of(inside))
        return f"]({up}{target}{link[2] or ''})"

    return _LINK.sub(turned, markdown)


def linked_outside(page: Path) -> Iterator[Path]:
    """Files of the repository, by their path in it, that a page of docs/ links to beside the docs."""
    for link in _LINK.finditer(page.read_text(encoding="utf-8")):
        inside = _inside(page.parent, link[1])
        if inside is not None:
            yield inside


def _inside(folder: Path, link: str) -> Path | None:
    """The linked file by its path in the repository; None where it is a page of docs/."""
    target = (folder / link).resolve()
    return None if target.is_relative_to(ROOT / "docs") else target.relative_to(ROOT)


def copy_of(linked: Path) -> str:
    """Where the site has its copy of a file of the repository; browsers save what is not text."""
    name = linked.as_posix()
    return f"{FILES}/{name}{'.txt' if linked.suffix in _SHOWN_AS_TEXT else ''}"


def math_fence(source: str, language: str, css_class: str, options: Any, md: Any, **more: Any) -> str:
    """LaTeX of a fence as MathML in a box that scrolls by itself."""
    del language, options, md, more
    return f'<div class="{css_class}">{formula(source)}</div>'


def formula(latex: str) -> str:
    """One formula as MathML, its LaTeX as the text alternative.

    Raises ValueError for a command that would be shown as it is written.
    """
    from latex2mathml.converter import convert

    latex = " ".join(latex.split())
    mathml: str = convert(latex, display="block")
    shown = html.unescape(re.sub(r"<[^>]*>", "", mathml))
    if "\\" in shown:
        raise ValueError(f"formula {latex!r}: {shown!r} is not known to latex2mathml")
    label = html.escape(latex, quote=True)
    return mathml.replace("<math ", f'<math aria-label="{label}" ', 1)
