"""What the package exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import langchain_umr


def test_public_names() -> None:
    assert langchain_umr.__all__ == [
        "GMEEmbeddings",
        "MLLMReranker",
        "RerankingRetriever",
        "UMRVectorStore",
        "adocuments_to_content_blocks",
        "document_key",
        "documents_to_content_blocks",
    ]
    assert all(hasattr(langchain_umr, name) for name in langchain_umr.__all__)


def test_importing_loads_neither_model_nor_database_libraries() -> None:
    code = (
        "import sys, langchain_umr; print(sorted({'torch', 'transformers', 'chromadb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
