"""run.sh as a user meets it, with lists of packages that are short."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

JOB = "import sys; print('the job runs on', sys.version_info[:2], *sys.argv[1:])"


@pytest.fixture
def clone(tmp_path):
    """A clone in a folder with a space in its name, whose job says that it runs."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(ROOT / "run.sh", folder)
    (folder / "bpgo.py").write_text(JOB)
    (folder / "requirements.txt").write_text("# none\n")
    (folder / "requirements-test.txt").write_text("--requirement requirements.txt\n")
    (folder / "requirements.lock").touch()
    return folder


def start(clone, *words, **environment):
    words = ["bash", str(clone / "run.sh"), *words]
    around = {
        name: value for name, value in os.environ.items() if name not in ("VENV", "VERSIONS")
    }  # the suite's own
    environment = {**around, "PYTHON": sys.executable, **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, env=environment, start_new_session=True, **pipes)


def run(clone, *words, **environment):
    process = start(clone, *words, **environment)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.mark.long
def test_whatever_happens_to_an_installation_the_next_run_works(clone):
    killed = start(clone)
    while not (clone / ".venv/pyvenv.cfg").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()

    together = [start(clone, "--steps", "2"), start(clone, "--steps", "3")]
    (out, other), errors = zip(*(process.communicate(timeout=120) for process in together))
    assert [process.returncode for process in together] == [0, 0], errors
    assert (out + other).count("installing requirements.txt") == 1, (
        "one installed, the other waited for it"
    )
    assert "--steps 2" in out and "--steps 3" in other

    assert run(clone) == (
        0,
        f"the job runs on {sys.version_info[:2]}\n",
        "",
    )  # installed is installed

    (clone / "requirements.txt").write_text("# another\n")
    code, out, _ = run(clone)
    assert code == 0 and "installing requirements.txt" in out
    assert "installing" not in run(clone)[1]

    (clone / "requirements.txt").write_text("./nowhere\n")
    code, _, error = run(clone)
    assert code == 1 and error.endswith(
        "error: the installation failed (see above); start again to retry\n"
    )
    (clone / "requirements.txt").write_text("# another\n")
    assert run(clone)[0] == 0


@pytest.mark.parametrize(
    "environment, line",
    [
        (
            dict(PYTHON="python2.7"),
            "error: no Python 3.10 to 3.13 (python2.7); install one and start again",
        ),
        (dict(VERSIONS="new"), "error: VERSIONS=new: newest, exact or oldest"),
    ],
)
def test_what_it_cannot_do_is_one_line(clone, environment, line):
    code, _, error = run(clone, **environment)
    assert code == 2 and error == f"{line}\n"
