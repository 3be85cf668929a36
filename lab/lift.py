"""Prints the functions of a script that need nothing but torch, as they stand: a method's
equations, to be copied.

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
HEAD = '''"""The equations of vgrpo's {name}.py (Apache-2.0), which says whose paper they are. Needs torch alone."""

import torch

EPS = 1e-8  # in every division by a standard deviation
'''


@dataclass
class Args:
    script: tyro.conf.Positional[Literal["grpo_base", "bpgo", "slas", "self_paced"]]
    """Whose functions."""


def asked_of_others(table):
    """Names that a function takes from its module or from Python."""
    here = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return here.union(*map(asked_of_others, table.get_children()))


def functions(source):
    """{name: what it asks of the module} of the functions at the top of a script that import
    nothing themselves."""
    tree, tables = ast.parse(source), symtable.symtable(source, "", "exec").get_children()
    plain = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not any(isinstance(part, ast.Import | ast.ImportFrom) for part in ast.walk(node))
    }
    return {
        table.get_name(): asked_of_others(table) - set(dir(builtins)) - {"torch", "EPS"}
        for table in tables
        if table.get_name() in plain
    }


def lifted(name):
    """The text of a file with the functions of NAME.py that need torch, and one another, alone."""
    source = (ROOT / f"{name}.py").read_text()
    asked = functions(source)
    while out := [function for function, names in asked.items() if names - asked.keys()]:
        for function in out:
            del asked[function]
    tree = ast.parse(source)
    texts = [
        ast.get_source_segment(source, node)
        for node in tree.body
        if getattr(node, "name", "") in asked
    ]
    return HEAD.format(name=name) + "".join(f"\n\n{text}\n" for text in texts)


if __name__ == "__main__":
    print(lifted(tyro.cli(Args, description=__doc__).script), end="")
