"""The rooms of the repository, and the limits that keep it readable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ORDER = ["core", "gpt_conf", "variations", "model", "train_args", "convert", "engine", "lab"]
DOORS = ["train", "sample"]  # beside one another, over every room
BY_NOBODY = ["bench", "tests", "data", *DOORS]
FILE_LINES, FUNCTION_LINES = 400, 60


def sources() -> list[Path]:
    rooms = [p for name in ORDER for p in (REPOSITORY / name).rglob("*.py")]
    return rooms + [p for name in (*ORDER, *DOORS) if (p := REPOSITORY / f"{name}.py").exists()]


def room(path: Path) -> str:
    return path.relative_to(REPOSITORY).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The first word of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    own = room(path)
    allowed = {*ORDER, *DOORS[:0]} if own in DOORS else set(ORDER[: ORDER.index(own) + 1])
    for name in imports(path):
        assert name not in {*ORDER, *BY_NOBODY} - allowed, f"{own} may not import {name}"


def test_the_options_know_only_the_standard_library() -> None:
    used = set(imports(REPOSITORY / "core" / "options.py"))
    assert used <= {*sys.stdlib_module_names, "core"}, used
    assert set(imports(REPOSITORY / "gpt_conf.py")) <= {*sys.stdlib_module_names, "core"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name}: {lines} lines"


def test_every_module_and_public_class_says_what_it_is() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_nothing_reads_code_from_disk_or_pickles() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path
        assert "pickle" not in set(imports(path)), path
        assert "torch.load(" not in path.read_text(), path
