"""Docker jobs of an unmodified yapapi on a whole market: the demo's picture, and the shell command of the examples."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from worlds.patience import patience, within

from golem.lab.demo import PROVIDER_SHARE, YAPAPI_PYTHON
from golem.lab.engine import LocalEngine
from golem.lab.localnet import LocalNet

pytestmark = [
    pytest.mark.integration, pytest.mark.root,
    pytest.mark.skipif(not YAPAPI_PYTHON.exists(), reason="yapapi's environment is not there (.ci/setup yapapi)"),
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
DOCKER_EXAMPLE = ROOT / "examples" / "docker"


def test_a_picture_from_containers(engine: LocalEngine, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    line = [sys.executable, "-m", "golem.lab.demo", "--runtime", "vm", "--out", str(picture), "--width", "96", "--height", "64",
            "--samples", "16", "--tiles", "4x2"]  # fmt: skip
    env = {**os.environ, "DOCKER_HOST": engine.host}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=patience(280))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert f"containers run on the Docker Engine at {engine.host}" in said
    assert "golem image push: render:demo is" in said
    assert "The books add up to the last wei" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_shell_command_in_an_image_of_ones_own(engine: LocalEngine, tmp_path: Path) -> None:
    if shutil.which("busybox") is None:
        pytest.skip("no busybox on this machine (Debian: apt-get install busybox-static)")
    trio.run(_hello, engine, tmp_path)


async def _hello(engine: LocalEngine, folder: Path) -> None:
    net = LocalNet(folder)
    try:
        requestor = await net.start_node("requestor", wait=False)
        provider = await net.start_node("provider")
        await requestor.wait_ready()
        provider.environment |= {"DOCKER_HOST": engine.host, **PROVIDER_SHARE}
        net.start_agent(provider, subnet=net.name, arguments=("--runtime", "vm"))
        await requestor.command("payment", "fund")
        archive = folder / "hello.tar"
        env = {**os.environ, **requestor.environment, "PYTHONPATH": str(ROOT)}
        await trio.run_process([sys.executable, str(DOCKER_EXAMPLE / "make_image.py"), str(archive)], env=env)
        await requestor.command("image", "push", str(archive), "--tag", "hello-docker")
        line = [str(YAPAPI_PYTHON), str(DOCKER_EXAMPLE / "hello_docker.py"), "--subnet", net.name]
        with within(200):
            done = await trio.run_process(line, env=env, capture_stdout=True, capture_stderr=True, check=False)
        said = done.stdout.decode()
        assert done.returncode == 0, said + done.stderr.decode() + net.agents["provider-agent"].tail()
        assert "provider says:\n" + platform.machine() + "\n50\n" in said
        assert "the file that came back: A LETTER THAT WENT TO THE PROVIDER AND CAME BACK.\n" in said
    finally:
        await net.stop()
