"""Which model an index belongs to: recorded at first use, compared ever after."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umr_plugins.errors import FingerprintError, InputError
from umr_plugins.index.encode import wrong_dim
from umr_plugins.index.ledger import Ledger
from umr_plugins.types import Encoder

log = logging.getLogger(__name__)


class Identity:
    """The model and vector options in a ledger's `meta` table."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def fingerprint(self) -> str | None:
        """Of the encoder that made the vectors; None while callers bring their own."""
        return self._ledger.meta("fingerprint")

    @property
    def dim(self) -> int | None:
        """Length of the vectors, once known."""
        value = self._ledger.meta("dim")
        return None if value is None else int(value)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that recreate the encoder, if it said so."""
        value = json.loads(self._ledger.meta("config") or "{}")
        return value if isinstance(value, dict) else {}

    def facts(self) -> dict[str, Any]:
        """What `info` shows."""
        names = ("fingerprint", "dtype", "pages", "created")
        return {
            "model": self.config.get("model"),
            "dim": self.dim,
            **{name: self._ledger.meta(name) for name in names},
            "demo": self._ledger.meta("demo") == "1",
        }

    def check(self, encoder: Encoder, *, recreated: bool = False) -> None:
        """Record the encoder of a new index, or make sure that this one made the vectors.

        Args:
            encoder: what will embed from now on.
            recreated: it was loaded from the record, not given by the caller.

        Raises:
            FingerprintError: it is another model, or the same with other vector options.
        """
        recorded, empty = self.fingerprint, not self._ledger.count()
        if recorded == encoder.fingerprint:
            self._check_dtype(encoder)
            return
        if not empty and self.dim is not None and self.dim != encoder.dim:
            raise wrong_dim(self.dim, encoder.dim)
        if not empty and recorded is not None:
            if recreated:
                raise FingerprintError(
                    f"this index was made with {described(self.config, self.dim)}, fingerprint "
                    f"{recorded[:12]}, but the model under that name is another one now, fingerprint "
                    f"{encoder.fingerprint[:12]}. Their vectors can't be compared. Put the old model back, "
                    "or index into a new folder"
                )
            raise FingerprintError(
                f"this index was made with {described(self.config, self.dim)}, fingerprint {recorded[:12]}; "
                f"you gave {described(config_of(encoder), encoder.dim)}, fingerprint "
                f"{encoder.fingerprint[:12]}. Their vectors can't be compared. Give the model and options "
                "that it was made with, or no model at all (the index knows its own); or make a new index"
            )
        if not empty:
            log.warning(
                "the vectors of this index were brought by its callers; trusting that this model made them"
            )
        self._record(encoder)

    def _record(self, encoder: Encoder) -> None:
        with self._ledger.transaction():
            self._ledger.set_meta("fingerprint", encoder.fingerprint)
            self._ledger.set_meta("dim", str(encoder.dim))
            self._ledger.set_meta("config", json.dumps(config_of(encoder)))
            self._ledger.set_meta("dtype", dtype_of(encoder))
            self._ledger.set_meta("pages", getattr(encoder, "pages", None) or "image")
            self._ledger.set_meta("demo", str(int(bool(getattr(encoder, "is_demo", False)))))

    def _check_dtype(self, encoder: Encoder) -> None:
        recorded, given = self._ledger.meta("dtype"), dtype_of(encoder)
        if recorded and given and recorded != given:
            log.warning(
                "the index was made in %s, this model runs in %s: scores differ a little", recorded, given
            )

    def fix_dim(self, dim: int) -> None:
        """Record the length of vectors that the caller brings, or check it.

        Raises:
            FingerprintError: another length than the index has.
        """
        if self.dim is not None and self.dim != dim and (self._ledger.count() or self.fingerprint):
            raise wrong_dim(self.dim, dim)
        if self.dim != dim:
            self._ledger.set_meta("dim", str(dim))

    def recreate(self) -> Encoder:
        """The recorded model, loaded again.

        Only bundled models, models of the registry and folders are loaded: a ledger from elsewhere must not
        be able to make this machine download something.

        Raises:
            InputError: nothing recorded that can be loaded; says what to give.
            FingerprintError: what is there under that name has changed.
        """
        from umr_plugins.backbones.spec import BUNDLED, KNOWN

        config = self.config
        model = config.get("model")
        if not isinstance(model, str) or not (model in BUNDLED or model in KNOWN or _is_folder(model)):
            raise InputError(
                "this index needs its model to go on, and it can't be loaded from what is recorded "
                f"({described(config, self.dim)}). Give it: Index(path, Embedder(...))"
            )
        from umr_plugins.embedder import shared_embedder

        encoder: Encoder = shared_embedder(**config)
        self.check(encoder, recreated=True)
        return encoder


def _is_folder(model: str) -> bool:
    path = Path(model)
    return path.is_absolute() and path.is_dir()


def described(config: Mapping[str, Any], dim: int | None) -> str:
    """A model and its options, for messages."""
    options = ", ".join(f"{key}={value}" for key, value in config.items() if key not in ("model", "dim"))
    return f"{config.get('model') or 'an unnamed model'} (dim {dim}{', ' if options else ''}{options})"


def config_of(encoder: Encoder) -> dict[str, Any]:
    """What recreates the encoder, if it says so; only what JSON takes."""
    config = getattr(encoder, "config", None)
    if not isinstance(config, Mapping):
        return {}
    try:
        return dict(json.loads(json.dumps(dict(config))))
    except (TypeError, ValueError):
        return {}


def dtype_of(encoder: Encoder) -> str | None:
    """The type the model computes in, without torch's prefix."""
    dtype = getattr(encoder, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")
