"""The Docker image of the render example: made without Docker, the same every time, and it renders what the module renders."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import wasmtime

from golem.exeunit.runtime import ImageFormat
from golem.exeunit.transfer.packages import detect_format

RENDER = Path(__file__).resolve().parents[2] / "examples" / "render"
TILE = (30, 20, 40, 30, 160, 120, 9)  # x, y, width and height, then of the image, samples

NO_COMPILER = "no C compiler on this machine (Debian: apt-get install gcc libc6-dev)"
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason=NO_COMPILER)


def make_image_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_example_make_image", RENDER / "make_image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_module(folder: Path) -> bytes:
    """The tile as render.wasm makes it."""
    store = wasmtime.Store(engine := wasmtime.Engine())
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["render", "/room.txt", "/wasm.ppm", *map(str, TILE)]
    wasi.preopen_dir(str(folder), "/")
    store.set_wasi(wasi)
    instance = linker.instantiate(store, wasmtime.Module.from_file(engine, str(RENDER / "render.wasm")))
    with suppress(wasmtime.ExitTrap):
        instance.exports(store)["_start"](store)
    return (folder / "wasm.ppm").read_bytes()


def test_the_image_renders_as_the_module_does(tmp_path: Path) -> None:
    maker = make_image_module()
    archive, again = tmp_path / "image.tar", tmp_path / "again.tar"
    maker.make_image(archive)
    maker.make_image(again)
    assert archive.read_bytes() == again.read_bytes()
    assert detect_format(archive) is ImageFormat.DOCKER_ARCHIVE
    with tarfile.open(archive) as saved:
        (entry,) = json.load(saved.extractfile("manifest.json"))
        config = json.load(saved.extractfile(entry["Config"]))["config"]
        layer = saved.extractfile(entry["Layers"][0]).read()
    assert (config["Entrypoint"], sorted(config["Volumes"])) == (["/bin/render"], ["/golem/input", "/golem/output"])
    with tarfile.open(fileobj=io.BytesIO(layer)) as files:
        files.extractall(tmp_path / "root")  # our own archive: Debian 12's Python has no filters
    shutil.copy(RENDER / "scenes" / "room.txt", tmp_path)
    program = tmp_path / "root" / "bin" / "render"
    if len(list((tmp_path / "root").rglob("*.so*"))):
        pytest.skip("linked with shared libraries: it runs inside the image only")
    line = [program, tmp_path / "room.txt", tmp_path / "native.ppm", *map(str, TILE)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    native, module = (tmp_path / "native.ppm").read_bytes(), by_module(tmp_path)
    assert len(native) == len(module)
    differences = sum(one != other for one, other in zip(native, module, strict=True))
    assert differences < len(native) / 100, "but for the last bit of a few pixels, both compilers make one picture"
