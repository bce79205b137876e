"""docs/paper.md: every name in it exists, every test, every command's file and flags; nothing of the paper is left out."""
import ast
import importlib
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
TABLE = [line.strip("|").split("|") for line in (ROOT / "docs/paper.md").read_text().splitlines() if line.startswith("| ") and "`" in line]
ROWS = {row[0].strip(): [re.findall("`([^`]+)`", cell) for cell in row[1:]] for row in TABLE}


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_all_that_the_paper_numbers():
    named = set(re.findall(r"(?:Definition|Theorem|Proposition|Table|Figure) [\w.]*\w", " ".join(ROWS)))
    assert named == {"Definition A.1", "Theorem 3.1", "Proposition 4.1", "Table 1", *(f"Figure {n}" for n in range(1, 8))}
    assert len(ROWS) == len(TABLE) and len(ROWS) > 25


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_names_exists(row):
    code, tests, commands = ROWS[row]
    assert code and tests and len(commands) == 1
    for name in code:
        if "/" in name:
            assert (ROOT / name).is_file(), name
        else:
            module, *path = name.split(".")
            reduce(getattr, path, importlib.import_module(module))           # AttributeError: it is not there
    for test in tests:
        file, name = test.split("::")
        assert name in functions(ROOT / "tests" / f"{file}.py"), test
    words = shlex.split(commands[0])
    [script] = [word for word in words if word.endswith(".py")]
    assert words[0] == "python" and (ROOT / script).is_file(), script
    if script == "train.py":
        train.parse_flags(words[2:]).check()
    flags = [word for word in words[2:] if word.startswith("--")]
    assert all(f'"{flag}"' in (ROOT / script).read_text() for flag in flags) or script == "train.py", flags
