"""docs/failures.md's fault matrix names tests that exist, and none of the matrix here is missing from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "failures.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?`")


def rows() -> list[tuple[str, str, str, str]]:
    """(fault, file, test, case) of the section."""
    section = TABLE.read_text(encoding="utf-8").partition("## The fault matrix")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [(line.split("|")[1].strip(), *found) for line in lines for found in NAMED.findall(line)]


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def cases() -> set[str]:
    """The keys of CASES and ALONE in test_matrix.py."""
    tree = ast.parse((Path(__file__).with_name("test_matrix.py")).read_text(encoding="utf-8"))
    wanted = {
        node.target.id: node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict)
    }
    return {key.value for name in ("CASES", "ALONE") for key in wanted[name].keys if isinstance(key, ast.Constant)}


def test_at_least_fifteen_kinds_of_fault_are_in_the_table() -> None:
    assert len({fault for fault, *_ in rows()}) >= 15


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}: {row[2]}")
def test_the_test_that_shows_it_exists(row: tuple[str, str, str, str]) -> None:
    _, file, name, case = row
    assert name in names_in(ROOT / file)
    assert not case or case in cases()


def test_every_case_of_the_matrix_is_in_the_table() -> None:
    assert cases() == {case for *_, case in rows() if case}
