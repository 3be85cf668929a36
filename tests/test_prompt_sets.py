"""Prompt sets by name: downloaded once, told by their git blob, from a cache without a network, or
one clear line."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from common.errors import InputError
from common.prompts import read_prompts, sets
from tests.conftest import ROOT

IMAGES = "a red circle\n\nan image of\ta tab\n  a blue square  \n"  # as strangers write them
COMMIT = "1" * 40  # of the hub's data set
HPDV2 = [
    {"prompt": prompt, "human_preference": [0, 1]}
    for prompt in ("a cat", "a dog", "a cat", "a bird")
]
ROWS = {  # in the formats of the benchmarks
    "geneval": '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": '
    '"a photo of a bench"}',
    "unigenbench": 'index,prompt_en,sub_dims_en\n0,"In ink, two pandas.","{""Subjects"": '
    '""Animal""}"\n',
    "unigenbench:long": 'index,prompt_en,sub_dims_en\n0,"A ""long"" one.",{}\n1,Another.,{}\n',
    "vbench": '[{"prompt_en": "In a still frame, a stop sign", "dimension": '
    '["temporal_flickering"]}]',
}


@pytest.fixture
def server():
    """A server on localhost: `files` {path: bytes}, `asked` the paths of its requests, `cut` those
    that break off."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            made.asked.append(self.path)
            data = made.files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.send_header("ETag", '"0123456789"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET" and data:
                self.wfile.write(data[: len(data) // 2] if self.path in made.cut else data)

        do_HEAD = do_GET

        def log_message(self, *words):
            pass

    made = SimpleNamespace(files={}, asked=[], cut=set())
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        made.url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, args=[0.02], daemon=True).start()
        yield made
        http.shutdown()


@pytest.fixture
def github(server, tmp_path, monkeypatch):
    """That server as the mirror, an empty cache, and a small file under each set's name with its
    own blob."""
    monkeypatch.setenv("VGRPO_GITHUB", server.url + "/")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, item in sets.PUBLISHED.items():
        data = ROWS.get(name, IMAGES).encode()
        monkeypatch.setitem(sets.PUBLISHED, name, item._replace(blob=sets.blob_id(data)))
        server.files[f"/{item.repository}/{item.commit}/{item.path}"] = data
    return server


def refused(name):
    with pytest.raises(InputError) as error:
        read_prompts(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_blob_ids_are_gits(tmp_path):
    (tmp_path / "file").write_bytes(b"one\ntwo\n\x00\xff")
    said = subprocess.run(
        ["git", "hash-object", str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert sets.blob_id((tmp_path / "file").read_bytes()) == said.stdout.strip()


def test_the_papers_files_are_those_of_the_commit():
    for name, path in {"images": "prompts.txt", "videos": "video_prompts.txt"}.items():
        item = sets.PUBLISHED[f"dancegrpo:{name}"]
        assert item.url() == (
            "https://raw.githubusercontent.com/XueZeyue/DanceGRPO/"
            f"15cc71d53cc2e6e18a68ee607d5fb6ba9a99e344/assets/{path}"
        )
    assert sets.PUBLISHED["dancegrpo:images"].blob == "b47234e475645222ca9a0bb7742ebf4d08123855"
    assert sets.PUBLISHED["dancegrpo:videos"].blob == "2a7457f2d7b59ff7915be588de1ddb8fa95c8028"


@pytest.mark.parametrize(
    "name, prompts",
    {
        "dancegrpo:images": ["a red circle", "an image of a tab", "a blue square"],
        "dancegrpo:videos": ["a red circle", "an image of a tab", "a blue square"],
        "geneval": ["a photo of a bench"],
        "unigenbench": ["In ink, two pandas."],
        "unigenbench:long": ['A "long" one.', "Another."],
        "vbench": ["In a still frame, a stop sign"],
    }.items(),
)
def test_a_set_is_downloaded_once(github, monkeypatch, name, prompts):
    assert read_prompts(name) == prompts
    item = sets.PUBLISHED[name]
    assert github.asked == [f"/{item.repository}/{item.commit}/{item.path}"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_prompts(name) == prompts and len(github.asked) == 1
    assert os.listdir(item.place().parent) == [item.place().name]


def test_many_processes_at_once(github):
    with ThreadPoolExecutor(8) as pool:
        assert (
            len({tuple(prompts) for prompts in pool.map(read_prompts, ["dancegrpo:images"] * 24)})
            == 1
        )


def test_what_is_broken_in_the_cache_is_fetched_again(github):
    place = sets.PUBLISHED["geneval"].place()
    place.parent.mkdir(parents=True)
    place.write_bytes(ROWS["geneval"].encode()[:20])
    assert read_prompts("geneval") == ["a photo of a bench"]


@pytest.mark.parametrize(
    "why", ["another file", "no such file", "it breaks off", "no server", "offline", "no address"]
)
def test_without_the_file_one_line_says_where_it_belongs(github, monkeypatch, why):
    item = sets.PUBLISHED["dancegrpo:videos"]
    path = f"/{item.repository}/{item.commit}/{item.path}"
    if why == "another file":
        github.files[path] = b"a red circle\n"
    if why == "no such file":
        del github.files[path]
    if why == "it breaks off":
        github.cut.add(path)
    if why == "no server":
        monkeypatch.setenv("VGRPO_GITHUB", "http://127.0.0.1:9")
    if why == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if why == "no address":
        monkeypatch.setenv("VGRPO_GITHUB", "nowhere")
    said = refused("dancegrpo:videos")
    for mention in (
        "dancegrpo:videos",
        str(item.place()),
        item.url(),
        "--prompts",
        "--eval-prompts",
    ):
        assert mention in said
    assert {"another file": "git blob", "no such file": "404", "offline": "HF_HUB_OFFLINE"}.get(
        why, ""
    ) in said
    assert not item.place().exists()
    assert bool(github.asked) == (why in ("another file", "no such file", "it breaks off"))


@pytest.mark.parametrize(
    "name", ["dancegrpo", "dancegrpo:pictures", "geneval:long", "vbench:x", "hpdv2:test", "hub:x"]
)
def test_names_that_there_are_not(name):
    assert name in refused(name)


def test_benchmarks_are_told_from_what_one_trains_on():
    names = [
        *sets.PUBLISHED,
        "hpdv2",
        "hpsv2:all",
        "first-frames",
        "hub:a/b/c.csv",
        "captions.csv:text",
        "vbench.txt",
    ]
    benchmarks = {"geneval", "unigenbench", "unigenbench:long", "vbench", "hpsv2:all"}
    assert {name for name in names if sets.is_benchmark(name)} == benchmarks
    assert {name for name in names if not sets.is_name(name)} == {"captions.csv:text", "vbench.txt"}


def test_a_file_may_be_called_as_a_set_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vbench").write_text("mine\n")
    assert read_prompts("./vbench") == ["mine"]


# --- The hub ---


def offline(monkeypatch, home):
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


HUB = """
from common.prompts import read_prompts
print(read_prompts("hpdv2"), read_prompts("hub:somebody/captions/data/train.jsonl:text"), sep="\\n")
"""


def test_data_sets_of_the_hub_come_once_and_then_from_the_cache(server, tmp_path, monkeypatch):
    """By $HF_ENDPOINT and $HF_HOME, as people set them: in a process of its own, as they are read
    once."""
    server.files["/datasets/ymhao/HPDv2/resolve/main/train.json"] = json.dumps(HPDV2).encode()
    server.files["/datasets/somebody/captions/resolve/main/data/train.jsonl"] = (
        b'{"text": "one"}\n{"text": "two"}\n'
    )
    expected = "['a cat', 'a dog', 'a bird']\n['one', 'two']\n"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-c", HUB]
    first = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=300
    )
    assert first.stdout == expected, first.stderr
    (text,) = tmp_path.glob("vgrpo/*/hpdv2.txt")
    assert text.parent.name == COMMIT and text.read_text() == "a cat\na dog\na bird"
    offline(monkeypatch, tmp_path)
    assert read_prompts("hpdv2") == ["a cat", "a dog", "a bird"]
    assert read_prompts("hub:somebody/captions/data/train.jsonl:text") == ["one", "two"]


def test_hpdv2_keeps_each_prompt_once_and_reads_them_from_text_the_next_time(tmp_path, monkeypatch):
    folder = tmp_path / "hub/datasets--ymhao--HPDv2"  # the cache's own layout
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / f"snapshots/{COMMIT}").mkdir(parents=True)
    (folder / f"snapshots/{COMMIT}/train.json").write_text(json.dumps(HPDV2))
    offline(monkeypatch, tmp_path)
    assert read_prompts("hpdv2") == ["a cat", "a dog", "a bird"]
    (folder / f"snapshots/{COMMIT}/train.json").write_text("broken since")
    assert read_prompts("hpdv2") == ["a cat", "a dog", "a bird"]


def test_without_the_hub_one_line_says_which_file(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    for name, repository, file in (
        ("hpdv2", "ymhao/HPDv2", "train.json"),
        ("hub:somebody/captions/train.csv:text", "somebody/captions", "train.csv"),
    ):
        said = refused(name)
        assert (
            name in said
            and f"hf download --repo-type dataset {repository} {file}" in said
            and "--prompts" in said
        )
    assert "Write hub:OWNER/NAME/FILE" in refused("hub:somebody/captions")
    assert "hub:some body/a b/c.csv" in refused("hub:some body/a b/c.csv")


def test_first_frames_are_made_by_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "FIRST_FRAMES", tmp_path / "frames/prompts.txt")
    assert "python -m lab.first_frames" in refused("first-frames")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/prompts.txt").write_text("0.png\ta dog runs\n")
    assert read_prompts("first-frames") == [f"{tmp_path}/frames/0.png\ta dog runs"]
