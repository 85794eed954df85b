"""Which rows a batch holds, and what is made of them: by seed and number alone, and nothing lost or mixed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umr_plugins.data.rows import IndexedRows
from umr_plugins.data.schema import CLASSES, Document, Row
from umr_plugins.encoding.trainable import Entry
from umr_plugins.errors import DataError, InputError
from umr_plugins.training.collate import MOST_NEGATIVES, Batch, Batches
from umr_plugins.training.losses import Relations
from umr_plugins.training.sampler import Kind, Mixture
from umr_plugins.types import Item

SIZES: dict[Kind, int] = {"pictures": 4, "text": 8}
PICTURE = Path("/pictures/a.png")


class Held(IndexedRows):
    """Rows in memory."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.sha256 = name, ""
        self._rows = [
            dataclasses.replace(row, source=name, where=f"{name}:{n + 1}") for n, row in enumerate(rows)
        ]
        self.classes = np.array([CLASSES.index(row.modality_class) for row in rows], np.int8)
        self.pictures = np.array([row.pictures for row in rows], np.bool_)
        self.negatives = np.array([len(row.negatives) for row in rows], np.int32)

    def _row(self, index: int) -> Row:
        return self._rows[index]


def row(query: Item | str, *positives: Document | str, negatives: Sequence[Document | str] = (),
        instructions: tuple[str, ...] = ()) -> Row:  # fmt: skip
    def documents(given: Sequence[Document | str]) -> tuple[Document, ...]:
        return tuple(Document(Item(each)) if isinstance(each, str) else each for each in given)

    asked = Item(query) if isinstance(query, str) else query
    return Row(asked, documents(positives), documents(negatives), instructions)


def held(name: str, *, texts: int = 0, pictures: int = 0, cross: int = 0, fused: int = 0) -> Held:
    """Rows of text only, of pictures only, of text to picture, and of both to text."""
    picture = Item(image=PICTURE)
    kinds = [
        (texts, Item("a"), Item("b")),
        (pictures, picture, Item(image=Path("/pictures/b.png"))),
        (cross, Item("a"), picture),
        (fused, Item("a", PICTURE), Item("b")),
    ]
    return Held(name, [row(query, Document(item)) for count, query, item in kinds for _ in range(count)])


def two() -> list[Held]:
    return [held("a", texts=60, cross=20), held("b", texts=20, pictures=20, fused=60)]


def mixture(**given: Any) -> Mixture:
    return Mixture(two(), **{"sizes": SIZES, "steps": 200, **given})


# --- Mixture ------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_number_only() -> None:
    in_order = list(mixture(seed=3))
    steps = list(range(200))
    random.Random(0).shuffle(steps)
    again = mixture(seed=3)
    assert {step: again[step] for step in steps} == dict(enumerate(in_order))
    assert list(mixture(seed=4)) != in_order


