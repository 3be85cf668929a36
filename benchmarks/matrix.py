"""Is it green on every Python and every kind of processor that docs/machines.md names?

    python3 benchmarks/matrix.py             # every Python, and one with every kernel: an hour
    python3 benchmarks/matrix.py --all       # every pair of the two
    python3 benchmarks/matrix.py --pythons 3.10 --kernels avx2      # one cell
    python3 benchmarks/matrix.py --pythons 3.10 --kernels default --versions oldest

A cell is a Python and the kernels of a kind of processor. In it `bash run.sh` trains for two steps
and `bash run.sh test -m 'not slow'` runs the suite with its long tests, in an environment of that
Python's own, which run.sh installs. It prints the table, and writes each cell's output to --logs.
It needs the Pythons and nothing else. --lock writes requirements.lock, the versions that were
green."""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
KERNELS = {  # torch's own, oneDNN's and MKL's
    "default": {},
    "avx2": dict(
        ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"
    ),
    "avx512": dict(
        ATEN_CPU_CAPABILITY="avx512",
        ONEDNN_MAX_CPU_ISA="AVX512_CORE",
        MKL_ENABLE_INSTRUCTIONS="AVX512",
    ),
}


def interpreter(version):
    """The path of Python 3.x, None if there is none: on the PATH, or one of pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
    return shutil.which(f"python{version}") if not pyenv else str(pyenv[-1])


def has(kernels):
    """Whether this processor can run these kernels."""
    features = Path("/proc/cpuinfo")  # on Linux; elsewhere the default alone is tried
    needed = {"avx512": "avx512f"}.get(kernels, kernels)
    return kernels == "default" or (
        features.exists() and f" {needed} " in features.read_text(encoding="utf-8")
    )


def run(words, environment, log):
    """bash run.sh words -> (seconds, its output, its exit code); the output goes to the end of the
    log as it comes."""
    started, command = time.time(), ["bash", str(ROOT / "run.sh"), *words]
    with log.open("a", encoding="utf-8") as file:
        print("$", *words, file=file, flush=True)
        before = file.tell()
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    said = log.read_bytes()[before:].decode(errors="replace")
    return time.time() - started, said, done.returncode


def cell(python, kernels, args):
    """-> (the row of the table, whether all is green)"""
    log = args.logs / f"{python}-{kernels}-{args.versions}.log"
    log.unlink(missing_ok=True)
    environment = {
        **os.environ, **KERNELS[kernels], "PYTHON": interpreter(python),
        "VENV": str(venv(python, args)), "VERSIONS": args.versions,
    }  # fmt: skip
    _, said, code = run(
        ["test", "--version"], environment, log
    )  # the installation counts for no cell's time
    if code:
        return (python, kernels, "does not install", "-", log), False
    with tempfile.TemporaryDirectory() as folder:
        seconds, said, code = run(["--steps", "2", "--output", f"{folder}/run"], environment, log)
    job = f"{seconds:.0f} s" if code == 0 else "**fails**: " + said.strip().splitlines()[-1][:80]
    green = code == 0
    suite = "-"
    if not args.job_only:
        seconds, said, code = run(["test", "-m", "not slow", *args.pytest], environment, log)
        counts = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in ", said, re.M)
        suite = (
            f"{'' if code == 0 else '**fails**: '}{counts[-1] if counts else '?'}, {seconds:.0f} s"
        )
        green &= code == 0
    return (python, kernels, job, suite, log), green


def venv(python, args):
    return args.venvs / f".venv-{python}{'' if args.versions == 'newest' else '-' + args.versions}"


def lock(pythons, args):
    """requirements.lock: every package's version, with a marker where it is not the same for all
    Pythons."""
    versions = {}
    for python in pythons:
        freeze = [str(venv(python, args) / "bin/python"), "-m", "pip", "freeze", "--local"]
        for line in subprocess.run(
            freeze, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.splitlines():
            name, _, version = line.partition("==")
            versions.setdefault(name.lower(), {})[python] = version.partition("+")[0]
    lines = [
        "# The versions of the last green run of benchmarks/matrix.py, which wrote this; "
        "VERSIONS=exact bash run.sh"
    ]
    for name, found in sorted(versions.items()):
        if len(set(found.values())) == 1:
            lines.append(f"{name}=={next(iter(found.values()))}")
        else:
            lines += [
                f'{name}=={version} ; python_version == "{python}"'
                for python, version in found.items()
            ]
    (ROOT / "requirements.lock").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, choices=PYTHONS)
    parser.add_argument("--kernels", nargs="+", default=tuple(KERNELS), choices=KERNELS)
    parser.add_argument("--all", action="store_true", help="every kernel on every Python")
    parser.add_argument("--versions", default="newest", choices=("newest", "exact", "oldest"))
    parser.add_argument(
        "--job-only", action="store_true", help="train for two steps, without the suite"
    )
    parser.add_argument("--venvs", type=Path, default=ROOT, help="folder of the environments")
    parser.add_argument("--logs", type=Path, default=ROOT / "runs/matrix")
    parser.add_argument(
        "--lock", action="store_true", help="write requirements.lock if all is green"
    )
    parser.add_argument(
        "--pytest", nargs=argparse.REMAINDER, default=[], help="what follows goes to pytest"
    )
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    pythons = [python for python in args.pythons if interpreter(python)]
    kernels = [name for name in args.kernels if has(name)]
    if missing := [*(set(args.pythons) - set(pythons)), *(set(args.kernels) - set(kernels))]:
        print("not on this machine:", ", ".join(sorted(missing)), flush=True)
    print(
        "| Python | kernels | `bash run.sh --steps 2` | `bash run.sh test` | log |\n| --- | --- "
        "| --- | --- | --- |"
    )
    green = True
    # what a Python breaks it breaks on every processor, and the other way round
    for python, name in itertools.product(pythons, kernels):
        if args.all or name == kernels[0] or python == pythons[-1]:
            row, fine = cell(python, name, args)
            print("|", " | ".join(map(str, row)), "|", flush=True)
            green &= fine
    if green and args.lock:
        lock(pythons, args)
    sys.exit(not (green and pythons))


if __name__ == "__main__":
    main()
