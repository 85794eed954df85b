"""What a user meets: options, bad input, ranking, errors. Exactness is in test_reranker_parity."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from umr_plugins.backbones.features import FeatureCache
from umr_plugins.errors import BatchError, CheckpointError, InputError, ItemError, ModelNotFoundError
from umr_plugins.prompts.rerank import DOMAINS, PROMPTS, QUESTIONS, RerankPrompt, choose_prompt
from umr_plugins.reranker import Reranker, shared_reranker
from umr_plugins.types import Item, PairScorer


@pytest.fixture(scope="module")
def reranker(qwen2_vl_folder: Path) -> Reranker:
    return Reranker(qwen2_vl_folder, dtype="float32", max_image_tokens=64)


def test_it_is_a_pair_scorer(reranker: Reranker) -> None:
    assert isinstance(reranker, PairScorer)


def test_no_document_and_one_document(reranker: Reranker) -> None:
    assert reranker.score("x", []).shape == (0,)
    assert reranker.rank("x", []) == []
    (only,) = reranker.rank("x", ["a dog"])
    assert only.index == 0
    assert only.score == only.relevance == pytest.approx(float(reranker.score("x", ["a dog"])[0]), abs=1e-6)


def test_the_best_comes_first_and_ties_keep_their_order(reranker: Reranker) -> None:
    documents = ["a dog", "a river", "a dog", "report", "a river"]
    ranked = reranker.rank("a fox", documents)
    relevance = [each.relevance for each in ranked]
    assert relevance == sorted(relevance, reverse=True)  # type: ignore[type-var]
    places = [each.index for each in ranked]
    assert places.index(0) + 1 == places.index(2)
    assert places.index(1) + 1 == places.index(4)
    assert [each.index for each in reranker.rank("a fox", documents, top_n=2)] == places[:2]


def test_the_first_stage_counts_and_its_order_breaks_ties(reranker: Reranker) -> None:
    documents = ["a dog", "a dog", "a river"]
    ranked = reranker.rank("a fox", documents, first_stage=[0.1, 0.3, 0.2], weight=0.5)
    for each in ranked:
        assert each.relevance is not None
        assert each.score == pytest.approx([0.1, 0.3, 0.2][each.index] + 0.5 * each.relevance)
    assert [
        each.index for each in reranker.rank("a fox", documents, first_stage=[0.1, 0.3, 0.2], weight=0)
    ] == [
        1,
        2,
        0,
    ]
    pure = reranker.rank("a fox", ["a dog", "a dog"], first_stage=[0.1, 0.3], weight="pure")
    assert [each.index for each in pure] == [1, 0]
    assert pure[0].score == pure[0].relevance


def test_a_document_that_cant_be_judged_keeps_its_first_stage_rank(
    reranker: Reranker, tmp_path: Path
) -> None:
    documents: list[Any] = ["a dog", {"image": tmp_path / "gone.png"}, "a river", "", 5, "report"]
    ranked = reranker.rank("a fox", documents)
    assert sorted(each.index for each in ranked) == list(range(6))
    for place, code in ((1, "unreadable"), (3, "empty"), (4, "unsupported")):
        refused = ranked[place]
        assert (refused.index, refused.relevance) == (place, None)
        assert refused.error is not None
        assert refused.error.code == code
        assert refused.error.index == place
    assert len(reranker.rank("a fox", documents, top_n=2)) == 2
    with pytest.raises(BatchError, match=r"(?s)3 of 6 items can't be judged.*use rank\(\)") as caught:
        reranker.score("a fox", documents)
    assert [error.index for error in caught.value.errors] == [1, 3, 4]


@pytest.mark.parametrize("query", ["", "  \n", {"text": ""}, 7])
def test_an_empty_query_is_refused(reranker: Reranker, query: Any) -> None:
    with pytest.raises(ItemError, match="the query: "):
        reranker.rank(query, ["a dog"])


def test_a_missing_query_picture_is_named(reranker: Reranker, tmp_path: Path) -> None:
    with pytest.raises(ItemError, match=r"the query: .*gone\.png"):
        reranker.rank({"text": "x", "image": tmp_path / "gone.png"}, ["a dog"])


def test_a_thousand_documents(reranker: Reranker) -> None:
    documents = [f"{number} dogs" for number in range(1000)]
    scores = reranker.score("how many dogs?", documents)
    ranked = reranker.rank("how many dogs?", documents)
    assert sorted(each.index for each in ranked) == list(range(1000))
    some = [3, 500, 999]
    alone = [reranker.score("how many dogs?", [documents[n]])[0] for n in some]
    assert np.abs(scores[some] - alone).max() < 1e-5


def test_a_document_longer_than_the_context_is_cut_and_said(
    qwen2_vl_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Reranker(qwen2_vl_folder, dtype="float32", max_length=160, max_image_tokens=16)
    long = " ".join(f"word{number}" for number in range(2000))
    with caplog.at_level(logging.WARNING):
        (judged, plain) = sorted(
            short.rank("a fox", [long, "a dog"], explain=True), key=lambda each: each.index
        )
    assert "1 documents were longer than max_length=160" in caplog.text
    assert judged.prompt is not None
    assert plain.prompt is not None
    words = judged.prompt.split("Candidate: ")[1].split("\n")[0]
    assert long.startswith(words)
    assert 60 < len(words) < len(long)
    assert judged.prompt.endswith("True or False<|im_end|>\n<|im_start|>assistant\n")
    backbone = short._judge.backbone
    assert 150 < len(backbone.tokenizer.template(judged.prompt)) <= 160
    assert judged.relevance == pytest.approx(float(short.score("a fox", [words])[0]), abs=1e-6)


def test_a_long_query_is_cut_and_said(qwen2_vl_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = Reranker(qwen2_vl_folder, dtype="float32", max_length=200, max_image_tokens=16)
    with caplog.at_level(logging.WARNING):
        (judged,) = short.rank("where is the fox? " * 200, ["a dog"], explain=True)
    assert "by the first 50, a quarter of max_length=200" in caplog.text
    assert judged.relevance is not None


def test_pictures_that_leave_no_room_are_refused(qwen2_vl_folder: Path, photo: Image.Image) -> None:
    short = Reranker(qwen2_vl_folder, dtype="float32", max_length=160, max_image_tokens=120)
    ranked = short.rank("a fox", ["a dog", {"image": photo.resize((400, 400)), "text": "a caption"}])
    refused = next(each for each in ranked if each.index == 1)
    assert refused.error is not None
    assert refused.error.code == "too_large"
    assert "lower max_image_tokens" in refused.error.reason


def test_too_many_pictures_are_refused(reranker: Reranker, photo: Image.Image) -> None:
    many = {"images": [photo] * 9}
    (refused,) = reranker.rank("a fox", [many])
    assert refused.error is not None
    assert "takes 8 pictures" in str(refused.error)


def test_one_canvas_for_models_of_a_single_picture(
    qwen2_vl_folder: Path, photo: Image.Image, reranker: Reranker
) -> None:
    single = Reranker(qwen2_vl_folder, dtype="float32", max_images=1, max_image_tokens=64)
    other = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    documents: list[Any] = [{"image": other}, {"image": photo, "text": "a caption"}, "text only"]
    ranked = sorted(single.rank({"image": photo}, documents, explain=True), key=lambda each: each.index)
    for each in ranked:
        assert each.relevance is not None
        assert each.prompt is not None
        assert each.prompt.count("<|image_pad|>") == 1
        assert ("on the left, the candidate's on the right" in each.prompt) == (each.index < 2)
    assert "Candidate: a caption" in str(ranked[1].prompt)
    (clip,) = single.rank({"image": photo}, [Item(image=other, video=(photo, photo))])
    assert "not video" in str(clip.error)
    for prompt in ("lamra", "qwen3-vl-reranker", "Q: {query} D: {document}"):
        asked = Reranker(qwen2_vl_folder, dtype="float32", max_images=1, max_image_tokens=64, prompt=prompt)
        ranked = asked.rank({"image": photo}, documents[:1], explain=True)
        said = str(ranked[0].prompt)
        assert "<|vision_end|>The query's picture is on the left" in said
        assert "NULL" not in said
    two = reranker.score({"image": photo}, [{"image": other}])
    assert abs(two[0] - float(ranked[0].relevance or 0)) > 1e-4


def test_nan_is_an_error_of_its_document(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reranker._judge._log_odds

    def broken(prefix: Any, prompts: Any, shared: int) -> Any:
        return [
            ItemError("model", "the model's answer is not a finite number") if prompt.length > 120 else odds
            for prompt, odds in zip(prompts, whole(prefix, prompts, shared), strict=True)
        ]

    monkeypatch.setattr(reranker._judge, "_log_odds", broken)
    ranked = reranker.rank("a fox", ["a dog", "word " * 100, "a river"])
    assert (ranked[1].index, ranked[1].relevance) == (1, None)


def test_a_model_of_nan_says_so(qwen2_vl_folder: Path) -> None:
    broken = Reranker(qwen2_vl_folder, dtype="float32")
    broken._judge._rows = torch.full_like(broken._judge._rows, math.nan)
    with pytest.raises(BatchError, match="not a finite number; try dtype='float32'") as caught:
        broken.score("a fox", ["a dog", "a river"])
    assert [error.index for error in caught.value.errors] == [0, 1]


def test_a_failure_of_the_model_costs_only_its_document(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = reranker._judge.backbone
    whole = backbone.inputs

    def failing(items: Any) -> Any:
        if any(item.length > 90 for item in items):
            raise torch.OutOfMemoryError("no memory")
        return whole(items)

    documents = ["a dog", "word " * 100, "a river", "report"]
    expected = reranker.score("a fox", [documents[n] for n in (0, 2, 3)])
    monkeypatch.setattr(backbone, "inputs", failing)
    ranked = {each.index: each for each in reranker.rank("a fox", documents)}
    assert "OutOfMemoryError" in str(ranked[1].error)
    assert [ranked[n].relevance for n in (0, 2, 3)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_sixteen_threads_get_the_same_scores(reranker: Reranker, photo: Image.Image) -> None:
    documents: list[Any] = ["a dog", {"image": photo}, {"image": photo, "text": "a caption"}, "a river"]
    expected = {q: reranker.score(q, documents) for q in ("a fox", "a bank")}
    with ThreadPoolExecutor(16) as pool:
        asked = ["a fox", "a bank"] * 8
        for query, scores in zip(asked, pool.map(lambda q: reranker.score(q, documents), asked), strict=True):
            assert np.abs(scores - expected[query]).max() < 1e-5


def test_inputs_are_not_changed(reranker: Reranker, photo: Image.Image) -> None:
    document = {"image": photo, "text": "a caption"}
    pixels, query = photo.tobytes(), Item("a fox")
    reranker.rank(query, [document])
    assert (document, photo.tobytes(), query) == (
        {"image": photo, "text": "a caption"},
        pixels,
        Item("a fox"),
    )


def test_an_instruction_is_asked_with(reranker: Reranker) -> None:
    (judged,) = reranker.rank(Item("a fox", instruction="Find the antonym."), ["a dog"], explain=True)
    assert "user\nFind the antonym.\nQuery: a fox\nCandidate: a dog\n" in str(judged.prompt)
    assert judged.relevance != reranker.rank("a fox", ["a dog"])[0].relevance


def test_a_template_without_a_slot_for_it_keeps_the_instruction(qwen2_vl_folder: Path) -> None:
    own = Reranker(qwen2_vl_folder, dtype="float32", prompt="Q: {query} D: {document} {answers}?")
    (judged,) = own.rank(Item("a fox", instruction="Find the antonym."), ["a dog"], explain=True)
    assert "user\nQ: Find the antonym. a fox D: a dog" in str(judged.prompt)


def test_options_that_would_change_nothing_are_refused(qwen2_vl_folder: Path) -> None:
    with pytest.raises(InputError, match="was trained with 'Yes' and 'No'"):
        Reranker(qwen2_vl_folder, prompt="lamra", answers=("A", "B"))
    with pytest.raises(InputError, match="domain='news' would change nothing"):
        Reranker(qwen2_vl_folder, prompt="lamra", domain="news")
    with pytest.raises(InputError, match="the positive and the negative answer"):
        Reranker(qwen2_vl_folder, prompt=RerankPrompt("x", "{query}{document}", answers=("Yes",)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="its questions lack"):
        Reranker(qwen2_vl_folder, prompt=RerankPrompt("x", "{query}{document}{question}", questions={}))
    for given in ("1", True, -1):
        with pytest.raises(InputError, match="feature_cache_bytes"):
            Reranker(qwen2_vl_folder, feature_cache_bytes=given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_batch_tokens"):
        Reranker(qwen2_vl_folder, max_batch_tokens=0)


def test_a_query_that_leaves_no_room_is_at_fault_itself(qwen2_vl_folder: Path) -> None:
    short = Reranker(qwen2_vl_folder, dtype="float32", max_length=160, max_image_tokens=16)
    with pytest.raises(ItemError, match="the query: its instruction, words and pictures take"):
        short.rank(Item("a fox", instruction="Find " * 300), ["a dog"])


def test_choices_and_other_answers(qwen2_vl_folder: Path) -> None:
    choice = Reranker(qwen2_vl_folder, dtype="float32", answers=("A", "B"))
    (judged,) = choice.rank("a fox", ["a dog"], explain=True)
    assert "A: it fully does. B: it does not, or only in part. A or B<|im_end|>" in str(judged.prompt)
    word = Reranker(qwen2_vl_folder, dtype="float32", answers=("Yes", "No"))
    (other,) = word.rank("a fox", ["a dog"], explain=True)
    assert "query? Yes or No<|im_end|>" in str(other.prompt)
    assert len({judged.relevance, other.relevance}) == 2


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (("Yes", "Yes"), "share a token"),
        (("Yes", "absolutely not"), "'absolutely not' is not a single token"),
        (("Yes",), "the positive and the negative answer"),
        (("Yes", " "), "the positive and the negative answer"),
        ("True", "the positive and the negative answer"),
    ],
)
def test_answers_that_cant_be_told_apart(qwen2_vl_folder: Path, answers: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Reranker(qwen2_vl_folder, dtype="float32", answers=answers)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{query} only", r"it has \{document\} 0 times"),
        ("{document}, then {query}", r"needs \{query\} before \{document\}"),
        ("{query}{query}{document}", r"it has \{query\} 2 times"),
        ("{query} {document} {wish}", r"unknown slots \['wish'\]"),
        ("{query} {answers} {document}", r"has \{answers\} before \{document\}"),
        ("{query}<|image_pad|>{document}", "holds the picture token"),
        ("Is it?", r"must be one of \['judge', 'lamra', 'qwen3-vl-reranker'\]"),
        ("judg", "did you mean 'judge'"),
    ],
)
def test_a_template_is_checked_when_it_is_given(qwen2_vl_folder: Path, template: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Reranker(qwen2_vl_folder, dtype="float32", prompt=template)


def test_a_template_of_ones_own(qwen2_vl_folder: Path) -> None:
    own = Reranker(qwen2_vl_folder, dtype="float32", prompt="Q: {query} D: {document} {answers}?")
    (judged,) = own.rank("a fox", ["a dog"], explain=True)
    assert "user\nQ: a fox D: a dog True or False?<|im_end|>" in str(judged.prompt)


def test_every_pair_of_modalities_has_a_question_in_every_domain() -> None:
    kinds = ("text", "image", "fused")
    assert set(QUESTIONS) == {(q, d, domain) for q in kinds for d in kinds for domain in DOMAINS}


def test_domains_ask_about_captions(qwen2_vl_folder: Path, photo: Image.Image) -> None:
    news = Reranker(qwen2_vl_folder, dtype="float32", domain="news", max_image_tokens=16)
    (judged,) = news.rank("a fox", [{"image": photo}], explain=True)
    assert "the candidate news picture fit the query" in str(judged.prompt)
    with pytest.raises(InputError, match="did you mean 'fashion'"):
        Reranker(qwen2_vl_folder, domain="fashon")  # type: ignore[arg-type]


def test_a_folder_that_does_not_say_it_is_qwen3_vl_reranker(qwen3_vl_folder: Path) -> None:
    told = Reranker(qwen3_vl_folder, dtype="float32", prompt="qwen3-vl-reranker")
    (judged,) = told.rank("a fox", ["a dog"], explain=True)
    assert str(judged.prompt) == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: Given a search query, retrieve relevant candidates that answer the query.<Query>:a fox\n"
        "<Document>:a dog<|im_end|>\n<|im_start|>assistant\n"
    )


def test_lamra_is_asked_as_it_was_trained(qwen2_vl_folder: Path) -> None:
    lamra = Reranker(qwen2_vl_folder, dtype="float32", prompt="lamra")
    (judged,) = lamra.rank(Item("a fox", instruction="Find it."), ["a dog"], explain=True)
    assert "candidate" + " " * 24 + "meets the requirements of the query." in str(judged.prompt)
    assert "responed with 'No'.Query:Find it. a foxCandidate:a dog<|im_end|>" in str(judged.prompt)
    vocabulary = lamra._judge.backbone.tokenizer
    assert len(lamra._judge._rows) == 2  # one token each, as trained
    assert vocabulary.single("Yes", blank=False) != vocabulary.single("Yes")


def test_calibration_subtracts_what_the_form_alone_says(qwen2_vl_folder: Path) -> None:
    plain = Reranker(qwen2_vl_folder, dtype="float32")
    calibrated = Reranker(qwen2_vl_folder, dtype="float32", calibrate=True)

    def odds(share: float) -> float:
        return math.log(share / (1 - share))

    bias = odds(float(plain.score("N/A", ["N/A"])[0]))
    ours = calibrated.score("a fox", ["a dog", "N/A"])
    theirs = plain.score("a fox", ["a dog", "N/A"])
    for one, other in zip(ours, theirs, strict=True):
        assert odds(float(one)) == pytest.approx(odds(float(other)) - bias, abs=1e-4)
    assert calibrated.score("N/A", ["N/A"])[0] == pytest.approx(0.5, abs=1e-6)


def test_a_bias_that_cant_be_measured_loses_nothing(
    qwen2_vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = Reranker(qwen2_vl_folder, dtype="float32", calibrate=True)

    def fail(*_: object) -> float:
        raise ItemError("model", "no memory", stage="encode")

    monkeypatch.setattr(calibrated._judge, "prior", fail)
    ranked = calibrated.rank("a fox", ["a dog", "a river"])
    assert [(each.index, each.relevance) for each in ranked] == [(0, None), (1, None)]
    assert "no memory" in str(ranked[0].error)


def test_features_of_an_embedder_with_equal_vision_weights(
    qwen2_vl_folder: Path,
    gme_folder: Path,
    tmp_path: Path,
    photo: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compared by the weights: GME's folder has the same, another seed has not."""
    import tiny_checkpoints

    from umr_plugins.backbones import features
    from umr_plugins.embedder import Embedder
    from umr_plugins.encoding import scoring

    cache = FeatureCache(10**8)
    monkeypatch.setattr(features, "SHARED", cache)
    monkeypatch.setattr(scoring, "SHARED", cache)
    picture = photo.resize((448, 448))  # 256 tokens: the least of one and within the bounds of both
    expected = Reranker(qwen2_vl_folder, dtype="float32").score("a fox", [picture])
    cache.clear()
    Embedder(gme_folder, dtype="float32").encode_documents([picture])
    assert (cache.hits, cache.misses) == (0, 1)
    again = Reranker(qwen2_vl_folder, dtype="float32").score("a fox", [picture])
    assert (cache.hits, cache.misses) == (1, 1)
    assert np.abs(again - expected).max() < 1e-5
    other = tiny_checkpoints.write_qwen_vl(tmp_path, seed=3)
    Reranker(other, dtype="float32").score("a fox", [picture])
    assert (cache.hits, cache.misses) == (1, 2)


