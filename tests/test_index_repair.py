"""Damage of every kind: what is noticed, what is mended without help, and what a full disk costs."""

from __future__ import annotations

import logging
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umr_plugins.errors import StorageError, UMRError
from umr_plugins.index import store as store_module
from umr_plugins.index.catch_up import probe
from umr_plugins.index.chroma import Projection, ProjectionError
from umr_plugins.index.index import Index
from umr_plugins.index.ledger import Ledger
from umr_plugins.testing import FakeEncoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of 200 items, closed."""
    with Index(tmp_path / "db", FakeEncoder()) as index:
        fill(index, 200)
    return tmp_path / "db"


def fill(index: Index, count: int) -> None:
    index.add(
        [f"text {row}" for row in range(count)],
        ids=[str(row) for row in range(count)],
        metadatas=[{"n": row} for row in range(count)],
    )


def chroma_folder(folder: Path) -> Path:
    [found] = folder.glob("umr.chroma-*")
    return found


def projection_of(index: Index) -> Projection:
    projection = index._store.projection
    assert projection is not None
    return projection


def is_whole(index: Index, count: int = 200) -> bool:
    """Everything is in order and the texts below `count` are found."""
    report = index.verify()
    assert report.ok, report.problems
    for row in range(0, count, 17):
        assert index.search(f"text {row}", 1)[0].id == str(row)
    assert report.items == index.count()
    return True


def test_a_clean_store_raises_no_alarm(folder: Path) -> None:
    before = chroma_folder(folder)
    for _ in range(3):
        with Index(folder, FakeEncoder()) as index:
            assert is_whole(index)
            assert index.info()["mended"] == []
    assert chroma_folder(folder) == before


def missing(projection: Projection) -> None:
    projection.delete([7])


def orphan(projection: Projection) -> None:
    projection.upsert([9999], np.ones((1, 16), np.float32) / 4, [{"modality": "text"}])


def stale(projection: Projection) -> None:
    vector = np.ones((1, 16), np.float32) / 4
    projection.upsert([7], vector, [{"modality": "text", "n": 6}])


def swapped(projection: Projection) -> None:
    (one, first, a), (two, second, b) = projection.read([7, 8])
    projection.upsert([one, two], np.stack([second, first]), [a, b])


def other_metadata(projection: Projection) -> None:
    [(seq, vector, _)] = projection.read([7])
    projection.upsert([seq], vector[None], [{"modality": "text", "n": 777}])


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (missing, "missing"),
        (orphan, "orphaned"),
        (stale, "wrong"),
        (swapped, "wrong"),
        (other_metadata, "wrong"),
    ],
)
def test_verify_finds_each_drift_and_rebuild_mends_it(
    folder: Path, damage: Callable[[Projection], None], field: str
) -> None:
    with Index(folder, FakeEncoder()) as index:
        damage(projection_of(index))
        report = index.verify()
        assert not report.ok
        assert getattr(report, field) == (("9999",) if field == "orphaned" else report.wrong or ("6",))
        assert any("rebuild()" in line for line in report.problems)
        index.rebuild()
        assert is_whole(index)


def test_two_swapped_vectors_are_both_named(folder: Path) -> None:
    with Index(folder, FakeEncoder()) as index:
        swapped(projection_of(index))
        assert sorted(index.verify().wrong) == ["6", "7"]


def test_searches_do_not_believe_a_projection_that_drifted(folder: Path) -> None:
    """Scores and filters come from the ledger, so a wrong row can hide an item but never mislead."""
    with Index(folder, FakeEncoder()) as index:
        orphan(projection_of(index))
        other_metadata(projection_of(index))
        assert {hit.id for hit in index.search("text 6", 200)} <= {str(row) for row in range(200)}
        assert index.search("text 6", 5, where={"n": 777}) == []
        assert index.get(["6"])[0].metadata == {"n": 6}


def test_rebuild_runs_no_model(folder: Path) -> None:
    with Index(folder) as index:  # no encoder, and a fake can't be recreated
        index.rebuild()
        assert index.verify().ok


@pytest.mark.parametrize("what", ["deleted", "emptied", "garbage"])
def test_a_lost_chroma_folder_comes_back_by_opening(folder: Path, what: str) -> None:
    chroma = chroma_folder(folder)
    if what == "garbage":
        for path in chroma.rglob("*"):
            if path.is_file():
                path.write_bytes(b"garbage" * 500)
    else:
        shutil.rmtree(chroma)
    if what == "emptied":
        chroma.mkdir()
    with Index(folder, FakeEncoder()) as index:
        assert len(index.info()["mended"]) == 1
        assert is_whole(index)
    assert len(list(folder.glob("umr.chroma-*"))) == 1


def test_the_ledger_alone_is_enough(folder: Path, tmp_path: Path) -> None:
    with Index(folder, FakeEncoder()):
        pass
    (tmp_path / "copy").mkdir()
    for path in folder.glob("umr.ledger.sqlite3*"):
        shutil.copy(path, tmp_path / "copy")
    with Index(tmp_path / "copy", FakeEncoder()) as index:
        assert is_whole(index)


@pytest.fixture(scope="module")
def persisted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index so large that Chroma has written its graph files, closed."""
    folder = tmp_path_factory.mktemp("large") / "db"
    with Index(folder, FakeEncoder()) as index:
        fill(index, 1300)
    assert list(chroma_folder(folder).glob("*/data_level0.bin"))
    return folder


