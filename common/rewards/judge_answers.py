"""Read the score, 1 to 10, in a judge's answer.

The question asks for one number alone. Models also write `8/10`, `Score: 8`, JSON, or a sentence.
`score_in` reads these forms by the rules below, in this order. The first rule that finds a number
decides; an answer with two different scores, or with none, has no score, and the judge is asked
again. A score outside 1 to 10 is none.

1. A thought is no answer: only what follows `</think>` counts. An open thought has no answer yet.
2. An answer with braces is JSON, fenced or not: the one key score, rating, overall, ... counts.
3. Names of the scale are removed: `1 to 10`, `(1-10)`, `from 1.00 (bad) to 10.00 (perfect)`.
4. The whole answer is a number, as `8`, `8.5`, `8,5`, `8/10`, `8 out of 10`, `**8**`.
5. Numbers after `final score`, `overall rating`, `final answer`, `\\boxed{`, ...; then those after
   `score`, `rating` or `answer`. `quality score: 7` is a part of a score and does not count.
6. The only number of the answer, after `I give it a`, `I rate this`, `I would score it`, ...
7. `8/10` or `8 out of 10` in a sentence. `Sharpness: 8/10` is a part: then there is no score.

A number in a range (`7-8`, `7 or 8`), with a percent sign, out of another total (`4/5`), or at the
end of an answer that was cut does not count.
"""

import json
import math
import re
from typing import Any

THOUGHT, END = "<think>", "</think>"
CUT = "…"  # ends an answer that stopped at the limit of its tokens

_N = r"(?<![\w.,/⁄\-–])([0-9]+(?:\.[0-9]+)?)"
_OF_TEN = r"(?:\s*(?:/|out of)\s*10(?:\.0+)?)"
# nothing that makes another number of it: a digit, a range, a total, the end of a cut answer
_ALONE = rf"(?![\w⁄{CUT}]|\.\d|\.*{CUT})(?!\s*(?:[%/⁄]|out of))"
_ALONE += r"(?![ \t]*(?:[,\-–—~]|\b(?:or|to|and|maybe|perhaps|possibly)\b)[ \t]*\d)(?![ \t]+\d)"
_SCORE = rf"{_N}(?:{_OF_TEN})?{_ALONE}"
_LINK = r"(?:[\s:：=>*_\[\](){}|\"'“”~\-–—]|\b(?:is|of|as|would be|at)\b)*"

# what follows a score in a sentence, not a noun: "I give 2 reasons"
_END = r"[\s\"'*_”]*(?:$|[.!;,:)(\n\-–—]|\b(?:because|since|as|due|for|overall|points)\b)"

_SCALE = re.compile(
    r"[(\[]?(?:\b(?:on|in|using)\s+)?(?:\b(?:a|the)\s+)?(?:\bscale\s+(?:of|from)?\s*)?"
    r"(?:\b(?:from|between)\s+)?(?<![\d.,])[01](?:\.0+)?(?:\s*\([^)]*\))?"
    r"\s*(?:to|and|through|-|–|—)\s*10(?:\.0+)?(?![\d/]|\.\d)(?:\s*\([^)]*\))?(?:\s*scale\b)?[)\]]?",
    re.I,
)
_WHOLE = re.compile(rf"\W*{_N}{_OF_TEN}?(?:\s*(?:points|分))?(?<!{CUT})[\s\"'*_`.!)\]]*")
_WORDS = r"(?:score|rating|answer|评分|得分|分数)"
_FINAL = re.compile(
    rf"(?:\b(?:final|overall|total)\s+{_WORDS}\b|\boverall\b|\\boxed){_LINK}{_SCORE}", re.I
)
_LABEL = re.compile(
    rf"(?:^|[^\w\s]|\b(?:my|the|a|this|its)\s)\s*\b{_WORDS}\b{_LINK}{_SCORE}", re.I | re.M
)
_VERB = re.compile(
    r"(\b(?:not|never|cannot|can't|won't|wouldn't|don't)\s+)?"
    r"\b(?:give|rate|score|grade|assign|deserves?|gets?|earns?)\b"
    r"(?:\s+(?:it|this|that|the|image|picture|video|clip|a|an|as|at|with|score|rating|of)\b)*"
    rf"[\s:*_\"'“]*{_SCORE}(?={_END})",
    re.I,
)
_TENTH = re.compile(rf"([:：]\W*)?{_N}{_OF_TEN}(?![\w/⁄%]|\.\d)({_END})?", re.I)
_KEY = re.compile(r"(?:(?:final|overall|total)[ _-]?)?(?:score|rating|grade)|overall", re.I)


def score_in(answer: str | None) -> float:
    """Return the score, 1 to 10, of an answer; NaN if it has none or several."""
    text = (answer or "").rpartition(END)[2]  # rule 1
    if THOUGHT in text:
        return math.nan
    text = re.sub(r"([^\S\n])\s+|\n\s*\n", lambda gap: "\n" if "\n" in gap[0] else " ", text)
    text = re.sub(r"[*`]", "", text)
    text = re.sub(r"\\boxed\{([^{}]*)\}", r"\\boxed \1", text)
    if "{" in text:  # rule 2
        text = _of_json(text)
    text = re.sub(r"(?<=\d),(?=\d{1,2}(?!\d))(?<![.,]\d,)", ".", text)  # a decimal comma
    text = _SCALE.sub(" ", text)  # rule 3
    found = _numbers(text)
    score = found.pop() if len(found) == 1 else math.nan
    return score if 1 <= score <= 10 else math.nan


def _numbers(text: str) -> set[float]:
    """Return the different numbers that the first rule that fits, 4 to 7, finds in a text."""
    whole = _WHOLE.fullmatch(text)
    if whole:
        return {float(whole[1])}
    for pattern in (_FINAL, _LABEL):
        found = {float(match[1]) for match in pattern.finditer(text)}
        if found:
            return found
    verbs = {float(m[2]) for m in _VERB.finditer(text) if not m[1]}
    if verbs and len(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?:/|out of)\s*10\b", "", text))) == 1:
        return verbs
    tenths = list(_TENTH.finditer(text))
    if any(match[1] or match[3] is None for match in tenths):
        return set()
    return {float(match[2]) for match in tenths}


def _of_json(text: str) -> str:
    """Return the value of the score in the JSON of an answer as text, "" if there is not one."""
    part = text[text.index("{") : text.rfind("}") + 1]
    try:
        content = json.loads(part, object_pairs_hook=_once)
    except (ValueError, RecursionError):  # also for two objects one after the other
        return ""
    values = [value for name, value in content.items() if _KEY.fullmatch(name.strip())]
    if len(values) != 1 or isinstance(values[0], bool):
        return ""
    return str(values[0]) if isinstance(values[0], int | float | str) else ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dictionary of (name, value) pairs. Raises ValueError for a name given twice."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)
