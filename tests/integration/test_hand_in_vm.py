"""A hand inside a container of a real Engine: shell, exec and a web server, from the command line and over REST."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from cli.test_cli_activity import golem, screen
from worlds.engine import admin, busybox_tar, import_image
from worlds.hand_world import HandWorld, hand_world
from worlds.patience import within
from worlds.support import trio_test

from golem.lab.engine import LocalEngine

pytestmark = [pytest.mark.integration, pytest.mark.root]

CHANGES = ("ENV PATH=/bin FROM_IMAGE=yes", "EXPOSE 8080", "WORKDIR /root")
SITE = 'mkdir -p /tmp/www/cgi-bin; echo page > /tmp/www/page; printf "#!/bin/sh\\necho; cat\\n" > /tmp/www/cgi-bin/echo; ' \
    'chmod +x /tmp/www/cgi-bin/echo; httpd -p 127.0.0.1:8080 -h /tmp/www'  # fmt: skip


@pytest.fixture(scope="module")
def image(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Docker archive with busybox."""
    tag = "hand-in-vm"
    import_image(engine, busybox_tar(), tag, CHANGES)
    path = tmp_path_factory.mktemp("image") / "busybox.tar"
    client = admin(engine)
    with path.open("wb") as file:
        for chunk in client.get_image(tag):
            file.write(chunk)
    client.remove_image(tag, force=True)
    client.close()
    return path


@asynccontextmanager
async def vm_world(tmp_path: Path, engine: LocalEngine, image: Path, interaction: str | None = None) -> AsyncIterator[HandWorld]:
    tmp_path.chmod(0o711)
    with within(60):
        async with hand_world(tmp_path, package=image, engine_host=engine.host, interaction=interaction) as world:
            yield world


async def count(world: HandWorld, program: str) -> int:
    """How many processes in the container run a program."""
    listed = await golem(world.r, "exec", "1", "--", "ps", "-o", "args")
    return sum(line.startswith(program) for line in listed.stdout.decode().splitlines())


@trio_test
async def test_a_hand_in_a_container(tmp_path: Path, engine: LocalEngine, image: Path) -> None:
    async with vm_world(tmp_path, engine, image) as w:
        await _exec(w)
        await _shell(w)
        await _service(w)
        before = await usage(w)
        await golem(w.r, "exec", "1", "--", "sh", "-c", "i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done")
        assert (await usage(w))[1] > before[1] + 0.1  # what runs by hand is counted
        async with screen(w, "shell", "1") as s:
            await s.until(b"# ")
            await w.destroy()
            await s.until(b"the activity has ended")
            assert await s.process.wait() == 255


async def usage(world: HandWorld) -> list[float]:
    async with world.http() as http:
        await trio.sleep(1.1)  # a second's figures are taken for fresh
        answer = await http.get(f"{world.base}/usage")
        found: list[float] = answer.json()["currentUsage"]
        return found


async def _exec(w: HandWorld) -> None:
    ended = await golem(w.r, "exec", "1", "-e", "A=b", "--", "sh", "-c", "echo $FROM_IMAGE $A $(pwd); echo oops >&2; exit 9")
    assert (ended.returncode, ended.stdout, ended.stderr) == (9, b"yes b /root\n", b"oops\n")
    data = b"\x00\xff line\n" * 50_000
    ended = await golem(w.r, "exec", "-i", "1", "--", "md5sum", stdin=data)
    assert ended.returncode == 0
    there = await golem(w.r, "exec", "-i", "1", "--", "cat", stdin=data)
    assert there.stdout == data
    missing = await golem(w.r, "exec", "1", "--", "/none/such")
    assert missing.returncode in (126, 127, 255)


async def _shell(w: HandWorld) -> None:
    async with screen(w, "shell", "1") as s:
        await s.until(b"# ")
        await s.type(b"stty size; tty; id -u; grep -c guest /etc/passwd\n")
        for expected in (b"37 97", b"/dev/pts/", b"\r\n0\r\n", b"1\r\n"):
            await s.until(expected)
        await s.resize(22, 55)
        await s.type(b"until [ \"$(stty size)\" = '22 55' ]; do sleep 0.05; done; echo resi''zed\n")
        await s.until(b"resized")
        await s.type(b"trap 'echo 4$((1+1))!; stop=1' INT; echo 1$((1+1))!; until [ $stop ]; do :; done\n")
        await s.until(b"12!")
        await s.type(b"\x03")
        await s.until(b"42!")
        await s.type(b"exit 6\n")
        assert await s.process.wait() == 6
    async with screen(w, "shell", "1", "--", "sh", "-c", "sleep 777 & echo on; sleep 777; true") as s:
        await s.until(b"on\r\n")
        assert await count(w, "sleep 777") == 2
        await s.type(b"~.")
        await s.process.wait()
    while await count(w, "sleep 777"):
        pass


async def _service(w: HandWorld) -> None:
    await w.execute({"run": {"entry_point": "/bin/sh", "args": ["-c", SITE]}})
    async with w.http() as http:

        async def page(where: str) -> Any:
            with within(10):
                while (answer := await http.get(where)).status_code == 502:
                    await trio.sleep(0.05)
            return answer

        answer = await page("8080/page")
        assert (answer.status_code, answer.text) == (200, "page\n")
        assert (await http.get("page")).text == "page\n"  # the image exposes that one port
        assert (await http.get("8080/none")).status_code == 404
        assert (await http.get(f"{w.base}/proxy-http/http://localhost:8080/page")).text == "page\n"
        answer = await http.post("8080/cgi-bin/echo", content=b"x" * 100_000)
        assert (answer.status_code, answer.content) == (200, b"x" * 100_000)
        answer = await http.get("81/")
        assert (answer.status_code, "port 81 of the activity" in answer.text) == (502, True)


@trio_test
async def test_a_provider_that_has_switched_it_off(tmp_path: Path, engine: LocalEngine, image: Path) -> None:
    async with vm_world(tmp_path, engine, image, interaction="") as w:
        refused = await golem(w.r, "exec", "1", "--", "ls")
        assert (refused.returncode, b"the provider does not allow shells" in refused.stderr) == (255, True)
        async with w.http() as http:
            answer = await http.get("8080/")
            assert (answer.status_code, "does not allow" in answer.text) == (403, True)
