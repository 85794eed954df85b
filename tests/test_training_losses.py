"""Losses against small loops over Python floats, finite differences and torch's own cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from umr_plugins.errors import InputError
from umr_plugins.training.losses import Relations, distillation, info_nce, matryoshka

Q, D, H = 4, 9, 6
NAN = math.nan
# Documents 0 to 3 are positives, 4 and 5 are hard negatives of query 0, 6 and 7 of query 1, 8 of query 3.
RELATIONS = Relations(
    positive=torch.tensor([0, 1, 2, 3]),
    owner=torch.tensor([0, 1, 2, 3, 0, 0, 1, 1, 3]),
    known=torch.zeros(Q, D, dtype=torch.bool).index_put((torch.tensor([0, 2]), torch.tensor([2, 6])),
                                                        torch.tensor(True)),
    source=torch.tensor([0, 1, 0, 1]),
    scores=torch.tensor([0.9, 0.8, 0.7, NAN, 0.2, 0.5, 0.1, NAN, 0.3], dtype=torch.float64),
)  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {},
    {"in_batch": False},
    {"same_source_only": True},
    {"query_query": True},
    {"document_document": True},
    {"false_negative_margin": 0.1},
    {"false_negative_margin": -0.2, "in_batch": False},
    {"query_query": True, "document_document": True, "same_source_only": True, "false_negative_margin": 0.05},
    {"query_query": True, "document_document": True, "in_batch": False, "false_negative_margin": 0.2},
]
OPTION_NAMES = [",".join(options) or "plain" for options in OPTIONS]


def states(seed: int = 0, q: int = Q, d: int = D, h: int = H) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(q, h, generator=generator, dtype=torch.float64),
        torch.randn(d, h, generator=generator, dtype=torch.float64),
    )


def cosine(left: list[float], right: list[float]) -> float:
    dot = sum(a * b for a, b in zip(left, right, strict=True))
    return dot / math.sqrt(sum(a * a for a in left)) / math.sqrt(sum(b * b for b in right))


def by_hand(
    queries: torch.Tensor,
    documents: torch.Tensor,
    relations: Relations,
    *,
    temperature: float = 0.03,
    in_batch: bool = True,
    same_source_only: bool = False,
    query_query: bool = False,
    document_document: bool = False,
    false_negative_margin: float | None = None,
) -> float:
    q, d = queries.tolist(), documents.tolist()
    positive, owner = relations.positive.tolist(), relations.owner.tolist()
    known = [set() for _ in q] if relations.known is None else [
        {j for j in range(len(d)) if row[j]} for row in relations.known.tolist()]  # fmt: skip
    source = relations.source.tolist() if relations.source is not None else [0] * len(q)
    total = 0.0
    for i in range(len(q)):
        p = positive[i]
        answers = known[i] | {p}
        target = cosine(q[i], d[p])
        found = []
        for j in range(len(d)):
            near = source[owner[j]] == source[i] or not same_source_only
            if j not in answers and (owner[j] == i or (in_batch and near)):
                found.append(cosine(q[i], d[j]))
            if document_document and j not in answers and near:
                found.append(cosine(d[p], d[j]))
        for j in range(len(q)):
            near = source[j] == source[i] or not same_source_only
            if query_query and j != i and near and positive[j] not in answers:
                found.append(cosine(q[i], q[j]))
        if false_negative_margin is not None:
            found = [each for each in found if each <= target + false_negative_margin]
        own = math.exp(target / temperature)
        total -= math.log(own / (own + sum(math.exp(each / temperature) for each in found)))
    return total / len(q)


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
@pytest.mark.parametrize("temperature", [0.03, 0.5])
def test_info_nce_is_its_formula(options: dict[str, Any], temperature: float) -> None:
    for seed in range(5):
        queries, documents = states(seed)
        loss = info_nce(queries, documents, RELATIONS, temperature=temperature, **options)
        expected = by_hand(queries, documents, RELATIONS, temperature=temperature, **options)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_each_option_changes_the_loss() -> None:
    queries, documents = states(3)
    losses = [info_nce(queries, documents, RELATIONS, temperature=0.5, **each).item() for each in OPTIONS]
    assert len({round(loss, 6) for loss in losses}) == len(OPTIONS)


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_a_document_that_is_known_to_answer_pulls_no_gradient(options: dict[str, Any]) -> None:
    queries, documents = states(2)
    documents.requires_grad_()
    everything = torch.ones(Q, D, dtype=torch.bool)
    everything[0, 4] = False  # the only negative left in the batch
    info_nce(queries, documents, replace(RELATIONS, known=everything), temperature=0.5, **options).backward()
    moved = {int(row) for row in documents.grad.abs().sum(1).nonzero()}  # type: ignore[union-attr]
    assert moved <= {0, 4}
    assert moved or "false_negative_margin" in options


def test_known_answers_left_unmarked_change_the_loss() -> None:
    queries, documents = states()
    right = info_nce(queries, documents, RELATIONS, query_query=True)
    wrong = info_nce(queries, documents, replace(RELATIONS, known=None), query_query=True)
    assert wrong > right + 1e-6


def test_owners_that_are_mixed_up_change_the_loss_of_own_negatives() -> None:
    queries, documents = states()
    mixed = replace(RELATIONS, owner=RELATIONS.owner.roll(1))
    right, wrong = (info_nce(queries, documents, each, in_batch=False) for each in (RELATIONS, mixed))
    assert abs(right - wrong) > 1e-3


def test_a_positive_counts_as_known_without_a_mark() -> None:
    queries, documents = states()
    marked = torch.eye(Q, D, dtype=torch.bool)
    for options in OPTIONS:
        without = info_nce(queries, documents, replace(RELATIONS, known=None), **options)
        assert torch.equal(without, info_nce(queries, documents, replace(RELATIONS, known=marked), **options))


def test_two_queries_with_one_positive_are_no_negatives_of_each_other() -> None:
    queries, documents = states(3, q=2, d=1)
    relations = Relations(torch.tensor([0, 0]), torch.tensor([0]))
    assert info_nce(queries, documents, relations, query_query=True, document_document=True).item() == 0


def test_the_caller_s_mask_of_known_documents_is_not_written_to() -> None:
    known = RELATIONS.known.clone()  # type: ignore[union-attr]
    info_nce(*states(), RELATIONS, query_query=True, document_document=True, false_negative_margin=0.1)
    assert torch.equal(known, RELATIONS.known)  # type: ignore[arg-type]


def test_plain_batches_have_the_cross_entropy_of_multiple_negatives_ranking() -> None:
    queries, documents = states(4, q=5, d=10)  # documents 5 to 9: one hard negative per query
    relations = Relations(torch.arange(5), torch.arange(5).repeat(2))
    scores = F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T * 20.0
    expected = F.cross_entropy(scores, torch.arange(5))
    torch.testing.assert_close(info_nce(queries, documents, relations, temperature=1 / 20), expected)


def test_equal_vectors_give_the_logarithm_of_the_number_of_candidates() -> None:
    queries, documents = torch.ones(3, 4), torch.ones(7, 4)
    relations = Relations(torch.arange(3), torch.tensor([0, 1, 2, 0, 0, 1, 2]))
    assert info_nce(queries, documents, relations).item() == pytest.approx(math.log(7))
    with_both = info_nce(queries, documents, relations, query_query=True, document_document=True)
    assert with_both.item() == pytest.approx(math.log(7 + 2 + 6))
    own = info_nce(queries, documents, relations, in_batch=False)
    assert own.item() == pytest.approx((math.log(3) + 2 * math.log(2)) / 3)


def test_what_lies_beyond_the_margin_is_no_negative_and_at_the_margin_it_is() -> None:
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    documents = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # cosines 0 and 1
    relations = Relations(torch.tensor([0]), torch.tensor([0, 0]))
    for margin, expected in [(None, math.log1p(math.e)), (1.0, math.log1p(math.e)), (0.99, 0.0)]:
        loss = info_nce(queries, documents, relations, temperature=1.0, false_negative_margin=margin)
        assert loss.item() == pytest.approx(expected)


def test_a_state_that_is_not_a_number_is_seen_in_the_loss_under_a_margin_too() -> None:
    queries, documents = states()
    documents[4, 0] = NAN
    assert info_nce(queries, documents, RELATIONS, false_negative_margin=0.1).isnan()


def test_only_documents_of_the_query_s_own_source_are_met() -> None:
    queries, documents = states()
    documents.requires_grad_()
    relations = replace(RELATIONS, source=torch.tensor([0, 1, 2, 3]))
    info_nce(queries, documents, relations, same_source_only=True, rows=slice(0, 1), query_query=True,
             document_document=True, temperature=0.5).backward()  # fmt: skip
    assert {int(row) for row in documents.grad.abs().sum(1).nonzero()} == {0, 4, 5}  # type: ignore[union-attr]


def test_a_query_without_negatives_has_no_loss_and_no_gradient() -> None:
    queries, documents = (each.requires_grad_() for each in states(5, q=1, d=1))
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    relations = Relations(torch.tensor([0]), torch.tensor([0]))
    loss = info_nce(queries, documents, relations, temperature=temperature, query_query=True,
                    document_document=True, false_negative_margin=0.0)  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    for tensor in (queries, documents, temperature):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    queries, documents = (each.requires_grad_() for each in states(6))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(queries: torch.Tensor, documents: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return info_nce(queries, documents, RELATIONS, temperature=temperature, **options)

    assert torch.autograd.gradcheck(loss, (queries, documents, temperature))


@pytest.mark.parametrize("loss", [info_nce, distillation])
def test_a_temperature_that_is_learned_may_have_any_shape_of_one_element(loss: Callable[..., Any]) -> None:
    plain = loss(*states(), RELATIONS, temperature=0.25)
    for shape in ((), (1,), (1, 1)):
        temperature = torch.full(shape, 0.25, requires_grad=True)
        learned = loss(*states(), RELATIONS, temperature=temperature)
        learned.backward()
        assert torch.equal(plain, learned.detach())
        assert temperature.grad is not None
        assert temperature.grad.abs().sum() > 0


def gradients(
    loss: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries, documents = (each.requires_grad_() for each in states(7))
    total = torch.stack(loss(queries, documents)).sum()
    total.backward()
    assert queries.grad is not None
    assert documents.grad is not None
    return total.detach(), queries.grad, documents.grad


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("loss", "options"),
    [(info_nce, options) for options in OPTIONS] + [(distillation, {})],
    ids=[*OPTION_NAMES, "distillation"],
)
def test_slices_of_rows_add_up_to_the_whole(
    loss: Callable[..., torch.Tensor], options: dict[str, Any], size: int
) -> None:
    whole = gradients(lambda queries, documents: [loss(queries, documents, RELATIONS, **options)])
    parts = gradients(
        lambda queries, documents: [
            loss(queries, documents, RELATIONS, rows=slice(start, start + size), **options)
            for start in range(0, Q, size)
        ]
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_slice_is_less_than_the_whole() -> None:
    whole = info_nce(*states(), RELATIONS, temperature=0.5)
    assert 0 < info_nce(*states(), RELATIONS, temperature=0.5, rows=slice(1, 3)) < whole
    assert info_nce(*states(), RELATIONS, rows=slice(2, 2)).item() == 0


def reordered(of_queries: torch.Tensor, of_documents: torch.Tensor) -> Relations:
    """`RELATIONS` after `queries[of_queries]` and `documents[of_documents]`."""
    assert RELATIONS.known is not None
    assert RELATIONS.source is not None
    assert RELATIONS.scores is not None
    return Relations(
        of_documents.argsort()[RELATIONS.positive[of_queries]],
        of_queries.argsort()[RELATIONS.owner[of_documents]],
        RELATIONS.known[of_queries][:, of_documents],
        RELATIONS.source[of_queries],
        RELATIONS.scores[of_documents],
    )


@pytest.mark.parametrize(
    ("loss", "options"),
    [(info_nce, options) for options in OPTIONS] + [(distillation, {})],
    ids=[*OPTION_NAMES, "distillation"],
)
def test_the_order_in_a_batch_means_nothing(
    loss: Callable[..., torch.Tensor], options: dict[str, Any]
) -> None:
    queries, documents = states(8)
    expected = loss(queries, documents, RELATIONS, **options)
    of_queries, of_documents = torch.tensor([2, 0, 3, 1]), torch.tensor([8, 3, 1, 0, 5, 7, 2, 6, 4])
    shuffled = loss(
        queries[of_queries], documents[of_documents], reordered(of_queries, of_documents), **options
    )
    torch.testing.assert_close(shuffled, expected, rtol=1e-12, atol=0)
    with_old_relations = loss(queries[of_queries], documents[of_documents], RELATIONS, **options)
    assert abs(with_old_relations - expected) > 1e-6


def test_lengths_of_states_mean_nothing() -> None:
    queries, documents = states()
    longer = info_nce(queries * 7, documents * torch.arange(1, D + 1)[:, None], RELATIONS)
    torch.testing.assert_close(longer, info_nce(queries, documents, RELATIONS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loss", [info_nce, distillation])
def test_low_types_are_computed_in_float32_also_inside_autocast(
    loss: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    queries, documents = (each.to(dtype).requires_grad_() for each in states())
    exact = loss(queries.double(), documents.double(), RELATIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(queries, documents, RELATIONS)
    result.backward()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(exact.item(), rel=1e-5)
    assert queries.grad is not None
    assert queries.grad.dtype == dtype


def test_distillation_is_its_formula() -> None:
    queries, documents = states()
    owned = {0: [0, 4, 5], 1: [1, 6], 2: [2], 3: [8]}  # those with a score; 2 and 3 have nothing to order
    scores = RELATIONS.scores.tolist()  # type: ignore[union-attr]
    total = 0.0
    for i in (0, 1):
        teacher = [math.exp(scores[j] / 0.5) for j in owned[i]]
        student = [math.exp(cosine(queries[i].tolist(), documents[j].tolist()) / 0.2) for j in owned[i]]
        total += sum(
            t / sum(teacher) * math.log((t / sum(teacher)) / (s / sum(student)))
            for t, s in zip(teacher, student, strict=True)
        )
    loss = distillation(queries, documents, RELATIONS, temperature=0.2, teacher_temperature=0.5)
    assert loss.item() == pytest.approx(total / 2, rel=1e-12)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn() -> None:
    queries, documents = (each.requires_grad_() for each in states())
    cosines = F.cosine_similarity(queries.detach()[RELATIONS.owner], documents.detach(), dim=1)
    agreeing = replace(RELATIONS, scores=cosines / 0.2 + 3)
    loss = distillation(queries, documents, agreeing, temperature=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert queries.grad is not None
    assert queries.grad.abs().max() < 1e-12
    assert distillation(queries, documents, replace(agreeing, scores=-cosines / 0.2), temperature=0.2) > 0.1


def test_gradients_of_distillation_are_those_of_finite_differences() -> None:
    queries, documents = (each.requires_grad_() for each in states(9))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, d, t: distillation(q, d, RELATIONS, temperature=t), (queries, documents, temperature)
    )


def test_distillation_without_two_scored_documents_of_a_query_is_refused() -> None:
    single = torch.where(torch.arange(D) < Q, torch.tensor(0.5), NAN)
    with pytest.raises(InputError, match=r"none of 4 queries has them \(4 of 9 documents are scored\)"):
        distillation(*states(), replace(RELATIONS, scores=single))
    with pytest.raises(InputError, match=r"needs relations\.scores"):
        distillation(*states(), replace(RELATIONS, scores=None))


def test_matryoshka_is_the_weighted_sum_over_widths() -> None:
    queries, documents = states()
    loss = matryoshka(lambda q, d: info_nce(q, d, RELATIONS), {2: 0.5, 6: 2.0})
    narrow = by_hand(queries[:, :2], documents[:, :2], RELATIONS)
    assert loss(queries, documents).item() == pytest.approx(
        0.5 * narrow + 2 * by_hand(queries, documents, RELATIONS), rel=1e-12
    )


def test_matryoshka_pulls_no_gradient_beyond_its_widest_dim() -> None:
    queries, documents = (each.requires_grad_() for each in states())
    matryoshka(lambda q, d: info_nce(q, d, RELATIONS), {2: 1.0, 4: 1.0})(queries, documents).backward()
    assert queries.grad is not None
    assert queries.grad[:, :4].abs().min() > 0
    assert torch.equal(queries.grad[:, 4:], torch.zeros(Q, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({}, "at least one dim"),
        ({0: 1.0}, "got 0"),
        ({2.0: 1.0}, r"got 2\.0"),
        ({True: 1.0}, "got True"),
        ({2: 0.0}, "dim 2 is 0"),
        ({2: -1.0}, "dim 2 is -1"),
        ({2: NAN}, "dim 2 is nan"),
    ],
)
def test_matryoshka_dims_that_mean_nothing_are_refused(dims: dict[int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        matryoshka(lambda q, d: info_nce(q, d, RELATIONS), dims)


def test_a_matryoshka_dim_beyond_the_vectors_is_refused() -> None:
    with pytest.raises(InputError, match="dim 7 is larger than the model's vectors of 6"):
        matryoshka(lambda q, d: info_nce(q, d, RELATIONS), {2: 1.0, 7: 1.0})(*states())


@pytest.mark.parametrize(
    "temperature", [0, -0.1, NAN, math.inf, torch.tensor(-1.0), torch.tensor([0.1, 0.1])]
)
@pytest.mark.parametrize("loss", [info_nce, distillation])
def test_a_temperature_that_is_no_number_above_0_is_refused(
    loss: Callable[..., Any], temperature: Any
) -> None:
    with pytest.raises(InputError, match=r"^temperature must be"):
        loss(*states(), RELATIONS, temperature=temperature)


def test_other_numbers_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="teacher_temperature must be"):
        distillation(*states(), RELATIONS, teacher_temperature=0)
    with pytest.raises(InputError, match="got nan"):
        info_nce(*states(), RELATIONS, false_negative_margin=NAN)
    with pytest.raises(InputError, match=r"needs relations\.source"):
        info_nce(*states(), replace(RELATIONS, source=None), same_source_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"positive": torch.tensor([0, 1, 2, 9])},
            "positive holds positions of documents, 0 to 8 here; got 9",
        ),
        ({"positive": torch.tensor([0, 1, 2, -1])}, "got -1"),
        ({"owner": torch.tensor([0, 1, 2, 3, 4, 0, 1, 1, 3])}, "owner holds positions of queries, 0 to 3"),
        ({"positive": torch.tensor([[0, 1], [2, 3]])}, r"positive must have shape \(4,\)"),
        ({"known": torch.zeros(D, Q, dtype=torch.bool)}, r"known must have shape \(4, 9\)"),
        ({"known": torch.zeros(Q, D, dtype=torch.long)}, "known must be torch.bool"),
        ({"positive": torch.zeros(Q, dtype=torch.bool)}, "positive must be torch.int64"),
        ({"source": torch.zeros(D, dtype=torch.long)}, r"source must have shape \(4,\)"),
        ({"scores": torch.zeros(Q)}, r"scores must have shape \(9,\)"),
        ({"positive": torch.zeros(0, dtype=torch.long), "known": None, "source": None}, "got 0 and 9"),
    ],
)
def test_relations_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(RELATIONS, **change)


@pytest.mark.parametrize("loss", [info_nce, distillation])
@pytest.mark.parametrize(
    ("q", "d", "message"),
    [
        ((3, H), (D, H), "of 4 queries and 9 documents, got 3 and 9"),
        ((Q, H), (8, H), "got 4 and 8"),
        ((Q, H), (D, 5), r"got shapes \(4, 6\) and \(9, 5\)"),
        ((Q,), (D, H), "must be matrices"),
    ],
)
def test_states_that_do_not_fit_are_refused(
    loss: Callable[..., Any], q: tuple[int, ...], d: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loss(torch.ones(q), torch.ones(d), RELATIONS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", [info_nce, distillation])
def test_relations_on_the_cpu_serve_states_on_a_gpu(loss: Callable[..., torch.Tensor]) -> None:
    queries, documents = states()
    on_gpu = loss(queries.cuda(), documents.cuda(), RELATIONS)
    torch.testing.assert_close(on_gpu.cpu(), loss(queries, documents, RELATIONS))
