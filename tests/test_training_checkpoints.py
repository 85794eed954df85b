"""Checkpoints are whole or not there, and a run's folder goes on with its own recipe and data only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from umr_plugins.errors import CheckpointError, InputError, StorageError
from umr_plugins.index import lock
from umr_plugins.training import checkpoints
from umr_plugins.training.checkpoints import MANIFEST
from umr_plugins.training.folder import RUN, RunFolder, step_of
from umr_plugins.training.reading import make_recipe
from umr_plugins.training.recipe import FREE, Recipe

FILES = {
    "trained.safetensors": b"weights " * 40,
    "state.json": b'{"step": 1}',
    "rng/0.pt": b"\0\1\2",
    "none": b"",
}
FACTS = {"step": 0, "versions": {"torch": "2"}}


def written(folder: Path, step: int, mark: bytes = b"") -> Path:
    """A checkpoint that is complete but has not got its name."""
    path = checkpoints.aside(folder, step) / f"checkpoint-{step}"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content + mark if content else b"")
    return path


def publish(folder: Path, step: int, mark: bytes = b"") -> Path:
    path = checkpoints.publish(
        written(folder, step, mark), folder / f"checkpoint-{step}", {**FACTS, "step": step}
    )
    checkpoints.aside(folder, step).rmdir()
    return path


def content(path: Path) -> dict[str, bytes]:
    return {
        each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints."""
    for step in (9, 100, 20):
        publish(tmp_path, step)
    return tmp_path


# --- what is whole ------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_was_written_and_says_so(folder: Path) -> None:
    path = folder / "checkpoint-100"
    found = content(path)
    manifest = checkpoints.check(path)
    assert {name: found[name] for name in FILES} == FILES
    assert set(found) == {*FILES, MANIFEST}
    assert manifest["files"].keys() == FILES.keys()
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(each) for name, each in FILES.items()
    }
    assert (manifest["step"], manifest["versions"]) == (100, {"torch": "2"})


def test_the_newest_is_the_one_of_the_highest_step(folder: Path) -> None:
    for other in ("checkpoint-200.old", "my-checkpoint-300", "checkpoint-x", "tmp-checkpoint-400"):
        (folder / other).mkdir()
    (folder / "checkpoint-500").write_text("no folder")
    assert [path.name for path in checkpoints.all_in(folder)] == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
    ]
    assert checkpoints.newest_valid(folder) == (folder / "checkpoint-100", [])
    assert [step_of(path) for path in checkpoints.all_in(folder)] == [100, 20, 9]


def test_where_there_is_no_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert checkpoints.newest_valid(tmp_path) == (None, [])
    assert checkpoints.newest_valid(tmp_path / "none") == (None, [])
    checkpoints.clean(tmp_path / "none")
    checkpoints.rotate(tmp_path / "none", 1)
    assert checkpoints.put_away(tmp_path / "none", None) == []


