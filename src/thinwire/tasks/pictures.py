"""What a model says of a picture, drawn on it: SVG, with the picture's pixels in it as PNG, so that one file is all."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from colorsys import hls_to_rgb
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.record import PICTURE

Box = tuple[float, float, float, float]
WIDTH, LINE = 320.0, 16
"""Of what is drawn, and of a line of text, in units of the SVG."""


def colour(number: int) -> tuple[int, int, int]:
    """Of a class, red, green, blue; neighbours differ."""
    red, green, blue = (round(255 * one) for one in hls_to_rgb(number * 0.38 % 1.0, 0.55, 0.9))
    return red, green, blue


def png(pixels: NDArray[np.uint8]) -> bytes:
    """pixels: [height, width, channels], grey, red green blue, or these and opacity (W3C PNG, third edition)."""
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")


def uri(drawn: str) -> str:
    """Of an SVG, as a line of `Task.shown`."""
    return f"{PICTURE}svg+xml;base64,{b64encode(drawn.encode()).decode()}"


def svg(
    pixels: NDArray[np.uint8],
    boxes: Sequence[tuple[Box, int, str]] = (),
    areas: Sequence[tuple[NDArray[Any], int, str]] = (),
) -> str:
    """boxes: left, top, right, bottom in pixels, a class, and what to write there. areas: bool [height, width], a class, and what
    to write below the picture."""
    scale = WIDTH / pixels.shape[1]
    height = pixels.shape[0] * scale
    total = height + LINE * len(areas) + (4 if areas else 0)
    layer = np.zeros((*pixels.shape[:2], 4), np.uint8)
    for area, kind, _ in areas:
        layer[area] = (*colour(kind), 140)
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {total:g}" width="{WIDTH:g}" height="{total:g}" '
        'font-family="sans-serif" font-size="12">'
    ]
    for one in (pixels, layer) if areas else (pixels,):
        found.append(
            f'<image width="{WIDTH:g}" height="{height:g}" preserveAspectRatio="none" style="image-rendering: pixelated" '
            f'href="data:image/png;base64,{b64encode(png(one)).decode()}"/>'
        )
    for line, (_, kind, text) in enumerate(areas, start=1):
        below = height + LINE * line
        found.append(f'<rect x="2" y="{below - 10:g}" width="10" height="10" fill="rgb{colour(kind)}"/>')
        found.append(f'<text x="16" y="{below:g}" fill="gray">{escape(text)}</text>')
    for (left, top, right, bottom), kind, text in boxes:
        x, y, size = left * scale, top * scale, f'width="{(right - left) * scale:.1f}" height="{(bottom - top) * scale:.1f}"'
        found.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="none" stroke="rgb{colour(kind)}" stroke-width="2"/>')
        found.append(
            f'<text x="{x + 3:.1f}" y="{y + 13:.1f}" fill="rgb{colour(kind)}" stroke="black" stroke-width="3" '
            f'paint-order="stroke">{escape(text)}</text>'
        )
    return "\n".join([*found, "</svg>\n"])
