#!/usr/bin/env python3
"""Run a shell command in a Docker image on the market, with the unmodified yapapi 0.13; see README.md.

    YAGNA_APPKEY=... python hello_docker.py --subnet demo

Sends a file to one provider that offers the runtime `vm`, runs a command on it in the image that the node's registry has
under --image, prints what the command said, and fetches the file that it wrote. Exit status: 0 done, 1 not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

from yapapi import Golem, Task, WorkContext
from yapapi.payload import vm
from yapapi.rest.activity import CommandExecutionError
from yapapi.script import Script

LETTER = "A letter that went to the provider and came back.\n"
COMMAND = "uname -m; wc -c < letter.txt; tr a-z A-Z < letter.txt > answer.txt"


class Hello:
    """One task: what is sent, run and fetched."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder

    async def work(self, ctx: WorkContext, tasks: AsyncIterator[Task[str, str]]) -> AsyncIterator[Script]:
        async for task in tasks:
            script = ctx.new_script(timeout=timedelta(minutes=5))
            script.upload_bytes(LETTER.encode(), f"{self.options.volume}/letter.txt")
            command = script.run("/bin/sh", "-c", f"cd {self.options.volume} && {task.data}")
            script.download_file(f"{self.options.volume}/answer.txt", str(self.folder / "answer.txt"))
            yield script
            print(f"{ctx.provider_name} says:\n{(await command).stdout}", end="")
            task.accept_result((self.folder / "answer.txt").read_text())

    async def run(self) -> bool:
        options = self.options
        payload = await vm.repo(image_tag=options.image, repository_url=options.registry, min_storage_gib=1.0)
        done = False
        async with Golem(budget=1, subnet_tag=options.subnet, payment_network=options.network) as golem:
            tasks = golem.execute_tasks(
                self.work, [Task(data=options.command)], payload=payload, max_workers=1, timeout=timedelta(minutes=10)
            )
            async for task in tasks:
                print(f"the file that came back: {task.result}", end="")
                done = True
        return done


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a shell command in a Docker image on a Golem market.")
    parser.add_argument("--image", default="hello-docker", help="tag in the node's registry (default: %(default)s)")
    node = os.environ.get("YAGNA_API_URL") or "http://127.0.0.1:7465"
    parser.add_argument("--registry", default=node, metavar="URL", help="default: the node, %(default)s")
    parser.add_argument("--volume", default="/golem/work", help="a volume of the image (default: %(default)s)")
    parser.add_argument("--command", default=COMMAND, help="run in the volume; it makes answer.txt from letter.txt")
    parser.add_argument("--subnet", default=None, help="default: YAGNA_SUBNET, else public")
    parser.add_argument("--network", default="holesky", help="payment network (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hello-docker-") as folder:
        try:
            return 0 if asyncio.run(Hello(options, Path(folder)).run()) else 1
        except CommandExecutionError as error:
            print(f"the command failed: {error.message}: {error.stderr or ''}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
