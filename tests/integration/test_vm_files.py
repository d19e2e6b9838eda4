"""A file job on a whole market with a real Engine: 200 MB into a container, its hash taken there, and 200 MB back."""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

import pytest
import trio
from worlds.engine import busybox_tar
from worlds.support import trio_test

from golem.files.tool import Gftp
from golem.lab.engine import LocalEngine
from golem.lab.localnet import open_localnet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "rest"))

from requestor import Requestor, published  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.root]

SIZE = 200_000_000


@trio_test
async def test_200_mb_up_and_down(tmp_path: Path, engine: LocalEngine) -> None:
    tmp_path.chmod(0o711)
    image, source, back = tmp_path / "busybox.tar", tmp_path / "source", tmp_path / "back"
    image.write_bytes(busybox_tar())
    content = random.Random(7).randbytes(SIZE)
    source.write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    script = "sha256sum /data/in; cp /data/in /data/out; stat -c %s /data/out"
    async with open_localnet(tmp_path / "net") as net:
        node, provider = await net.start_node("requestor"), await net.start_node("provider")
        await node.command("payment", "fund")
        provider.environment |= {"DOCKER_HOST": engine.host, "YA_RT_STORAGE": "2"}
        net.start_agent(provider, subnet=net.name)
        async with node.client() as client, published(image, node.environment) as package, trio.open_nursery() as nursery:
            files = Gftp(node.data_dir / "bus.sock")
            await nursery.start(files.run)
            [there] = await files.publish([str(source)])
            slot = await files.receive(str(back))
            requestor = Requestor(client, net.name)
            demand, body = await requestor.demand(await requestor.allocate(), package, runtime="vm")
            draft = await requestor.negotiate(demand, body, await requestor.proposal(demand, "Initial"))
            activity = await requestor.create_activity(await requestor.agree(draft))
            results = await requestor.run(
                activity,
                {"deploy": {"volumes": ["/data"]}},
                {"start": {}},
                {"transfer": {"from": there["url"], "to": "container:/data/in"}},
                {"run": {"entry_point": "/bin/sh", "args": ["-c", script], "capture": {"stdout": {"atEnd": {}}}}},
                {"transfer": {"from": "container:/data/out", "to": slot["url"]}},
                timeout_s=120,
            )
            assert results[3]["stdout"] == f"{expected}  /data/in\n{SIZE}\n"
            await requestor.destroy_activity(activity)
            nursery.cancel_scope.cancel()
    with back.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == expected
