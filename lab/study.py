"""The laptop study: do the papers' claims hold where everything is exact? Trains what lab/claims.py
asks for.

    python -m lab.study                          # all: about 6.5 hours on two cores; continues
                                                 # after a kill
    python -m lab.study --quick                  # every figure from fewer seeds and steps:
                                                 # twenty minutes
    python -m lab.study --plan                   # the runs, and how long they take
    python -m lab.study --only transfer          # claims with these prefixes (KEY:MODEL)
    python -m lab.study --methods my_method.py   # adds your method, with the same flags and seeds
    python -m lab.study --figures                # no runs: table and figures from the JSON files

A run is told by its settings, so it is trained once, whichever claims name it. First comes the
search, on seeds that no claim uses: learning rate and clip range, the same points for the baseline
as for every method; the claims' runs take what it found. Runs go side by side, --workers at once,
one thread each; every one that ends is written into lab/results at once, and one that was stopped
goes on from its last checkpoint."""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import tyro

from common import errors, models
from common.args import check_lists, defaults
from common.errors import InputError
from common.reporting.files import rows_before
from common.trainer import run_folder
from evaluation.tables import aligned
from lab import claims, figures, study_rewards, verdicts
from lab.gains import commit
from lab.study_results import FOLDER, Results, name_of

ROOT = Path(__file__).resolve().parents[1]
QUICK = dict(steps=4, eval_every=2, prompts_per_step=2)
QUICK_SEEDS = 2
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
SHOWN_SEED = 0  # of whose models the pictures show samples
KEPT = (
    "reward_mean",
    "reward_std",
    "advantage_abs_mean",
    "grad_norm",
    "clip_fraction",
    "batch_std",
)
# Seconds of one core, tiny-flux's measured beside another run, the others' on a busier machine:
# starting and ending a run; an evaluation; a sample's rollout and reward; a sample's share of an
# update at one denoising step.
SECONDS = {
    "tiny-flux": (3.0, 2.2, 0.018, 0.0045),
    "tiny-sd": (3.0, 2.5, 0.021, 0.0055),
    "tiny-wan": (3.0, 4.4, 0.034, 0.0070),
    "tiny-wan-i2v": (3.0, 5.0, 0.030, 0.0070),
}
PROBE_SECONDS = {"probe:loudness": 20.0, "probe:bias": 15.0, "probe:samples": 5.0}


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """Claims whose KEY:MODEL begins with one of these; none: all."""
    seeds: int = 0
    """Seeds of each comparison, 0, 1, ...; 0: as many as lab/claims.py has."""
    methods: tuple[str, ...] = ()
    """Scripts of your own, with `Args` and `main(args)` as grpo_base.py has them: trained as the
    baseline is, on three rewards, and compared with it; nothing else is run."""
    workers: int = 2
    """Runs at once, each in a process of its own with one thread."""
    quick: bool = False
    """A few steps, two seeds and no search, into --runs: to see every figure, not to learn from
    it."""
    plan: bool = False
    """Print the runs and their core-minutes by claim, and end."""
    search: bool = False
    """The search alone."""
    figures: bool = False
    """No runs: table and figures again from the JSON alone."""
    results: Path = FOLDER
    """Where the JSON is."""
    runs: Path = ROOT / "runs/study"
    """Where the runs go; of a finished one metrics.jsonl and config.json stay, for `python -m
    lab.compare`."""


@dataclass(frozen=True)
class Job:
    """A run: all settings, and a seed."""

    name: str  # of the setting's file
    seed: int
    settings: dict = dataclasses.field(compare=False)
    path: str = dataclasses.field(default="", compare=False)  # of a reader's own script

    @property
    def shown(self):
        """Whether samples of its model are kept."""
        return self.seed == SHOWN_SEED and claims.plain(self.settings)


def job(settings, seed, path=""):
    return Job(name_of(settings), seed, settings, path)


# --- The plan ---