def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    from umr_plugins.backbones.features import Features

    cache = FeatureCache(1000)
    for number in range(5):
        cache.put(bytes([number]), Features(torch.zeros(100)))  # 400 bytes each
    assert cache.bytes == 800
    assert [cache.get(bytes([number])) is not None for number in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    cache.put(b"large", Features(torch.zeros(1000)))
    assert cache.get(b"large") is None
    big = torch.zeros(1000, 10)
    cache.put(b"part", Features(big[:2]))
    kept = cache.get(b"part")
    assert kept is not None
    assert kept.tokens.untyped_storage().nbytes() == 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"top_n": 0}, "top_n must be a whole number of at least 1"),
        ({"weight": -1}, "weight must be a number of at least 0"),
        ({"weight": "relevance"}, "weight must be a number"),
        ({"first_stage": [0.5]}, "2 documents, 1"),
        ({"first_stage": [0.5, math.nan]}, "must be finite"),
    ],
)
def test_arguments_of_rank(reranker: Reranker, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        reranker.rank("a fox", ["a dog", "a river"], **arguments)


def test_a_single_document_needs_a_list(reranker: Reranker) -> None:
    with pytest.raises(InputError, match=r"for one item pass \[item\]"):
        reranker.score("a fox", "a dog")


def test_embedders_are_no_rerankers_nor_the_other_way_round(
    mm_embed_folder: Path, qwen3_vl_reranker_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from umr_plugins.embedder import Embedder

    with pytest.raises(CheckpointError, match="made to be used as embedder, not as reranker"):
        Reranker("umr-tiny")
    monkeypatch.setattr("umr_plugins.backbones.registry._download", lambda *_, **__: mm_embed_folder)
    with pytest.raises(CheckpointError, match="made to be used as embedder, not as reranker"):
        Reranker("nvidia/MM-Embed")
    monkeypatch.setattr("umr_plugins.backbones.registry._download", lambda *_, **__: qwen3_vl_reranker_folder)
    with pytest.raises(CheckpointError, match="made to be used as reranker, not as embedder"):
        Embedder("Qwen/Qwen3-VL-Reranker-2B")
    with pytest.raises(CheckpointError, match="made to be used as reranker, not as embedder"):
        Embedder(str(qwen3_vl_reranker_folder))
    assert Reranker("Qwen/Qwen3-VL-Reranker-2B", dtype="float32").prompt.answers == ("yes", "no")


def test_a_model_that_cant_be_had_is_told_in_terms_of_rerankers() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        Reranker("Qwen/Qwen2-VL-2B-Instrukt")
    said = str(caught.value)
    assert "Did you mean 'Qwen/Qwen2-VL-2B-Instruct'?" in said
    assert 'Reranker("/models/' in said
    assert "umr-tiny" not in said


def test_a_folder_of_an_embedder_is_refused(mm_embed_folder: Path, gme_folder: Path) -> None:
    for folder in (mm_embed_folder, gme_folder):
        with pytest.raises(CheckpointError, match="is an embedder without a trained language-model head"):
            Reranker(folder, dtype="float32")


def test_a_checkpoint_without_head_is_refused(qwen2_vl_folder: Path, tmp_path: Path) -> None:
    for path in qwen2_vl_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"has no language-model head \(lm_head\.weight"):
        Reranker(tmp_path, dtype="float32")


def test_a_chat_form_that_cant_be_written_is_refused(qwen2_vl_folder: Path, tmp_path: Path) -> None:
    for path in qwen2_vl_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["content"] = token["content"].replace("<|im_start|>", "<|begin|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"no token '<\|im_start\|>'.*umr\.json"):
        Reranker(tmp_path, dtype="float32")


def test_what_the_message_says_to_write_beside_a_checkpoint_works(
    llava_next_folder: Path, tmp_path: Path
) -> None:
    for path in llava_next_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["model_type"] = "llama"
    raw["text_config"].pop("sliding_window", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"Write an umr\.json beside it with family, role"):
        Reranker(tmp_path, dtype="float32")
    sidecar = {"family": "llava_next", "role": "reranker", "template": "<s>USER: {body} ASSISTANT:"}
    (tmp_path / "umr.json").write_text(json.dumps(sidecar))
    (judged,) = Reranker(tmp_path, dtype="float32").rank("a fox", ["a dog"], explain=True)
    assert str(judged.prompt).startswith("<s>USER: Judge a candidate")
    (tmp_path / "umr.json").write_text(json.dumps(sidecar | {"template": "{instruction}{body}"}))
    with pytest.raises(CheckpointError, match="chat form alone"):
        Reranker(tmp_path, dtype="float32")


def test_shared_and_closed(qwen2_vl_folder: Path) -> None:
    first = shared_reranker(qwen2_vl_folder, dtype="float32", adapter=None)
    assert shared_reranker(qwen2_vl_folder, dtype="float32") is first
    assert shared_reranker(str(qwen2_vl_folder), dtype=torch.float32) is first
    assert copy.deepcopy(first) is first
    assert pickle.loads(pickle.dumps(first)) is first
    first.close()
    assert not shared_reranker(qwen2_vl_folder, dtype="float32").closed
    made = Reranker(qwen2_vl_folder, dtype="float32")
    made.close()
    with pytest.raises(Exception, match="closed"):
        made.score("x", ["y"])


def test_prompts_by_name_are_well_formed() -> None:
    for name in PROMPTS:
        assert choose_prompt(name, None, "judge").name == name