def test_a_new_process_draws_the_same_batches() -> None:
    code = (
        "import json, test_training_sampler as t\n"
        "print(json.dumps([t.mixture(seed=3)[150], t.mixture(seed=3)[7], t.drawn(t.mixture(seed=3), 9)]))"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    here = [mixture(seed=3)[150], mixture(seed=3)[7], drawn(mixture(seed=3), 9)]
    assert json.loads(done.stdout) == json.loads(json.dumps(here))


def drawn(made: Mixture, step: int) -> list[Any]:
    """A batch of `Batches` as JSON."""
    batch = Batches(made)[step]
    return [
        [each.item.text for each in batch.entries],
        batch.queries.tolist(),
        batch.documents.tolist(),
        batch.where,
    ]


@pytest.mark.parametrize("given", [{}, {"class_weights": {"fused": 1, "single": 1}}, {"same_source": False}])
def test_all_rows_of_a_stratum_come_before_any_comes_again(given: dict[str, Any]) -> None:
    made = mixture(steps=400, **given)
    seen: dict[tuple[int, int, bool], list[int]] = {}
    for batch in made:
        for source, number in batch:
            rows = made.sources[source]
            key = (source, int(rows.classes[number]), bool(rows.pictures[number]))
            seen.setdefault(key, []).append(number)
    assert len(seen) == len(made.strata)
    for (source, of, pictures), numbers in seen.items():
        rows = made.sources[source]
        all_of_them = set(np.flatnonzero((rows.classes == of) & (rows.pictures == pictures)).tolist())
        size = len(all_of_them)
        rounds = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        assert len(rounds) > 2
        assert all(set(each) == all_of_them for each in rounds[:-1])
        assert len(set(rounds[-1])) == len(rounds[-1])
        assert rounds[0] != rounds[1]


SHARES = [
    (None, None, {"a single": 60 / 180, "a cross": 20 / 180, "b single": 40 / 180, "b fused": 60 / 180}),
    (
        {"single": 1, "cross": 1, "fused": 2},
        None,
        {"a single": 0.25 * 0.6, "b single": 0.25 * 0.4, "a cross": 0.25, "b fused": 0.5},
    ),
    (
        None,
        {"a": 3, "b": 1},
        {"a single": 0.75 * 0.75, "a cross": 0.75 * 0.25, "b single": 0.25 * 0.4, "b fused": 0.25 * 0.6},
    ),
    (
        {"single": 10, "fused": 10},
        {"a": 0.2, "b": 0.6},
        {"a single": 0.5 * 0.25, "b single": 0.5 * 0.75, "b fused": 0.5},
    ),
    ({"single": 1}, {"b": 1}, {"b single": 1.0}),
]


@pytest.mark.parametrize("same_source", [True, False])
@pytest.mark.parametrize(("classes", "sources", "shares"), SHARES)
def test_shares_of_rows_follow_the_weights(
    classes: dict[str, float] | None,
    sources: dict[str, float] | None,
    shares: dict[str, float],
    same_source: bool,
) -> None:
    steps = 3000
    made = mixture(steps=steps, class_weights=classes, source_weights=sources, same_source=same_source)
    counts: Counter[str] = Counter()
    kinds: Counter[tuple[str, bool]] = Counter()
    for batch in made:
        for source, number in batch:
            rows = made.sources[source]
            name = f"{rows.name} {CLASSES[rows.classes[number]]}"
            counts[name] += 1
            kinds[name, bool(rows.pictures[number])] += 1
    # Of b's 40 rows of one modality half are pictures; of the others a class is of one kind.
    texts = shares.get("a single", 0) + shares.get("b single", 0) / 2
    mean_size = 1 / (texts / SIZES["text"] + (1 - texts) / SIZES["pictures"])
    assert set(counts) == set(shares)
    for name, share in shares.items():
        mean = steps * mean_size * share
        # A batch holds 8 rows of one stratum at most, so the variance per step is at most 8 times the mean.
        assert counts[name] == pytest.approx(mean, abs=4 * (8 * mean) ** 0.5), name
    assert made.expected() == {
        rows.name: sum(count for name, count in counts.items() if name.startswith(rows.name))
        for rows in two()
    }
    if "b single" in shares:
        half = counts["b single"] / 2
        assert kinds["b single", True] == pytest.approx(half, abs=4 * (8 * half) ** 0.5)


@pytest.mark.parametrize("same_source", [True, False])
def test_a_batch_has_the_size_of_its_kind_and_mixes_no_kinds(same_source: bool) -> None:
    made = mixture(steps=400, same_source=same_source)
    several = 0
    for batch in made:
        (pictures,) = {bool(made.sources[source].pictures[number]) for source, number in batch}
        assert len(batch) == SIZES["pictures" if pictures else "text"]
        several += len({source for source, _ in batch}) > 1
    assert several == 0 if same_source else several > 100


@pytest.mark.parametrize(
    ("epochs", "steps"), [(None, 28), (1, 28), (2.0, 55), (0.5, 14), (0.001, 1), (100, 2750)]
)  # 80 rows of text in batches of 8 and 70 with pictures in batches of 4: 27.5 steps
def test_epochs_become_steps(epochs: float | None, steps: int) -> None:
    made = Mixture([held("a", texts=80, cross=70)], sizes=SIZES, epochs=epochs)
    assert len(made) == made.steps == steps
    if epochs == 100:  # so rows come as often as was asked for, within four standard deviations
        assert made.expected()["a"] == pytest.approx(15_000, abs=4 * 2 * 2750**0.5)


def test_epochs_count_all_rows_when_weights_move_them_to_larger_batches() -> None:
    made = mixture(steps=None, epochs=20, class_weights={"single": 1}, source_weights={"a": 1})
    assert len(made) == round(20 * 60 / 8)  # the 60 rows that have a weight
    assert made.expected() == {"a": 1200, "b": 0}


@pytest.mark.parametrize("step", [-1, 200])
def test_there_is_no_batch_before_the_first_or_after_the_last(step: int) -> None:
    with pytest.raises(IndexError):
        mixture()[step]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"class_weights": {"singel": 1}}, "no class 'singel'; allowed are .*; did you mean 'single'"),
        ({"source_weights": {"c": 1}}, "no source 'c'; allowed are a, b"),
        ({"class_weights": {"single": -1}}, "weight of class 'single' must be a number from 0 .* got -1"),
        ({"source_weights": {"a": float("nan")}}, "weight of source 'a' must be a number from 0 .* got nan"),
        ({"source_weights": {"a": True}}, "weight of source 'a' must be a number from 0 .* got True"),
        ({"source_weights": {"a": "1"}}, "weight of source 'a' must be a number from 0 .* got '1'"),
        ({"class_weights": {"single": 0, "cross": 0}}, "all weights by class are 0"),
        ({"source_weights": {"a": 0.0}}, "all weights by source are 0"),
        ({"source_weights": {"a": 1}, "class_weights": {"single": 1, "fused": 2}},
         "class 'fused' has weight 2, but no source with a weight has such rows"),
        ({"source_weights": {"a": 1, "b": 2}, "class_weights": {"cross": 1}},
         "source 'b' has weight 2, but its rows are of classes without weight"),
        ({"sizes": {"text": 21, "pictures": 4}},
         "'b' has 20 rows of text only, fewer than a batch of 21; lower batch.text, or"),
        ({"sizes": {"text": 8, "pictures": 81}},
         "'a' has 20 rows with pictures, fewer than a batch of 81; lower batch.pictures"),
        ({"sizes": {"text": 81, "pictures": 4}, "same_source": False}, "the data have 80 rows of text only"),
    ],
)  # fmt: skip
def test_what_can_not_be_mixed_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        mixture(**given)


