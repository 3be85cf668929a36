"""Write samples for the official tools of public benchmarks, in a folder for each model:

    geneval       00000/metadata.jsonl (the prompt's line), 00000/samples/00000.png to 00003.png
    vbench        PROMPT-0.mp4 to PROMPT-4.mp4; to PROMPT-24.mp4 for temporal_flickering's prompts
    unigenbench   eval_data/LANGUAGE/MODEL/INDEX_0.png to INDEX_3.png
    hpsv2         anime, concept-art, paintings, photo: anime/00000.jpg, one for each prompt

Papers: 2310.11513, 2311.17982, 2510.18701, 2306.09341. The tools ignore missing files and count
surplus ones, so `check` refuses both.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError, text
from common.prompts import files, sets
from common.reporting.files import write_beside, write_text

if TYPE_CHECKING:
    import numpy as np
    import torch
NAMES = ("geneval", "vbench", "unigenbench", "hpsv2")
SAMPLES, FLICKERING = {"geneval": 4, "vbench": 5, "unigenbench": 4, "hpsv2": 1}, 25
DIMENSIONS = (
    "subject_consistency background_consistency motion_smoothness dynamic_degree "
    "aesthetic_quality imaging_quality "
    "object_class multiple_objects human_action color spatial_relationship scene "
    "appearance_style temporal_style "
    "overall_consistency"
)


@dataclass
class Layout:
    """Hold a benchmark's prompts [P], the file of each sample (prompt, which), and other files.

    texts: {other file: its text}.
    """

    name: str
    prompts: list[str] = field(default_factory=list)
    files: dict[tuple[int, int], str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    place: str = ""  # between the layout's folder and the model's

    def add(self, prompt: str, paths: list[str]) -> None:
        """Add a prompt and the files of its samples."""
        self.files |= {(len(self.prompts), which): path for which, path in enumerate(paths)}
        self.prompts.append(prompt)

    def samples(self) -> list[tuple[int, int]]:
        """Return all samples [(prompt, which)]: the first of every prompt, then the second, ..."""
        return sorted(self.files, key=lambda sample: sample[::-1])

    def root(self, folder: Path, model: str) -> Path:
        """Return the folder of a model, in that of the evaluation, which the tool reads."""
        return Path(folder) / self.name / self.place / model

    def path(self, folder: Path, model: str, sample: tuple[int, int]) -> Path:
        """Return the file of a sample (prompt, which)."""
        return self.root(folder, model) / self.files[sample]

    def begin(self, folder: Path, model: str) -> None:
        """Write the files other than samples, and delete what a killed process left half written.

        Raises OSError, and InputError for a file that does not belong there.
        """
        root = self.root(folder, model)
        root.mkdir(parents=True, exist_ok=True)
        for path in root.rglob(".tmp-*"):
            path.unlink()
        self.check(folder, model, whole=False)
        for name, words in self.texts.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(root / name, words)

    def check(self, folder: Path, model: str, whole: bool = True) -> None:
        """Raise InputError for a surplus file, and with `whole` for a missing one."""
        root = self.root(folder, model)
        there = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
        wanted = {*self.files.values(), *self.texts}
        said = f"{root}: {self.name} has {len(wanted)} files,"
        if missing := wanted - there if whole else ():
            raise InputError(
                f"{said} {len(missing)} are missing, {min(missing)!r} among them. Run the same "
                "command again."
            )
        if surplus := there - wanted:
            raise InputError(
                f"{said} {len(surplus)} others are there, {min(surplus)!r} among them. Move them "
                "away."
            )

    def commands(self, folder: Path, model: str) -> list[str]:
        """Return the commands of the benchmark's tool for a model's folder."""
        there = shlex.quote(str(self.root(folder, model).absolute()))
        return COMMANDS[self.name](there, self.place.rpartition("/")[2])


COMMANDS = {
    "geneval": lambda there, _: [
        f"python evaluation/evaluate_images.py {there} --outfile results.jsonl --model-path "
        "OBJECT_DETECTOR_FOLDER",
        "python evaluation/summary_scores.py results.jsonl",
    ],
    "vbench": lambda there, _: [
        f"for d in {DIMENSIONS}; do vbench evaluate --videos_path {there} --dimension $d; done",
        f"vbench static_filter --videos_path {there} --result_path static",
        "vbench evaluate --videos_path static/filtered_videos --dimension temporal_flickering",
    ],
    "unigenbench": lambda there, language: [
        f"python eval/qwenvl_72b_{language[:2]}_eval.py --data_path {there} --api_url URL "
        f"--csv_file data/test_prompts_{language}.csv"
    ],
    "hpsv2": lambda there, _: [
        f'python -c "import hpsv2, sys; hpsv2.evaluate(sys.argv[1])" {there}   '
        "# not with the wheel of PyPI, which lacks its tokenizer's vocabulary"
    ],
}


def plan(name: str, spec: str = "") -> Layout:
    """Return the layout of a benchmark for its prompts, or for those of `spec`.

    spec: the name of a set, or a file in the benchmark's format. Raises InputError.
    """
    return PLANS[name](spec or {"hpsv2": "hpsv2:all"}.get(name, name))


def _geneval(spec: str) -> Layout:
    layout = Layout("geneval")
    for number, row in enumerate(_rows(spec, prompt=_words, tag=_words)):
        paths = [f"{number:05d}/samples/{which:05d}.png" for which in range(SAMPLES["geneval"])]
        layout.add(files.with_fields(files.one_line(row["prompt"]), row, "prompt"), paths)
        layout.texts[f"{number:05d}/metadata.jsonl"] = json.dumps(row)
    return layout


def _vbench(spec: str) -> Layout:
    """Return VBench's layout. A prompt of several dimensions has one set of files."""
    layout, dimensions = Layout("vbench"), {}
    for row in _rows(spec, prompt_en=_words, dimension=_list_of_words):
        dimensions.setdefault(row["prompt_en"], []).extend(row["dimension"])
    for prompt, of_prompt in dimensions.items():
        if "/" in prompt or "\0" in prompt or len(f".tmp-{prompt}-00.mp4".encode()) > 255:
            raise InputError(
                f"--layout vbench: no file can be called {prompt[:100]!r}-0.mp4, as VBench wants "
                "it. Shorten or rename the prompt."
            )
        number = FLICKERING if "temporal_flickering" in of_prompt else SAMPLES["vbench"]
        layout.add(files.one_line(prompt), [f"{prompt}-{which}.mp4" for which in range(number)])
    return layout


