"""Who may open an index, and with which model."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from umr_plugins.errors import FingerprintError, IndexLockedError, InputError, StorageError
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder

HOLD = """
import sys
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder
index = Index(sys.argv[1], FakeEncoder())
index.add(["from the child"])
print("ready", flush=True)
sys.stdin.read()
"""

TRY = """
import sys, time
from umr_plugins.errors import IndexLockedError
from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder
print("go", flush=True)
sys.stdin.readline()
try:
    index = Index(sys.argv[1], FakeEncoder())
except IndexLockedError as error:
    print("locked", flush=True)
else:
    index.add([f"by {sys.argv[2]}"])
    print("owner", flush=True)
    sys.stdin.read()
    index.close()
"""


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate()
    assert process.returncode == 0


def test_another_process_is_refused_at_once_and_told_who_has_it(tmp_path: Path) -> None:
    holder = child(HOLD, str(tmp_path / "db"))
    try:
        assert line(holder) == "ready"
        begun = time.monotonic()
        with pytest.raises(IndexLockedError, match=f"pid {holder.pid}"):
            Index(tmp_path / "db", FakeEncoder())
        assert time.monotonic() - begun < 1
    finally:
        holder.kill()
        holder.communicate()
    with Index(tmp_path / "db", FakeEncoder()) as index:  # a killed owner leaves no stale lock
        assert index.get(index.ids())[0].text == "from the child"
        assert index.verify().ok


def test_a_race_has_exactly_one_owner(tmp_path: Path) -> None:
    for attempt in range(3):
        racers = [child(TRY, str(tmp_path / "db"), f"{attempt} {number}") for number in range(3)]
        for racer in racers:
            assert line(racer) == "go"
        for racer in racers:
            tell(racer, "\n")
        assert sorted(line(racer) for racer in racers) == ["locked", "locked", "owner"]
        for racer in racers:
            finish(racer)
    with Index(tmp_path / "db", FakeEncoder()) as index:
        assert (index.count(), index.verify().ok) == (3, True)


def test_the_same_process_shares_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = Index("db", FakeEncoder())
    second = Index(tmp_path / "db", FakeEncoder())
    second.add(["x"])
    assert first.search("x", 1)[0].text == "x"
    first.close()
    assert second.count() == 1
    (tmp_path / "link").symlink_to(tmp_path / "db")
    with Index(tmp_path / "link") as third:
        third.add(["y"], vectors=[[1.0] + [0.0] * 15])
    assert second.count() == 2
    second.close()
    probe = child(HOLD, str(tmp_path / "db"))
    assert line(probe) == "ready"  # the last close gave the folder free
    tell(probe, "")
    finish(probe)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    with Index(tmp_path / "db", FakeEncoder()) as index:
        index.add(["x"])
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = []
            for attempt in (lambda: index.search("x"), lambda: Index(tmp_path / "db", FakeEncoder())):
                try:
                    attempt()
                    said.append("allowed")
                except IndexLockedError:
                    said.append("refused")
                except BaseException as error:
                    said.append(repr(error))
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.close(writer)
        said = json.loads(os.read(reader, 4096))
        os.close(reader)
        os.waitpid(pid, 0)
        assert said == ["refused", "refused"]
        assert index.search("x", 1)[0].text == "x"


def test_two_collections_in_one_folder(tmp_path: Path) -> None:
    with (
        Index(tmp_path, FakeEncoder(), collection="texts") as texts,
        Index(tmp_path, FakeEncoder(8, "other"), collection="pictures") as pictures,
    ):
        texts.add(["x"])
        pictures.add(["y", "z"])
    assert Index.exists(tmp_path, "texts")
    assert not Index.exists(tmp_path)
    with Index(tmp_path, collection="pictures") as pictures:
        assert pictures.count() == 2
    with pytest.raises(StorageError, match=r"collections \['pictures', 'texts'\]"):
        Index(tmp_path)


def test_what_is_no_index_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"not an index and not empty.*x\.jpg"):
        Index(tmp_path / "photos", FakeEncoder())
    with pytest.raises(StorageError, match="there is no index"):
        Index(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="can't use"):
        Index(tmp_path / "file", FakeEncoder())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "photos", "x.jpg"]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("", {}, "empty"),
        ("http://localhost:8000", {}, "ledger needs a local folder"),
        ("ftp://localhost", {"ledger": "x"}, "looks like"),
        ("http://localhost:8000/api", {"ledger": "x"}, "looks like"),
        ("db", {"ledger": "x"}, "ledger= is for server URLs"),
        ("db", {"collection": "a/b"}, "collection"),
        ("db", {"collection": "x"}, "2 to 62"),
        ("db", {"encoder": 7}, "encoder must be"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        Index(path, **{"encoder": FakeEncoder(), **options})


def ledger(folder: Path) -> Path:
    return folder / "umr.ledger.sqlite3"


def test_newer_foreign_and_damaged_ledgers_are_named(tmp_path: Path) -> None:
    Index(tmp_path / "db", FakeEncoder()).close()
    with sqlite3.connect(ledger(tmp_path / "db")) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StorageError, match=r"schema 99.*pip install -U"):
        Index(tmp_path / "db", FakeEncoder())
    (tmp_path / "other").mkdir()
    with sqlite3.connect(ledger(tmp_path / "other")) as database:
        database.execute("CREATE TABLE songs (name)")
    database.close()
    with pytest.raises(StorageError, match="not an index ledger"):
        Index(tmp_path / "other", FakeEncoder())
    ledger(tmp_path / "other").write_bytes(b"no database " * 1000)
    with pytest.raises(StorageError, match="damaged"):
        Index(tmp_path / "other", FakeEncoder())


def test_a_folder_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index(tmp_path / "db", FakeEncoder()).close()
    real = os.open

    def denied(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_RDWR and str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StorageError, match="can't write in the index folder"):
        Index(tmp_path / "db", FakeEncoder())


def test_another_model_is_refused_with_both_named(tmp_path: Path) -> None:
    with Index(tmp_path / "db", FakeEncoder()) as index:
        index.add(["x"])
    with pytest.raises(FingerprintError) as caught:
        Index(tmp_path / "db", FakeEncoder(name="another"))
    for part in ("made with fake", "fake-16", "you gave another", "another-16", "make a new index"):
        assert part in str(caught.value)
    with pytest.raises(FingerprintError, match="16 dimensions, these have 8"):
        Index(tmp_path / "db", FakeEncoder(8))
    with Index(tmp_path / "db", FakeEncoder()) as index:  # the failed openings freed the lock
        assert index.search("x", 1)[0].score == pytest.approx(1, abs=1e-6)


def test_an_empty_index_takes_another_model(tmp_path: Path) -> None:
    Index(tmp_path / "db", FakeEncoder()).close()
    with Index(tmp_path / "db", FakeEncoder(8, "better")) as index:
        index.add(["x"])
        assert (index.dim, index.info()["fingerprint"], index.info()["model"]) == (8, "better-8", "better")


def test_another_dtype_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = FakeEncoder()
    encoder.dtype = "torch.float32"  # type: ignore[attr-defined]
    with Index(tmp_path / "db", encoder) as index:
        index.add(["x"])
    encoder.dtype = "torch.bfloat16"  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING), Index(tmp_path / "db", encoder) as index:
        assert index.info()["dtype"] == "float32"
    assert "made in float32, this model runs in bfloat16" in caplog.text


def test_vectors_without_any_encoder(tmp_path: Path) -> None:
    with Index(tmp_path / "db", create=True) as index:
        assert (index.dim, index.search_vector([1.0, 0.0])) == (None, [])
        index.add(["a", "b"], ids=["a", "b"], vectors=[[1.0, 0.0], [0.0, 1.0]])
        assert index.search_vector([0.1, 0.9], 1)[0].id == "b"
        with pytest.raises(FingerprintError, match="2 dimensions, these have 3"):
            index.add(["c"], vectors=[[1.0, 0.0, 0.0]])
        with pytest.raises(InputError, match="needs its model"):
            index.search("words")
    with Index(tmp_path / "db", FakeEncoder(2)) as index:  # same length: trusted, and logged
        assert index.info()["fingerprint"] == "fake-2"


def test_a_recorded_model_is_only_loaded_from_places_that_are_known(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    encoder.name = "somebody/unknown-model"
    with Index(tmp_path / "db", encoder) as index:
        index.add(["x"])
    with Index(tmp_path / "db") as index, pytest.raises(InputError, match="somebody/unknown-model"):
        index.search("x")


def test_info(tmp_path: Path) -> None:
    with Index(tmp_path / "db", FakeEncoder()) as index:
        index.add(["x"])
        facts = index.info()
    assert json.loads(json.dumps(facts)) == facts
    assert {
        key: facts[key] for key in ("items", "files", "dim", "model", "behind", "demo", "collection")
    } == {
        **{"items": 1, "files": 0, "dim": 16, "model": "fake"},
        **{"behind": 0, "demo": False, "collection": "umr"},
    }
