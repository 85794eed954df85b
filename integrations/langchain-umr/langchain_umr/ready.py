"""A ready encoder inside a configuration object that must survive copying and pickling.

Models and their locks can be neither copied nor pickled. Copies hold the same `Ready`; a pickle holds a token
that leads back to it in the same process, and the encoder itself only where it can be pickled.
"""

from __future__ import annotations

import pickle
import sys
import uuid
import weakref
from typing import Any

from umr_plugins.types import Encoder

_ALL: weakref.WeakValueDictionary[str, Ready] = weakref.WeakValueDictionary()


class Ready:
    """An encoder and the configuration that it stands for.

    `encoder` is None after unpickling in another process, if the encoder can't be pickled; the configuration
    then has to be enough.
    """

    def __init__(self, encoder: Encoder | None, config: dict[str, Any], token: str | None = None) -> None:
        self.encoder = encoder
        self.config = config
        self.token = token or uuid.uuid4().hex
        _ALL[self.token] = self

    def __copy__(self) -> Ready:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Ready:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.token, self.config, self._pickled())

    def _pickled(self) -> bytes | None:
        module = sys.modules.get("umr_plugins.embedder")
        if module is not None and isinstance(self.encoder, module.Embedder):
            return None  # gigabytes of weights that the configuration can load again
        try:
            return pickle.dumps(self.encoder)
        except Exception:  # a lock, a connection, a local class: the token still works in this process
            return None


def _restore(token: str, config: dict[str, Any], pickled: bytes | None) -> Ready:
    known = _ALL.get(token)
    return known or Ready(pickle.loads(pickled) if pickled else None, config, token)