def test_a_batch_as_large_as_its_source_is_its_rows_in_another_order() -> None:
    made = Mixture([held("a", texts=8)], sizes=SIZES, steps=2)
    assert [sorted(batch) for batch in made] == [[(0, number) for number in range(8)]] * 2
    assert made[0] != made[1]


def test_weights_for_something_without_rows_are_refused() -> None:
    with pytest.raises(InputError, match="class 'fused' has weight 1, but the data have no rows of it"):
        Mixture([held("a", texts=9)], sizes=SIZES, steps=1, class_weights={"single": 1, "fused": 1})
    with pytest.raises(InputError, match="source 'b' has weight 1, but the data have no rows of it"):
        Mixture([held("a", texts=9), held("b")], sizes=SIZES, steps=1, source_weights={"a": 1, "b": 1})
    zero = Mixture([held("a", texts=9), held("b")], sizes=SIZES, steps=1, source_weights={"a": 1, "b": 0})
    assert zero.expected() == {"a": 8, "b": 0}


def test_sources_need_rows_and_names_of_their_own() -> None:
    with pytest.raises(InputError, match="two sources are called a; give each a name of its own"):
        Mixture([held("a", texts=9), held("b", texts=9), held("a", texts=9)], sizes=SIZES)
    with pytest.raises(InputError, match="no row"):
        Mixture([held("a")], sizes=SIZES)


# --- Batches ------------------------------------------------------------------------------------------------


class Chosen(Mixture):
    """Batches that were chosen by hand."""

    def __init__(self, sources: list[Held], *batches: list[tuple[int, int]]) -> None:
        super().__init__(sources, sizes={"pictures": 1, "text": 1}, steps=len(batches))
        self.batches = batches

    def __getitem__(self, step: int) -> list[tuple[int, int]]:
        if not 0 <= step < len(self.batches):
            raise IndexError(step)
        return self.batches[step]


