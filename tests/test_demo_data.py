"""The sample corpus and its queries fit together, and the figures are counted right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from umr_plugins.demo import CARDS, FILES
from umr_plugins.demo.baselines import bm25
from umr_plugins.demo.queries import Answer, Query, load_cards, load_queries
from umr_plugins.demo.report import examples
from umr_plugins.demo.run import Asked, Row, macro_of, row_of
from umr_plugins.media.images import content_key, load_image
from umr_plugins.types import Hit, Item

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def test_there_are_enough_queries_of_every_type() -> None:
    counts = Counter(query.type for query in load_queries())
    assert set(counts) == {
        "text_to_picture",
        "picture_to_text",
        "picture_to_picture",
        "fused_to_picture",
        "text_to_page",
        "text_to_text",
    }
    assert min(counts.values()) >= 15
    assert sum(counts.values()) >= 120


def test_queries_have_unique_ids_and_hold_what_their_type_says() -> None:
    queries = load_queries()
    assert len({query.id for query in queries}) == len(queries)
    for query in queries:
        asked = query.type.split("_to_")[0]
        assert query.item.modality == {"text": "text", "picture": "image", "fused": "fused"}[asked], query.id


def test_every_answer_exists() -> None:
    cards = set(load_cards()[0])
    for query in load_queries():
        assert query.answers, query.id
        for answer in query.answers:
            if answer.id is not None:
                assert answer.id in cards, query.id
            else:
                assert (FILES / (answer.path or "?")).is_file(), query.id


def test_every_picture_opens_and_no_query_picture_is_in_the_corpus() -> None:
    corpus = [path for path in FILES.rglob("*") if path.suffix in PICTURES]
    corpus += [path for path in CARDS.parent.iterdir() if path.suffix in PICTURES]
    asked = [query.item.image for query in load_queries() if isinstance(query.item.image, Path)]
    assert len(corpus) >= 100
    assert {pixels(path) for path in corpus}.isdisjoint(map(pixels, asked))
    assert {content_key(path) for path in corpus}.isdisjoint(map(content_key, asked))


def pixels(path: Path) -> bytes:
    """The picture at a size where a re-encoding makes no difference, in 32 steps per colour."""
    small = load_image(path).resize((8, 8))
    return bytes(value // 8 for value in small.tobytes())


def test_cards_are_pictures_with_words() -> None:
    ids, items = load_cards()
    assert len(set(ids)) == len(ids) >= 10
    assert {item.modality for item in items} == {"fused"}
    assert CARDS.parent != FILES
    assert FILES not in CARDS.parents


def hit(path: str | None = None, page: int | None = None, id_: str = "x") -> Hit:
    return Hit(id_, 0.0, Item(text="t"), path=FILES / path if path else None, page=page)


@pytest.mark.parametrize(
    ("answer", "found", "right"),
    [
        (Answer(path="a.md"), hit("a.md"), True),
        (Answer(path="a.md"), hit("b/a.md"), False),
        (Answer(path="g.pdf", page=2), hit("g.pdf", 2), True),
        (Answer(path="g.pdf", page=2), hit("g.pdf", 3), False),
        (Answer(id="card-1"), hit(id_="card-1"), True),
        (Answer(id="card-1"), hit("card-1", id_="y"), False),
        (Answer(path="a.md"), hit(None), False),
    ],
)
def test_what_counts_as_right(answer: Answer, found: Hit, right: bool) -> None:
    assert answer.matches(found) is right


def asked(rank: int | None, *, text: str | None = "words", bm25_rank: int | None = None) -> Asked:
    picture = None if text else Path("p.png")
    return Asked(Query("q", "t", Item(text, picture), ()), [], rank, 0.1, bm25_rank)


def test_row_counts_by_hand() -> None:
    row = row_of("t", [asked(1, bm25_rank=5), asked(5), asked(None), asked(6)])
    assert (row.n, row.hit_at_1, row.hit_at_5, row.bm25_at_5) == (4, 0.25, 0.5, 0.25)
    assert row.random_at_5 == pytest.approx(0.1)
    assert row.interval[0] < 0.5 < row.interval[1]


def test_bm25_has_no_figure_for_queries_without_words() -> None:
    assert row_of("t", [asked(1, text=None)]).bm25_at_5 is None


def test_macro_average_weighs_types_equally_and_narrows_the_interval() -> None:
    wide = Row("a", 2, 0.0, 0.5, (0.1, 0.9), 0.02, None)
    macro = macro_of([wide, Row("b", 20, 1.0, 0.5, (0.1, 0.9), 0.04, 0.5)])
    assert (macro.n, macro.hit_at_1, macro.hit_at_5, macro.bm25_at_5) == (22, 0.5, 0.5, 0.25)
    assert macro.random_at_5 == pytest.approx(0.03)
    assert macro.interval == pytest.approx((0.5 - 0.4 / 2**0.5, 0.5 + 0.4 / 2**0.5))


def test_examples_show_misses_too() -> None:
    rows = [asked(1), asked(None), asked(2), asked(None), asked(3), asked(4), asked(None)]
    assert [each.rank for each in examples(rows)] == [1, 2, 3, None, None]


def test_bm25_ranks_by_shared_words_and_keeps_quiet_without_any() -> None:
    search = bm25(["a", "b", "c"], ["a red kite over the sea", "", "sea and sea shore"])
    assert search("kite", 5) == ["a"]
    assert search("sea", 5)[0] == "c"
    assert set(search("sea", 5)) == {"a", "c"}
    assert search("nothing of it", 5) == []