def flip(path: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


def flip_first(path: Path) -> None:
    flip(path, 0, 7)


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    flip(path, -1, 3)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


WITH_BYTES = [flip_first, flip_middle, flip_last, truncate, empty]
DAMAGES = [
    *[(name, damage) for name in (*FILES, MANIFEST) if name != "none" for damage in WITH_BYTES],
    *[(name, damage) for name in (*FILES, MANIFEST) for damage in (append, Path.unlink, to_folder)],
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_checkpoint_with_a_damaged_file_is_named_and_the_one_before_is_used(
    folder: Path, name: str, damage: Callable[[Path], object]
) -> None:
    path = folder / "checkpoint-100" / name
    damage(path)
    found, problems = checkpoints.newest_valid(folder)
    assert found == folder / "checkpoint-20"
    (problem,) = problems
    assert str(folder / "checkpoint-100") in problem
    assert name in problem
    with pytest.raises(CheckpointError):
        checkpoints.check(folder / "checkpoint-100")


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(folder: Path) -> None:
    path = folder / "checkpoint-100" / MANIFEST
    raw = path.read_bytes()
    assert len(raw) > 500
    for place in range(len(raw)):
        flip(path, place, place % 8)
        with pytest.raises(CheckpointError, match="checkpoint-100"):
            checkpoints.check(path.parent)
        path.write_bytes(raw)
    checkpoints.check(path.parent)


@pytest.mark.parametrize(
    "name", ["extra.bin", "rng/extra.pt", "new/extra.pt", "rng/manifest.json", ".hidden"]
)
def test_a_file_that_was_added_is_named(folder: Path, name: str) -> None:
    path = folder / "checkpoint-100" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    assert checkpoints.newest_valid(folder) == (folder / "checkpoint-20", [f"{path} was added later"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"files": []}',
        '{"files": {}, "sha256": ""}',
        '{"files": {"a": 1}, "sha256": ""}',
        "\udcff",
    ],
)
def test_a_manifest_that_is_none_is_named(folder: Path, text: str) -> None:
    path = folder / "checkpoint-100" / MANIFEST
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    found, (problem,) = checkpoints.newest_valid(folder)
    assert found == folder / "checkpoint-20"
    assert problem.startswith(str(path))


def test_a_file_that_can_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoints._sha256

    def broken(path: Path) -> str:
        if path == folder / "checkpoint-100/rng/0.pt":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoints, "_sha256", broken)
    found, (problem,) = checkpoints.newest_valid(folder)
    assert found == folder / "checkpoint-20"
    assert problem.startswith(f"{folder}/checkpoint-100/rng/0.pt can't be read")


def test_every_damaged_one_is_named(folder: Path) -> None:
    for step in (100, 20, 9):
        flip_first(folder / f"checkpoint-{step}/state.json")
    found, problems = checkpoints.newest_valid(folder)
    assert found is None
    assert [f"checkpoint-{step}/state.json is not as it was written" in problem
            for step, problem in zip((100, 20, 9), problems, strict=True)] == [True] * 3  # fmt: skip


def test_only_the_newest_are_kept(folder: Path) -> None:
    checkpoints.rotate(folder, 5)
    assert len(checkpoints.all_in(folder)) == 3
    checkpoints.rotate(folder, 2)
    assert [path.name for path in checkpoints.all_in(folder)] == ["checkpoint-100", "checkpoint-20"]
    checkpoints.rotate(folder, 1)
    assert checkpoints.newest_valid(folder) == (folder / "checkpoint-100", [])
    assert [path.name for path in folder.iterdir()] == ["checkpoint-100"]


def test_damaged_ones_are_put_away_so_that_none_is_kept_in_place_of_a_whole_one(folder: Path) -> None:
    flip_first(folder / "checkpoint-100/state.json")
    before = content(folder / "checkpoint-100")
    found, _ = checkpoints.newest_valid(folder)
    assert checkpoints.put_away(folder, found) == [folder / "damaged-checkpoint-100"]
    assert content(folder / "damaged-checkpoint-100") == before
    publish(folder, 30)
    checkpoints.rotate(folder, 1)
    assert checkpoints.newest_valid(folder) == (folder / "checkpoint-30", [])
    assert checkpoints.put_away(folder, folder / "checkpoint-30") == []
    publish(folder, 100, b"again")
    flip_first(folder / "checkpoint-100/rng/0.pt")
    assert checkpoints.put_away(folder, None) == [
        folder / "damaged-checkpoint-100",
        folder / "damaged-checkpoint-30",
    ]
    assert content(folder / "damaged-checkpoint-100") != before


# --- killed at any moment -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Passes every `except Exception`, as a signal passes all."""


CALLS = {"fsync": os, "rename": os, "replace": os, "unlink": os, "rmdir": os, "mkdir": os, "write_text": Path}


