"""The projection on a Chroma server, with the ledger in a local folder."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from umr_plugins.errors import InputError, StorageError
from umr_plugins.index.chroma import Projection
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder

COMMAND = Path(sys.executable).with_name("chroma")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, data = free_port(), tmp_path_factory.mktemp("server")
    command = [str(COMMAND), "run", "--host", "127.0.0.1", "--port", str(port), "--path", str(data)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the server ended at once"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_everything_works_over_http(server: str, tmp_path: Path) -> None:
    with Index(server, FakeEncoder(), ledger=tmp_path / "ledger") as index:
        index.add([f"text {row}" for row in range(300)], metadatas=[{"n": row} for row in range(300)])
        assert index.search("text 7", 1)[0].text == "text 7"
        assert index.search("text 7", 5, where={"n": {"$gt": 297}})[0].metadata["n"] in (298, 299)
        assert index.delete(where={"n": 3}) == 1
        assert index.verify().ok
        index.rebuild()
        assert (index.count(), index.verify().ok) == (299, True)
        assert index.info()["server"] == server
        with pytest.raises(InputError, match="open already"):
            Index(tmp_path / "ledger", FakeEncoder())
    with Index(server, ledger=tmp_path / "ledger") as index:
        assert (index.count(), index.verify().ok, index.info()["mended"]) == (299, True, [])
    assert not list((tmp_path / "ledger").glob("*.chroma-*"))


def test_two_clients_of_one_server_do_not_meet(server: str, tmp_path: Path) -> None:
    with (
        Index(server, FakeEncoder(), ledger=tmp_path / "a") as one,
        Index(server, FakeEncoder(8, "other"), ledger=tmp_path / "b") as two,
    ):
        one.add(["x"])
        two.add(["y", "z"])
        assert (one.count(), two.count(), one.verify().ok, two.verify().ok) == (1, 2, True, True)


def test_a_server_that_lost_the_collection_gets_it_again(server: str, tmp_path: Path) -> None:
    with Index(server, FakeEncoder(), ledger=tmp_path / "ledger") as index:
        index.add(["x", "y"])
        projection = index._store.projection
        assert projection is not None
        projection.drop()
        assert index.search("x", 1)[0].text == "x"
    with Index(server, FakeEncoder(), ledger=tmp_path / "ledger") as index:
        name = index._store.ledger.meta("projection") or ""
    other = Projection(server, name)
    other.drop()
    other.close()
    with Index(server, FakeEncoder(), ledger=tmp_path / "ledger") as index:
        assert index.verify().ok
        assert index.info()["mended"] == ["the server no longer has the collection"]


def test_no_server(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StorageError, match="server"):
        Index(url, FakeEncoder(), ledger=tmp_path / "ledger")
    with pytest.raises(StorageError, match="server"):
        Index(url, FakeEncoder(), ledger=tmp_path / "ledger")
    shutil.rmtree(tmp_path / "ledger")