ONE = Document(Item("one"), id="1")
THREE = Document(Item("three"), id="3")
A = Held(
    "a",
    [
        row("q0", ONE, negatives=[THREE, Document(Item("x"), score=0.5)]),
        row("q1", ONE, THREE),
        row("q2", Document(Item("shared"), id="9", pool="both")),
    ],
)
B = Held(
    "b",
    [
        row("q0", "x"),  # a document of a's first row, known by its text
        row("q4", Document(Item("not a's"), id="1")),  # an id counts within its source
        row("q5", Document(Item("shared, in other words"), id="9", pool="both"), negatives=["x"]),
    ],
)
ALL = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def texts(batch: Batch) -> list[str | None]:
    return [batch.entries[place].item.text for place in batch.documents]


def test_relations_of_rows_that_share_documents() -> None:
    drawn_by_q1 = set()
    for step, batch in enumerate(Batches(Chosen([A, B], *[ALL] * 20))):
        found, relations = texts(batch), batch.relations
        second = found[3]
        assert found[0] == "one"
        assert sorted(found[1:3], key=str) == ["three", "x"]
        assert second in ("one", "three")
        drawn_by_q1.add(second)
        assert found[4:] == ["shared", "x", "not a's", "shared, in other words", "x"]
        assert batch.step == step
        assert relations.owner.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5]
        assert relations.positive.tolist() == [0, 3, 4, 5, 6, 7]
        assert relations.source is not None
        assert relations.source.tolist() == [0, 0, 0, 1, 1, 1]
        assert relations.known is not None
        known = {
            (query, document)
            for query in range(6)
            for document in range(9)
            if relations.known[query, document]
        }
        answers = [{"one"}, {"one", "three"}, {"shared", "shared, in other words"}, {"x"}, {"not a's"}]
        answers.append(answers[2])
        expected = {
            (query, document)
            for query in range(6)
            for document in range(9)
            if found[document] in answers[query]
        }
        assert known == expected
        assert batch.masked == len(expected) - 6
        assert relations.scores is not None
        assert [n for n in range(9) if not relations.scores[n].isnan()] == [found.index("x")]
        assert relations.scores[found.index("x")] == 0.5
        assert batch.where == ["a:1", "a:2", "a:3", "b:1", "b:2", "b:3"]
    assert drawn_by_q1 == {"one", "three"}


def test_without_any_score_there_are_none() -> None:
    (batch,) = Batches(Chosen([A, B], [(0, 1), (1, 1)]))
    assert batch.relations.scores is None
    assert batch.masked == 0


def test_equal_inputs_are_encoded_once() -> None:
    (batch,) = Batches(Chosen([A, B], ALL))
    said = [(each.role, each.item.text) for each in batch.entries]
    assert len(set(said)) == len(said) == 5 + len(set(texts(batch)))
    assert batch.queries[0] == batch.queries[3]  # both ask q0
    queries = [batch.entries[place] for place in batch.queries]
    assert [(each.role, each.item.text) for each in queries] == [
        ("query", text) for text in ("q0", "q1", "q2", "q0", "q4", "q5")
    ]
    assert {batch.entries[place].role for place in batch.documents} == {"document"}


def test_inputs_are_equal_by_role_task_text_and_pictures() -> None:
    here, there = (Item("same", Path(f"/pictures/{name}.png")) for name in "ab")
    rows = [
        row("same", Document(Item("same"))),
        row("same", Document(here), instructions=("Find it.",)),
        row(here, Document(there), instructions=("Find it.",)),
        row(
            dataclasses.replace(here),
            Document(Item("same", images=(PICTURE, PICTURE))),
            instructions=("Find it.",),
        ),
    ]
    made = Chosen([Held("a", rows)], [(0, 0), (0, 1), (0, 2), (0, 3)])
    (batch,) = Batches(made)
    assert batch.queries.tolist() == [0, 2, 4, 4]
    assert batch.documents.tolist() == [1, 3, 5, 6]
    assert [each.instruction for each in batch.entries] == [
        None,
        None,
        "Find it.",
        None,
        "Find it.",
        None,
        None,
    ]
    (plain,) = Batches(made, takes_instruction=False)
    assert {each.instruction for each in plain.entries} == {None}
    assert plain.queries.tolist() == [0, 0, 3, 3]