def _unigenbench(spec: str) -> Layout:
    rows = _rows(spec, index=_number)
    column = next((name for name in ("prompt_en", "prompt_zh") if name in rows[0]), None)
    if column is None:
        raise InputError(
            f"--layout unigenbench: {spec} has neither a column prompt_en nor prompt_zh. Give the "
            "benchmark's file."
        )
    rows, numbers = _rows(spec, **{column: _words}), [int(row["index"]) for row in rows]
    if len(set(numbers)) < len(numbers):
        raise InputError(
            f"--layout unigenbench: {spec} has an index twice, whose images would be the same "
            "files. Give each prompt another index."
        )
    language = column[-2:] + "_long" * ("long" in Path(spec).name)
    layout = Layout("unigenbench", place=f"eval_data/{language}")
    for row, number in zip(rows, numbers):
        paths = [f"{number}_{which}.png" for which in range(SAMPLES["unigenbench"])]
        layout.add(files.one_line(row[column]), paths)
    return layout


def _hpsv2(spec: str) -> Layout:
    family, _, style = spec.partition(":")
    if family != "hpsv2":
        raise InputError(f"--layout hpsv2: takes --prompts hpsv2:STYLE, not {spec}. Give a style.")
    layout = Layout("hpsv2")
    for name in sets.HPSV2 if style == "all" else (style,):
        for number, prompt in enumerate(sets.read(f"hpsv2:{name}")):
            layout.add(prompt, [f"{name}/{number:05d}.jpg"])
    return layout


PLANS = {"geneval": _geneval, "vbench": _vbench, "unigenbench": _unigenbench, "hpsv2": _hpsv2}


def _rows(spec: str, **columns) -> list[dict[str, Any]]:
    """Return the rows [{column: value}] of a published set, or of a file.

    columns: the needed columns, each with a function that returns whether a value is valid. Raises
    InputError.
    """
    path = sets.path_of(spec) if spec in sets.PUBLISHED else Path(spec)
    try:
        rows = files.rows_of(path, next(iter(columns)))
    except InputError:
        raise
    except (OSError, KeyError, ValueError, RecursionError) as error:
        raise InputError(
            f"prompts: {spec} is not a readable file of the benchmark ({text(error)}). Give "
            "another file."
        ) from None
    for number, row in enumerate(rows, 1):
        if missing := [name for name in columns if not isinstance(row, dict) or name not in row]:
            raise InputError(
                f"prompts: row {number} of {spec} has no {missing[0]!r}: it is not the "
                "benchmark's file. Give another file."
            )
        if wrong := [name for name, will_do in columns.items() if not will_do(row[name])]:
            raise InputError(
                f"prompts: row {number} of {spec} has {str(row[wrong[0]])[:40]!r} as "
                f"{wrong[0]!r}: it is not the benchmark's file. Give another file."
            )
    if not rows:
        raise InputError(f"prompts: {spec} has no prompt in it. Give another file.")
    return rows


def _words(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _list_of_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_words, value))


def _number(value: Any) -> bool:
    return str(value).isdecimal()


def write(path: Path, sample: "torch.Tensor", fps: float) -> None:
    """Write a sample [3, H, W], or a clip [F, 3, H, W] for .mp4, in [0, 1] to a file.

    The name sets the format; fps: frames per second of a clip. A partly written file never has the
    final name. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = sample.float().clamp(0, 1).mul(255).round().byte().movedim(-3, -1).cpu().numpy()
    write_beside(path, lambda beside: WRITERS[path.suffix](beside, pixels, fps))


def _image(path: Path, pixels: "np.ndarray", fps: float) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(
        path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {})
    )


def _clip(path: Path, pixels: "np.ndarray", fps: float) -> None:
    import imageio

    with imageio.get_writer(
        path, fps=fps, quality=9, macro_block_size=1
    ) as writer:  # of no other size
        for frame in pixels:
            writer.append_data(frame)


WRITERS = {".png": _image, ".jpg": _image, ".mp4": _clip}
