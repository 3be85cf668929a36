"""Words in pictures: the world of `tiny-letters`. Captions, a renderer, and a reader that is exact.

    render        words -> pictures of 32x80, each letter in a slot of 16 pixels
    read          pictures -> words: in each slot the letter of the renderer that fits best
    captions      words -> captions such as `a sign that says "BREAD"`
    misspell      a word with each letter replaced with some probability, for the base model's
                  training

The alphabet lacks the letters that a reader of text confuses with others. A model that is trained
on the reward `ocr`, a published reader, is watched by the reward `letters`, this file's reader: it
shows what fools only the published one.

    python -m worlds.letters       # writes the prompt files
"""

import functools
import random
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.models.presets import ASSETS
from common.rewards.ocr import agreement, plain, wanted_text

ALPHABET = "ABCDEFHJKLMNPRTUVXY"
SLOTS = 5
HEIGHT, SLOT = 32, 16  # pixels of a letter's place
WIDTH = SLOTS * SLOT
BASELINE, SIZE = 25, 24  # pixels
EMPTY = (0, 1, 2, 3, 28, 29, 30, 31)  # rows that no letter reaches
INK, GROUND = (0.10, 0.15, 0.40), (0.96, 0.93, 0.85)
FONT = "fonts/ttf/DejaVuSansMono-Bold.ttf"  # in matplotlib's data
LEAST_CONTRAST = 0.1  # of ink against the ground; below it there is no text
LEAST_AMOUNT = 0.4  # of a letter's ink, against the picture's clearest letter; below it is a blank
LEAST_FIT = 0.8  # cosine; below it a slot has ink, but no letter
UNREADABLE = "?"

CAPTIONS = (
    'a sign that says "{}"',
    'a poster that reads "{}"',
    'a label with the word "{}"',
    'a shop window with "{}" on it',
    'a book titled "{}"',
    'a wall painted with "{}"',
)
# English words of three to five letters. The builder of the model never sees one of them.
WORDS = """
ACE ACT ANT APE ARC ARM ART BAR BAT BAY BED BEE BUD BUN CAB CAN CAP CAR CAT CUB CUP DAY DEN EAR
EEL ELF ELK ELM EVE EYE FAN FEN FLY FUN FUR HAM HAT HAY HEN HUB HUT JAM JAR JET KEY LAB LAP MAN
MAP MUD NAP NET NUT PAN PEA PEN PET RAM RAT RYE TEA TAR TUB VAN
ABLE ACRE ARCH AREA ARMY AUNT BABY BAKE BALL BAND BANK BARN BATH BEAN BEAR BELL BELT BLUE BULB
CAFE CAKE CALM CAMP CAVE CHEF CLAY CLUB CRAB CUBE DARK DATE DECK DEER DUCK DUNE EACH FACE FARM
FERN FLAT FUEL HALL HAND HARP HERB JUMP KELP LAKE LAMB LAMP LEAF LUCK MALT MENU MULE NECK PALM
PARK PEAR PLUM RACE TREE TUNA YARN
AMBER APPLE BAKER BEACH BEARD BENCH BERRY BLACK BLADE BREAD CABLE CAMEL CANDY CHALK CHARM CLEAN
CLEAR CREAM CURRY CURVE DANCE DREAM EARLY EARTH EMPTY ENTRY EXTRA FABLE FERRY FRAME FUNNY HAPPY
HEART JELLY KAYAK KEBAB LABEL LAYER LUCKY LUNCH MAPLE MARCH METAL NERVE PANEL PAPER PARTY PATCH
PEACE PEACH PEARL PENNY PLANE PLANT PLATE RADAR RELAX TABLE THREE TRACK TRADE TRUCK VALUE VAULT
""".split()
HELD_OUT = 64


# --- Words and captions ---


def split_words(seed=0):
    """Return (training words, held-out words), disjoint and in random order."""
    words = random.Random(seed).sample(WORDS, len(WORDS))
    return words[HELD_OUT:], words[:HELD_OUT]


def captions(words):
    """Return a caption for each word; the forms of CAPTIONS take turns."""
    return [CAPTIONS[row % len(CAPTIONS)].format(word) for row, word in enumerate(words)]


def random_words(number, rng):
    """Return `number` strings of three to five random letters, none of them one of WORDS."""
    known, found = set(WORDS), []
    while len(found) < number:
        word = "".join(rng.choices(ALPHABET, k=rng.randint(3, SLOTS)))
        if word not in known:
            found.append(word)
    return found


def misspell(word, probability, rng):
    """Return the word with each letter replaced by another one with `probability`."""
    return "".join(
        rng.choice(ALPHABET.replace(letter, "")) if rng.random() < probability else letter
        for letter in word
    )


