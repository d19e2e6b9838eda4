"""Tiles and images of the render example: cutting an image up, reading a tile, assembling, writing a PNG.

Used by `render.py`; standard library only, pixels are 8-bit RGB, rows from the top.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

PPM_HEADER = re.compile(rb"P6\s+(\d{1,6})\s+(\d{1,6})\s+255\s")


@dataclass(frozen=True)
class Tile:
    """A rectangle of the image, in pixels; `index` counts from 0, row by row."""

    index: int
    x: int
    y: int
    w: int
    h: int


def cut(width: int, height: int, columns: int, rows: int) -> list[Tile]:
    """The image as columns x rows tiles of as equal a size as pixels allow; ValueError if there are too few pixels."""
    if not (1 <= columns <= width and 1 <= rows <= height):
        raise ValueError(f"cannot cut {width}x{height} pixels into {columns}x{rows} tiles")
    xs = [width * column // columns for column in range(columns + 1)]
    ys = [height * row // rows for row in range(rows + 1)]
    return [
        Tile(row * columns + column, xs[column], ys[row], xs[column + 1] - xs[column], ys[row + 1] - ys[row])
        for row in range(rows)
        for column in range(columns)
    ]


def read_ppm(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels of a binary PPM of 8 bits a channel; ValueError if it is none."""
    header = PPM_HEADER.match(data)
    if header is None:
        raise ValueError("not a binary PPM of 8 bits a channel")
    width, height = int(header[1]), int(header[2])
    pixels = data[header.end() :]
    if len(pixels) != 3 * width * height:
        raise ValueError(f"{width}x{height} pixels take {3 * width * height} bytes, not {len(pixels)}")
    return width, height, pixels


def png(width: int, height: int, pixels: bytes) -> bytes:
    """The pixels as a PNG file."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    stride = 3 * width
    rows = b"".join(b"\0" + pixels[at : at + stride] for at in range(0, stride * height, stride))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, no interlace
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 6)) + chunk(b"IEND", b"")


class Canvas:
    """The image while its tiles arrive; what is missing is dark grey."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.pixels = bytearray(b"\x22" * (3 * width * height))

    def paste(self, tile: Tile, ppm: bytes) -> None:
        """Put a rendered tile in its place; ValueError if the file is no PPM of the tile's size."""
        w, h, pixels = read_ppm(ppm)
        if (w, h) != (tile.w, tile.h):
            raise ValueError(f"a tile of {tile.w}x{tile.h} pixels was asked for, {w}x{h} came")
        for row in range(h):
            start = 3 * ((tile.y + row) * self.width + tile.x)
            self.pixels[start : start + 3 * w] = pixels[3 * w * row : 3 * w * (row + 1)]

    def save(self, path: Path) -> None:
        """Write the PNG; whoever looks at `path` meanwhile sees the old file or the new one."""
        new = path.with_name(path.name + ".new")
        new.write_bytes(png(self.width, self.height, bytes(self.pixels)))
        os.replace(new, path)

    def preview(self, columns: int) -> list[str]:
        """The image as lines of `columns` half blocks in 24-bit terminal colours, two pixel rows a line."""
        lines = max(1, round(columns * self.height / self.width / 2))

        def colour(column: int, half: int) -> str:
            x = (2 * column + 1) * self.width // (2 * columns)
            y = (2 * half + 1) * self.height // (4 * lines)
            r, g, b = self.pixels[3 * (y * self.width + x) : 3 * (y * self.width + x) + 3]
            return f"{r};{g};{b}"

        def cell(column: int, line: int) -> str:
            return f"\x1b[38;2;{colour(column, 2 * line)};48;2;{colour(column, 2 * line + 1)}m▀"

        return ["".join(cell(column, line) for column in range(columns)) + "\x1b[0m" for line in range(lines)]
