"""Pictures in a grid, each with its caption; shared by the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TILE = 192  # pixels of a picture's side on the sheet
GAP = 12
FONT_SIZE = 14
LINE_HEIGHT = 18


@dataclass(frozen=True)
class Tile:
    """A picture of any size, drawn within TILE x TILE pixels, and the lines under it."""

    picture: Image.Image
    caption: Sequence[str]


def draw_contact_sheet(tiles: Sequence[Tile], columns: int) -> Image.Image:
    """One RGB image of all tiles, row by row."""
    captions = [[part for line in tile.caption for part in _wrap(line)] for tile in tiles]
    cell_width = TILE + GAP
    cell_height = TILE + LINE_HEIGHT * max(len(caption) for caption in captions) + GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (GAP + columns * cell_width, GAP + rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left = GAP + index % columns * cell_width
        top = GAP + index // columns * cell_height
        picture = _fit(tile.picture)
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        for number, line in enumerate(caption):
            pen.text((left, top + TILE + 4 + number * LINE_HEIGHT), line, "black", font_size=FONT_SIZE)
    return sheet


def _fit(picture: Image.Image) -> Image.Image:
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _wrap(line: str) -> list[str]:
    """The line's words, on as many lines as a tile's width needs."""
    font = ImageFont.load_default(FONT_SIZE)
    lines = [""]
    for word in line.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > TILE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
