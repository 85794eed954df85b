"""A thousand files, fifty of them bad in every way users' files are bad: each costs only itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import BAD, SLOW, encoded, text_pdf
from PIL import Image

from umr_plugins.index.index import FolderReport, Index
from umr_plugins.testing import FakeEncoder

GOOD, REFUSED = 950, 50


def write_good(folder: Path, number: int) -> None:
    """A picture, a text, or (rarely, since each takes a process) a PDF; all different."""
    if number % 95 == 0:
        (folder / f"{number}.pdf").write_bytes(text_pdf(f"page of paper {number}"))
    elif number % 3 == 0:
        (folder / f"{number}.md").write_text(f"# Note {number}\n\nSome words about number {number}.\n")
    else:
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        suffix, kind = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))[
            number % 3 - 1 if number % 2 else 2
        ]
        (folder / f"{number}.{suffix}").write_bytes(encoded(Image.fromarray(pixels), kind))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder, and the code that each bad file must be refused with."""
    root = tmp_path_factory.mktemp("thousand")
    for part in range(10):
        (root / f"part{part}").mkdir()
    for number in range(GOOD):
        write_good(root / f"part{number % 10}", number)
    kinds = [name for name in sorted(BAD) if name not in SLOW]
    assert len(kinds) >= 20
    codes: dict[str, str] = {}
    for number, name in enumerate(itertools.islice(itertools.cycle(kinds), REFUSED)):
        folder = root / f"part{number % 10}" / f"bad{number}"
        folder.mkdir()
        write, code = BAD[name]
        written = write(folder)
        shown = written.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        codes[str(folder / shown)] = code
    return root, codes


def found(report: FolderReport) -> dict[str, str]:
    return {str(row.path): row.code for row in report.refused}


def test_a_thousand_files(expected: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, codes = expected
    encoder = FakeEncoder()
    commits: list[int] = []
    with Index(tmp_path / "db", encoder) as index:
        first = index.add_folder(root, on_commit=commits.append)
        assert found(first) == codes
        assert (first.indexed, first.unchanged, first.removed, first.items) == (GOOD, 0, 0, GOOD)
        assert commits[-1] == GOOD
        assert max(np.diff([0, *commits])) <= 32
        assert index.count() == GOOD
        assert index.verify().ok
        ids = set(index.ids())

        encoder.calls.clear()
        second = index.add_folder(root)
        assert (second.indexed, second.unchanged, second.removed) == (0, GOOD, 0)
        assert found(second) == codes
        assert encoder.calls == []
        assert set(index.ids()) == ids

        edited, deleted = root / "part3" / "3.md", root / "part6" / "6.md"
        before = {path: hit.id for hit in index.get(index.ids()) if (path := hit.path) in (edited, deleted)}
        edited.write_text("Other words.")
        deleted.unlink()
        third = index.add_folder(root)
        assert (third.indexed, third.unchanged, third.removed) == (1, GOOD - 2, 1)
        assert [item.text for _, items, _ in encoder.calls for item in items] == ["Other words."]
        assert ids - set(index.ids()) == set(before.values())
        assert index.search("Other words.", 1)[0].path == edited
        assert index.verify().ok
