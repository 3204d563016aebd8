"""Clips side by side with their captions, as one PNG picture."""

import io
from collections.abc import Sequence

import numpy as np

COLUMNS = 4  # captions in a row
SHOWN = 4  # frames of each clip, evenly spaced from the first to the last
TITLE, GAP, LINE = 16, 4, 1  # pixels: above a clip, after it, and between its frames


def contact_sheet(videos: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """A PNG of frames of uint8 [F, H, W, 3] videos of one size, each row below its captions.

    A line between the frames of a clip tells where a shape stands in each.
    """
    from PIL import Image, ImageDraw

    frames, height, width, _ = videos[0].shape
    cell_width, cell_height = SHOWN * (width + LINE) - LINE + GAP, TITLE + height + GAP
    rows = -(-len(videos) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width, rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    picked = np.linspace(0, frames - 1, SHOWN).round().astype(int)
    for number, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        left, top = number % COLUMNS * cell_width, number // COLUMNS * cell_height
        pen.text((left + 2, top + 2), caption, fill="black")
        for place, frame in enumerate(picked):
            corner = (left + place * (width + LINE), top + TITLE)
            sheet.paste(Image.fromarray(video[frame]), corner)
    png = io.BytesIO()
    sheet.quantize(256).save(png, "PNG", optimize=True)  # 256 colours do, in half the bytes
    return png.getvalue()
