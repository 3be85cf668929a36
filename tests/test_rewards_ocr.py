"""The reward ocr: its rule against a transcription of Flow-GRPO's, and the published reader on
pictures whose text is known."""

import random
import shutil
import socket
import sys

import matplotlib
import numpy as np
import pytest
import torch
from learned import check_contract, photo, score_all
from PIL import Image, ImageDraw, ImageFont

from common.errors import InputError
from common.prompts import caption_with_fields, read_prompts
from common.rewards import ocr, table

FONTS = matplotlib.get_data_path() + "/fonts/ttf/"
LETTERS = "ABCDEFGHJKLMNPRSTUVXYZ"  # without those that look like another one


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return ocr.Reader()


def made(name, batch=16):
    pytest.importorskip("rapidocr")
    return table.load([name], [], reward_batch=batch)[name]


def words(number, length=4, seed=0):
    choose = random.Random(seed)
    return ["".join(choose.choice(LETTERS) for _ in range(length)) for _ in range(number)]


def drawn(text, size, height, width, font="DejaVuSans-Bold.ttf"):
    """A mask [height, width] in [0, 1] of the text, drawn four times as large."""
    image = Image.new("L", (width * 4, height * 4))
    face = ImageFont.truetype(FONTS + font, size * 4)
    middle = (width * 2, height * 2)
    ImageDraw.Draw(image).multiline_text(
        middle, text, font=face, fill=255, anchor="mm", align="center"
    )
    return torch.from_numpy(np.asarray(image.resize((width, height), Image.LANCZOS)) / 255).float()


def signs(texts, seed=0, height=32, width=64, size=20):
    """Pictures [b, 3, height, width] of dark text on a bright ground, in random colours."""
    generator = torch.Generator().manual_seed(seed)
    ground = 0.75 + 0.25 * torch.rand(len(texts), 3, 1, 1, generator=generator)
    ink = 0.35 * torch.rand(len(texts), 3, 1, 1, generator=generator)
    mask = torch.stack([drawn(text, size, height, width) for text in texts])[:, None]
    return ground + (ink - ground) * mask


# --- The rule ---


def flow_grpo(read, prompt, contained=True):
    """flow_grpo/ocr.py, OcrScorer.__call__ (contained), and that of videos, in NumPy."""
    wanted = prompt.split('"')[1].replace(" ", "").lower()
    read = read.replace(" ", "").lower()
    table = np.zeros((len(read) + 1, len(wanted) + 1))
    table[:, 0], table[0] = np.arange(len(read) + 1), np.arange(len(wanted) + 1)
    for i in range(len(read)):
        for j in range(len(wanted)):
            replaced = table[i, j] + (read[i] != wanted[j])
            table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, replaced)
    distance = 0 if contained and wanted in read else table[-1, -1]
    return 1 - min(distance, len(wanted)) / len(wanted)


def test_the_rule_is_flow_grpos():
    choose, contained = random.Random(0), 0
    for _ in range(400):
        wanted = "".join(choose.choice("aB c") for _ in range(choose.randint(0, 6))) + "a"
        read = "".join(choose.choice("AbC ") for _ in range(choose.randint(0, 12)))
        prompt = f'a sign "{wanted}" in "a street"'
        plain = ocr.plain(read), ocr.wanted_text(prompt)
        contained += plain[1] in plain[0]
        assert ocr.agreement(*plain) == pytest.approx(flow_grpo(read, prompt))
        whole = ocr.agreement(*plain, whole=True)
        assert whole == pytest.approx(flow_grpo(read, prompt, contained=False))
    assert 40 < contained < 360


@pytest.mark.parametrize(
    "read, score, whole",
    [
        ("bread", 1, 1),
        ("", 0, 0),
        ("breed", 0.8, 0.8),
        ("bred", 0.8, 0.8),
        ("breads", 1, 0.8),
        ("freshbread", 1, 0),
        ("nothing like it at all", 0, 0),
    ],
)
def test_scores_by_hand(read, score, whole):
    assert ocr.agreement(ocr.plain(read), "bread") == pytest.approx(score)
    assert ocr.agreement(ocr.plain(read), "bread", whole=True) == pytest.approx(whole)