# --- Renderer ---


@functools.cache
def templates():
    """Return the ink of each letter of the alphabet, [K, HEIGHT, SLOT] in [0, 1]."""
    fine = 4  # drawn this much larger, then averaged
    face = ImageFont.truetype(f"{matplotlib.get_data_path()}/{FONT}", SIZE * fine)
    drawn = []
    for letter in ALPHABET:
        image = Image.new("L", (SLOT * fine, HEIGHT * fine))
        middle = SLOT * fine // 2, BASELINE * fine
        ImageDraw.Draw(image).text(middle, letter, font=face, fill=255, anchor="ms")
        drawn.append(np.asarray(image.resize((SLOT, HEIGHT), Image.BOX)) / 255)
    return torch.from_numpy(np.stack(drawn)).float()


def render(words, ink=INK, ground=GROUND):
    """Return pictures of words, [b, 3, HEIGHT, WIDTH] in [0, 1]."""
    ink, ground = (torch.tensor(colour)[:, None, None] for colour in (ink, ground))
    cover = torch.zeros(len(words), 1, HEIGHT, WIDTH)
    for row, word in enumerate(words):
        for slot, letter in enumerate(word):
            place = slice(slot * SLOT, (slot + 1) * SLOT)
            cover[row, 0, :, place] = templates()[ALPHABET.index(letter)]
    return ground + (ink - ground) * cover


# --- Reader ---


def read(images: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Return the words in pictures [b, 3, HEIGHT, WIDTH], and how well their letters fit, [b].

    The ground is the mean colour of the empty rows, and the ink is measured along the direction in
    which the other pixels differ from it. The fit is the mean cosine of slots that are not blank
    with their letter, 0 without any. A slot with ink that fits no letter reads as UNREADABLE.
    """
    b, channels, height, width = images.shape
    assert (channels, height, width) == (3, HEIGHT, WIDTH), f"expected 32x80, got {images.shape}"
    offset = images.float() - images[:, :, EMPTY].float().mean((2, 3), keepdim=True)
    direction = (offset * offset.norm(dim=1, keepdim=True)).sum((2, 3), keepdim=True)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-6)
    ink = (offset * direction).sum(1)  # [b, H, W]
    ink = ink.view(b, HEIGHT, SLOTS, SLOT).transpose(1, 2).flatten(2)  # [b, slots, pixels]
    shapes = templates().to(images.device).flatten(1)  # [K, pixels]
    match = ink @ shapes.T  # [b, slots, K]
    fit = match / (ink.norm(dim=-1, keepdim=True) * shapes.norm(dim=1)).clamp(min=1e-6)
    fit, letter = fit.max(-1)  # [b, slots]
    amount = match.gather(-1, letter[..., None])[..., 0] / shapes.square().sum(1)[letter]
    contrast = amount.amax(1, keepdim=True)
    filled = (amount > LEAST_AMOUNT * contrast) & (contrast > LEAST_CONTRAST)
    quality = (fit * filled).sum(1) / filled.sum(1).clamp(min=1)
    words = []
    for row in range(b):
        slots = zip(letter[row].tolist(), (fit[row] > LEAST_FIT).tolist(), filled[row].tolist())
        words.append("".join(ALPHABET[k] if good else UNREADABLE for k, good, ink in slots if ink))
    return words, quality


class Letters:
    """Score pictures of the world of letters by the word that they show, 0 to 1.

    The rule is that of `ocr:whole`; the reader is exact (tests/test_letters.py).
    """

    video = False
    scale = 0.2
    range = (0.0, 1.0)

    def check(self, prompts: Iterable[str]) -> None:
        """Raise ValueError for the first prompt that asks for no text."""
        for prompt in prompts:
            wanted_text(prompt)

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, 32, 80] in [0, 1] with b prompts."""
        words, _ = read(media)
        scores = [
            agreement(plain(word), wanted_text(prompt), whole=True)
            for word, prompt in zip(words, prompts)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=media.device)


class LettersQuality(Letters):
    """Score pictures by how well their letters are drawn, whatever they are, 0 to 1."""

    scale = 0.05

    def score(self, media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores [b] float32 of media [b, 3, 32, 80] in [0, 1]."""
        return read(media)[1]


def main(folder=ASSETS / "prompts"):
    """Write the two prompt files that tiny-letters uses by default."""
    for name, words in zip(("letters.txt", "letters_heldout.txt"), split_words()):
        (folder / name).write_text("\n".join(captions(words)) + "\n", encoding="utf-8")
        print(f"{folder / name}: {len(words)} captions")


if __name__ == "__main__":
    main()
