"""A ready model inside a configuration object that must survive copying and pickling.

Models and their locks can be neither copied nor pickled. Copies hold the same `Ready`; a pickle holds a token
that leads back to it in the same process, and the model itself only where it can be pickled.
"""

from __future__ import annotations

import pickle
import sys
import uuid
import weakref
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

M = TypeVar("M")

_ALL: weakref.WeakValueDictionary[str, Ready[Any]] = weakref.WeakValueDictionary()


class Ready(Generic[M]):
    """An encoder or reranker, and the configuration that it stands for.

    `model` is None after unpickling in another process, if the model can't be pickled; the configuration
    then has to be enough.
    """

    def __init__(self, model: M | None, config: dict[str, Any], token: str | None = None) -> None:
        self.model = model
        self.config = config
        self.token = token or uuid.uuid4().hex
        _ALL[self.token] = self

    def __copy__(self) -> Ready[M]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ready[M]:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.token, self.config, self._pickled())

    def _pickled(self) -> bytes | None:
        module = sys.modules.get("umr_plugins.embedder")
        if module is not None and isinstance(self.model, module.Embedder):
            return None  # the configuration says everything; a Reranker pickles as its options
        try:
            return pickle.dumps(self.model)
        except Exception:  # a lock, a connection, a local class: the token still works in this process
            return None


def checked(model: BaseModel, update: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of a `model_copy`, which pydantic takes as they are, read as the constructor reads them.

    Raises:
        pydantic.ValidationError: an unknown field, or a value that it does not take.
    """
    given = {name: getattr(model, name) for name in model.model_fields_set}
    made = type(model)(**{**given, **update})
    return {name: getattr(made, name) for name in update}


def _restore(token: str, config: dict[str, Any], pickled: bytes | None) -> Ready[Any]:
    known = _ALL.get(token)
    return known or Ready(pickle.loads(pickled) if pickled else None, config, token)
