"""README and docs/: links and anchors lead somewhere, commands parse, tables that scripts write are
current."""

import json
import os
import re
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT, documented
from printed import PAGES, anchors, check_command, commands, links, prose

import bpgo
from common import cli, models, rewards
from lab import rooms

TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
COMMANDS = [(name, command) for name, text in TEXTS.items() for command in commands(text)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with the runs that commands name."""
    monkeypatch.chdir(tmp_path)
    for name in ("RUN", "runs/plain", "runs/bpgo-tiny-flux-1", "runs/slas-tiny-flux-1"):
        for part in ("export", "checkpoints/step_000020"):
            (tmp_path / name / part).mkdir(parents=True)
        config = asdict(cli.defaults(bpgo.Args)) | {"script": "bpgo"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))


# --- Links ---


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings_that_there_are(name):
    for link in links(TEXTS[name]):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert (ROOT / target).exists(), link
        if anchor:
            assert anchor in anchors((ROOT / target).read_text()), link


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), ["README.md"]
    while todo:
        name = todo.pop()
        if name not in reached and name in TEXTS:
            reached.add(name)
            targets = (link.partition("#")[0] for link in links(TEXTS[name]) if ":" not in link)
            todo += [
                os.path.normpath(os.path.join(os.path.dirname(name), target)) for target in targets
            ]
    assert reached == set(TEXTS)


def test_papers_are_cited_by_one_number_each():
    """An arXiv id in the text of a link is that of its address."""
    for name, text in TEXTS.items():
        for shown, address in re.findall(
            r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/([^)]+)\)", text
        ):
            assert shown == address, name


def test_anchors_are_named_as_github_does():
    page = (
        "# A run's folder\n\n## `--help`, and [more](x.md)\n\n## Twice\n\n"
        "    # no heading\n\n## Twice\n"
    )
    assert anchors(page) == ["a-runs-folder", "--help-and-more", "twice", "twice-1"]


# --- Commands ---


def test_commands_are_found_in_blocks_and_in_prose():
    said = "Take `python a.py` or `slas.py --x`:"
    page = said + "\n\n    bash run.sh  # so\n\n```\naccelerate launch b.py \\\n   --y\n```\n"
    assert commands(page) == [
        "bash run.sh  # so",
        "accelerate launch b.py     --y",
        "python a.py",
        "slas.py --x",
    ]
    assert prose(page).split() == said.split()


@pytest.mark.parametrize("name, command", COMMANDS)
def test_commands_parse(name, command, elsewhere, monkeypatch):
    check_command(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    ["python bpgo.py --learning-rat 1", "bash run.sh --stepz 2", "accelerate launch --config "
                                                                 "bpgo.py",
     "slas.py --lam 1", "accelerate launch --config_file configs/none.yaml bpgo.py",
     "python bpgo.py -m", "python -m lab.gains --onely x",
     "python evaluate.py RUN --layout nothing", "python -m lab.rooms --write",
     "sbatch configs/slurm.sh bpgo.py --a"],
)  # fmt: skip
def test_a_wrong_command_would_be_noticed(command, elsewhere, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)) as wrong:
        check_command(command, monkeypatch)
    assert getattr(wrong.value, "code", 2) == 2


# --- What scripts write, and numbers ---


def test_the_rooms_are_those_of_today():
    text = rooms.PAGE.read_text()
    assert rooms.with_tables(text) == text, "run python -m lab.rooms"


def test_the_lengths_of_files_are_about_those_of_today():
    found = re.findall(r"\[`([a-z_/]+\.py)`\]\([^)]+\), (\d+) lines", TEXTS["README.md"])
    assert found
    for name, lines in found:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 15, name


# without those that other tests put beside them
ROOMS = ("common.", "worlds.")
OURS = {name for name, place in rewards.REWARDS.items() if place.startswith(ROOMS)}


def test_the_readme_names_every_model_and_every_reward():
    table = re.search(r"^\| `--model`.*?(?=^\n)", TEXTS["README.md"], re.M | re.S)[0]
    named = {
        name
        for cell in re.findall(r"^\| (.*?) \|", table, re.M)[1:]
        for name in re.findall("`(.+?)`", cell)
    }
    assert named == set(models.MODELS)
    listed = re.search(r"^Rewards: .*?(?=\.\s)", TEXTS["README.md"], re.M | re.S)[0]
    assert set(re.findall("`(.+?)`", listed)) == {name.partition(":")[0] for name in OURS}


def test_the_rewards_page_has_every_reward():
    found = set()
    for cell in re.findall(r"^\| (`.*?) \|", TEXTS["common/rewards/README.md"], re.M):
        first, *others = re.findall("`(.+?)`", cell)  # `videoalign`, `videoalign:vq`, `:mq`
        found |= {first, *(f"{first}{name}" if name[0] == ":" else name for name in others)}
    assert found >= OURS


def test_the_messages_on_the_page_of_troubles_are_in_the_code():
    quoted = re.findall(r"^\*\*`([^`]+?)(?: \.\.\.)?`", TEXTS["docs/troubleshooting.md"], re.M)
    files = [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")]
    code = re.sub(r'"\s*f?"', "", "".join(file.read_text() for file in files))
    assert len(quoted) >= 6 and all(message in code for message in quoted)


def test_the_six_metrics_are_the_same_on_both_pages():
    shown = re.findall(
        r"^\| `(\w+)` \|",
        TEXTS["README.md"].partition("Six metrics")[2].partition("\n\n    ")[0],
        re.M,
    )
    assert len(shown) == 6 and all(documented().fullmatch(name) for name in shown)
    assert set(shown) == set(
        re.findall("`(.+?)`", TEXTS["docs/metrics.md"].partition("Six tell")[2].partition(".")[0])
    )


def test_the_cost_of_a_step_is_the_measured_one():
    status = " ".join(TEXTS["README.md"].partition("## Status")[2].split())
    small, large = re.search(
        r"a step (\S+) times .* on `tiny-flux`, (\S+) times on a 70M FLUX", status
    ).groups()
    for case, shown in (("tiny-flux", small), ("70M FLUX", large)):
        row = re.search(rf"^\| {case}, .*$", TEXTS["benchmarks/RESULTS.md"], re.M)[0].split(" | ")
        assert f"{float(row[3].split()[0]):.2f}" == shown, case


def test_the_attacks_add_up():
    rows = re.findall(
        r"^\| [\w' ]+ \| (\d+) \| (\d+) \| (\d+) \|$", TEXTS["docs/machines.md"], re.M
    )
    numbers = [tuple(map(int, row)) for row in rows]
    assert all(number == line + end for number, line, end in numbers)
    assert f"{sum(number for number, _, _ in numbers)} of" in TEXTS["docs/machines.md"]


def test_the_version_cited_is_the_newest():
    newest = re.search(r"^## (\S+), (\d+) (\w+) (\d+)$", TEXTS["CHANGELOG.md"], re.M)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == newest[1] and f"{cited['date-released']:%-d %B %Y}" == " ".join(
        newest.groups()[1:]
    )


def test_the_readme_stays_short():
    assert len(TEXTS["README.md"].splitlines()) <= 165
