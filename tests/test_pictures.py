"""Conditioning images: what diffusers makes of a file, or one line that names it."""

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from common.errors import InputError
from common.prompts.pictures import check, read_image
from evaluation.bias import medium

ORIENTATION = 0x0112  # the tag of EXIF
# what a viewer does with the stored pixels [H, W, 3], by the table of the EXIF standard
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def picture(mode="RGB", size=(37, 22)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", TURNED)
def test_photographs_are_turned_as_diffusers_turns_them(tmp_path, kind, orientation):
    path = str(tmp_path / f"photo.{kind}")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture().save(path, exif=exif)
    ours = np.asarray(read_image(path))
    assert np.array_equal(ours, np.asarray(load_image(path)))
    if kind == "png":
        assert np.array_equal(ours, TURNED[orientation](np.asarray(picture())))
    pixels = medium(path)[0].permute(1, 2, 0).numpy() * 255  # of evaluation.bias --real
    assert np.array_equal(pixels.round(), ours)
    check([f"{path}\ta fox"], most=1)


@pytest.mark.parametrize(
    "name, mode",
    [
        ("a.png", "P"),
        ("a.png", "1"),
        ("a.png", "L"),
        ("a.png", "LA"),
        ("a.png", "RGBA"),
        ("a.webp", "RGBA"),
        ("a.jpg", "CMYK"),
        ("a.tiff", "CMYK"),
        ("a.gif", "P"),
        ("a.bmp", "RGB"),
    ],
)
def test_other_kinds_of_pixels_are_those_of_diffusers(tmp_path, name, mode):
    path = str(tmp_path / name)
    options = {"transparency": 3} if mode == "P" else {}
    picture(mode).save(path, **options)
    ours = read_image(path)
    assert ours.mode == "RGB" and np.array_equal(ours, load_image(path))


@pytest.mark.parametrize(
    "name, mode, warned",
    [
        ("a.png", "RGBA", True),
        ("a.webp", "RGBA", True),
        ("a.png", "LA", True),
        ("a.gif", "P", True),
        ("a.png", "RGB", False),
        ("a.jpg", "RGB", False),
    ],
)
def test_transparent_pixels_are_warned_of(tmp_path, capsys, name, mode, warned):
    """A viewer hides the colours under them; the model sees these."""
    path = str(tmp_path / name)
    shown = np.full((22, 37, 4), (255, 0, 0, 0), dtype=np.uint8)  # hidden red
    shown[5:9, 5:9] = (0, 0, 255, 255)
    image = Image.fromarray(shown, "RGBA").convert(mode)
    image.save(path, **({"transparency": image.getpixel((0, 0))} if mode == "P" else {}))
    check([f"{path}\ta fox", f"{path}\ta dog"], most=1)
    said = capsys.readouterr().err
    line = f"warning: prompts: images with transparent pixels: 1, first {path}. "
    assert said.startswith(line) if warned else not said, said


def test_an_alpha_channel_that_is_opaque_is_silent(tmp_path, capsys):
    picture("RGB").convert("RGBA").save(tmp_path / "a.png")
    check([f"{tmp_path}/a.png\ta fox"], most=1)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_is_its_first_frame(tmp_path, name):
    path = str(tmp_path / name)
    first, second = picture(), Image.new("RGB", (37, 22), "red")
    first.save(path, save_all=True, append_images=[second], duration=100, lossless=True)
    assert np.array_equal(read_image(path), load_image(path))
    assert not np.array_equal(read_image(path), second)


@pytest.mark.parametrize("values", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused_because_they_become_white_or_black(tmp_path, values):
    path = str(tmp_path / "depth.tiff")
    Image.fromarray((np.arange(48).reshape(6, 8) * 1000).astype(values)).save(path)
    assert len(np.unique(load_image(path))) <= 2
    with pytest.raises(InputError, match="depth.tiff .*more than 8 bits"):
        read_image(path)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp", "cut.gif", "cut.tiff"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_file_cut_short_is_named(tmp_path, name, share):
    path = tmp_path / name
    picture().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for small in (True, False):
        with pytest.raises(InputError, match=f"image .*{name} does not load"):
            read_image(str(path), small)


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    picture().save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(InputError, match="huge.png does not load .DecompressionBombError"):
        read_image(str(path))
