"""Print the functions of a script that need torch alone: a method's equations, to be copied.

python -m lab.lift slas > slas_equations.py
"""

import ast
import builtins
import symtable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
COPIED = {"groups"}  # modules of common/ that need torch alone and are copied whole
HEAD = '''\
"""The equations of vgrpo's {name}.py (Apache-2.0), which names their paper. Needs torch alone."""

import torch

import groups  # common/groups.py

EPS = 1e-8  # in every division by a standard deviation
'''


@dataclass
class Args:
    script: tyro.conf.Positional[Literal["grpo_base", "bpgo", "slas", "self_paced"]]
    """The script whose functions are printed."""


def names_in(table):
    """Return the names that a function's body takes from its module or from Python."""
    here = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return here.union(*map(names_in, table.get_children()))


def names_in_annotations(function):
    """Return the names in the type hints of a function's syntax tree."""
    hints = [node.annotation for node in ast.walk(function) if isinstance(node, ast.arg)]
    parts = [part for hint in [*hints, function.returns] if hint for part in ast.walk(hint)]
    return {part.id for part in parts if isinstance(part, ast.Name)}


def functions(source):
    """Return {name: names it takes from the module} of the functions at the top of a script.

    Functions that import something are left out.
    """
    plain = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            if not any(isinstance(part, ast.Import | ast.ImportFrom) for part in ast.walk(node)):
                plain[node.name] = names_in_annotations(node)
    given = {*dir(builtins), *COPIED, "torch", "EPS"}
    return {
        table.get_name(): (names_in(table) | plain[table.get_name()]) - given
        for table in symtable.symtable(source, "", "exec").get_children()
        if table.get_name() in plain
    }


def lifted(name):
    """Return a file's text: the functions of NAME.py that need torch, and one another, alone."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    asked = functions(source)
    while out := [function for function, names in asked.items() if names - asked.keys()]:
        for function in out:
            del asked[function]
    texts = [
        ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if getattr(node, "name", "") in asked
    ]
    return HEAD.format(name=name) + "".join(f"\n\n{text}\n" for text in texts)


if __name__ == "__main__":
    print(lifted(tyro.cli(Args, description=__doc__).script), end="")
