"""`MLLMReranker` in every way it can be made, against the suite for compressors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import tiny_checkpoints
from compressor_suite import CompressorSuite
from langchain_core.documents import BaseDocumentCompressor
from langchain_umr import MLLMReranker

from umr_plugins.testing import FakeReranker


class TestReady(CompressorSuite):
    """Around a reranker that is there already."""

    def make(self, photos: Path, top_n: int | None) -> BaseDocumentCompressor:
        return MLLMReranker(reranker=FakeReranker(), roots=photos, top_n=top_n)


class TestCopied(CompressorSuite):
    """A deep copy of a copy with other options."""

    def make(self, photos: Path, top_n: int | None) -> BaseDocumentCompressor:
        first = MLLMReranker(reranker=FakeReranker(), weight="pure", instruction="find it")
        return copy.deepcopy(first.model_copy(update={"roots": (photos,), "top_n": top_n}))


class TestPickled(CompressorSuite):
    """Out of a pickle."""

    def make(self, photos: Path, top_n: int | None) -> BaseDocumentCompressor:
        made = MLLMReranker(reranker=FakeReranker(), roots=[photos], top_n=top_n, score_key=None)
        restored: MLLMReranker = pickle.loads(pickle.dumps(made))
        return restored


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.write_qwen_vl(tmp_path_factory.mktemp("qwen2-vl"))


class TestCheckpoint(CompressorSuite):
    """A true model of random weights, by its name."""

    @pytest.fixture(autouse=True)
    def _checkpoint(self, checkpoint: Path) -> None:
        self.folder = checkpoint

    def make(self, photos: Path, top_n: int | None) -> BaseDocumentCompressor:
        return MLLMReranker(model=self.folder, dtype="float32", roots=photos, top_n=top_n)
