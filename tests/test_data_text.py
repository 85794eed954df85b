"""Text sets (BEIR's folders, triples), the look-up of documents on disk, and readers by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from umr_plugins.data import lookup
from umr_plugins.data.readers import FORMATS, read, read_beir, read_triples
from umr_plugins.data.schema import Document, Row
from umr_plugins.errors import DataError, InputError
from umr_plugins.types import Item

CORPUS = [
    {"_id": "d1", "title": "Kites", "text": "They fly.", "metadata": {}},
    {"_id": "d2", "title": "", "text": "Dogs run."},
    {"_id": 3, "title": "Only a title", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "what flies"},
    {"_id": "q2", "text": "what runs"},
    {"_id": "q3", "text": "other"},
]


def lines(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("".join(f"{line}\n" for line in told), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines(tmp_path / "corpus.jsonl", *CORPUS)
    lines(tmp_path / "queries.jsonl", *QUERIES)
    judged = ["q2\td2\t1", "q1\td1\t2", "q1\t3\t1", "q1\td2\t0"]
    lines(tmp_path / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore", *judged)
    return tmp_path


def test_judged_queries_are_rows_and_documents_are_title_and_text(folder: Path) -> None:
    [rows] = read_beir(folder, instruction="Find the passage.")
    assert list(rows) == [
        Row(
            Item("what flies"),
            (Document(Item("Kites They fly."), "d1"), Document(Item("Only a title"), "3")),
            (), ("Find the passage.",), folder.name, "q1", "queries.jsonl:1",
        ),
        Row(
            Item("what runs"), (Document(Item("Dogs run."), "d2"),),
            (), ("Find the passage.",), folder.name, "q2", "queries.jsonl:2",
        ),
    ]  # fmt: skip
    assert rows.classes.tolist() == [0, 0]
    assert not rows.pictures.any()
    assert pickle.loads(pickle.dumps(rows))[1] == rows[1]
    hashes = {rows.sha256, read_beir(folder)[0].sha256}
    lines(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore", "q2\td2\t1", "q1\td1\t2")
    hashes.add(read_beir(folder)[0].sha256)
    lines(folder / "corpus.jsonl", *CORPUS, {"_id": "d4", "text": "more"})
    hashes.add(read_beir(folder)[0].sha256)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("qrels/train.tsv", ["q1\td1\t1"], "train.tsv:1: the header must be query-id, corpus-id, score"),
        ("qrels/train.tsv", ["H", "q1\td9\t1"], "train.tsv:2: 'd9' is not in corpus.jsonl"),
        ("qrels/train.tsv", ["H", "q9\td1\t1"], "train.tsv:2: 'q9' is not in queries.jsonl"),
        ("qrels/train.tsv", ["H", "q1\td1\t1", "q1\td1\t2"], "train.tsv:3: 'd1' is judged twice"),
        ("qrels/train.tsv", ["H", "q1\td1"], "train.tsv:2: needs query-id"),
        ("qrels/train.tsv", ["H", "q1\td1\tyes"], "train.tsv:2: needs query-id"),
        ("qrels/train.tsv", ["H", "q1\td1\t0"], "holds no rows"),
        ("corpus.jsonl", [*CORPUS, {"_id": "d2", "text": "x"}], "corpus.jsonl:4: the _id 'd2' stands in"),
        ("corpus.jsonl", [{"_id": "d1", "text": " "}, *CORPUS[1:]], "corpus.jsonl:1: "),
        ("corpus.jsonl", [{"_id": "d1", "title": 5}, *CORPUS[1:]], "title and text must be strings"),
        ("queries.jsonl", [{"_id": "q1"}, *QUERIES[1:]], "queries.jsonl:1: "),
        ("queries.jsonl", [{"id": "q1", "text": "a"}], "there is no '_id'"),
    ],
)
def test_what_does_not_fit_together_is_named(folder: Path, name: str, values: list[Any], told: str) -> None:
    lines(folder / name, *("query-id\tcorpus-id\tscore" if value == "H" else value for value in values))
    with pytest.raises(DataError) as caught:
        read_beir(folder)
    assert told in str(caught.value)


def test_a_missing_split_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"qrels/dev\.tsv can't be read"):
        read_beir(folder, "dev")


def test_documents_are_found_by_id_even_where_hashes_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_hash", lambda name: len(name))
    path = lines(tmp_path / "c.jsonl", *({"_id": f"d{number}", "n": number} for number in range(40)))
    found = lookup.Lookup(path, "_id")
    assert len(found) == 40
    for number in range(40):
        value, where = found.find(f"d{number}") or ({}, "")
        assert (value["n"], where) == (number, f"c.jsonl:{number + 1}")
    assert "d40" not in found
    assert "none at all" not in found


def test_a_look_up_keeps_little_of_a_large_file(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", *({"_id": str(number), "text": "x" * 500} for number in range(3_000)))
    assert len(pickle.dumps(lookup.Lookup(path, "_id"))) < 30 * 3_000


def test_triples_take_both_spellings_and_lists(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl",
        {"query": "a", "positive": "b", "negative": ["c", "d"]},
        {"anchor": "e", "pos": ["f", "g"], "neg": None},
    )
    [rows] = read_triples(path, source="nli")
    assert rows[0] == Row(
        Item("a"), (Document(Item("b")),), (Document(Item("c")), Document(Item("d"))),
        source="nli", where="t.jsonl:1",
    )  # fmt: skip
    assert [each.item.text for each in rows[1].positives] == ["f", "g"]
    assert rows.negatives.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", 'a\tsay "b\tc\nd\te\tf\n'),
        ("t.tsv", 'anchor\tneg\tpos\na\tc\tsay "b\nd\tf\te\n'),
        ("t.csv", 'query,positive,negative\na,"say ""b",c\nd,e,f\n'),
    ],
)
def test_triples_in_tables(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    [rows] = read_triples(tmp_path / name)
    found = [(row.query.text, row.positives[0].item.text, row.negatives[0].item.text) for row in rows]
    assert found == [("a", 'say "b', "c"), ("d", "e", "f")]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.jsonl", '{"query": "a", "positiv": "b"}', "unknown key 'positiv'.*mean 'positive'"),
        ("t.jsonl", '{"query": "a", "anchor": "a", "pos": "b"}', "give query or anchor, not both"),
        ("t.jsonl", '{"query": ["a"], "pos": "b"}', "query is one text, got a list"),
        ("t.jsonl", '{"pos": "b"}', "there is no query"),
        ("t.jsonl", '{"query": "a", "pos": []}', "there is no positive"),
        ("t.jsonl", '{"query": "a", "pos": "b", "neg": "b"}', "is also a positive"),
        ("t.jsonl", '{"query": "a", "pos": ["b", 3]}', "text must be a string"),
        ("t.tsv", "a\n", "1 cells, but there are 2 columns"),
        ("t.tsv", "a\tb\tc\td\n", "4 cells, but there are 3 columns"),
        ("t.txt", "a", "files end in"),
    ],
)
def test_wrong_triples_are_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        read_triples(tmp_path / name)


def test_a_reader_is_chosen_by_name(folder: Path) -> None:
    assert set(FORMATS) == {
        "rows",
        "mbeir",
        "beir",
        "triples",
        "image_folders",
        "captions",
        "pages",
        "dataset",
    }
    [rows] = read("beir", folder, split="train", source="s")
    assert (rows.name, len(rows)) == ("s", 2)


@pytest.mark.parametrize(
    ("format", "options", "told"),
    [
        ("biir", {}, "format='biir' is not known; allowed are rows, .*mean 'beir'"),
        ("beir", {"splti": "dev"}, "'beir' has no option 'splti'; allowed are split, .*mean 'split'"),
        ("beir", {"folder": "x"}, "has no option 'folder'"),
        ("mbeir", {}, "'mbeir' needs name"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    folder: Path, format: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        read(format, folder, **options)