def graph_and_log(folder: Path) -> list[Path]:
    return sorted(path for path in chroma_folder(folder).rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_and_cut_files_are_noticed_and_mended(persisted: Path, tmp_path: Path, seed: int) -> None:
    shutil.copytree(persisted, tmp_path / "db")
    chance = random.Random(seed)
    path = graph_and_log(tmp_path / "db")[seed % len(graph_and_log(tmp_path / "db"))]
    data = bytearray(path.read_bytes())
    if seed % 2:
        data = data[: chance.randrange(len(data))]
    else:
        for _ in range(8):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    with Index(tmp_path / "db", FakeEncoder()) as index:
        report = index.verify()
        if not report.ok:  # damage that opening can't see is found by verify and mended by rebuild
            index.rebuild()
        assert is_whole(index, 1300)


def test_the_probe_reads_a_good_folder_and_survives_a_bad_one(persisted: Path, tmp_path: Path) -> None:
    shutil.copytree(persisted, tmp_path / "db")
    with Index(tmp_path / "db", FakeEncoder()) as index:
        name = projection_of(index).name
    ledger = Ledger(tmp_path / "db" / "umr.ledger.sqlite3")
    assert probe(ledger, chroma_folder(tmp_path / "db"), name) is None
    assert "exit status" in (probe(ledger, chroma_folder(tmp_path / "db"), "nobody") or "")
    [pickle] = chroma_folder(tmp_path / "db").glob("*/index_metadata.pickle")
    pickle.write_bytes(b"")  # what a kill during Chroma's own persisting leaves
    assert probe(ledger, chroma_folder(tmp_path / "db"), name) is not None
    ledger.close()
    with Index(tmp_path / "db", FakeEncoder()) as index:
        assert is_whole(index, 1300)


class Broken:
    """A projection whose every call fails, like a wedged Chroma collection."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        def fails(*_: Any, **__: Any) -> Any:
            raise ProjectionError("Failed to apply logs to the hnsw segment writer")

        return (lambda: None) if name == "close" else fails


def test_a_projection_that_wedges_is_replaced_while_searching_and_adding(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Index(folder, FakeEncoder()) as index:
        for use in (lambda: index.search("text 3", 1), lambda: index.add(["more"], ids=["more"])):
            name, before = projection_of(index).name, len(index.info()["mended"])
            projection_of(index).close()
            index._store._projection = Broken(name)  # type: ignore[assignment]
            with caplog.at_level(logging.WARNING):
                use()
            assert "making the projection anew" in caplog.text
            assert len(index.info()["mended"]) == before + 1
            assert projection_of(index).name != name
        assert is_whole(index)


def test_many_threads_meet_a_wedged_projection(folder: Path) -> None:
    with Index(folder, FakeEncoder()) as index:
        name = projection_of(index).name
        projection_of(index).close()
        index._store._projection = Broken(name)  # type: ignore[assignment]
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda row=row: found.append(index.search(f"text {row}", 1)[0].id))
            for row in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [str(row) for row in range(8)]
        assert len(index.info()["mended"]) == 1


def test_a_crash_inside_chroma_while_catching_up_costs_the_owner_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child that is first to write dies; the owner makes the projection anew."""
    with sqlite3.connect(folder / "umr.ledger.sqlite3") as database:
        database.execute("DELETE FROM meta WHERE key = 'closed'")
        database.execute("UPDATE items SET state = 0 WHERE seq > 150")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from umr_plugins.index.chroma import Projection\n"
        "Projection.upsert = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    paths = [str(tmp_path / "hook"), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with Index(folder, FakeEncoder()) as index:
        [reason] = index.info()["mended"]
        assert "exit status -11" in reason
        assert is_whole(index)


def test_what_a_kill_left_is_caught_up_by_the_child(folder: Path) -> None:
    with sqlite3.connect(folder / "umr.ledger.sqlite3") as database:
        database.execute("DELETE FROM meta WHERE key = 'closed'")
        database.execute("UPDATE items SET state = 0 WHERE seq > 150")
    ledger = Ledger(folder / "umr.ledger.sqlite3")
    assert probe(ledger, chroma_folder(folder), ledger.meta("projection") or "") is None
    assert ledger.behind() == (0, 0)
    ledger.close()
    with Index(folder, FakeEncoder()) as index:
        assert index.info()["mended"] == []
        assert is_whole(index)


def fails_to_write(*_: Any, **__: Any) -> None:
    raise ProjectionError("Chroma can't write: database or disk is full")


def test_when_chroma_can_not_be_written_the_ledger_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Index(folder, FakeEncoder()) as index:
        with monkeypatch.context() as full:
            full.setattr(Projection, "upsert", fails_to_write)
            full.setattr(Projection, "query", fails_to_write)
            with pytest.raises(StorageError, match="nothing committed is lost"):
                index.add(["while full"], ids=["new"])
            assert index.search("while full", 1)[0].id == "new"
            assert index.search("text 9", 1, where={"n": {"$gt": 8}})[0].id == "9"
            assert not index.verify().ok
            assert index.info()["behind"] == 1
        index.add(["space again"], ids=["again"])
        assert is_whole(index)


def test_an_index_opens_for_searching_though_its_projection_can_not_be_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(chroma_folder(folder))
    with monkeypatch.context() as full:
        full.setattr(Projection, "upsert", fails_to_write)
        with Index(folder, FakeEncoder()) as index:
            assert index.search("text 9", 1)[0].id == "9"
            assert not index.verify().ok
    with Index(folder, FakeEncoder()) as index:
        assert is_whole(index)


def test_a_full_disk_under_the_ledger(folder: Path) -> None:
    with Index(folder, FakeEncoder()) as index:
        ledger = index._store.ledger
        [(pages,)] = ledger.read("PRAGMA page_count")
        ledger.read(f"PRAGMA max_page_count = {pages}")  # SQLite answers as on a full disk
        with pytest.raises(StorageError, match="disk is full"):
            fill_more(index)
        assert index.count() == 200
        assert is_whole(index)
        ledger.read("PRAGMA max_page_count = 1073741823")
        fill_more(index)
        assert is_whole(index)
        assert index.count() == 700


def fill_more(index: Index) -> None:
    index.add([f"more {row}" * 50 for row in range(500)], ids=[f"m{row}" for row in range(500)])


def test_the_folder_is_deleted_under_us(folder: Path) -> None:
    with Index(folder, FakeEncoder()) as index:
        shutil.rmtree(folder)
        with pytest.raises(StorageError, match="deleted or replaced"):
            index.add(["x"])
        with pytest.raises(StorageError, match="deleted or replaced"):
            index.rebuild()
    assert not list(folder.parent.glob("db/*chroma*"))
    with Index(folder, FakeEncoder()) as index:
        assert index.count() == 0
        index.add(["x"])
        assert index.search("x", 1)[0].text == "x"


class Killed(BaseException):
    """Ends a run the way a kill does: nothing that catches errors may catch it."""


def run(index: Index, folder: Path) -> None:
    """A bit of everything that writes."""
    fill(index, 40)
    index.add(["replaced"], ids=["3"], metadatas=[{"n": 3}])
    index.add_folder(folder)
    (folder / "a.txt").write_text("second version")
    (folder / "b.txt").unlink()
    index.add_folder(folder)
    index.delete(["5"])
    index.rebuild()


def write_source(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"file {name}")
    (folder / "long.txt").write_text("\n\n".join(f"{number} " * 400 for number in range(40)))


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, after: bool) -> list[int]:
    """Make write number `step` the last one; returns the counter."""
    count = [0]

    def wrap(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] > step or (count[0] == step and not after):
                raise Killed
            result = real(*arguments, **options)
            if count[0] == step:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, counted)

    for name in ("upsert", "delete"):
        wrap(Projection, name)
    wrap(Ledger, "_commit")
    return count


