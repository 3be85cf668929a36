"""Prompt files as people write them, and the order in which a run visits them."""

import csv
import json
import os
import time
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import torch

from common.errors import InputError
from common.prompts import (
    AHEAD,
    fields_of,
    files,
    prompts_ahead,
    prompts_of_step,
    read_prompts,
)


def written(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return path


# --- Files ---


@pytest.mark.parametrize(
    "content, prompts",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),  # no newline at the end
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),  # byte-order mark
        (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        (b"\n\n  one  \n \t \n\ntwo\n\n", ["one", "two"]),
        (b"same\nother\nsame\nsame\n", ["same", "other", "same", "same"]),
        (b'a "quoted", comma = sign\n# no comment\n', ['a "quoted", comma = sign', "# no comment"]),
    ],
)
def test_lines(tmp_path, content, prompts):
    assert read_prompts(written(tmp_path, content)) == prompts
    assert read_prompts(str(written(tmp_path, content))) == prompts


@pytest.mark.parametrize(
    "prompt",
    [
        "a 🦊 and a 👩‍🚀 at 5 °C",
        "חתול על מחצלת",
        "قطة \u200fتجلس على\u200e الأريكة",
        "一只猫坐在垫子上",
        "x" * 10_000,
    ],
)
def test_any_text_comes_back_unchanged(tmp_path, prompt):
    assert read_prompts(written(tmp_path, f"first\n{prompt}\nlast\n".encode())) == [
        "first",
        prompt,
        "last",
    ]