def plan(args, results):
    """[(the search or claim, [Job])], each run where it is first asked for. Before its search is
    done a run stands here with its model's own settings: it costs the same."""
    asked, seen = [], set()
    for title, jobs in (
        *searches(args, results),
        *comparisons(args, results),
        *methods(args, results),
    ):
        new = [job for job in dict.fromkeys(jobs) if job not in seen]
        seen.update(new)
        asked.append((title, new))
    return asked


def chosen(args):
    """The claims that --only means."""
    found = [claim for claim in claims.CLAIMS if not args.only or claim.name.startswith(args.only)]
    if not found:
        raise InputError(f"--only {' '.join(args.only)}: no claim begins so; --plan lists them")
    return [] if args.methods else found


def searches(args, results):
    """Those that the claims take their settings from."""
    named = {setting.searched for claim in chosen(args) for setting in claim.settings} - {None}
    named |= {("grpo_base", *pair) for pair in claims.SIDE_BY_SIDE if args.methods}
    for searched in claims.SEARCHED if results.searched else ():
        if searched in named:
            tried = [
                claims.setting(*searched).settings(point) for point in claims.points(*searched[1:])
            ]
            yield (
                f"search {' '.join(searched)}",
                [job(one, seed) for seed in claims.SEARCH_SEEDS for one in tried],
            )


def comparisons(args, results, strictly=False):
    """The claims' runs; strictly: those alone whose search is done."""
    if args.search:
        return
    for claim in chosen(args):
        known = [(setting, results.settings(setting)) for setting in claim.settings]
        settings = [
            found or setting.settings() for setting, found in known if found or not strictly
        ]
        yield (
            claim.name,
            [job(one, seed) for one in settings for seed in range(seeds_of(args, claim.seeds))],
        )
    if not args.methods:
        yield (
            "samples of the base models",
            [job({"script": "probe:samples", "model": model}, SHOWN_SEED) for model in claims.SIZE],
        )


def methods(args, results, strictly=False):
    """A reader's own methods, each with the baseline's settings, and the baseline."""
    for path in map(Path, args.methods):
        if not path.is_file():
            raise InputError(f"--methods {path}: there is no such file")
        source = {"script": path.name, "source": hashlib.sha256(path.read_bytes()).hexdigest()[:8]}
        for model, task in claims.SIDE_BY_SIDE:
            setting = claims.setting("grpo_base", model, task)
            base = results.settings(setting)
            if base or not strictly:
                base = base or setting.settings()
                seeds = range(seeds_of(args, claims.SEEDS))
                own = [job({**base, **source}, seed, str(path.resolve())) for seed in seeds]
                yield f"{path.name}:{model}:{task}", [*(job(base, seed) for seed in seeds), *own]


def seeds_of(args, number):
    return args.seeds or (QUICK_SEEDS if args.quick else number)


def todo(jobs, results):
    return [job for job in jobs if job.seed not in results.runs(job.settings)]


