"""The house itself: how long its rooms are, what each of them says, and what importing one brings along."""

import ast

from conftest import ROOT

CODE = sorted((ROOT / "common").rglob("*.py"))
LINES, CLASS_LINES = 300, 150


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_no_file_in_common_and_no_class_is_longer_than_one_reads_at_once():
    long = {str(path.relative_to(ROOT)): n for path in CODE if (n := len(path.read_text().splitlines())) > LINES}
    for path in CODE:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and (n := node.end_lineno - node.lineno + 1) > CLASS_LINES:
                long[f"{path.relative_to(ROOT)}: {node.name}"] = n
    long.pop("common/models/family.py: Family", None)
    assert not long
