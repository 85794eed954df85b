"""Collections of pictures as rows: classes in folders, captions, pages, data sets with columns."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import encoded, picture
from PIL import Image

from umr_plugins.data.readers import from_dataset, read, read_captions, read_image_folders, read_pages
from umr_plugins.data.schema import CLASSES, Document, Row, Rows
from umr_plugins.errors import DataError, InputError
from umr_plugins.types import Item

PNG = encoded(picture(), "PNG")


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"never decoded here")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def classes(rows: Rows) -> list[str]:
    return [CLASSES[number] for number in rows.classes]


def pairs(rows: Rows) -> list[tuple[object, list[object]]]:
    """Text or file name of each query, and of its positives."""

    def name(item: Item) -> object:
        return item.text if item.text is not None else [each.name for each in item.pictures]  # type: ignore[union-attr]

    return [(name(row.query), [name(each.item) for each in row.positives]) for row in rows]


def test_every_other_picture_of_a_class_is_a_positive(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.jpg", "cat/b.PNG", "cat/deep/c.webp", "dog/a.jpg", "dog/b.jpg", ".git/x", "dog/.x")
    [rows] = read_image_folders(tmp_path, instruction="Find the same class.")
    by_id = {row.id: row for row in rows}
    assert list(by_id) == ["cat/a.jpg", "cat/b.PNG", "cat/deep/c.webp", "dog/a.jpg", "dog/b.jpg"]
    assert by_id["cat/b.PNG"] == Row(
        query=Item(image=tmp_path / "cat" / "b.PNG"),
        positives=(
            Document(Item(image=tmp_path / "cat" / "a.jpg"), id="cat/a.jpg"),
            Document(Item(image=tmp_path / "cat" / "deep" / "c.webp"), id="cat/deep/c.webp"),
        ),
        instructions=("Find the same class.",),
        source=tmp_path.name,
        id="cat/b.PNG",
        where=f"{tmp_path.name}/cat/b.PNG",
    )
    assert [each.id for each in by_id["dog/b.jpg"].positives] == ["dog/a.jpg"]
    assert classes(rows) == ["single"] * 5
    assert rows.pictures.all()
    assert not rows.negatives.any()
    assert pickle.loads(pickle.dumps(rows))[4] == rows[4] == rows[-1]
    assert read_image_folders(tmp_path)[0].sha256 != rows.sha256
    assert read_image_folders(tmp_path, instruction="Find the same class.")[0].sha256 == rows.sha256


def test_what_does_not_fit_into_classes_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.jpg", "cat/b.jpg", "dog/only.jpg", "notes.txt", "cat/list.csv")
    (tmp_path / "cat" / "c.jpg").symlink_to(tmp_path / "cat" / "a.jpg")
    with pytest.raises(DataError) as caught:
        read_image_folders(tmp_path)
    told = str(caught.value)
    assert told.startswith("4 problems in ")
    for part in ("class 'dog' has one picture", "cat/c.jpg: links are not followed", "cat/list.csv: its name",
                 "notes.txt: it lies in no class"):  # fmt: skip
        assert part in told


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sub-folder with pictures"):
        read_image_folders(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        read_image_folders(tmp_path / "none")


CAPTIONS = {
    "captions.jsonl": '{"image": "a.jpg", "caption": ["a cat", "it sleeps"], "more": 1}\n'
    '{"image": "b.jpg", "caption": "a \\"dog\\",\\nrunning"}\n{"image": "b.jpg", "caption": "last"}\n',
    "captions.csv": 'image,caption\r\na.jpg,a cat\r\na.jpg,it sleeps\r\nb.jpg,"a ""dog"",\nrunning"\r\n'
    "b.jpg,last\r\n",
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_each_caption_finds_its_picture(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / name).write_text(CAPTIONS[name], newline="")
    [rows] = read_captions(tmp_path / name)
    assert pairs(rows) == [
        ("a cat", [["a.jpg"]]), ("it sleeps", [["a.jpg"]]), ('a "dog",\nrunning', [["b.jpg"]]),
        ("last", [["b.jpg"]]),
    ]  # fmt: skip
    assert classes(rows) == ["cross"] * 4
    assert rows[0].positives[0].key("") == rows[1].positives[0].key("") != rows[2].positives[0].key("")
    lines = (1, 1, 2, 3) if name.endswith("l") else (2, 3, 4, 6)
    assert [row.where for row in rows] == [f"{name}:{line}" for line in lines]
    assert pickle.loads(pickle.dumps(rows))[2] == rows[2]


def test_cells_of_tsv_are_taken_as_they_stand(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    path = tmp_path / "c.tsv"
    path.write_bytes('\ufeffid\tpath\tsaid\n1\ta.jpg\tan "open quote, and a comma\n'.encode())
    [rows] = read_captions(path, image="path", caption="said")
    assert pairs(rows) == [('an "open quote, and a comma', [["a.jpg"]])]


def test_a_picture_finds_all_its_captions(tmp_path: Path) -> None:
    fill(tmp_path, "pictures/a.jpg", "pictures/b.jpg")
    path = write(
        tmp_path / "c.jsonl",
        {"image": "a.jpg", "caption": ["a cat", "it sleeps"]},
        {"image": "b.jpg", "caption": "a dog"},
    )
    [rows] = read_captions(path, direction="image_to_text", root=tmp_path / "pictures", source="coco")
    assert pairs(rows) == [(["a.jpg"], ["a cat", "it sleeps"]), (["b.jpg"], ["a dog"])]
    [other] = read_captions(path, root=tmp_path / "pictures", source="coco")
    assert other.sha256 != rows.sha256


def test_captions_of_one_picture_on_two_lines_would_become_negatives(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    (tmp_path / "c.csv").write_text("image,caption\na.jpg,a cat\n./a.jpg,it sleeps\n")
    with pytest.raises(DataError, match=r"c\.csv:3: the picture stands on an earlier line too"):
        read_captions(tmp_path / "c.csv", direction="image_to_text")
    assert len(read_captions(tmp_path / "c.csv")[0]) == 2


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("c.csv", "imgae,caption\na.jpg,a\n", r"c\.csv:1: there is no column 'image'.*mean 'imgae'"),
        ("c.csv", "image,caption,image\na.jpg,a,b\n", r"a column is named twice"),
        ("c.csv", "image,caption\na.jpg\n", r"c\.csv:2: 1 cells, but there are 2 columns"),
        ("c.csv", 'image,caption\na.jpg,"a\n', r"c\.csv:2: a double quote is opened and never closed"),
        ("c.csv", "image,caption\na.jpg,\n", r"c\.csv:2: there is no 'caption'"),
        ("c.csv", 'image,caption\na.jpg,"a" b\n', r"c\.csv:2: not CSV"),
        ("c.csv", "image,caption\n", r"holds no rows"),
        ("c.csv", "", r"is empty; its first line names the columns"),
        ("c.jsonl", '{"image": "a.jpg", "captoin": "a"}', r"there is no 'caption'.*mean 'captoin'"),
        ("c.jsonl", '{"image": "a.jpg", "caption": []}', r"needs at least one caption"),
        ("c.jsonl", '{"image": "a.jpg", "caption": ["a", 3]}', r"text must be a string"),
        ("c.jsonl", '{"image": "b.jpg", "caption": "a"}', r"b\.jpg can't be read"),
        ("c.parquet", "", r"files end in \.jsonl, .*got '\.parquet'"),
    ],
)
def test_wrong_captions_are_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    fill(tmp_path, "a.jpg")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        read_captions(tmp_path / name)


def test_the_same_caption_twice_of_one_picture_is_refused_as_positive(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    path = write(tmp_path / "c.jsonl", {"image": "a.jpg", "caption": ["a", "a"]})
    with pytest.raises(DataError, match=r"positives\[1\] is given twice"):
        read_captions(path, direction="image_to_text")


def test_an_unknown_direction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'image_to_text'"):
        read_captions(tmp_path / "c.csv", direction="image_to_txt")  # type: ignore[arg-type]


def test_each_question_finds_its_page(tmp_path: Path) -> None:
    fill(tmp_path, "p1.png", "p2.png")
    path = write(
        tmp_path / "pages.jsonl",
        {"images": ["p1.png"], "texts": [{"user": "How much?", "assistant": "5"}, {"user": "When?"}]},
        {"image": "p2.png", "question": "Who signed?"},
    )
    [rows] = read_pages(path, instruction=("Find the page.", "Which page?"))
    assert pairs(rows) == [
        ("How much?", [["p1.png"]]), ("When?", [["p1.png"]]), ("Who signed?", [["p2.png"]]),
    ]  # fmt: skip
    assert [row.where for row in rows] == ["pages.jsonl:1", "pages.jsonl:1", "pages.jsonl:2"]
    assert rows[0].instructions == ("Find the page.", "Which page?")


def test_several_pages_are_refused_left_out_or_taken_together(tmp_path: Path) -> None:
    fill(tmp_path, "p1.png", "p2.png")
    path = write(
        tmp_path / "pages.jsonl",
        {"images": ["p1.png", "p2.png"], "texts": [{"user": "How much?"}]},
        {"image": "p2.png", "question": "Who signed?"},
    )
    with pytest.raises(DataError, match=r'pages\.jsonl:1: 2 pages.*several="skip"'):
        read_pages(path)
    assert pairs(read_pages(path, several="skip")[0]) == [("Who signed?", [["p2.png"]])]
    [together] = read_pages(path, several="together")
    assert together[0].positives[0].item == Item(images=(tmp_path / "p1.png", tmp_path / "p2.png"))
    with pytest.raises(InputError, match="several='first' is not known; allowed are refuse, skip, together"):
        read_pages(path, several="first")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "a"}, "there is no 'image'"),
        ({"images": [], "question": "a"}, 'give "image", a path, or "images"'),
        ({"images": ["p.png"], "image": "p.png", "question": "a"}, 'give "image", a path, or "images"'),
        ({"image": "p.png"}, 'give "question", or "texts"'),
        ({"image": "p.png", "texts": ["a"]}, 'give "question", or "texts"'),
        ({"image": "p.png", "texts": [{"assistant": "5"}]}, r"texts\[0\]\.user: .*empty"),
        ({"image": "none.png", "question": "a"}, "can't be read"),
    ],
)
def test_wrong_pages_are_refused(tmp_path: Path, row: object, told: str) -> None:
    fill(tmp_path, "p.png")
    with pytest.raises(DataError, match=told):
        read_pages(write(tmp_path / "pages.jsonl", row))


class Columns:
    """Looks like a data set: rows by number, named columns, a fingerprint."""

    def __init__(self, *rows: Mapping[str, Any], fingerprint: str = "f1") -> None:
        self.rows, self._fingerprint = rows, fingerprint
        self.column_names = list(rows[0]) if rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[index]


def test_columns_become_rows() -> None:
    shown = picture()
    dataset = Columns(
        {"q": "red", "page": shown, "said": None, "wrong": ["blue", "green"], "how": "Find it."},
        {"q": "dog", "page": {"bytes": PNG, "path": None}, "said": "a dog", "wrong": None, "how": None},
    )
    columns = {"query_text": "q", "positive_image": "page", "positive_text": "said", "negative_text": "wrong",
               "instruction": "how"}  # fmt: skip
    [rows] = from_dataset(dataset, columns, source="shop", instruction=["Look."])
    assert rows[0] == Row(
        Item("red"), (Document(Item(image=shown)),), (Document(Item("blue")), Document(Item("green"))),
        ("Find it.",), "shop", None, "shop, row 0",
    )  # fmt: skip
    assert rows[1].positives == (Document(Item("a dog", PNG)),)
    assert rows[1].instructions == ("Look.",)
    assert classes(rows) == ["cross", "fused"]
    assert rows.negatives.tolist() == [2, 0]
    assert rows.pictures.all()
    other = Columns(*dataset.rows, fingerprint="f2")
    hashes = {
        from_dataset(each, chosen, source="shop")[0].sha256
        for each in (dataset, other)
        for chosen in (columns, {"query_text": "q", "positive_image": "page"})
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"q": None, "p": "a"}, r"shop, row 1: needs one query \(got 0\)"),
        ({"q": ["a", "b"], "p": "a"}, r"got 2"),
        ({"q": "a", "p": []}, r"at least one positive"),
        ({"q": "a", "p": " "}, r"row 1: positive: .*empty"),
        ({"q": "a", "p": ["a", "a"]}, r"positives\[1\] is given twice"),
        ({"q": "a", "p": "a", "i": 5}, r"a picture is a PIL\.Image, bytes or a path, got a number"),
        ({"q": "a", "p": "a", "i": ["x", "y"]}, r"1 texts and 2 pictures as positive"),
        ({"q": "a", "p": "a", "i": "/none.jpg"}, r"none\.jpg can't be read"),
    ],
)
def test_wrong_rows_of_a_data_set_are_refused(row: dict[str, Any], told: str) -> None:
    dataset = Columns({"q": "a", "p": "b", "i": None}, {"i": None, **row})
    columns = {"query_text": "q", "positive_text": "p", "positive_image": "i"}
    with pytest.raises(DataError, match=told):
        from_dataset(dataset, columns, source="shop")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"query_txt": "q", "positive_text": "p"}, "did you mean 'query_text'"),
        ({"query_text": "qq", "positive_text": "p"}, "no column 'qq'; allowed are q, p"),
        ({"query_text": "q"}, "columns name no positive"),
        ({"positive_text": "p"}, "columns name no query"),
    ],
)
def test_wrong_columns_are_refused(columns: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        from_dataset(Columns({"q": "a", "p": "b"}), columns, source="shop")


def test_a_data_set_needs_rows_and_a_fingerprint() -> None:
    columns = {"query_text": "q", "positive_text": "p"}
    nothing = Columns()
    nothing.column_names = ["q", "p"]
    with pytest.raises(DataError, match="holds no rows"):
        from_dataset(nothing, columns, source="shop")
    with pytest.raises(DataError, match="no _fingerprint"):
        from_dataset(Columns({"q": "a", "p": "b"}, fingerprint=None), columns, source="shop")  # type: ignore[arg-type]


def test_pictures_of_a_data_set_are_not_decoded_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Image.open(io.BytesIO(PNG))
    monkeypatch.setattr(type(shown), "load", lambda *_: pytest.fail("a picture was decoded"))
    [rows] = from_dataset(
        Columns({"q": "a", "p": shown}), {"query_text": "q", "positive_image": "p"}, source="s"
    )
    assert rows[0].positives[0].item.image is shown


def test_a_damaged_picture_in_memory_is_named_where_documents_are_compared() -> None:
    broken = Image.open(io.BytesIO(PNG[: len(PNG) // 2]))
    dataset = Columns({"q": "a", "p": "b", "n": broken})
    columns = {"query_text": "q", "positive_text": "p", "negative_image": "n"}
    with pytest.raises(DataError, match="s, row 0: the picture is damaged"):
        from_dataset(dataset, columns, source="s")


def test_a_real_data_set_gives_encoded_pictures(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    features = datasets.Features({"q": datasets.Value("string"), "p": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"q": ["a", "b"], "p": [str(path), picture()]}, features=features)
    columns = {"query_text": "q", "positive_image": "p"}
    [rows] = from_dataset(dataset, columns, source="s")
    assert rows[0].positives[0].item.image == path
    assert isinstance(rows[1].positives[0].item.image, bytes)
    assert classes(rows) == ["cross", "cross"]
    assert from_dataset(dataset, columns, source="s")[0].sha256 == rows.sha256
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]


def test_a_data_set_on_disk_is_read_by_its_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"q": ["a", "b"], "p": ["c", "d"]})
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(str(tmp_path / "two"))
    columns = {"query_text": "q", "positive_text": "p"}
    (rows,) = read("dataset", tmp_path / "one", columns=columns)
    assert (rows.name, [row.query.text for row in rows]) == ("one", ["a", "b"])
    (rows,) = read("dataset", tmp_path / "two", columns=columns, split="train", source="mine")
    assert (rows.name, len(rows)) == ("mine", 2)
    with pytest.raises(InputError, match="holds the splits train, test; name one of them by split"):
        read("dataset", tmp_path / "two", columns=columns)
    with pytest.raises(InputError, match="without splits"):
        read("dataset", tmp_path / "one", columns=columns, split="train")
    with pytest.raises(InputError, match="holds no data set"):
        read("dataset", tmp_path, columns=columns)