def seconds(settings):
    """What a run takes of one core, about."""
    if settings["script"].startswith("probe:"):
        return PROBE_SECONDS[settings["script"]]
    every = {**models.settings(settings["model"]), **settings}
    start, evaluation, sampled, updated = SECONDS[settings["model"]]
    if settings.get("eval_prompts") == claims.HELD_OUT:
        evaluation *= claims.EVALUATION_NOISES
    samples = every["prompts_per_step"] * every["group_size"]
    noisy = every.get("sde_window") or every.get("sde_steps") or every["sampling_steps"] - 1
    trained = max(1, round(every["timestep_fraction"] * noisy)) * (
        every.get("best_of") or every["group_size"]
    )
    trained *= every["prompts_per_step"] * (1.33 if every.get("kl_coef") else 1)
    again = 0.0
    if every.get("prior") == "sft":  # by the initial weights, while prompts are new
        again = samples * sampled
    if every.get("gamma") == "auto":  # at most: the means after an update
        again = samples * sampled
    step = samples * sampled + trained * updated + again
    return (
        start
        + evaluation * (2 + (every["steps"] - 1) // every["eval_every"])
        + every["steps"] * step
    )


def show(asked, results):
    """The plan as text: runs, those that are there, and core-minutes, by claim."""
    lines, total = [("claim", "runs", "there", "core-minutes")], [0, 0, 0.0]
    for title, jobs in asked:
        missing = todo(jobs, results)
        minutes = sum(seconds(job.settings) for job in jobs) / 60
        total = [a + b for a, b in zip(total, (len(jobs), len(jobs) - len(missing), minutes))]
        lines.append((title, str(len(jobs)), str(len(jobs) - len(missing)), f"{minutes:.0f}"))
    lines.append(("together", *map(str, total[:2]), f"{total[2]:.0f}"))
    left = sum(seconds(job.settings) for _, jobs in asked for job in todo(jobs, results)) / 60
    spent = (
        sum(
            results.runs(job.settings).get(job.seed, {}).get("seconds", 0)
            for _, jobs in asked
            for job in jobs
        )
        / 60
    )
    said = (
        f"a run is counted where it is first asked for; left: {left:.0f} core-minutes, spent: "
        f"{spent:.0f}"
    )
    return f"{aligned(lines)}\n{said}"


# --- A run ---


def start_worker(parent, folder):
    """One thread, a log in the runs' folder, and no life after the study's own process: who starts
    again must not meet what is still training."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.chdir(ROOT)
    sys.stdout = sys.stderr = (folder / f"worker-{os.getpid()}.log").open(
        "a", buffering=1, encoding="utf-8"
    )
    import torch

    torch.set_num_threads(1)


def run(job, folder):
    """Trains, or goes on with, a run, or makes a probe: (config, run), or what went wrong, in
    words."""
    begun = time.process_time()
    try:
        if job.settings["script"].startswith("probe:"):
            from lab.probes import PROBES

            config, found = (
                {},
                PROBES[job.settings["script"].split(":")[1]](job.settings["model"], job.seed),
            )
        else:
            config, found = trained(job, Path(folder))
    except (Exception, errors.Stopped, KeyboardInterrupt) as error:
        traceback.print_exc()  # into the worker's log
        return f"{type(error).__name__}: {errors.text(error)}"
    about = {
        "commit": commit(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    return config, {**about, "seconds": round(time.process_time() - begun, 1), **found}


def trained(job, folder):
    script, output = script_of(job), folder / f"{job.name}-{job.seed}"
    flags = {
        name: value
        for name, value in job.settings.items()
        if name not in ("script", "model", "task", "source")
    }
    flags = {
        name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()
    }
    # results are known by their settings, and those in lab/results have alpha at the rank
    flags.setdefault("lora_alpha", models.settings(job.settings["model"]).get("lora_rank", 0))
    flags |= dict(seed=job.seed, output=str(output), tracker="none")
    if (output / "config.json").exists():
        flags["resume"] = "latest"
    args = defaults(script.Args, job.settings["model"], **flags)
    sys.argv = [script.__file__]
    print(f"\n--- {job.name} seed {job.seed} ---", flush=True)
    script.main(args)
    found = numbers_of(rows_before(output / "metrics.jsonl", float("inf")), args)
    if job.shown:
        found["pictures"] = pictures(args)
    for name in ("checkpoints", "export"):
        shutil.rmtree(output / name, ignore_errors=True)
    return config_of(args), found


def script_of(job):
    """One of the four scripts by name, or a reader's own by its path."""
    if not job.path:
        return importlib.import_module(job.settings["script"])
    name = Path(job.path).stem
    spec = importlib.util.spec_from_file_location(name, job.path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(args):
    """All flags, without those that say where a run lies."""
    config = run_folder.settings(args)
    for name in ("output", "resume", "seed"):
        del config[name]
    return {
        name: value.replace(f"{ROOT}/", "") if isinstance(value, str) else value
        for name, value in config.items()
    }


# --- What is kept of it ---

TRUTH = {"verifier": "truth", "motion": "truth"}


def short(name):
    """verifier -> truth, motion:quality -> quality, study_rewards.py:MotionVague -> vague."""
    return TRUTH.get(name, name.split(":")[-1].removeprefix("Motion").lower())


def numbers_of(rows, args):
    """The rows of metrics.jsonl -> {"steps", "evaluations", "training"}; "vague" is the mean over
    vague captions."""
    from common.prompts import caption_of, read_prompts

    evaluations = [row for row in rows if "eval_reward" in row]
    names = [name for name in evaluations[0] if name.startswith("eval_")]
    found = {
        short(name.removeprefix("eval_")): [row[name] for row in evaluations] for name in names
    }
    if "vague" in found:
        share = study_rewards.share_of_vague(
            [caption_of(prompt) for prompt in read_prompts(args.eval_prompts)]
        )
        found["vague"] = [value / share if share else float("nan") for value in found["vague"]]
    steps = [row for row in rows if "reward_mean" in row]
    curves = ("weight_", "trust_", "gamma", "prior")
    training = {
        name: [row[name] for row in steps]
        for name in steps[0]
        if name in KEPT or name.startswith(curves)
    }
    return {
        "steps": [row["step"] for row in evaluations],
        "evaluations": found,
        "training": training,
    }


def pictures(args):
    """Samples of a run's model, of the prompts and from the noise of the base model's."""
    import torch

    from evaluation import trained
    from lab import probes

    model = models.load(args.model, torch.float32, **args.model_settings())
    trained.load(model, trained.find(f"{args.output}/export"))
    return probes.pictures(args, model)


# --- The study ---


def study(args, results):
    """Trains what is asked for and not there; returns [(Job, what went wrong)]."""
    failed, begun = [], time.monotonic()
    args.runs.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    with ProcessPoolExecutor(
        args.workers, get_context("spawn"), start_worker, (os.getpid(), args.runs)
    ) as pool:
        for part in (
            searches,
            lambda *of: (*comparisons(*of, strictly=True), *methods(*of, strictly=True)),
        ):
            jobs = todo(
                dict.fromkeys(job for _, jobs in part(args, results) for job in jobs), results
            )
            waiting = {pool.submit(run, job, args.runs): job for job in jobs}
            left = sum(seconds(job.settings) for job in jobs)
            try:
                for number, done in enumerate(as_completed(waiting), 1):
                    job, found = waiting[done], done.result()
                    failed += [(job, found)] if isinstance(found, str) else []
                    left -= seconds(job.settings)
                    about = f"{number}/{len(jobs)}, {(time.monotonic() - begun) / 60:.0f} min"
                    print(
                        f"[{about}, {left / 60 / args.workers:.0f} left] "
                        f"{keep(results, job, found)}",
                        flush=True,
                    )
            except BaseException:
                pool.shutdown(
                    cancel_futures=True
                )  # those under way stop after their step, or end with this process
                raise
    return failed


def keep(results, job, found):
    """Writes a run's results; returns the line that says so."""
    what = f"{job.name} seed {job.seed}"
    if isinstance(found, str):
        return f"{what} FAILED: {found}"
    results.add(job.settings, job.seed, *found)
    curves = found[1].get("evaluations", {})
    return f"{what}: " + ", ".join(
        f"{name} {values[0]:.3f} -> {values[-1]:.3f}" for name, values in curves.items()
    )


def quick(settings):
    """Settings of a run of a few steps."""
    return settings if settings["script"].startswith("probe:") else {**settings, **QUICK}


def main(args):
    args = dataclasses.replace(args, results=args.results.resolve(), runs=args.runs.resolve())
    if args.quick:
        args = dataclasses.replace(
            args, results=args.runs / "quick/results", runs=args.runs / "quick"
        )
    results = Results(args.results, searched=not args.quick, shrink=quick if args.quick else None)
    if args.plan:
        print(show(plan(args, results), results))
        return
    failed = [] if args.figures else study(args, results)
    figures.draw(results, args.results.parent / "figures")
    if args.results == FOLDER:
        verdicts.write(results)
    print(verdicts.table(results))
    if failed:
        raise errors.RunError(
            f"{len(failed)} runs failed, the first {failed[0][0].name}: {failed[0][1]}"
        )


if __name__ == "__main__":
    with errors.one_line():
        check_lists(Args, sys.argv[1:])
        given = tyro.cli(Args, description=__doc__)
    errors.run(main, given)
