"""Write into docs/methods/NAME.md what each method changes against grpo_base.py, below its header
and settings.

python -m lab.method_diffs
"""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("bpgo", "slas", "self_paced")


def code(name):
    """Return the lines of a script from its first function on."""
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("def ")) :]


def hunks(name):
    """Return the diff as text, each hunk under its function or its section of main."""
    base, script = code("grpo_base"), code(name)
    matcher = difflib.SequenceMatcher(None, base, script, autojunk=False)
    text = []
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            continue
        places = [line for line in script[: k + 1] if re.match(r"(def|class) | +# --- ", line)]
        text.append(f"@@ {places[-1].strip(' #-:')} @@")
        text += [f"-{line}" for line in base[i:j]]
        text += [f"+{line}" for line in script[k:m]]
    return "\n".join(line.rstrip() for line in text)


def page(name):
    """Return the path of a method's page."""
    return ROOT / f"docs/methods/{name}.md"


def with_diff(text, name):
    """Return a page's text with the present hunks between its markers."""
    before, _, rest = text.partition("<!-- diff -->")
    _, end, after = rest.partition("<!-- /diff -->")
    assert end, f"{page(name)} has no place for the hunks"
    return f"{before}<!-- diff -->\n```diff\n{hunks(name)}\n```\n<!-- /diff -->{after}"


if __name__ == "__main__":
    for name in METHODS:
        page(name).write_text(
            with_diff(page(name).read_text(encoding="utf-8"), name), encoding="utf-8"
        )