def counted(made: Batches, of: Any) -> Counter[Any]:
    return Counter(each for batch in made for each in of(batch))


def even(counts: Counter[Any], over: int) -> bool:
    """Whether all of `over` things were drawn about equally often, within five standard deviations."""
    mean = counts.total() / over
    return len(counts) == over and all(abs(each - mean) < 5 * mean**0.5 for each in counts.values())


STEPS = [[(0, 0)]] * 600


def test_positives_are_drawn_over_all_of_a_row() -> None:
    made = Batches(Chosen([Held("a", [row("q", "p0", "p1", "p2", negatives=["n"])])], *STEPS))
    assert all(texts(batch)[1:] == ["n"] for batch in made)
    assert even(counted(made, lambda batch: texts(batch)[:1]), 3)


@pytest.mark.parametrize(
    ("asked", "given", "count"), [(2, 5, 2), (5, 5, 5), (0, 5, 0), (None, 5, 5), (None, 12, 8)]
)
def test_negatives_are_drawn_and_counted(asked: int | None, given: int, count: int) -> None:
    rows = [row("q", "p", negatives=[f"n{number}" for number in range(given)])]
    made = Batches(Chosen([Held("a", rows)], *STEPS), negatives=asked)
    for batch in made:
        first, *negatives = texts(batch)
        assert first == "p"
        assert len(negatives) == len(set(negatives)) == count
    if count:
        assert even(counted(made, lambda batch: texts(batch)[1:]), given)
        assert even(counted(made, lambda batch: texts(batch)[1:2]), given)
    assert MOST_NEGATIVES == 8


def test_phrasings_are_drawn_over_all_of_a_row() -> None:
    rows = [row("q", "p", instructions=("Find it.", "Show it.", "Which?"))]
    made = Chosen([Held("a", rows)], *STEPS)
    instructions = counted(Batches(made), lambda batch: [each.instruction for each in batch.entries[:1]])
    assert even(instructions, 3)
    assert {each.instruction for batch in Batches(made) for each in batch.entries[1:]} == {None}
    without = Batches(made, takes_instruction=False)
    assert {each.instruction for batch in without for each in batch.entries} == {None}


def same(left: Batch, right: Batch) -> bool:
    pairs = [(left.queries, right.queries), (left.documents, right.documents)]
    return (
        left.entries == right.entries
        and all(torch.equal(*pair) for pair in pairs)
        and equal(left.relations, right.relations)
        and (left.step, left.masked, left.where) == (right.step, right.masked, right.where)
    )


def equal(left: Relations, right: Relations) -> bool:
    for each in dataclasses.fields(Relations):
        one, other = getattr(left, each.name), getattr(right, each.name)
        if (one is None) != (other is None):
            return False
        if one is not None and not torch.allclose(one.float(), other.float(), equal_nan=True):
            return False
    return True


def test_what_is_drawn_depends_on_seed_and_number_only() -> None:
    rows = [row("q", "p0", "p1", "p2", negatives=["n0", "n1", "n2"], instructions=("a", "b"))]
    made = Chosen([Held("a", rows)], *[[(0, 0)] * 4] * 50)
    in_order = list(Batches(made, negatives=2, seed=5))
    again = Batches(made, negatives=2, seed=5)
    assert all(same(again[step], in_order[step]) for step in reversed(range(50)))
    assert len({tuple(texts(batch)) for batch in in_order}) > 40
    other = Batches(made, negatives=2, seed=6)
    assert sum(same(other[step], in_order[step]) for step in range(50)) < 5