def test_the_field_goes_before_the_quotes(tmp_path):
    path = tmp_path / "signs.jsonl"
    path.write_text('{"prompt": "a \\"red\\" sign", "text": "Best Bread"}\n{"prompt": "\\"So\\""}')
    asked = [ocr.wanted_text(caption_with_fields(prompt)) for prompt in read_prompts(path)]
    assert asked == ["bestbread", "so"]


@pytest.mark.parametrize(
    "name, lines, place, said",
    [
        ("a.txt", 'a "sign"\n\na sign', "line 3 of", "'a sign' has no text in double quotes"),
        ("a.txt", 'a "sign', "line 1 of", "has no text in double quotes"),
        ("a.txt", "a “sign”", "line 1 of", "has no text in double quotes"),
        ("a.txt", 'a " " sign', "line 1 of", "asks for is ' ', not words"),
        ("a.jsonl", '{"prompt": "a", "text": "x"}\n{"prompt": "b", "text": 5}', "row 2 of", "5"),
        ("a.jsonl", '{"prompt": "a", "text": ""}', "row 1 of", "asks for is ''"),
        ("a.csv", "prompt\na sign", "row 1 of", "has no text in double quotes"),
    ],
)
def test_a_prompt_without_text_is_refused_with_its_line(name, lines, place, said, tmp_path):
    (tmp_path / name).write_text(lines, encoding="utf-8")
    with pytest.raises(InputError) as error:
        table.load(["ocr"], read_prompts(tmp_path / name))
    message = str(error.value)
    assert message.startswith(f"reward ocr: {place} {tmp_path / name}") and "\n" not in message
    assert said in message


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_without_its_package_one_line_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)  # whatever is installed
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as error:
        table.load(["ocr"], ['"so"'])
    assert str(error.value) == (
        f"reward ocr needs the package {package}, which is not installed. Run {ocr.INSTALL}."
    )


# --- The published weights ---


def test_rendered_text_is_read(reader):
    texts = words(200)
    read = reader.read(signs(texts))
    right = sum(ocr.plain(a) == ocr.plain(b) for a, b in zip(read, texts))
    assert right >= 190, [pair for pair in zip(read, texts) if pair[0] != pair[1]]


