"""The training data: which emoji, their pictures on plain backgrounds, and the captions that name them."""

import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
DEFAULT_CACHE = HERE / ".cache"  # ignored by git
ART_PACKAGE = "emoji-datasource-google@16.0.0"  # 64 px Noto Emoji art, Apache-2.0; its metadata is MIT
NAME_PACKAGE = "emojibase-data@16.0.3"  # English names, MIT

IMAGE_SIZE = 64
EMOJI_SIZE = 56  # fixed scale and position: 4 px of background on every side
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (18, 18, 18),
    "red": (214, 40, 40),
    "green": (52, 168, 83),
    "blue": (40, 96, 214),
    "yellow": (255, 232, 80),
    "purple": (142, 68, 190),
    "pink": (255, 170, 204),
}
COLORS = list(BACKGROUNDS)
UNCONDITIONAL = (" ", "")  # what diffusers users pass as "no prompt"


@dataclass(frozen=True)
class Emoji:
    """One emoji: its name, other names for it, its picture file and the background it is never trained on."""

    name: str
    aliases: tuple[str, ...]
    image: str
    held_out: str


def fetch_package(package: str, cache: Path) -> Path:
    """Return the unpacked folder of an npm package, fetching it with `npm pack` the first time."""
    name, version = package.rsplit("@", 1)
    folder = cache / f"{name}-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        archive = cache / f"{name}-{version}.tgz"
        if not archive.is_file():
            subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        partial = cache / f"{name}-{version}.partial"
        with tarfile.open(archive) as tar:
            wanted = [
                m for m in tar.getmembers() if re.search(r"/(emoji\.json|en/data\.json|img/google/64/.*)$", m.name)
            ]
            tar.extractall(partial, members=wanted, filter="data")
        partial.rename(folder)
    return folder / "package"


def normal_code(code: str) -> str:
    """Return a code point sequence in the one spelling both packages share."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def clean_name(text: str) -> str:
    """Return a name as captions spell it: lower case letters, digits, spaces and apostrophes."""
    text = re.sub(r"[-_/&:]", " ", text.lower().replace("\u2019", "'"))
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9' ]", "", text)).strip()


def load_emoji(cache: Path) -> list[Emoji]:
    """Return the popular emoji in the order of the Unicode list, which also deals out the held-out colours."""
    wanted = set((HERE / "popular_emoji.txt").read_text().split())
    labels = {
        normal_code(entry["hexcode"]): clean_name(entry["label"])
        for entry in json.loads((fetch_package(NAME_PACKAGE, cache) / "en/data.json").read_text())
    }
    entries = json.loads((fetch_package(ART_PACKAGE, cache) / "emoji.json").read_text())
    chosen = sorted((e for e in entries if e["short_name"] in wanted), key=lambda e: e["sort_order"])
    names = [labels[normal_code(e["unified"])] for e in chosen]
    spellings = [{clean_name(short) for short in e["short_names"]} - set(names) for e in chosen]
    uses = Counter(alias for group in spellings for alias in group)
    return [
        Emoji(
            name=name,
            aliases=tuple(sorted(a for a in group if uses[a] == 1 and re.fullmatch(r"[a-z ]{3,24}", a))),
            image=entry["image"],
            held_out=COLORS[index * 3 % len(COLORS)],
        )
        for index, (entry, name, group) in enumerate(zip(chosen, names, spellings, strict=True))
    ]


def load_art(emoji: Emoji, cache: Path) -> np.ndarray:
    """Return the emoji's picture at its fixed size: premultiplied RGBA in 0..1."""
    path = fetch_package(ART_PACKAGE, cache) / "img/google/64" / emoji.image
    rgba = np.asarray(Image.open(path).convert("RGBA"), np.float32) / 255
    rgba = np.dstack([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]])
    size = (EMOJI_SIZE, EMOJI_SIZE)
    planes = [Image.fromarray(rgba[..., i]).resize(size, Image.Resampling.LANCZOS) for i in range(4)]
    return np.clip(np.dstack([np.asarray(plane) for plane in planes]), 0, 1)


def compose(art: np.ndarray, color: str) -> np.ndarray:
    """Return the art in the middle of a plain background, 64x64x3 in 0..255."""
    picture = np.tile(np.array(BACKGROUNDS[color], np.float32) / 255, (IMAGE_SIZE, IMAGE_SIZE, 1))
    edge = (IMAGE_SIZE - EMOJI_SIZE) // 2
    middle = slice(edge, edge + EMOJI_SIZE)
    picture[middle, middle] = picture[middle, middle] * (1 - art[..., 3:]) + art[..., :3]
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def compose_all(emoji: list[Emoji], cache: Path) -> np.ndarray:
    """Return every emoji on every background, shaped (emoji, colour, 64, 64, 3)."""
    return np.stack([[compose(art, color) for color in COLORS] for art in (load_art(e, cache) for e in emoji)])


def with_article(name: str) -> str:
    """Return the name after "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def draw_caption(emoji: Emoji, color: str, rng: random.Random) -> str:
    """Return a random caption; some are empty (for guidance) and some leave the background open."""
    if rng.random() < 0.12:
        return UNCONDITIONAL[rng.random() < 0.15]
    name = rng.choice(emoji.aliases) if emoji.aliases and rng.random() < 0.3 else emoji.name
    subject = rng.choices(
        [name, with_article(name), f"{name} emoji", f"an emoji of {with_article(name)}"], [9, 9, 1, 1]
    )[0]
    styles = ["{}", "{} on a {} background", "{}, {} background", "{} with a {} background", "{} on {}"]
    return rng.choices(styles, [15, 55, 20, 6, 4])[0].format(subject, color)
