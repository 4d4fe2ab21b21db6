"""Importing is fast, and imports run one way through the packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import expunge

SOURCE = Path(expunge.__file__).parent
ORDER = (
    "data",
    "maths",
    "models",
    "segments",
    "methods",
    "analysis",
    "evaluation",
    "training",
    "runs",
    "search",
    "audits",
    "reporting",
    "ledger",
    "web",
    "benchmark",
    "cli",
)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import that runs, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imported(ast.Module([other], []))
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        yield from imported(node)


def violations(path: Path, source: str) -> list[str]:
    """Imports of a file that run against the order."""
    parts = path.relative_to(SOURCE).parts
    if len(parts) == 1 and path.stem in ("api", "semeval", "__main__", "__init__"):
        allowed = set(ORDER) - ({"cli"} if path.stem != "__main__" else set())
    elif len(parts) == 1:
        allowed = set()
    else:
        assert parts[0] in ORDER, f"{path}: its package has no place in the order"
        allowed = set(ORDER[: ORDER.index(parts[0]) + 1])
    found = []
    for line, name in imported(ast.parse(source)):
        pieces = name.split(".")
        if pieces[0] != "expunge" or len(pieces) == 1:
            continue
        if pieces[1] in (*ORDER, "api") and pieces[1] not in allowed:
            found.append(f"{path.relative_to(SOURCE)}:{line} imports {name}")
    return found


def test_packages_import_from_their_left_only() -> None:
    paths = sorted(SOURCE.rglob("*.py"))
    assert len(paths) > 30
    found = [fault for path in paths for fault in violations(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("place", "line", "faulty"),
    [
        ("models/x.py", "from expunge.training.loop import train", True),
        ("models/x.py", "def f():\n    import expunge.methods.base", True),
        ("models/x.py", "from expunge import cli", True),
        ("models/x.py", "from expunge.api import unlearn", True),
        ("models/x.py", "from expunge.data.rows import Row\nfrom expunge.models.a import b", False),
        ("data/x.py", "from expunge.errors import InputError\nimport expunge, torch", False),
        ("data/x.py", "if TYPE_CHECKING:\n    from expunge.cli.main import main", False),
        ("data/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import expunge.cli.main", True),
        ("errors.py", "import expunge.data.rows", True),
        ("api.py", "from expunge.benchmark.build import build", False),
        ("api.py", "from expunge.cli.main import main", True),
        ("cli/x.py", "from expunge.web.page import page", False),
    ],
)
def test_the_check_itself_finds_what_it_should(place: str, line: str, faulty: bool) -> None:
    assert bool(violations(SOURCE / place, line)) == faulty


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import expunge; expunge.InputError",
        "from expunge.cli.main import main; main(['--help']); main(['--version'])",
    ],
)
def test_importing_and_the_help_load_nothing_heavy(code: str) -> None:
    loaded = loaded_after(code)
    assert "expunge.errors" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "peft", "rich", "sklearn"}


def test_the_names_of_the_package_are_there() -> None:
    for name in expunge.__all__:
        assert getattr(expunge, name).__module__.startswith("expunge.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        expunge.nothing  # noqa: B018
