"""M-BEIR's layout: ids across files, instructions by key, and what happens where the files disagree."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from umr_plugins.data.mbeir import clean_up, read_instructions, read_mbeir
from umr_plugins.data.schema import CLASSES, Document, Row
from umr_plugins.errors import DataError, InputError
from umr_plugins.types import Item

HEAD = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"
PROMPTS = [
    "text\timage\tVisualNews\t0\tfind news photo\tNews?\tShow.\tPicture it.",
    "image\ttext\tVisualNews\t0\tcaption it\tSay it.\t\t",
    "image,text\ttext\tOVEN\t5\toven text A\toven text B\toven text C\toven text D",
    "image,text\timage,text\tOVEN\t5\toven both\tb\tc\td",
    "image,text\ttext\tINFOSEEK\t6\tinfoseek text\tb\tc\td",
]


def lines(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("".join(f"{line}\n" for line in told), encoding="utf-8")
    return path


def query(qid: str, text: str | None, image: str | None, positives: list[str], **more: Any) -> dict[str, Any]:
    modality = ",".join([*["image"] * (image is not None), *["text"] * (text is not None)])
    return {
        "qid": qid, "query_txt": text, "query_img_path": image, "query_modality": modality,
        "query_src_content": None, "pos_cand_list": positives, "neg_cand_list": [], "task_id": 0, **more,
    }  # fmt: skip


def candidate(did: str, text: str | None, image: str | None, **more: Any) -> dict[str, Any]:
    modality = ",".join([*["image"] * (image is not None), *["text"] * (text is not None)])
    return {"did": did, "txt": text, "img_path": image, "modality": modality, "src_content": None, **more}


POOL = [
    candidate("0:1", None, "images/a.jpg"),
    candidate("0:2", None, "images/b.jpg"),
    candidate("0:3", "a caption", None),
    candidate("5:1", "an oven text", None),
    candidate("5:2", "with picture", "images/a.jpg"),
    candidate("6:1", "an infoseek text", None),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"never decoded here")
    lines(tmp_path / "instructions" / "query_instructions.tsv", HEAD, *PROMPTS)
    lines(tmp_path / "cand_pool" / "local" / "mbeir_news_cand_pool.jsonl", *POOL)
    return tmp_path


def queries(root: Path, *values: object, name: str = "news", split: str = "train") -> None:
    lines(root / "query" / split / f"mbeir_{name}_{split}.jsonl", *values)


def refused(root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_mbeir(root, "news", **options)
    return str(caught.value)


def test_a_query_is_read_with_its_candidates_and_instructions(root: Path) -> None:
    queries(root, query("0:7", "a storm", None, ["0:1", "0:2"], neg_cand_list=["0:3"]))
    [rows] = read_mbeir(root, "news")
    assert rows[0] == Row(
        query=Item("a storm"),
        positives=(
            Document(Item(image=root / "images" / "a.jpg"), "0:1", pool="mbeir"),
            Document(Item(image=root / "images" / "b.jpg"), "0:2", pool="mbeir"),
        ),
        instructions=("find news photo", "News?", "Show.", "Picture it."),
        source="news",
        id="0:7",
        where="mbeir_news_train.jsonl:1",
    )
    assert [CLASSES[number] for number in rows.classes] == ["cross"]
    assert rows.negatives.tolist() == [0]
    [native] = read_mbeir(root, "news", negatives=True, source="other")
    assert native[0].negatives == (Document(Item("a caption"), "0:3", pool="mbeir"),)
    assert native.negatives.tolist() == [1]
    assert (native.name, native[0].source) == ("other", "other")
    assert native.sha256 != rows.sha256
    assert pickle.loads(pickle.dumps(rows))[0] == rows[0]


@pytest.mark.parametrize(
    ("asked", "instructions"),
    [
        (query("0:1", "a", None, ["0:1"]), ("find news photo", "News?", "Show.", "Picture it.")),
        (query("0:1", None, "images/a.jpg", ["0:3"]), ("caption it", "Say it.")),
        (query("5:1", "who", "images/a.jpg", ["5:1"]), tuple(f"oven text {letter}" for letter in "ABCD")),
        (query("5:1", "who", "images/a.jpg", ["5:2"]), ("oven both", "b", "c", "d")),
        (query("6:1", "who", "images/a.jpg", ["6:1"]), ("infoseek text", "b", "c", "d")),
    ],
)
def test_instructions_are_those_of_data_set_and_both_modalities(
    root: Path, asked: dict[str, Any], instructions: tuple[str, ...]
) -> None:
    queries(root, asked)
    assert read_mbeir(root, "news")[0][0].instructions == instructions


def test_positives_of_another_data_set_stay_but_do_not_choose_the_instruction(root: Path) -> None:
    queries(root, query("6:9", "who", "images/a.jpg", ["5:2", "6:1"]))
    [rows] = read_mbeir(root, "news")
    assert [document.id for document in rows[0].positives] == ["5:2", "6:1"]
    assert rows[0].instructions[0] == "infoseek text"
    queries(root, query("6:9", "who", "images/a.jpg", ["5:1"]))
    assert "own data set (INFOSEEK) must be of one modality" in refused(root)
    queries(root, query("5:9", "who", "images/a.jpg", ["5:1", "5:2"]))
    assert "they are image,text and text" in refused(root)


def test_equal_candidates_are_equal_in_every_source(root: Path) -> None:
    queries(root, query("0:7", "a storm", None, ["0:1"]))
    keys = {
        document.key(row.source)
        for name in ("one", "two")
        for row in read_mbeir(root, "news", source=name)[0]
        for document in row.positives
    }
    assert len(keys) == 1


def test_the_pool_is_the_tasks_own_or_that_of_all_tasks(root: Path) -> None:
    place = root / "cand_pool"
    queries(root, query("0:7", "a storm", None, ["0:8"]))
    assert "mbeir_news_train.jsonl:1: candidate '0:8' is not in" in refused(root)
    assert 'pool="global"' in refused(root)
    assert "looked for" in refused(root, pool="global")
    lines(place / "global" / "mbeir_union_train_cand_pool.jsonl", candidate("0:8", None, "images/b.jpg"))
    assert read_mbeir(root, "news", pool="global")[0][0].positives[0].id == "0:8"
    (place / "local" / "mbeir_news_cand_pool.jsonl").rename(
        place / "local" / "mbeir_news_val_cand_pool.jsonl"
    )
    assert read_mbeir(root, "news")[0][0].positives[0].id == "0:8"
    queries(root, query("0:7", "a storm", None, ["0:1"]), split="val")
    assert read_mbeir(root, "news", "val")[0][0].positives[0].id == "0:1"
    with pytest.raises(InputError, match="did you mean 'global'"):
        read_mbeir(root, "news", pool="globl")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (query("0:1", "a", None, []), "pos_cand_list is empty"),
        (query("0:1", "a", None, ["0:1", "0:1"]), "positives[1] is given twice"),
        (query("0:1", "a", None, "0:1"), "pos_cand_list is a list of ids"),  # type: ignore[arg-type]
        (query("0:1", "a", None, ["0:1"], query_modality="txt"), "query_modality is 'txt'; allowed are"),
        (query("0:1", "a", None, ["0:1"], query_modality="image"), "is 'image', but query_txt and"),
        (query("0:1", None, "images/none.jpg", ["0:3"]), "none.jpg can't be read"),
        (query("0:1", None, "../a.jpg", ["0:3"]), "lies outside"),
        (query("0:1", "a", None, ["0:3"]), "no instruction for VisualNews from text to text"),
        (query("3:1", "a", None, ["3:1"]), "candidate '3:1' is not in"),
        ({"query_txt": "a"}, "there is no 'qid'"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_query_is_named(root: Path, value: object, told: str) -> None:
    queries(root, query("0:7", "a storm", None, ["0:1"]), value)
    message = refused(root)
    assert "  mbeir_news_train.jsonl:2: " in message
    assert told in message


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (candidate("0:1", "again", None), "cand_pool.jsonl:7: the did '0:1' stands in"),
        ({"txt": "a"}, "cand_pool.jsonl:7: there is no 'did'"),
        (candidate("0:9", "a", None, modality="image"), "cand_pool.jsonl:7: modality is 'image', but txt"),
        (candidate("0:9", "", "images/a.jpg"), "modality is 'image,text', but txt and img_path hold image"),
        ("[]", "each line is a JSON object"),
    ],
)
def test_a_wrong_candidate_is_named(root: Path, value: object, told: str) -> None:
    lines(root / "cand_pool" / "local" / "mbeir_news_cand_pool.jsonl", *POOL, value)
    queries(root, query("0:7", "a storm", None, ["0:9"]))
    assert told in refused(root)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (PROMPTS[0], "tsv:7: data set 0 from text to image is there twice"),
        ("text\timage\tVisualNews\t0", "tsv:7: needs the modalities"),
        ("text\tpicture\tVisualNews\t0\ta", "tsv:7: needs the modalities"),
        ("text\ttext\tVisualNews\t0\t\t", "tsv:7: needs the modalities"),
    ],
)
def test_wrong_instructions_are_named(root: Path, value: str, told: str) -> None:
    path = lines(root / "instructions" / "query_instructions.tsv", HEAD, *PROMPTS, value)
    with pytest.raises(DataError, match=told):
        read_instructions(path)


def test_missing_files_are_named(root: Path) -> None:
    assert "mbeir_news_train.jsonl can't be read" in refused(root)
    queries(root, query("0:7", "a storm", None, ["0:1"]))
    (root / "instructions" / "query_instructions.tsv").unlink()
    assert "query_instructions.tsv can't be read" in refused(root)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('  "hello world"  ', "Hello world."), ("a\r\nb", "A\nb."), ("Really?", "Really?"), ("Yes!", "Yes!"),
        ("Done.", "Done."), ("", ""), ('""', ""), ("é", "É."), ("3 dogs", "3 dogs."),
    ],
)  # fmt: skip
def test_uniirs_clean_up(text: str, cleaned: str) -> None:
    assert clean_up(text) == cleaned


def test_the_clean_up_reaches_every_text_and_only_if_asked(root: Path) -> None:
    queries(root, query("6:9", ' "who is it', "images/a.jpg", ["6:1"]))
    [plain], [clean] = read_mbeir(root, "news"), read_mbeir(root, "news", clean=True)
    assert plain[0].query.text == ' "who is it'
    assert clean[0].query.text == "Who is it."
    assert clean[0].positives[0].item.text == "An infoseek text."
    assert clean[0].instructions == ("Infoseek text.", "B.", "C.", "D.")
    assert plain.sha256 != clean.sha256


def test_the_hash_covers_the_candidates(root: Path) -> None:
    queries(root, query("0:7", None, "images/a.jpg", ["0:3"]))
    [before] = read_mbeir(root, "news")
    changed = [*POOL[:2], candidate("0:3", "another caption", None), *POOL[3:]]
    lines(root / "cand_pool" / "local" / "mbeir_news_cand_pool.jsonl", *changed)
    with pytest.raises(DataError, match="has changed"):
        before[0]
    assert read_mbeir(root, "news")[0].sha256 != before.sha256