def test_bad_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b"\xef\xbb\xbf\n  \r\n\t\n")
    (tmp_path / "latin1.txt").write_bytes("one\ncafé\n".encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes("one\ntwo\n".encode("utf-16"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it: to read it would wait for ever
    for name, reason in {
        "missing.txt": "No such file",
        "folder": "Is a directory",
        "pipe": "is a pipe",
        "empty.txt": "no prompt in it",
        "blank.txt": "no prompt in it",
        "latin1.txt": "position 7",
        "utf16.txt": "position 0",
        "image.png": "position 0",
    }.items():
        with pytest.raises(InputError) as error:
            read_prompts(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and reason in str(error.value)
        assert "\n" not in str(error.value)


# --- Order ---

PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.mark.parametrize("number", [1, 3, 4, 12])
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_each_epoch_visits_each_prompt_once(number, seed):
    steps = 12 // number
    epochs = [
        [
            p
            for step in range(e * steps, (e + 1) * steps)
            for p in prompts_of_step(PROMPTS, step, number, seed)
        ]
        for e in range(5)
    ]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5  # every epoch in another order


@pytest.mark.parametrize("number", [5, 7])
def test_epochs_run_across_steps(number):
    visited = [p for step in range(12) for p in prompts_of_step(PROMPTS, step, number, seed=0)]
    assert set(Counter(visited).values()) == {
        number
    }  # 12 steps of `number` prompts are `number` epochs
    for epoch in range(number):
        assert sorted(visited[12 * epoch : 12 * epoch + 12]) == sorted(PROMPTS)
    one_by_one = [p for i in range(12 * number) for p in prompts_of_step(PROMPTS, i, 1, seed=0)]
    assert visited == one_by_one  # the size of a step does not change the order


def test_order_depends_on_the_step_and_seed_alone():
    forward = [prompts_of_step(PROMPTS, step, 5, seed=3) for step in range(20)]
    assert [prompts_of_step(PROMPTS, step, 5, seed=3) for step in reversed(range(20))] == forward[
        ::-1
    ]
    assert prompts_of_step(PROMPTS, 17, 5, seed=3) == forward[17]
    orders = {
        tuple(p for step in range(12) for p in prompts_of_step(PROMPTS, step, 5, s))
        for s in range(50)
    }
    assert len(orders) == 50


def test_what_comes_next_is_what_the_next_steps_ask_for():
    ahead = prompts_ahead(PROMPTS, 3, 5, 3, torch.tensor([4, 1, 1, 4]))
    asked = [
        prompts_of_step(PROMPTS, step, 5, seed=3)[group]
        for step in range(4, 3 + AHEAD)
        for group in (1, 4)
    ]
    assert ahead == list(dict.fromkeys(asked)) and 5 < len(ahead) < len(asked)


def test_seeds_do_not_share_epochs():
    orders = {
        (tuple(prompts_of_step(PROMPTS, epoch, 12, seed)))
        for seed in range(30)
        for epoch in range(30)
    }
    assert len(orders) == 900


def test_more_prompts_a_step_than_there_are():
    step = prompts_of_step(PROMPTS, 0, 30, seed=0)
    assert sorted(step[:12]) == sorted(step[12:24]) == sorted(PROMPTS)
    assert len(step) == 30 and len(set(step[24:])) == 6
    assert step[24:] + prompts_of_step(PROMPTS, 1, 30, seed=0)[:6] == prompts_of_step(
        PROMPTS, 2, 12, seed=0
    )


def test_a_single_prompt():
    assert prompts_of_step(["only"], 7, 3, seed=0) == ["only"] * 3


def test_duplicates_are_visited_as_often_as_they_stand():
    visited = [
        p for step in range(4) for p in prompts_of_step(["a", "b", "a", "c"], step, 1, seed=0)
    ]
    assert Counter(visited) == {"a": 2, "b": 1, "c": 1}


# --- Tables ---

ROWS = ["one", "two, with a comma", 'a "quoted"\nsecond line', "", "שועל\tand a tab "]
READ = ["one", "two, with a comma", 'a "quoted" second line', "שועל and a tab"]


def table(path, column="prompt"):
    """A file with ROWS in the column, and another column before it."""
    records = [{"index": i, column: prompt} for i, prompt in enumerate(ROWS)]
    kind = path.suffix[1:].lower()
    if kind in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(
                file, ["index", column], delimiter="," if kind == "csv" else "\t"
            )
            writer.writeheader()
            writer.writerows(records)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif kind == "json":
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_tables_with_a_column(tmp_path, kind):
    assert read_prompts(table(tmp_path / f"prompts.{kind}")) == READ
    other = table(tmp_path / f"other:{kind}.{kind}", "what a person says")
    assert read_prompts(f"{other}:what a person says") == READ
    with pytest.raises(
        InputError,
        match=r"row 1 of .* has no column 'prompt'; it has 'index', 'what a person says'",
    ):
        read_prompts(other)
    if kind.lower() in ("csv", "tsv"):  # there all is text
        assert read_prompts(f"{other}:index") == ["0", "1", "2", "3", "4"]
    else:
        with pytest.raises(
            InputError, match="row 1 of .* has '0' in column 'index', which is not text"
        ):
            read_prompts(f"{other}:index")


def test_strings_without_columns(tmp_path):
    (tmp_path / "plain.json").write_text('["one", "two", null]')
    (tmp_path / "plain.jsonl").write_text('"one"\n"two"\n')
    assert (
        read_prompts(tmp_path / "plain.json")
        == read_prompts(tmp_path / "plain.jsonl")
        == ["one", "two"]
    )


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.json", b"{", "JSONDecodeError: Expecting"),
        ("a.json", b'{"prompt": "one"}', "it is not a list of rows"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt"', "line 2: "),
        (
            "a.jsonl",
            b'{"prompt": "one"}\n"a red \\ud83d"',
            r"a.jsonl (line 2) has '\ud83d', half of a letter",
        ),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": ["two"]}', "row 2 of "),
        ("a.jsonl", b"[1]", "row 1 of "),
        ("a.jsonl", b"caf\xe9", "position 3"),
        ("a.csv", b"prompt\n" + b"x" * 200_000, "field larger"),
        ("a.csv", b"", "no prompt in it"),
        ("a.csv", b"index,prompt\n,\n2,\n", "no prompt in it"),
        ("a.parquet", b"PAR1", "ArrowInvalid"),
        ("b.csv:prompt", None, "No such file"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name.partition(":")[0]) in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# --- Files as people keep them ---


def kept(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(path)


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        # quotes are part of a cell where nothing needs them, which is what OCR prompts are made of
        (
            "a.tsv",
            'id\tprompt\n1\t"EXIT" above a door\n2\tplain\n',
            ['"EXIT" above a door', "plain"],
        ),
        ("a.tsv", 'prompt\tid\n"OPEN 24 H"\t1\nplain\t2\n', ['"OPEN 24 H"', "plain"]),
        ("a.tsv", 'id\tprompt\n1\t"never closed\n2\tplain\n', ['"never closed', "plain"]),
        ("a.tsv", 'prompt\na 19" rack\n"a" and "b"\n', ['a 19" rack', '"a" and "b"']),
        ("a.tsv", 'prompt\n" "\nplain\n', ['" "', "plain"]),
        # what a csv writer made of them
        (
            "a.tsv",
            'id\tprompt\n1\t"""EXIT"" above a door"\n2\tplain\n',
            ['"EXIT" above a door', "plain"],
        ),
        ("a.tsv", '"id"\t"prompt"\n"1"\t"a red fox"\n', ["a red fox"]),
        ("a.tsv", 'id\tprompt\n1\t"two\tcells"\n2\t"two\nlines"\n', ["two cells", "two lines"]),
        (
            "a.csv",
            'prompt\n"""EXIT"" above a door"\na 19" rack\n',
            ['"EXIT" above a door', 'a 19" rack'],
        ),
        ("a.csv", "\n\nid,prompt\n\n1,one\r\n,\n3,three", ["one", "three"]),
        ("a.csv", "id,prompt\r1,one\r2,two\r", ["one", "two"]),  # of an old Mac
        ("a.csv", ",prompt\n0,one\n", ["one"]),  # pandas' index
        ("a.ndjson", '{"prompt": "one"}\n\n{"prompt": "two"}', ["one", "two"]),
        # a tab is part of a caption, unless the name of a file is before it
        ("a.txt", "a fox,\tin snow\nplain\n", ["a fox, in snow", "plain"]),
        ("a.txt", "v1.5\t\tof a fox\n", ["v1.5 of a fox"]),
        ("a.txt", b"one\n\xef\xbb\xbftwo\n", ["one", "two"]),  # cat one.txt two.txt
        ("a.txt", "{red|blue} fox\n[a fox]\n", ["{red|blue} fox", "[a fox]"]),
        ("a.txt", "caption this, a fox\nprompt\n", ["caption this, a fox", "prompt"]),
    ],
)
def test_files_as_people_keep_them(tmp_path, name, content, prompts):
    assert kept(tmp_path, name, content) == prompts


@pytest.mark.parametrize(
    "name, content, reason",
    [
        (
            "a.csv",
            "prompt,id\na fox,1\na fox, asleep,2\n",
            "row 2 of {} (line 3): the number of cells is 3",
        ),
        ("a.csv", "prompt\na fox, asleep\n", "row 1 of {} (line 2): the number of cells is 2"),
        ("a.csv", "id,prompt\n1,a fox\n\n2\n", "row 2 of {} (line 4): the number of cells is 1"),
        ("a.csv", 'id,prompt\n1,"EXIT" above a door\n', "row 1 of {} (line 2): ',' expected"),
        ("a.csv", 'id,prompt\n1,one\n2,"never\n3,three\n', "row 2 of {} (line 3): unexpected end"),
        ("a.csv", 'id,prompt\n1,"never\n2,"again"\n', "row 1 of {} (line 2): "),
        (
            "a.csv",
            "sep=,\nid,prompt\n1,one\n",
            "row 1 of {} (line 2) has no column",
        ),  # Excel's first line
        ("a.csv", "id;prompt\n1;one\n", "row 1 of {} (line 2) has no column 'prompt'; it has 'id;"),
        ("a.csv", "a fox,7\na cat,8\n", "first line of a csv or tsv file has the names"),
        ("a.csv", "prompt,prompt\na,b\n", "has two columns 'prompt'"),
        ("a.csv", "id,prompt\n1,a\0b\n", "{}, line 2: a NUL character"),
        (
            "a.tsv",
            "id\tprompt\n1\tone\n2\ttwo\tcells\n",
            "row 2 of {} (line 3): the number of cells is 3",
        ),
        (
            "a.tsv",
            'id\tprompt\n1\t"X" on a door\n2\n',
            "row 2 of {} (line 3): the number of cells is 1",
        ),
        ("a.tsv", 'prompt\n"two\nlines"\n', "row 1 of {} (line 2) opens a quote"),
        ("a.tsv", 'id\tprompt\n1\t"X" on a door\n2\t"a ""y"""\n', "row 1 of {} (line 2): "),
        ("a.txt", '{"prompt": "a fox"}\n', "{}, line 1: "),
        ("a.txt", 'a fox\n\n{"prompt": "a fox"}\n', "{}, line 3: "),
        ("a.txt", '["a fox", "a cat"]\n', "Name the file .jsonl"),
        ("a.txt", '[\n  {\n    "prompt": "a fox"\n', "Name the file .jsonl"),
        ("a.txt", "prompt\na fox\n", "'prompt' looks like the header"),
        ("a.txt", "id,Prompt\n1,a fox\n", "looks like the header"),
        ("a.json", '{"prompt": "one"}\n{"prompt": "two"}\n', "Name the file .jsonl"),
        ("a.jsonl", '[\n{"prompt": "one"}\n]\n', "{}, line 1: JSONDecodeError"),
        ("a.jsonl", '"one"\n\n{"prompt": 7}', "row 2 of {} (line 3) has '7' in column"),
        ("a.jsonl", '{"prompt": "a\\u0000b"}', "row 1 of {} (line 1) has a NUL"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), "{}, line 1: a NUL character"),
        ("a.csv", "prompt\none\n".encode("utf-16"), "{}, line 1: UTF-16 ("),
        ("a.txt", "one\ncafé\n".encode("cp1252"), "{}, line 2: not UTF-8"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.csv", "\n<!DOCTYPE html>\n<html>\n", "a web page"),
        ("a.jsonl", "404: Not Found", "a server's answer"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(tmp_path, name, content, reason):
    with pytest.raises(InputError) as error:
        kept(tmp_path, name, content)
    assert reason.format(tmp_path / name) in str(error.value)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_parquet_column_of_other_things_than_text(tmp_path):
    rows = {"prompt": [b"one"], "number": [3], "words": [["a", "b"]], "text": ["one"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    for column in ("prompt", "number", "words"):
        with pytest.raises(InputError, match=f"row 1 of .*a.parquet has .* in column '{column}'"):
            read_prompts(f"{tmp_path}/a.parquet:{column}")
    encoded = pyarrow.array(["one", None, "two"]).dictionary_encode()  # pandas' categories
    pyarrow.parquet.write_table(pyarrow.table({"prompt": encoded}), tmp_path / "b.parquet")
    assert read_prompts(tmp_path / "b.parquet") == ["one", "two"]


def test_the_fields_of_json_lines_under_their_other_name(tmp_path):
    (prompt,) = kept(tmp_path, "a.ndjson", '{"prompt": "a sign", "text": "EXIT"}')
    assert fields_of(prompt) == {"text": "EXIT"}


def test_the_image_before_a_tab(tmp_path, monkeypatch):
    """A file that is missing or lacks an ending, a caption with another tab, with odd slashes."""
    (tmp_path / "frame").write_bytes(b"")
    monkeypatch.setenv("HOME", "/home/fox")
    lines = "lost.PNG\ta  fox // x/./y\nframe\ta\tfox\n~/clip.mp4\tc\nnot a file\td\n"
    assert kept(tmp_path, "a.txt", lines) == [
        f"{tmp_path}/lost.PNG\ta  fox // x/./y",
        f"{tmp_path}/frame\ta fox",
        "/home/fox/clip.mp4\tc",
        "not a file d",
    ]


def test_fifty_thousand_prompts_are_read_and_dealt_out_at_once(tmp_path):
    from common.models.flux import Flux

    (tmp_path / "many.txt").write_text(
        "\n".join(f"a photo of {i} red circles in a row" for i in range(50_000))
    )
    started = time.process_time()
    prompts = read_prompts(tmp_path / "many.txt")
    Flux.check(prompts)
    steps = [prompts_of_step(prompts, step, 8, seed=0) for step in range(200)]
    assert len(set(sum(steps, []))) == 1600
    assert time.process_time() - started < 1.0  # 0.2 on one slow core


def test_a_file_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 10**6)
    with pytest.raises(InputError, match="/dev/zero does not load .*more than 1000000 bytes"):
        read_prompts("/dev/zero")


def test_a_file_of_one_endless_line_is_refused(tmp_path):
    (tmp_path / "line.txt").write_text("one\n" + "a red circle " * 10_000)
    with pytest.raises(
        InputError,
        match=r"line.txt has a prompt of more than 100000 letters \(line 2\)",
    ):
        read_prompts(tmp_path / "line.txt")
