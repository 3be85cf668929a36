"""Read and write the study's results, a small JSON file for each setting in lab/results.

    MODEL-SCRIPT-DIGEST.json    {"settings": what identifies the setting, and gives the digest,
                                 "config": all flags of its runs,
                                 "runs": {seed: run}}

A run: {"commit", "versions", "seconds" (of a core), "steps" and "evaluations" {name: [...]} of the
held-out prompts, "training" {name: [...]}, and of some "pictures"}; a probe's: {"numbers": {name:
value}} or {"pictures"}."""

import hashlib
import json
import math
from pathlib import Path

from common.reporting.files import write_text
from lab import claims

FOLDER = Path(__file__).with_name("results")
DIGITS = 5


def name_of(settings):
    """The name of a setting's file: of what it says, whatever the order."""
    written = json.dumps(settings, sort_keys=True)
    script = Path(settings["script"]).stem.replace(":", "-")
    return f"{settings['model']}-{script}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"


def rounded(thing):
    """Numbers inside lists and dictionaries at DIGITS digits: more would say nothing; no number at
    all becomes None."""
    if isinstance(thing, dict):
        return {name: rounded(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [rounded(value) for value in thing]
    if isinstance(thing, float):
        return float(f"{thing:.{DIGITS}g}") if math.isfinite(thing) else None
    return thing


class Results:
    """The runs in a folder. searched: whether settings come from the search in it, or are the
    models' own."""

    def __init__(self, folder, searched=True, shrink=None):
        self.folder, self.searched, self.shrink = (
            Path(folder),
            searched,
            shrink or (lambda settings: settings),
        )
        self.files = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(self.folder.glob("*-*.json"))
        }

    def runs(self, settings):
        """{seed: run} of all settings in full."""
        return {
            int(seed): run
            for seed, run in self.files.get(name_of(settings), {}).get("runs", {}).items()
        }

    def of(self, setting):
        """{seed: run} of a claims.Setting, with what the search gives it and without its runs; {}
        before it is done."""
        settings = self.settings(setting)
        return self._claimed(settings) if settings else {}

    def _claimed(self, settings):
        return {
            seed: run
            for seed, run in self.runs(settings).items()
            if seed not in claims.SEARCH_SEEDS
        }

    def settings(self, setting):
        """All settings of a claims.Setting; None where its search is not done yet."""
        tuned = {}
        if self.searched and setting.searched and not setting.script.startswith("probe:"):
            tuned = self.tuned(*setting.searched)
        return None if tuned is None else self.shrink(setting.settings(tuned))

    def tried(self, method, model, task):
        """[(point, mean reward of the last two evaluations)] of the search's points whose runs are
        all there."""
        found = []
        for point in claims.points(model, task):
            runs = self.runs(claims.setting(method, model, task).settings(point))
            if all(seed in runs for seed in claims.SEARCH_SEEDS):
                ends = [
                    value
                    for seed in claims.SEARCH_SEEDS
                    for value in runs[seed]["evaluations"]["reward"][-2:]
                ]
                found.append((point, sum(ends) / len(ends)))
        return found

    def tuned(self, method, model, task):
        """{"learning_rate", "clip_range"}: the best point of the search; None till it is done. No
        mix of the best of each: two changes that help alone may unlearn everything together."""
        tried = self.tried(method, model, task)
        return (
            max(tried, key=lambda pair: pair[1])[0]
            if len(tried) == len(claims.points(model, task))
            else None
        )

    def methods(self, model, task):
        """{script: {seed: run}} of all that a task was given to without flags of its own, a
        reader's methods last."""
        found = {}
        for file in self.files.values():
            settings = file["settings"]
            if (
                settings["model"] == model
                and settings.get("task") == task
                and claims.plain(settings)
            ):
                script, mine = settings["script"], "source" in settings
                wanted = self.settings(claims.setting("grpo_base" if mine else script, model, task))
                mine = {name: settings[name] for name in ("script", "source")} if mine else {}
                if wanted and {**wanted, **mine} == settings:
                    found[script] = self._claimed(settings)
        return dict(
            sorted(
                found.items(),
                key=lambda pair: (pair[0].endswith(".py"), pair[0] != "grpo_base", pair[0]),
            )
        )

    def add(self, settings, seed, config, run):
        """Writes a run into its setting's file as it is now: another study may write, too. A killed
        process leaves the old file or the new one."""
        name = name_of(settings)
        path = self.folder / f"{name}.json"
        known = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else {}
        runs = sorted({**known, str(seed): rounded(run)}.items(), key=lambda pair: int(pair[0]))
        self.files[name] = {"settings": settings, "config": config, "runs": dict(runs)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, compact(self.files[name]) + "\n")


def compact(file):
    """JSON with a line for each key of a run, as a reader of a diff would have it: lists in one
    line."""
    head = [
        f' "{name}": {json.dumps(file[name], sort_keys=True)}' for name in ("settings", "config")
    ]
    runs = []
    for seed, run in file["runs"].items():
        lines = [f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in run.items()]
        runs.append(f"  {json.dumps(seed)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join([*head, ' "runs": {\n' + ",\n".join(runs) + "\n }"]) + "\n}"
