"""A power cut: what was not forced to the disk is gone. What the dev chain has acknowledged, and what a payer has signed, is not.

The directory lies on a file system in a file. A copy of that file has what reached the disk; what the kernel still held back
in memory for it is lost, as the first test shows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from chain_support import GLM, OURS, Client, Lab, address_of, devchain, key_of, spawn_devchain
from worlds.patience import patience

from golem.chain.devchain import url_of
from golem.chain.rows import Attempt, TransferBatch, TxRow
from golem.chain.store import Store

SIZE_BYTES = 64 << 20


@contextmanager
def disk(image: Path) -> Iterator[Path]:
    """The file system in `image`, mounted beside it."""
    point = image.with_suffix(".mounted")
    point.mkdir()
    done = subprocess.run(["mount", "-o", "loop", str(image), str(point)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a disk: {done.stderr.strip()}")
    try:
        yield point
    finally:
        limit = time.monotonic() + patience(20)
        while subprocess.run(["umount", str(point)], capture_output=True).returncode:  # a process is about to end
            assert time.monotonic() < limit, f"{point} is busy"
            time.sleep(0.05)


def cut(image: Path, name: str) -> Path:
    """The disk as it is after a power cut now."""
    after = image.with_name(f"{name}.ext4")
    shutil.copyfile(image, after)
    return after


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root (mounts a disk)")
    image = tmp_path / "disk.ext4"
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    return image


def test_a_power_cut_takes_what_was_not_forced_to_the_disk(image: Path) -> None:
    with disk(image) as point:
        with (point / "forced").open("w") as file:
            file.write("forced")
            file.flush()
            os.fsync(file.fileno())
        (point / "written").write_text("written")
        after = cut(image, "after")
    with disk(after) as point:
        assert (point / "forced").read_text() == "forced"
        assert not (point / "written").exists() or (point / "written").read_text() == ""


def test_the_dev_chain_keeps_what_it_has_acknowledged(image: Path) -> None:
    key, payee = key_of("power cut"), address_of("power cut payee")
    with disk(image) as point:
        where = point / "chain"
        process = spawn_devchain(where, "--block-time", "1000")
        try:
            while (url := trio.run(url_of, where)) is None:
                assert process.poll() is None
            lab = Lab(url, "devchain")
            lab.gas_money(key.address)
            sent = lab.send(key, payee, value=5, gas=21_000)
            in_mempool = cut(image, "mempool")
            lab.mine()
            in_block = cut(image, "block")
        finally:
            process.kill()
            process.wait(patience(10))
    for after, block in ((in_mempool, False), (in_block, True)):
        with disk(after) as point, devchain(point / "chain", "--block-time", "1000") as url:
            client = Client(url)
            known = client.call("eth_getTransactionByHash", sent)
            assert known is not None, after.name
            assert (known["blockNumber"] is not None) == block
            if block:
                assert client.call("eth_getTransactionReceipt", sent)["status"] == "0x1"
                assert client.number("eth_getBalance", payee) == 5
    OURS.clear()


def test_what_a_payer_has_signed_is_on_the_disk_before_it_is_sent(image: Path) -> None:
    account, payee = "1337/payer", address_of("power cut payee")
    with disk(image) as point:
        store = Store(point / "chain.db", account)
        store.add_batch(TransferBatch("b1", ((payee, GLM),), (("o1",),)))
        gathered = cut(image, "gathered")
        tx = TxRow(0, 0, "pay", "b1", payee, b"", 21_000, GLM, "signed", 0, "", "", 0, 0)
        store.add_tx(tx, Attempt("0x12", 0, b"bytes", 1, 1, 0.0, 0, 0))
        signed = cut(image, "signed")
        store.close()
    with disk(gathered) as point:
        store = Store(point / "chain.db", account)
        assert [row.batch.batch_id for row in store.queued()] == ["b1"]
        store.close()
    with disk(signed) as point:
        store = Store(point / "chain.db", account)
        (found,) = store.open()
        assert [attempt.raw for attempt in store.attempts(found.id)] == [b"bytes"]
        store.close()
