"""Errors as values: copied, pickled and shown."""

from __future__ import annotations

import copy
import pickle

import pytest

from umr_plugins.errors import BatchError, ItemError


@pytest.mark.parametrize(
    "travel", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_a_batch_error_travels_after_its_arguments_were_rewritten(travel):
    error = BatchError([ItemError("empty", "nothing", index=1, name="a.txt")], 3, "judged", "Mend it.")
    before = str(error)
    error.args = ("said by another library in add",)  # as Chroma does with what an embedding function raises
    other = travel(error)
    assert type(other) is BatchError
    assert str(other) == before
    assert (other.errors[0].index, other.errors[0].name, other.total) == (1, "a.txt", 3)