def run_until(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int, after: bool) -> int:
    write_source(tmp_path / "source")
    with monkeypatch.context() as patch:
        count = crash_at(patch, step, after)
        try:
            index = Index(tmp_path / "db", FakeEncoder())
            try:
                run(index, tmp_path / "source")
            finally:
                abandon(index)
        except Killed:
            forget_owners()
    return count[0]


def abandon(index: Index) -> None:
    """What the kernel does at a kill: files are closed, nothing is tidied."""
    projection = index._store._projection
    if projection is not None:
        projection._client.close()
    index._store.ledger._db.close()
    forget_owners()


def forget_owners() -> None:
    from umr_plugins.index import owners

    owners._stores.clear()
    for lock, _ in owners._locks.values():
        lock.release()
    owners._locks.clear()


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_every_write_may_be_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    monkeypatch.setattr(store_module, "probe", lambda *_: None)  # a process for each of some fifty openings
    total = run_until(monkeypatch, tmp_path, 10**9, after)
    assert total > 25
    for step in range(1, total + 1):
        shutil.rmtree(tmp_path / "db")
        run_until(monkeypatch, tmp_path, step, after)
        with Index(tmp_path / "db", FakeEncoder()) as index:
            report = index.verify()
            assert report.ok, (step, report.problems)
            write_source(tmp_path / "source")
            run(index, tmp_path / "source")
            assert index.verify().ok, step
            assert index.count() == 39 + 3 - 1 + 40, step
            assert index.search("replaced", 1)[0].id == "3"


def test_unexpected_errors_of_sqlite_are_storage_errors(folder: Path) -> None:
    with Index(folder, FakeEncoder()) as index:
        index._store.ledger._db.execute("DROP TABLE tombstones")
        with pytest.raises(UMRError, match="ledger"):
            index.delete(["1"])
        assert isinstance(index._store.ledger._db, sqlite3.Connection)


def test_searches_go_on_during_a_rebuild(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Index(folder, FakeEncoder()) as index:
        real, found = Projection.upsert, []

        def slow(self: Projection, *arguments: Any) -> None:
            searcher = threading.Thread(target=lambda: found.append(index.search("text 3", 1)[0].id))
            searcher.start()
            searcher.join(30)  # would be over only when the search did not wait for the rebuild
            assert not searcher.is_alive()
            real(self, *arguments)

        monkeypatch.setattr(Projection, "upsert", slow)
        index.rebuild()
        assert found == ["3"]
