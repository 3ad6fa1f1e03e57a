"""Pictures in a grid, each with its caption; shared by the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

TILE = 192  # pixels of a picture's side on the sheet
GAP = 12
FONT_SIZE = 14
LINE_HEIGHT = 18


@dataclass(frozen=True)
class Tile:
    """A picture of any size, drawn TILE pixels wide at most, and the lines under it."""

    picture: Image.Image
    caption: Sequence[str]


def draw_contact_sheet(tiles: Sequence[Tile], columns: int) -> Image.Image:
    """One RGB image of all tiles, row by row."""
    caption_height = LINE_HEIGHT * max(len(tile.caption) for tile in tiles)
    cell_width, cell_height = TILE + GAP, TILE + caption_height + GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (GAP + columns * cell_width, GAP + rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        left = GAP + index % columns * cell_width
        top = GAP + index // columns * cell_height
        picture = _fit(tile.picture)
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        for number, line in enumerate(tile.caption):
            pen.text((left, top + TILE + 4 + number * LINE_HEIGHT), _shorten(pen, line), "black", font_size=FONT_SIZE)
    return sheet


def _fit(picture: Image.Image) -> Image.Image:
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _shorten(pen: ImageDraw.ImageDraw, line: str) -> str:
    """The line, cut to a tile's width."""
    if pen.textlength(line, font_size=FONT_SIZE) <= TILE:
        return line
    while line and pen.textlength(f"{line}...", font_size=FONT_SIZE) > TILE:
        line = line[:-1]
    return f"{line}..."
