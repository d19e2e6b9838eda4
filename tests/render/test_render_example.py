"""The render example: its module run directly under wasmtime, and how the requestor assembles tiles into a PNG."""

from __future__ import annotations

import importlib.util
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import wasmtime

RENDER = Path(__file__).resolve().parents[2] / "examples" / "render"
SIZE = (24, 16)  # pixels of the test image
SMALL_SCENE = """
camera 0 1 4  0 0.5 0  40
sky 0.8 0.9 1.0  0.2 0.4 0.8
sun 1 1 1  2  3 3 3
material ground checker 0.6 0.6 0.6  0.3 0.3 0.3  0.5
material ball   mirror  0.9 0.9 0.9
material lamp   light   4 4 4
plane ground 0 0 0  0 1 0
sphere ball 0 0.5 0  0.5
box lamp -1.5 0 -0.5  -1 0.5 0   # a comment
"""


def load_image_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_example_image", RENDER / "image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


image = load_image_module()


class Renderer:
    """Runs render.wasm as a runtime does: one instance a call, one folder preopened as its root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engine = wasmtime.Engine()
        self.module = wasmtime.Module.from_file(self.engine, str(RENDER / "render.wasm"))
        self.linker = wasmtime.Linker(self.engine)
        self.linker.define_wasi()

    def run(self, *arguments: object) -> int:
        """The exit status; output stays in stdout.txt and stderr.txt below the root."""
        store = wasmtime.Store(self.engine)
        wasi = wasmtime.WasiConfig()
        wasi.argv = ["render", *map(str, arguments)]
        wasi.stdout_file = str(self.root / "stdout.txt")
        wasi.stderr_file = str(self.root / "stderr.txt")
        wasi.preopen_dir(str(self.root), "/")
        store.set_wasi(wasi)
        instance = self.linker.instantiate(store, self.module)
        try:
            instance.exports(store)["_start"](store)
        except wasmtime.ExitTrap as exit_trap:
            return exit_trap.code
        return 0

    def tile(self, x: int, y: int, w: int, h: int, *, scene: str = SMALL_SCENE, samples: int = 3, seed: int = 1) -> bytes:
        """The PPM of one tile of the test image."""
        (self.root / "scene.txt").write_text(scene)
        status = self.run("/scene.txt", "/golem/output/tile.ppm", x, y, w, h, *SIZE, samples, seed)
        assert status == 0, self.stderr()
        return (self.root / "golem/output/tile.ppm").read_bytes()

    def stderr(self) -> str:
        return (self.root / "stderr.txt").read_text()


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(tmp_path_factory.mktemp("render"))


def test_same_seed_same_image_other_seed_other_image(renderer: Renderer) -> None:
    first = renderer.tile(0, 0, *SIZE)
    assert renderer.tile(0, 0, *SIZE) == first
    assert renderer.tile(0, 0, *SIZE, seed=2) != first
    width, height, pixels = image.read_ppm(first)
    assert (width, height) == SIZE
    assert len(set(pixels)) > 50  # a picture, not a plain surface


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 2), (5, 3), (1, 16)])
def test_image_does_not_depend_on_the_tiling(renderer: Renderer, columns: int, rows: int) -> None:
    canvas = image.Canvas(*SIZE)
    for tile in image.cut(*SIZE, columns, rows):
        canvas.paste(tile, renderer.tile(tile.x, tile.y, tile.w, tile.h))
    assert bytes(canvas.pixels) == image.read_ppm(renderer.tile(0, 0, *SIZE))[2]


@pytest.mark.parametrize("name", sorted(path.name for path in (RENDER / "scenes").glob("*.txt")))
def test_shipped_scenes_render(renderer: Renderer, name: str) -> None:
    ppm = renderer.tile(0, 0, *SIZE, scene=(RENDER / "scenes" / name).read_text(), samples=1)
    assert len(set(image.read_ppm(ppm)[2])) > 50
    assert f"24x16 tile at 0,0 of {SIZE[0]}x{SIZE[1]}: 1 samples a pixel" in (renderer.root / "stdout.txt").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("spere ball 0 0 0 1", "unknown word 'spere'"),
        ("sphere nothing 0 0 0 1", "unknown material 'nothing'"),
        ("sphere ball 0 0 zero 1", "a centre expected, not 'zero'"),
        ("sphere ball 0 0 0", "a radius expected"),
        ("sphere ball 0 0 0 -1", "a radius must be above 0"),
        ("sphere ball 0 0 0 nan", "a radius expected, not 'nan'"),
        ("sphere ball 0 0 0 1 7", "unexpected '7'"),
        ("material x velvet 1 1 1", "unknown kind of material 'velvet'"),
        ("plane ground 0 0 0  0 0 0", "a normal must not be zero"),
        ("plane lamp 0 0 0  0 1 0", "a plane cannot be a light"),
        ("camera 0 0 0  0 0 0  40", "the camera looks at itself"),
        ("# " + "x" * 600, "line too long"),
    ],
)
def test_malformed_scene_is_refused_with_the_line(renderer: Renderer, line: str, message: str) -> None:
    (renderer.root / "bad.txt").write_text(SMALL_SCENE + line + "\n")
    assert renderer.run("/bad.txt", "/out.ppm", 0, 0, *SIZE, *SIZE, 1) == 2
    assert renderer.stderr() == f"render: /bad.txt:{SMALL_SCENE.count(chr(10)) + 1}: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/scene.txt"], "usage: render SCENE OUT"),
        (["/absent.txt", "/o", 0, 0, 1, 1, 8, 8, 1], "cannot read /absent.txt"),
        (["/scene.txt", "/o", 0, 0, 9, 1, 8, 8, 1], "W: 1 to 8, not '9'"),
        (["/scene.txt", "/o", 0, 0, 1, 1, 8, 8, "many"], "SAMPLES: 1 to 65536, not 'many'"),
        (["/scene.txt", "/../o", 0, 0, 1, 1, 8, 8, 1], "cannot write /../o"),
        (["/empty.txt", "/o", 0, 0, 1, 1, 8, 8, 1], "no camera"),
    ],
)
def test_bad_arguments_are_refused(renderer: Renderer, arguments: list[object], message: str) -> None:
    (renderer.root / "scene.txt").write_text(SMALL_SCENE)
    (renderer.root / "empty.txt").write_text("# nothing\n")
    assert renderer.run(*arguments) == 2
    assert message in renderer.stderr()


def test_png_round_trip(tmp_path: Path) -> None:
    width, height = 5, 3
    canvas = image.Canvas(width, height)
    canvas.pixels[:] = bytes(range(3 * width * height))
    canvas.save(tmp_path / "image.png")
    assert decode_png((tmp_path / "image.png").read_bytes()) == (width, height, bytes(canvas.pixels))
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def decode_png(data: bytes) -> tuple[int, int, bytes]:
    """An independent reader of unfiltered 8-bit RGB PNGs that checks lengths and checksums."""
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    rows = zlib.decompress(chunks[1][1])
    stride = 1 + 3 * width
    assert len(rows) == stride * height
    assert set(rows[::stride]) == {0}
    return width, height, b"".join(rows[start + 1 : start + stride] for start in range(0, len(rows), stride))


def test_tiles_cover_the_image_once() -> None:
    counts = [0] * (17 * 11)
    for tile in image.cut(17, 11, 4, 3):
        for y in range(tile.y, tile.y + tile.h):
            for x in range(tile.x, tile.x + tile.w):
                counts[y * 17 + x] += 1
    assert set(counts) == {1}
    with pytest.raises(ValueError, match="cannot cut"):
        image.cut(3, 3, 4, 1)


@pytest.mark.parametrize("ppm", [b"", b"P5 2 1 255 " + bytes(6), b"P6 2 1 255 " + bytes(5), b"P6 1 2 255 " + bytes(6)])
def test_a_tile_that_is_none_is_refused(ppm: bytes) -> None:
    with pytest.raises(ValueError, match=r"PPM|pixels"):
        image.Canvas(4, 4).paste(image.Tile(0, 0, 0, 2, 1), ppm)


def test_preview_has_the_colours_of_the_image() -> None:
    canvas = image.Canvas(8, 8)
    canvas.pixels[:] = bytes([200, 10, 20]) * 32 + bytes([1, 2, 3]) * 32
    lines = canvas.preview(4)
    assert len(lines) == 2
    assert lines[0].count("38;2;200;10;20") == 4
    assert lines[1].count("48;2;1;2;3") == 4
