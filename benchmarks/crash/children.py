"""The processes that `kill_index.py` starts: two that are killed, and one that looks at what is left.

    python children.py index SOURCE DB --pause S     like `umr index --json`, with a slow fake encoder
    python children.py write STORE DB VECTORS --rounds N --batch N    add vectors to `umr` or to bare `chroma`
    python children.py check STORE DB VECTORS --acknowledged N    what a later process finds

Each batch that was committed is acknowledged by a line `{"committed": n}` on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from umr_plugins.index.index import Index
from umr_plugins.testing import FakeEncoder
from umr_plugins.types import Item


def acknowledge(count: int) -> None:
    print(json.dumps({"committed": count}), file=sys.stderr, flush=True)


class SlowEncoder(FakeEncoder):
    """Takes its time, so that there are moments to be killed at."""

    pause = 0.0

    def _vector(self, item: Item) -> Any:
        time.sleep(self.pause)
        return super()._vector(item)


def index(args: argparse.Namespace) -> None:
    encoder = SlowEncoder(64)
    encoder.pause = args.pause
    with Index(args.db, encoder) as opened:
        report = opened.add_folder(args.source, on_commit=acknowledge)
    print(json.dumps({"indexed": report.indexed, "items": report.items}))


def rows(vectors: np.ndarray, rounds: int) -> Iterator[tuple[str, np.ndarray]]:
    """(id, vector): each vector once per round, under a new id and turned a little."""
    for turn in range(rounds):
        turned = np.roll(vectors, turn, axis=1)
        for number, vector in enumerate(turned):
            yield f"{turn}-{number}", vector


def first_rows(vectors: np.ndarray, count: int) -> tuple[list[str], np.ndarray]:
    """The first `count` rows of an endless run."""
    rounds = -(-count // len(vectors))
    chosen = [row for row, _ in zip(rows(vectors, rounds), range(count), strict=False)]
    return [name for name, _ in chosen], np.array([vector for _, vector in chosen], np.float32)


def batches(vectors: np.ndarray, rounds: int, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    names: list[str] = []
    block: list[np.ndarray] = []
    for name, vector in rows(vectors, rounds):
        names.append(name)
        block.append(vector)
        if len(names) == size:
            yield names, np.stack(block)
            names, block = [], []
    if names:
        yield names, np.stack(block)


def chroma_collection(db: Path, *, create: bool) -> Any:
    import chromadb

    client = chromadb.PersistentClient(str(db), settings=chromadb.config.Settings(anonymized_telemetry=False))
    if not create:
        return client.get_collection("umr", embedding_function=None)
    return client.create_collection(
        "umr", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )


def write(args: argparse.Namespace) -> None:
    vectors, done = np.load(args.vectors), 0
    store = Index(args.db, create=True) if args.store == "umr" else chroma_collection(args.db, create=True)
    for names, block in batches(vectors, args.rounds, args.batch):
        if isinstance(store, Index):
            store.add(names, ids=names, vectors=block, metadatas=[{"name": name} for name in names])
        else:
            store.upsert(
                names, embeddings=block, documents=names, metadatas=[{"name": name} for name in names]
            )
        done += len(names)
        acknowledge(done)
    if isinstance(store, Index):
        store.close()


def check(args: argparse.Namespace) -> None:
    """Print what is there of the acknowledged rows, as JSON. Raises what the store raises."""
    names, expected = first_rows(np.load(args.vectors), args.acknowledged)
    begun = time.monotonic()
    if args.store == "umr":
        with Index(args.db) as opened:
            seconds = time.monotonic() - begun
            ids, mended, verified = opened.ids(), opened.info()["mended"], opened.verify()
            present = set(ids)
            there = [name for name in names if name in present]
            stored = dict(zip(there, opened.vectors(there), strict=True))
            answered = bool(opened.search_vector(expected[0], 1)) if names else True
            problems = list(verified.problems)
    else:
        collection = chroma_collection(args.db, create=False)
        total = collection.count()
        seconds, mended, problems, stored = time.monotonic() - begun, [], [], {}
        for start in range(0, len(names), 500):
            page = collection.get(ids=names[start : start + 500], include=["embeddings"])
            stored.update(zip(page["ids"], page["embeddings"], strict=True))
        ids = collection.get(include=[])["ids"]
        answered = not names or bool(collection.query(query_embeddings=expected[:1], n_results=1)["ids"][0])
        problems += [] if total == len(ids) else [f"counts {total}, lists {len(ids)}"]
    wrong = [
        name
        for name, vector in zip(names, expected, strict=True)
        if name in stored and off(stored[name], vector)
    ]
    found = {
        "items": len(ids),
        "lost": [name for name in names if name not in stored][:5],
        "lost_count": sum(name not in stored for name in names),
        "wrong": wrong[:5],
        "wrong_count": len(wrong),
        "twice": len(ids) - len(set(ids)),
        "answered": answered,
        "problems": problems,
        "mended": mended,
        "seconds": round(seconds, 3),
    }
    print(json.dumps(found))


def off(stored: Any, expected: np.ndarray) -> bool:
    """Whether a vector is another one (both stores normalise, so the last digits may differ)."""
    vector = np.asarray(stored, np.float32)
    return vector.shape != expected.shape or float(np.abs(vector - expected).max()) > 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    for name, run in (("index", index), ("write", write), ("check", check)):
        verb = verbs.add_parser(name)
        verb.set_defaults(run=run)
        if name == "index":
            verb.add_argument("source", type=Path)
        else:
            verb.add_argument("store", choices=("umr", "chroma"))
        verb.add_argument("db", type=Path)
        if name == "index":
            verb.add_argument("--pause", type=float, default=0.0)
        else:
            verb.add_argument("vectors", type=Path)
            verb.add_argument("--batch", type=int, default=250)
            verb.add_argument("--rounds", type=int, default=1)
            verb.add_argument("--acknowledged", type=int, default=0)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
