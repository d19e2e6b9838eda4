"""No folder of this machine is in a text that crosses to a requestor: file names only."""

from __future__ import annotations

from pathlib import Path

import pytest

from golem.exeunit import places
from golem.exeunit.places import hidden, remember


@pytest.fixture(autouse=True)
def _own_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "_ours", set())
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "real")
    remember(tmp_path / "data" / "work", Path("/var/lib/golem/exe-unit"), Path("/run/x/docker.sock"), Path("/"), Path("/tmp"))


OVERLAY = "/srv/docker/100000.100000/overlay2/5ebbb9d696185bc8df71d47fd1a14ecac749f188a91287ba67841e97ec7dc153"


@pytest.mark.parametrize(("text", "shown"), [
    (f"Docker Engine: source {OVERLAY}/merged/home/pw is not directory", "Docker Engine: source /home/pw is not directory"),
    (f"mkdir {OVERLAY}/diff/x: no space", "mkdir x: no space"),
    ('mount "/srv/docker/volumes/golem-a-1/_data": busy', 'mount "_data": busy'),
    ("/srv/docker/containers/" + "0123456789abcdef" * 4 + "/hostname: gone", "hostname: gone"),
    ("cannot read /var/lib/golem/exe-unit/cache/images/sha3-224-ab: No such file", "cannot read sha3-224-ab: No such file"),
    ("[Errno 28] No space left on device: '/var/lib/golem/exe-unit'", "[Errno 28] No space left on device: 'exe-unit'"),
    ("the Docker Engine at /run/x/docker.sock does not answer: x", "the Docker Engine at docker.sock does not answer: x"),
    ("a volume cannot be at /etc/hosts", "a volume cannot be at /etc/hosts"),
    ("/tmp/x is not in a volume", "/tmp/x is not in a volume"),
    ("GET http://h/volumes answered 404", "GET http://h/volumes answered 404"),
    ("GET http://h/a/image/x.gvmi answered 404", "GET http://h/a/image/x.gvmi answered 404"),
    ("/data/volumes/x/y is missing", "/data/volumes/x/y is missing"),
    ("/golem/output/volumes is a directory", "/golem/output/volumes is a directory"),
])  # fmt: skip
def test_texts(text: str, shown: str) -> None:
    assert hidden(text) == shown


def test_where_links_lead(tmp_path: Path) -> None:
    for folder in ("data", "real"):
        assert hidden(f"cannot make {tmp_path}/{folder}/work/deployment-1/storage: x") == "cannot make storage: x"
