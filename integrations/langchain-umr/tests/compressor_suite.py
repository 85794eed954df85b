"""What any document compressor that reranks must do; LangChain's own test package has no suite for them.

A subclass says how one is made. Nothing here knows which model judges.
"""

from __future__ import annotations

import base64
import copy
import io
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.messages import HumanMessage
from langchain_core.tracers import BaseTracer
from langchain_core.tracers.schemas import Run
from PIL import Image

SCORE = "relevance_score"


def png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (56, 56), color).save(out, "PNG")
    return out.getvalue()


def data_uri(color: str) -> str:
    return "data:image/png;base64," + base64.b64encode(png(color)).decode()


class Recorder(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


class CompressorSuite:
    """Override `make`; `photos` is a folder with `red.png` and without `gone.png`."""

    def make(self, photos: Path, top_n: int | None) -> BaseDocumentCompressor:
        """A new compressor that may open what lies in `photos` and returns `top_n`, or all."""
        raise NotImplementedError

    @pytest.fixture
    def photos(self, tmp_path: Path) -> Path:
        (tmp_path / "red.png").write_bytes(png("red"))
        return tmp_path

    @pytest.fixture
    def compressor(self, photos: Path) -> BaseDocumentCompressor:
        return self.make(photos, None)

    @pytest.fixture
    def documents(self) -> list[Document]:
        """Text, picture, both, a picture in memory, and documents that nobody can judge."""
        return [
            Document("a boat at sea", id="text", metadata={"n": 1, "nested": {"tags": ["x"]}}),
            Document("", id="image", metadata={"image": "red.png"}),
            Document("a red kite", id="fused", metadata={"image_uri": "red.png", "relevance_score": "old"}),
            Document("", id="gone", metadata={"image": "gone.png"}),
            Document("", metadata={"image": data_uri("blue")}),
            Document("  ", id="blank"),
        ]

    def test_every_document_comes_back_once_with_all_it_had(
        self, compressor: BaseDocumentCompressor, documents: list[Document]
    ) -> None:
        found = compressor.compress_documents(documents, "red kite")
        assert sorted(str(one.id) for one in found) == sorted(str(one.id) for one in documents)
        given = {str(one.id): one for one in documents}
        for one in found:
            before = given[str(one.id)]
            assert one.page_content == before.page_content
            assert {**before.metadata, SCORE: 0} == {
                **{key: one.metadata[key] for key in before.metadata},
                SCORE: 0,
            }

    def test_what_was_given_is_not_changed(
        self, compressor: BaseDocumentCompressor, documents: list[Document]
    ) -> None:
        before = copy.deepcopy(documents)
        found = compressor.compress_documents(documents, "red kite")
        assert documents == before
        for one in found:
            one.metadata["new"] = 1
        assert documents == before

    def test_the_best_come_first(self, compressor: BaseDocumentCompressor, documents: list[Document]) -> None:
        found = compressor.compress_documents(documents, "red kite")
        scores = [one.metadata[SCORE] for one in found if one.metadata[SCORE] is not None]
        assert len(scores) == 4
        assert all(type(score) is float and 0 <= score <= 1 for score in scores)
        assert scores == sorted(scores, reverse=True)

    def test_equal_documents_keep_their_order(self, compressor: BaseDocumentCompressor) -> None:
        documents = [Document("a kite", id=str(n)) for n in range(5)]
        assert [one.id for one in compressor.compress_documents(documents, "kite")] == list("01234")

    def test_a_picture_alone_is_judged_and_a_missing_one_is_not_lost(
        self, compressor: BaseDocumentCompressor, documents: list[Document]
    ) -> None:
        found = {str(one.id): one for one in compressor.compress_documents(documents, "red kite")}
        assert found["image"].metadata[SCORE] is not None
        for lost, word in (("gone", "gone.png"), ("blank", "empty")):
            assert found[lost].metadata[SCORE] is None
            assert word in found[lost].metadata["rerank_error"]

    @pytest.mark.parametrize("top_n", [None, 1, 3, 99])
    def test_the_number_of_documents(
        self, photos: Path, documents: list[Document], top_n: int | None
    ) -> None:
        found = self.make(photos, top_n).compress_documents(documents, "red kite")
        everything = self.make(photos, None).compress_documents(documents, "red kite")
        assert len(found) == min(top_n or 99, len(documents))
        assert [one.id for one in found] == [one.id for one in everything][: len(found)]

    def test_no_documents(self, compressor: BaseDocumentCompressor) -> None:
        assert compressor.compress_documents([], "red kite") == []

    @pytest.mark.parametrize(
        "query",
        [
            {"text": "red kite", "image": data_uri("red")},
            HumanMessage(content=[{"type": "image", "base64": data_uri("red").partition(",")[2]}]),
            Document("red kite", metadata={"image": "red.png"}),
        ],
    )
    def test_queries_with_pictures(
        self, compressor: BaseDocumentCompressor, documents: list[Document], query: Any
    ) -> None:
        assert len(compressor.compress_documents(documents, query)) == len(documents)

    async def test_async_gives_the_same(
        self, compressor: BaseDocumentCompressor, documents: list[Document]
    ) -> None:
        found = compressor.compress_documents(documents, "red kite")
        assert await compressor.acompress_documents(documents, "red kite") == found

    async def test_callbacks_see_one_run_each(
        self, compressor: BaseDocumentCompressor, documents: list[Document]
    ) -> None:
        recorder = Recorder()
        found = compressor.compress_documents(documents, "red kite", callbacks=[recorder])
        await compressor.acompress_documents(documents, "red kite", callbacks=[recorder])
        assert [run.outputs for run in recorder.runs] == [{"output": found}] * 2
        assert [run.error for run in recorder.runs] == [None, None]