@pytest.mark.parametrize("world", [2, 3, 6])
def test_all_processes_together_have_the_batch_of_one(world: int) -> None:
    made = Chosen([A, B], *[ALL] * 5)
    for step, whole in enumerate(Batches(made)):
        parts = [Batches(made, rank=rank, world=world)[step] for rank in range(world)]
        assert all(equal(part.relations, whole.relations) for part in parts)
        assert {(part.masked, tuple(part.where)) for part in parts} == {(whole.masked, tuple(whole.where))}
        for name in ("queries", "documents"):
            assert [each for part in parts for each in inputs(part, name)] == inputs(whole, name)
        assert all(len(inputs(part, "queries")) == 6 // world for part in parts)
        assert all(
            set(range(len(part.entries))) == {*part.queries.tolist(), *part.documents.tolist()}
            for part in parts
        )


def inputs(batch: Batch, name: str) -> list[Entry]:
    """What is encoded, but for the row it is said to come from: of equal ones that is the first."""
    return [dataclasses.replace(batch.entries[place], where="") for place in getattr(batch, name)]


def test_uneven_parts_differ_by_one_row() -> None:
    parts = [Batches(Chosen([A, B], ALL), rank=rank, world=4)[0] for rank in range(4)]
    assert [len(part.queries) for part in parts] == [2, 2, 1, 1]


def test_too_few_negatives_are_named_with_their_places() -> None:
    short = Held("short", [row("q", "p", negatives=["n0", "n1"][:count]) for count in (2, 1, 0, 2)])
    with pytest.raises(
        DataError,
        match=r"2 hard negatives are asked for, but 2 rows have fewer, such as short:2 \(1\), short:3 \(0\)",
    ):
        Batches(Chosen([short], [(0, 0)]), negatives=2)
    with pytest.raises(DataError, match=r"but 1 row has fewer, such as short:3 \(0\)\. Mine more"):
        Batches(Chosen([short], [(0, 0)]), negatives=1)
    for enough in (0, None):
        assert len(Batches(Chosen([short], [(0, 0)]), negatives=enough)[0].queries) == 1


def test_rows_that_are_never_drawn_may_have_few_negatives() -> None:
    full = Held("full", [row("q", "p", negatives=["n0", "n1"])] * 4)
    made = Mixture(
        [full, held("none", texts=4)], sizes={"text": 4, "pictures": 4}, steps=2, source_weights={"full": 1}
    )
    assert all(len(batch.documents) == 4 * 3 for batch in Batches(made, negatives=2))
    with pytest.raises(DataError, match="none:1"):
        Batches(Mixture(made.sources, sizes={"text": 4, "pictures": 4}, steps=2), negatives=2)


def test_the_limit_for_text_is_for_inputs_without_pictures() -> None:
    rows = [row(Item("q", PICTURE), "p", Document(Item(images=(PICTURE, PICTURE)))), row("q", "p")]
    for batch in Batches(Chosen([Held("a", rows)], *[[(0, 0), (0, 1)]] * 20), max_text_length=7):
        assert all(each.max_length == (None if each.item.pictures else 7) for each in batch.entries)
        assert {bool(each.item.pictures) for each in batch.entries} == {True, False}
    (free,) = Batches(Chosen([Held("a", rows)], [(0, 0), (0, 1)]))
    assert {each.max_length for each in free.entries} == {None}


def test_an_entry_says_which_row_it_came_from() -> None:
    (batch,) = Batches(Chosen([A, B], [(1, 1), (0, 2)]))
    assert [each.where for each in batch.entries] == ["b:2", "b:2", "a:3", "a:3"]


def test_rows_with_the_same_query_share_their_positives_and_content_counts_beside_ids() -> None:
    from umr_plugins.training.collate import _known, _names

    def row(query: str, text: str, id: str | None = None, source: str = "s") -> Row:
        return Row(Item(query), (Document(Item(text), id),), source=source)

    rows = [
        row("a", "one"),
        row("a", "two"),
        row("b", "two", "7"),
        row("a", "three", source="other"),
        row("c", "else", "7"),
    ]
    known = _known(rows, [_names(each.positives[0], each.source) for each in rows])
    expected = [
        [1, 1, 1, 0, 0],  # both rows ask "a" of one source; the third has the second's text
        [1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1],  # by text, and by id
        [0, 0, 0, 1, 0],  # another source may ask for something else
        [0, 0, 1, 0, 1],
    ]
    assert known.int().tolist() == expected
