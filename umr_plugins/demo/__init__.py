"""The demonstration that ships with the package: umr-tiny, a sample corpus, and queries with known answers.

umr-tiny is a demonstration model: small enough for every installation, good at drawings and short
descriptions, no replacement for a real one.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
"""This folder."""

MODEL = ROOT / "umr-tiny"
"""Weights of the demonstration model."""

FILES = ROOT / "corpus" / "files"
"""Pictures, photographs, notes and a PDF: indexed as a folder."""

CARDS = ROOT / "corpus" / "cards" / "cards.jsonl"
"""Pictures with texts, fused into one vector each: rows of `id`, `text` and `image` (beside the file)."""

QUERIES = ROOT / "queries.jsonl"
"""Queries with known answers, see `umr_plugins.demo.queries`."""
