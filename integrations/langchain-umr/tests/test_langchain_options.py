"""`model_copy` with other options, and what errors of the embeddings advise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_umr import GMEEmbeddings, MLLMReranker
from pydantic import ValidationError

from umr_plugins.errors import BatchError, InputError
from umr_plugins.testing import FakeEncoder, FakeReranker


@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_with_other_options_is_checked_as_a_new_one(deep: bool) -> None:
    for one, mistakes in (
        (GMEEmbeddings(model="umr-tiny"), ({"dmi": 8}, {"dim": 0}, {"dim": "many"})),
        (MLLMReranker(top_n=3), ({"topn": 8}, {"top_n": 0}, {"reranker": "name"})),
    ):
        for update in mistakes:
            with pytest.raises(ValidationError, match=next(iter(update))):
                one.model_copy(update=update, deep=deep)
    made = GMEEmbeddings(model="umr-tiny").model_copy(update={"adapter": Path("lora")}, deep=deep)
    assert (made.model, made.adapter) == ("umr-tiny", "lora"), "read as the constructor reads it"
    assert MLLMReranker().model_copy(update={"image_key": "scan"}, deep=deep).image_key == ("scan",)
    assert MLLMReranker().model_copy(deep=deep) == MLLMReranker()


def test_a_copy_shares_the_ready_model_as_long_as_its_options_are_equal() -> None:
    encoder, judge = FakeEncoder(), FakeReranker()
    embeddings = GMEEmbeddings.from_encoder(encoder)
    assert embeddings.model_copy(update={"instruction": "find"}).encoder is encoder
    assert MLLMReranker(reranker=judge).model_copy(update={"top_n": 2}).scorer is judge
    with pytest.raises(ValidationError, match="takes no options of a model"):
        MLLMReranker(reranker=judge).model_copy(update={"model": "other"})


def test_errors_advise_nothing_that_the_method_does_not_take(tmp_path: Path) -> None:
    embeddings = GMEEmbeddings.from_encoder(FakeEncoder())
    calls: list[Any] = [
        lambda: embeddings.embed_documents(["kite", 5]),
        lambda: embeddings.embed_documents(["kite", "poison"]),
        lambda: embeddings.embed_image([tmp_path / "gone.png"]),
    ]
    for call in calls:
        with pytest.raises(BatchError, match="leave them out") as caught:
            call()
        assert "pass on_error" not in str(caught.value)
    for empty in ("", b"", None):
        with pytest.raises(InputError, match=r"uris \[0\] are empty; give a path"):
            embeddings.embed_image([empty])  # type: ignore[list-item]  # that is the mistake