def test_swapped_channels_would_not_be_read(reader):
    """Letters in red under stripes in blue: the reader weighs red more than blue."""
    texts = words(24, seed=1)
    media = torch.full((24, 3, 32, 64), 0.5)
    media[:, 0] += 0.39 * torch.stack([drawn(text, 20, 32, 64) for text in texts])
    media[:, 2] += 0.27 * ((torch.arange(32)[:, None] + torch.arange(64)) // 3 % 2)
    prompts = [f'"{text}"' for text in texts]
    scorer = made("ocr")
    assert scorer.score(media, prompts).mean() > 0.95
    assert scorer.score(media.flip(1), prompts).mean() < 0.5


PHOTOS = [
    'a cafe with "Fresh Bread" above',
    '"OPEN"',
    'a wall that says "Hello World"',
    '"Exit 42"',
]


def photographs(height=240, width=320):
    """Photographs, noise over a gradient, with text in one or two lines."""
    texts = ["Fresh\nBread", "OPEN", "Hello\nWorld", "Exit 42"]
    shown = []
    for seed, text in enumerate(texts):
        mask = drawn(text, 48, height, width, "DejaVuSerif-Bold.ttf")
        colour = torch.tensor([[1, 1, 0.9], [1, 0.9, 0.2], [0, 0, 0.2], [0.2, 0, 0]][seed])
        ground = 0.5 * photo(height, width, seed=seed) + (0.5 if seed > 1 else 0.0)
        shown.append(ground + (colour[:, None, None] - ground) * mask)
    return torch.stack(shown)


def test_text_in_photographs_is_found():
    media = photographs()
    assert made("ocr").score(media, PHOTOS).tolist() == [1, 1, 1, 1]
    assert made("ocr:whole").score(media, PHOTOS).tolist() == [1, 1, 1, 1]
    assert made("ocr").score(media, PHOTOS[1:] + PHOTOS[:1]).max() < 0.5


def test_a_picture_without_text_scores_zero():
    media = torch.cat([torch.full((1, 3, 96, 96), 0.5), torch.zeros(1, 3, 96, 96)])
    assert made("ocr").score(media, ['"so"'] * 2).tolist() == [0, 0]
    assert made("ocr").score(media[..., :32, :32], ['"so"'] * 2).tolist() == [0, 0]


def test_large_pictures_are_read_as_rapidocr_reads_them(reader):
    media = photographs()
    pictures = (media * 255).round().byte().permute(0, 2, 3, 1).flip(-1).numpy()
    reader.engine.text_rec.rec_image_shape = [3, 48, 320]
    official = [
        "".join(reader.engine(picture, use_det=True, use_cls=False, use_rec=True).txts or ())
        for picture in pictures
    ]
    assert reader.read(media) == official and all(official)


@pytest.mark.parametrize("height", [32, 240])
def test_contract(height):
    """Each picture is read alone, whatever the batch."""
    texts = ["Fresh\nBread", "OPEN", "a much longer line of text", "Exit 42", "SO", "Two\nLines"]
    if height == 32:
        texts = words(6, seed=2)
        media = signs(texts)
    else:
        media = signs(texts, height=height, width=480, size=30)
    wrong = [text.replace("\n", " ") + "Q" * row for row, text in enumerate(texts)]
    prompts = [f'"{text}"' for text in wrong]
    check_contract(lambda batch: made("ocr", batch=batch), media, prompts, tolerance=0)


def test_writing_more_raises_ocr_and_not_the_whole():
    media = signs(["BREAD", "BREAD NOW"], height=32, width=160)
    prompts = ['a sign that says "BREAD"'] * 2
    assert made("ocr").score(media, prompts).tolist() == [1, 1]
    whole = made("ocr:whole").score(media, prompts)
    assert whole.tolist() == pytest.approx([1, 0.4])


def test_a_clip_is_the_mean_of_its_frames():
    clip = signs(["LAMP", "LAMB", "XXXX", "LAMP"])[None]
    scorer = made("ocr")
    scorer.frames = "all"
    assert score_all({"ocr": scorer}, clip, ['"lamp"'])["ocr"].item() == pytest.approx(2.75 / 4)
    scorer.frames = "first"
    assert score_all({"ocr": scorer}, clip, ['"lamp"'])["ocr"].item() == 1


def test_it_is_quiet_offline_and_on_one_thread(monkeypatch, capfd):
    pytest.importorskip("rapidocr")

    def refuse(*_):
        raise AssertionError("it asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    scorer = made("ocr")
    scorer.score(signs(["LAMP"]), ['"lamp"'])
    scorer.score(torch.zeros(1, 3, 96, 96), ['"lamp"'])
    assert capfd.readouterr() == ("", "")
    for part in (scorer.reader.engine.text_rec, scorer.reader.engine.text_det):
        options = part.session.session.get_session_options()
        assert options.intra_op_num_threads == options.inter_op_num_threads == 1


def test_a_second_reader_needs_its_model(tmp_path):
    rapidocr = pytest.importorskip("rapidocr")
    with pytest.raises(InputError, match="Give --reward-path ocr:second=FILE.onnx"):
        table.load(["ocr:second"], ['"so"'])
    path = tmp_path / "other.onnx"
    shutil.copy(f"{rapidocr.__path__[0]}/models/{ocr.RECOGNITION}", path)
    scorer = table.load(["ocr:second"], ['"so"'], [f"ocr:second={path}"])["ocr:second"]
    assert isinstance(scorer, ocr.OcrSecond)
    assert scorer.score(signs(["LAMP"]), ['"lamp"']).item() == 1
    path.write_text("no model")
    with pytest.raises(InputError, match=r"--reward-path ocr:second=.* does not load") as error:
        table.load(["ocr:second"], ['"so"'], [f"ocr:second={path}"])
    assert "\n" not in str(error.value)


def test_a_run_with_it(train, tmp_path):
    pytest.importorskip("rapidocr")
    path = tmp_path / "signs.txt"
    path.write_text('a red circle and "SO"\na blue square and "NO"')
    prompts = dict(prompts=str(path), eval_prompts=str(path))
    _, rows = train(reward=("ocr",), watch=("ocr:whole",), **prompts)
    assert [row["ocr_mean"] >= row["ocr:whole_mean"] for row in rows] == [True, True]