@contextmanager
def killed_at(moment: int | None, *, done: bool = False) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Ends what is under way at the n-th change of the disk, before or after it; lists the changes."""
    seen: list[tuple[str, tuple[Any, ...]]] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **others: Any) -> Any:
            last = len(seen) == moment
            seen.append((name, args))
            if last and not done:
                raise Killed
            made = real(*args, **others)
            if last:
                raise Killed
            return made

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, owner in CALLS.items():
            patch.setattr(owner, name, watched(name, getattr(owner, name)))
        try:
            yield seen
        except Killed:
            assert moment is not None


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("done", [False, True])
def test_killed_while_publishing_the_old_one_or_the_new_one_is_whole(
    tmp_path: Path, replaces: bool, done: bool
) -> None:
    begin = tmp_path / "begin"
    publish(begin, 5, b"old") if replaces else publish(begin, 3, b"old")
    old = content(begin / ("checkpoint-5" if replaces else "checkpoint-3"))
    written(begin, 5, b"new")

    def run(moment: int | None, cleaning: int | None = None) -> tuple[Path, int, int]:
        folder = tmp_path / f"{moment}-{cleaning}"
        shutil.copytree(begin, folder)
        path = checkpoints.aside(folder, 5) / "checkpoint-5"
        with killed_at(moment, done=done) as first:
            checkpoints.publish(path, folder / "checkpoint-5", FACTS)
        with killed_at(cleaning, done=done) as second:
            checkpoints.clean(folder)
        if cleaning is not None:
            checkpoints.clean(folder)
        return folder, len(first), len(second)

    folder, moments, _ = run(None)
    new = content(folder / "checkpoint-5")
    assert new["state.json"].endswith(b"new")
    assert moments > 8
    outcomes = set()
    for moment in range(moments):
        *_, times = run(moment)
        for cleaning in (None, *range(times)):
            if cleaning is not None:
                folder, *_ = run(moment, cleaning)
            else:
                folder = tmp_path / f"{moment}-None"
            found, problems = checkpoints.newest_valid(folder)
            assert problems == []
            assert found is not None
            assert content(found) in (old, new)
            assert all(path.name.startswith("checkpoint-") for path in folder.iterdir())
            outcomes.add(content(found) == new)
    assert outcomes == {False, True}


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 5, b"old")
    path, target = written(tmp_path, 5, b"new"), tmp_path / "checkpoint-5"
    old = tmp_path / "tmp-checkpoint-old-checkpoint-5"
    opened: dict[int, Path] = {}
    real = os.open

    def remember(name: Any, *args: Any, **others: Any) -> int:
        handle = real(name, *args, **others)
        if "dir_fd" not in others:
            opened[handle] = Path(name)
        return handle

    monkeypatch.setattr(os, "open", remember)
    with killed_at(None) as seen:
        synced = []

        def sync(handle: int, fsync: Any = os.fsync) -> None:
            synced.append((len(seen), opened[handle]))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", sync)
        checkpoints.publish(path, target, FACTS)
    renames = [
        (place, Path(args[0]), Path(args[1])) for place, (name, args) in enumerate(seen) if name == "rename"
    ]
    assert [each[1:] for each in renames] == [(target, old), (path, target)]
    first = renames[0][0]
    assert {each for place, each in synced if place < first} == {
        path, path / "rng", path / MANIFEST, *(path / name for name in FILES)
    }  # fmt: skip
    assert [each for place, each in synced if place > renames[1][0]] == [tmp_path]
    removed = [place for place, (name, _) in enumerate(seen) if name in ("unlink", "rmdir")]
    assert min(removed) > renames[1][0]
    assert not old.exists()
    manifest = [place for place, (name, _) in enumerate(seen) if name == "write_text"]
    assert len(manifest) == 1
    assert {each for place, each in synced if place < manifest[0]} == {path / name for name in FILES}


# --- the folder of a run ------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "model": "m",
    "data": [{"path": "/data/train.jsonl"}],
    "steps": 8,
    "loss": {"matryoshka": {64: 1.0}},
    "weights": {"sources": {"keep": 1.0}},
}
DATA: list[dict[str, Any]] = [
    {"name": "a", "rows": 3, "sha256": "1"},
    {"name": "b", "rows": 2, "sha256": "2"},
]


def recipe(**changes: Any) -> Recipe:
    return make_recipe({**RECIPE, **changes}, Path("/data"))


class Run(RunFolder):
    """A run's folder, with what it told."""

    def __init__(self, path: Path) -> None:
        self.told: list[str] = []
        super().__init__(path, self.told.append)

    def begin(self, *args: Any) -> Path | None:
        try:
            return super().begin(*args)
        finally:
            self.release()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run that has two checkpoints."""
    path = tmp_path / "out"
    assert Run(path).begin(recipe(), DATA) is None
    for step in (2, 4):
        publish(path / "checkpoints", step)
    return path


def test_a_new_run_writes_what_it_is(tmp_path: Path) -> None:
    for path in (tmp_path / "new", tmp_path / "in/new", tmp_path / "empty"):
        if path.name == "empty":
            path.mkdir()
        run = Run(path)
        assert run.begin(recipe(), DATA) is None
        assert run.told == []
        said = json.loads((path / RUN).read_text())
        assert said == {"recipe": recipe().as_dict(), "data": DATA, "base": {}, "resumed": []}
        assert sorted(each.name for each in path.iterdir()) == [lock.NAME, "checkpoints", RUN]
        assert run.checkpoints == path / "checkpoints"
        assert run.report == path / "report.html"


def test_a_run_goes_on_from_its_newest_checkpoint_and_remembers_where(out: Path) -> None:
    run = Run(out)
    assert run.begin(recipe(), DATA) == out / "checkpoints/checkpoint-4"
    assert run.told == ["going on from checkpoint-4"]
    publish(out / "checkpoints", 6)
    run = Run(out)
    assert run.begin(recipe(), DATA) == out / "checkpoints/checkpoint-6"
    assert run.resumed == [4, 6]
    assert json.loads((out / RUN).read_text())["resumed"] == [4, 6]


def test_a_damaged_checkpoint_is_told_and_put_aside(out: Path) -> None:
    flip_first(out / "checkpoints/checkpoint-4/state.json")
    checkpoints.aside(out / "checkpoints", 6).mkdir()
    run = Run(out)
    assert run.begin(recipe(), DATA) == out / "checkpoints/checkpoint-2"
    first, *rest = run.told
    assert first.startswith(
        f"not used: {out / 'checkpoints/checkpoint-4/state.json'} is not as it was written"
    )
    assert rest == ["kept aside as damaged-checkpoint-4", "going on from checkpoint-2"]
    assert sorted(each.name for each in run.checkpoints.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]
    flip_first(out / "checkpoints/checkpoint-2/state.json")
    run = Run(out)
    assert run.begin(recipe(), DATA) is None
    assert run.told[-1] == "no whole checkpoint is left: starting anew"


def test_two_runs_can_not_share_a_folder(out: Path) -> None:
    first = RunFolder(out, print)
    assert first.begin(recipe(), DATA) is not None
    before = content(out)
    with pytest.raises(InputError, match="another umr train is at work in"):
        RunFolder(out, print).begin(recipe(), DATA)
    assert content(out) == before
    first.release()
    assert Run(out).begin(recipe(), DATA) is not None


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "checkpoints/checkpoint-3/x", "config.json", "run.tmp"]
)
def test_the_folder_of_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run of umr train; give another --out"):
        Run(tmp_path).begin(recipe(), DATA)
    assert content(tmp_path) == {name: b"mine"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="give another --out"):
        Run(tmp_path / "out").begin(recipe(), DATA)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"recipe": {}, "data": []}'])
def test_a_damaged_description_of_the_run_is_refused(out: Path, text: str) -> None:
    (out / RUN).write_text(text)
    with pytest.raises(InputError, match=r"run\.json was not written by umr train, or is damaged"):
        Run(out).begin(recipe(), DATA)
    assert checkpoints.newest_valid(out / "checkpoints")[0] is not None


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"seed": 3}, "seed"),
        ({"steps": None, "epochs": 2.0}, "epochs, steps"),
        (
            {"model": "n", "lora": {"rank": 4}, "optimizer": {"betas": [0.9, 0.9]}},
            "lora.rank, model, optimizer.betas",
        ),
        ({"loss": {"matryoshka": {64: 2.0}}}, "loss.matryoshka.64"),
        ({"loss": {"matryoshka": {32: 1.0}}}, "loss.matryoshka"),
        ({"loss": {}, "keep": 9}, "loss.matryoshka"),
        ({"data": [{"path": "/data/other.jsonl"}]}, "data"),
        ({"trainer": {"fsdp": "full_shard"}}, "trainer"),
        ({"weights": {"sources": {"keep": 2.0}}}, r"weights\.sources\.keep"),
    ],
)
def test_another_recipe_is_refused_by_the_keys_that_changed(
    out: Path, changes: dict[str, Any], keys: str
) -> None:
    before = content(out)
    with pytest.raises(
        InputError, match=rf"another recipe; changed are {keys}\. Go on with the recipe as it was"
    ):
        Run(out).begin(recipe(**changes), DATA)
    assert content(out) == before


def test_free_keys_may_change(out: Path) -> None:
    free = {
        "save_every": 3,
        "keep": 1,
        "log_every": 7,
        "tensorboard": True,
        "max_skipped": 9,
        "device": "cpu",
        "memory": {"chunk_tokens": 9},
    }
    assert free.keys() == FREE
    assert Run(out).begin(recipe(**free), DATA) == out / "checkpoints/checkpoint-4"
    assert json.loads((out / RUN).read_text())["recipe"] == recipe(**free).as_dict()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ([DATA[0], {**DATA[1], "sha256": "3"}], "b"),
        ([{**DATA[0], "rows": 4}, {**DATA[1], "sha256": "3"}], "a, b"),
        (DATA[:1], "b"),
        ([*DATA, {"name": "c", "rows": 1, "sha256": "4"}], "c"),
    ],
)
def test_other_data_are_refused_by_the_sources_that_changed(
    out: Path, data: list[dict[str, Any]], names: str
) -> None:
    before = content(out)
    with pytest.raises(InputError, match=rf"have changed since it was begun: {names}\. Go on with the data"):
        Run(out).begin(recipe(), data)
    assert content(out) == before


def test_before_the_first_checkpoint_recipe_and_data_may_change(tmp_path: Path) -> None:
    Run(tmp_path).begin(recipe(), DATA)
    assert Run(tmp_path).begin(recipe(seed=3), DATA[:1]) is None
    said = json.loads((tmp_path / RUN).read_text())
    assert (said["recipe"]["seed"], said["data"]) == (3, DATA[:1])


def test_a_finished_model_is_not_trained_again(out: Path) -> None:
    (out / "config.json").write_text("{}")
    with pytest.raises(
        InputError, match="holds the finished model of this recipe; there is nothing left to train"
    ):
        Run(out).begin(recipe(), DATA)
    with pytest.raises(InputError, match="another recipe; changed are seed"):
        Run(out).begin(recipe(seed=1), DATA)
    shutil.rmtree(out / "checkpoints")  # to save room
    with pytest.raises(InputError, match="another recipe; changed are seed"):
        Run(out).begin(recipe(seed=1), DATA)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("before", ["new", "begun", "damaged"])
def test_killed_while_beginning_it_begins_again(tmp_path: Path, before: str, done: bool) -> None:
    def prepared(name: str) -> Run:
        path = tmp_path / name
        if before != "new":
            Run(path).begin(recipe(), DATA)
            for step in (2, 4):
                publish(path / "checkpoints", step)
        if before == "damaged":
            flip_first(path / "checkpoints/checkpoint-4/state.json")
        return Run(path)

    with killed_at(None) as seen:
        prepared("whole").begin(recipe(), DATA)
    expected = {"new": None, "begun": "checkpoint-4", "damaged": "checkpoint-2"}[before]
    with killed_at(None) as preparing:
        prepared("again")
    moments = len(seen) - len(preparing)
    assert moments >= 3
    for moment in range(moments):
        run = prepared(str(moment))
        with killed_at(moment, done=done):
            run.begin(recipe(), DATA)
        found = Run(run.path).begin(recipe(), DATA)
        assert (found and found.name) == expected
        assert json.loads((run.path / RUN).read_text())["data"] == DATA
