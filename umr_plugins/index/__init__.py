"""Durable storage and search: a SQLite ledger that is the truth, and a Chroma projection of it."""
