"""Making and opening Chroma collections, with the check of the model that Chroma does not do."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

from chromadb.api import ClientAPI
from chromadb.api.models.Collection import Collection
from chromadb.errors import NotFoundError

from umr_plugins.backbones.spec import BUNDLED, KNOWN
from umr_plugins.chroma.config import checked, difference
from umr_plugins.chroma.function import UMREmbeddingFunction
from umr_plugins.chroma.stamp import Stamp
from umr_plugins.errors import FingerprintError, InputError

_log = logging.getLogger(__name__)


def create_collection(
    client: ClientAPI,
    name: str,
    embedding_function: UMREmbeddingFunction,
    *,
    space: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    configuration: Mapping[str, Any] | None = None,
    data_loader: Any = None,
    get_or_create: bool = False,
) -> Collection:
    """Make a collection that knows its model: options, fingerprint and length of the vectors.

    The model is loaded, since only its weights have a fingerprint.

    Args:
        client: any synchronous Chroma client.
        name: of the collection.
        embedding_function: embeds what is added and searched for.
        space: `"cosine"` unless given here or in the configuration.
        metadata: your own, kept; `umr_fingerprint` and `umr_dim` are added.
        configuration: as Chroma takes it: `{"hnsw": {"ef_search": 200}}`.
        data_loader: `UMRImageLoader`, for `uris`.
        get_or_create: open the collection, as `open_collection` does, if there is one; it must then have the
            distance, the metadata and the settings of the index that are given here.

    Raises:
        InputError: there is one already (with `get_or_create`, one that is made otherwise), or an argument is
            not allowed.
        FingerprintError: with `get_or_create`, as `open_collection`.
    """
    _check_arguments(client, embedding_function)
    own = dict(configuration or {})
    if "embedding_function" in own:
        raise InputError("give the embedding function as an argument, not in the configuration")
    if "hnsw:space" in (metadata or {}):
        raise InputError('give the distance as space="cosine", not in the metadata')
    index = "spann" if own.get("spann") is not None else "hnsw"
    options = dict(own.get(index) or {})
    if None not in (space, options.get("space")) and space != options["space"]:
        raise InputError(f"space={space!r} contradicts {options['space']!r} in the configuration; give one")
    wanted = options.get("space") if space is None else space
    options["space"] = embedding_function.default_space() if wanted is None else wanted
    _check_space(name, options["space"], wanted, embedding_function)
    found = _find(client, name)
    if found is not None and not get_or_create:
        raise InputError(
            f"there is a collection {name!r} already; open it with open_collection, or pass "
            "get_or_create=True"
        )
    if found is None:
        stamp = Stamp.write(embedding_function.encoder)
        try:
            client.create_collection(
                name,
                embedding_function=embedding_function,
                metadata={**(metadata or {}), **stamp},
                configuration=cast(Any, {**own, index: options}),  # Chroma checks it
            )
        except Exception:
            found = _find(client, name) if get_or_create else None
            if found is None:
                raise
    opened = open_collection(client, name, embedding_function, space=wanted, data_loader=data_loader)
    if found is not None:
        _check_made_so(found, metadata or {}, index, own.get(index) or {})
    return opened


def open_collection(
    client: ClientAPI,
    name: str,
    embedding_function: UMREmbeddingFunction,
    *,
    space: str | None = None,
    data_loader: Any = None,
) -> Collection:
    """Open a collection, and refuse it if another model has filled it.

    The fingerprint decides, and the length of the vectors: both are compared before anything is embedded, at
    once where they are known without loading the weights. One model can be named in several ways (its folder
    was moved, `dim` is the model's own), so recorded options are only named beside it; what differs in the
    instruction of queries never matters. A collection without fingerprint (made by Chroma alone, or after
    `collection.modify(metadata=...)`, which replaces all metadata) is opened with a warning, and its options
    must be equal; of one without recorded model (made by LangChain's Chroma, or with vectors of your own)
    only the length of the vectors can be compared. `client.get_collection` does none of this: Chroma compares
    names.

    A collection that would make Chroma build any other embedding function is refused too, since building one
    from stored configuration can run code that the configuration names.

    Args:
        client: any synchronous Chroma client.
        name: of the collection.
        embedding_function: embeds what is added and searched for.
        space: the distance that you rely on; None takes the collection's.
        data_loader: `UMRImageLoader`, for `uris`.

    Raises:
        FingerprintError: it was made with another model or other options; names both.
        InputError: no such collection, another distance, or another embedding function.
    """
    _check_arguments(client, embedding_function)
    found = _find(client, name)
    if found is None:
        raise InputError(f"there is no collection {name!r}; make it with create_collection")
    stored, given = _recorded(found), embedding_function.get_config()
    _check_space(name, _space(found), space, embedding_function)
    rows = found.get(limit=1, include=["embeddings"])["embeddings"]
    dim = len(rows[0]) if rows is not None and len(rows) else None
    told = given.get("instruction")  # to queries only
    differs = "" if stored is None else difference({**stored, "instruction": told}, given)
    stamp = Stamp.read(name, found.metadata, dim, differs)
    models = {(stored or given).get("model"), given.get("model")}
    if differs and (stamp.fingerprint is None or (len(models) == 2 and models <= {*BUNDLED, *KNOWN})):
        raise FingerprintError(
            f"collection {name!r} was made with another model or other options: {differs}. Their vectors "
            "can't be compared. Give what it was made with, or make a new collection"
        )
    if stamp.fingerprint is None:
        _log.warning(
            "collection %r %s; trusting that %r did",
            name,
            "does not say which model filled it"
            if stored is None
            else "records its model's options, not its fingerprint (metadata must keep the umr_* keys)",
            embedding_function,
        )
    function = embedding_function.stamped(stamp)
    return client.get_collection(name, embedding_function=function, data_loader=data_loader)


def _check_arguments(client: Any, function: Any) -> None:
    if not isinstance(function, UMREmbeddingFunction):
        raise InputError(f"embedding_function is a UMREmbeddingFunction, got {type(function).__name__}")
    if inspect.iscoroutinefunction(getattr(client, "get_collection", None)):
        raise InputError(
            "asynchronous clients are not supported; use chromadb.HttpClient, or add vectors of embed_items"
        )


def _check_space(name: str, space: Any, wanted: str | None, function: UMREmbeddingFunction) -> None:
    allowed = function.supported_spaces()
    for given in (space, wanted):
        if given is not None and given not in allowed:
            raise InputError(f"space must be one of {allowed}, got {given!r}")
    if wanted is not None and space != wanted:
        raise InputError(
            f"collection {name!r} has the distance {space!r}, not {wanted!r}; it can't be changed"
        )


def _check_made_so(found: Collection, metadata: Mapping[str, Any], index: str, options: Any) -> None:
    """Raise `InputError` if a collection is there with other metadata or settings than those asked for."""
    settings, noted = (found.configuration_json or {}).get(index) or {}, found.metadata or {}
    asked = {key: value for key, value in options.items() if key in settings and value is not None}
    differs = [
        difference({key: settings[key] for key in asked}, asked),
        difference({key: noted.get(key) for key in metadata}, metadata),
    ]
    if any(differs):
        raise InputError(
            f"there is a collection {found.name!r} already, made otherwise: "
            f"{'; '.join(filter(None, differs))}. Leave these out, or change it with collection.modify and "
            "keep the umr_* keys of its metadata"
        )


def _find(client: ClientAPI, name: str) -> Collection | None:
    try:
        return client.get_collection(name, embedding_function=None)
    except NotFoundError:
        return None


def _recorded(collection: Collection) -> dict[str, Any] | None:
    """The configuration of our function that a collection has stored, read without building anything."""
    model = collection.get_model()
    found = None
    for function in _functions([model.configuration_json, model.serialized_schema]):
        if function.get("name") != UMREmbeddingFunction.name():
            raise InputError(
                f"collection {collection.name!r} is stored with the embedding function "
                f"{str(function.get('name'))[:80]!r}, not with {UMREmbeddingFunction.name()!r}, and Chroma "
                "would build that one. If you trust whoever made it and its vectors are of this model, use "
                "client.get_collection(name) with vectors of embed_items"
            )
        try:
            config = checked(function.get("config") or {})
        except InputError as error:
            raise InputError(f"collection {collection.name!r} can't be trusted: {error}") from error
        if found is not None and found != config:
            raise InputError(f"collection {collection.name!r} can't be trusted: it records two models")
        found = config
    return found


def _functions(stored: Any) -> Iterator[Mapping[str, Any]]:
    """Every embedding function that stored JSON may make Chroma build, at any depth.

    Only one without a name is never built: which `type` is, depends on the place where it stands.
    """
    if isinstance(stored, list | tuple):
        for part in stored:
            yield from _functions(part)
    if isinstance(stored, Mapping):
        for key, part in stored.items():
            if key == "embedding_function" and isinstance(part, Mapping) and part.get("name") is not None:
                yield part
            yield from _functions(part)


def _space(collection: Collection) -> str | None:
    configuration = collection.configuration_json or {}
    index = configuration.get("hnsw") or configuration.get("spann") or {}
    space = index.get("space")
    return None if space is None else str(space)
