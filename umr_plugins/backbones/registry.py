"""From a model's name to its files and what it is.

A model name resolves as bundled alias, then existing folder, then hub id. What the checkpoint is comes from
`umr.json` beside its weights, else from `KNOWN` by hub id, else from the `model_type` of its `config.json`.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from umr_plugins.backbones.rerankers import INSTRUCT, KNOWN_RERANKERS, is_reranker, reranker_spec
from umr_plugins.backbones.spec import (
    BUNDLED,
    FAMILIES,
    GME,
    KNOWN,
    MM_EMBED,
    QWEN3_VL_EMBEDDING,
    ModelRole,
    ModelSpec,
)
from umr_plugins.errors import CheckpointError, InputError, ModelNotFoundError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NO_ID = "it has not the form of a hub id (owner/name)"
FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.tiktoken", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model: where its files are and what they are."""

    given: str
    folder: Path
    spec: ModelSpec
    config: dict[str, Any]
    origin: Literal["bundled", "folder", "hub"]
    revision: str | None = None
    adapter: Path | None = None


def resolve(
    model: str | Path,
    revision: str | None = None,
    *,
    download: bool = True,
    role: ModelRole = "embedder",
) -> Checkpoint:
    """Find a checkpoint's files and what it is. Downloads from the hub when it is neither alias nor folder.

    Args:
        model: bundled alias, folder or hub id.
        revision: branch, tag or commit of a hub id.
        download: False looks in the hub's local cache only.
        role: what it shall do; an instruct checkpoint can be read as either.

    Raises:
        ModelNotFoundError: nothing under that name; the message lists what was tried.
        CheckpointError: files are there but incomplete, not safetensors, or of an unknown family.
    """
    given = str(model)
    if given in BUNDLED:
        package, name = BUNDLED[given]
        with resources.as_file(resources.files(package) / name) as bundled:
            folder = Path(bundled)
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"the bundled model {given!r} is missing from this installation ({folder}); "
                "reinstall umr-plugins"
            )
        return _open(given, folder, "bundled", None, role)
    folder = Path(given).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"revision={revision!r} belongs to a hub id; {given!r} is a folder")
        return _open(given, folder.resolve(), "folder", None, role)
    if not _HUB_ID.fullmatch(given) or folder.is_absolute():
        raise ModelNotFoundError(_not_found(given, _NO_ID, role))
    return _open(given, _download(given, revision, download=download, role=role), "hub", revision, role)


def resolve_adapter(adapter: str | Path) -> Path:
    """The folder of a LoRA adapter, given as folder or hub id.

    Raises:
        ModelNotFoundError: neither a folder nor anything the hub could deliver.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder.resolve()
    try:
        if _HUB_ID.fullmatch(str(adapter)) and not str(adapter).startswith("."):
            return _download(str(adapter), None)
    except ModelNotFoundError as error:
        tried = "the hub could not deliver it and the local cache has no copy"
        cause: ModelNotFoundError | None = error
    else:
        tried, cause = _NO_ID, None
    raise ModelNotFoundError(
        f"no adapter {str(adapter)!r}: there is no such folder, and {tried}. Pass the folder that holds "
        "adapter_config.json and adapter_model.safetensors"
    ) from cause


def _download(
    hub_id: str, revision: str | None, *, download: bool = True, role: ModelRole = "embedder"
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=FILES, local_files_only=not download)
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        cause = type(error).__name__
        raise ModelNotFoundError(
            _not_found(
                hub_id, f"the hub could not deliver it{at} and the local cache has no copy ({cause})", role
            )
        ) from error


def _not_found(given: str, hub: str, role: ModelRole) -> str:
    embeds = role == "embedder"
    near = difflib.get_close_matches(given, [*BUNDLED, *KNOWN] if embeds else [*KNOWN_RERANKERS], n=1)
    meant = f" Did you mean {near[0]!r}?" if near and near[0] != given else ""
    bundled = f"the bundled models {sorted(BUNDLED)} (no such name), " if embeds else ""
    example = 'Embedder("/models/gme-2b")' if embeds else 'Reranker("/models/qwen2-vl-2b-instruct")'
    offline = (
        '; or try everything offline with the small demonstration model: Embedder("umr-tiny")'
        if embeds
        else ". There is no demonstration model for reranking"
    )
    return (
        f"no model {given!r}.{meant} Tried: {bundled}a local folder (none at that path), the Hugging Face "
        f"hub ({hub}). What you can do: download the checkpoint on a machine that reaches the hub and pass "
        f"its folder, e.g. {example}{offline}."
    )


def _open(
    given: str,
    folder: Path,
    origin: Literal["bundled", "folder", "hub"],
    revision: str | None,
    role: ModelRole,
) -> Checkpoint:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a whole model; pass its base as the model and this folder "
            f"as adapter: Embedder({base!r}, adapter={str(folder)!r})"
        )
    config = _read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    sidecar = folder / "umr.json"
    if sidecar.is_file():
        spec = _from_sidecar(sidecar, model_type)
    elif given in (KNOWN if role == "embedder" else KNOWN_RERANKERS):
        spec = (KNOWN if role == "embedder" else KNOWN_RERANKERS)[given]
    elif given in KNOWN or (given in KNOWN_RERANKERS and KNOWN_RERANKERS[given].prompt != "judge"):
        spec = (KNOWN | KNOWN_RERANKERS)[given]  # made for the other role
    elif role == "reranker" or is_reranker(folder, model_type):
        spec = reranker_spec(folder, config, model_type)
    else:
        spec = _from_config(folder, config, model_type)
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} is not supported; supported are {sorted(FAMILIES)}"
        )
    if spec.family != model_type:
        said = sidecar if sidecar.is_file() else f"{given}, as it is known,"
        raise CheckpointError(
            f"{folder}: config.json has model_type {model_type!r}, but {said} says family {spec.family!r}"
        )
    if spec.role != role:
        other = (
            "it has no trained language-model head; rerank with an instruct checkpoint such as "
            "Qwen/Qwen2-VL-2B-Instruct"
            if role == "reranker"
            else 'open it with Reranker, or embed with "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"'
        )
        raise CheckpointError(f"{given} is made to be used as {spec.role}, not as {role}: {other}")
    _check_weights(folder)
    return Checkpoint(given, folder, spec, config, origin, revision)


def _from_config(folder: Path, config: dict[str, Any], model_type: str) -> ModelSpec:
    # A GME checkpoint in a plain folder still names its remote code; that tells it from its base model,
    # whose positions differ.
    remote = json.dumps([config.get("auto_map"), config.get("architectures")]).lower()
    if model_type == "qwen2_vl" and re.search(r"\bgme|_gme", remote):
        return dataclasses.replace(GME, name=folder.name)
    if model_type == "llava_next":
        if "nvmmembed" in remote:
            return dataclasses.replace(MM_EMBED, name=folder.name)
        return dataclasses.replace(MM_EMBED, name=folder.name, pooling="last", license="unknown")
    if model_type == "qwen3_vl":
        return dataclasses.replace(QWEN3_VL_EMBEDDING, name=folder.name, license="unknown")
    return ModelSpec(
        name=folder.name, family=model_type, positions="mrope", two_steps=model_type == "qwen2_vl"
    )


def _from_sidecar(path: Path, model_type: str) -> ModelSpec:
    fields = {key: value for key, value in _read_json(path).items() if key != "format"}
    known = {field.name for field in dataclasses.fields(ModelSpec)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise CheckpointError(f"{path}: unknown keys {unknown}; allowed are {sorted(known)}")
    given = {"name": path.parent.name, **fields}
    if fields.get("role") == "reranker" and model_type in INSTRUCT:
        spec = dataclasses.replace(INSTRUCT[model_type], **given)
        if "{instruction}" in spec.template:
            raise CheckpointError(
                f"{path}: the template of a reranker is its chat form alone, with {{body}} where the prompt "
                "goes; {instruction} belongs to the prompt"
            )
    else:
        spec = ModelSpec(**given)
    for template in (spec.template, spec.bare_template, spec.document_template):
        if template is not None and (template.count("{body}") != 1 or template.count("{instruction}") > 1):
            raise CheckpointError(f"{path}: a template needs {{body}} once and {{instruction}} at most once")
    return spec


def write_sidecar(folder: Path, spec: ModelSpec) -> Path:
    """Write `umr.json` beside a checkpoint's weights, so that it is read the same way anywhere."""
    path = folder / "umr.json"
    path.write_text(json.dumps({"format": 1, **dataclasses.asdict(spec)}, indent=2) + "\n", encoding="utf-8")
    return path


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, without loading its weights, as JSON values."""
    size = sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))
    text = checkpoint.config.get("text_config", checkpoint.config)
    return {
        "model": checkpoint.given,
        "origin": checkpoint.origin,
        "folder": str(checkpoint.folder),
        "revision": checkpoint.revision,
        "adapter": str(checkpoint.adapter) if checkpoint.adapter else None,
        "weights_bytes": size,
        "hidden_size": text.get("hidden_size"),
        **dataclasses.asdict(checkpoint.spec),
    }


def preview(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What loading a model would do, as JSON values; nothing is downloaded and no weights are read.

    `would` says it in words; `memory_bytes` is what the weights take in bfloat16.

    Raises:
        ModelNotFoundError: neither on this machine nor among the known checkpoints.
        CheckpointError: as `resolve`.
    """
    given = str(model)
    try:
        role: ModelRole = "reranker" if given in KNOWN_RERANKERS else "embedder"
        checkpoint = resolve(model, revision, download=False, role=role)
    except ModelNotFoundError:
        known = KNOWN_RERANKERS | KNOWN
        if given not in known:
            raise
        facts = {**dataclasses.asdict(known[given]), "model": given, "origin": "hub", "revision": revision}
        memory = 2 * known[given].parameters
        size = f"{memory / 1e9:.1f} GB in bfloat16" if memory else "it; its size is not recorded"
        return {
            **facts,
            "memory_bytes": memory or None,
            "would": f"download it from the Hugging Face hub, then load {size}",
        }
    facts = describe(checkpoint)
    count = count_parameters(checkpoint.folder)
    would = (
        f"load {count / 1e6:,.1f} M parameters from {checkpoint.folder}, {2 * count / 1e9:.2f} GB in bfloat16"
    )
    return {**facts, "parameters": count, "memory_bytes": 2 * count, "would": would}


def count_parameters(folder: Path) -> int:
    """Parameters of a checkpoint without its language-model head, by the headers of its files.

    Raises:
        CheckpointError: a file whose header can't be read.
    """
    return sum(
        math.prod(entry["shape"])
        for header in headers(folder).values()
        for name, entry in header.items()
        if not name.startswith("lm_head.")
    )


def headers(folder: Path) -> dict[Path, dict[str, Any]]:
    """Of each safetensors file in a folder, its tensors by name with `dtype` and `shape`; reads nothing else.

    Raises:
        CheckpointError: a file whose header can't be read.
    """
    found: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:  # 8 bytes of length, then that much JSON
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("the header is longer than the file")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found[path] = header
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    return found


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which can run code when loaded; "
            "convert them to safetensors first"
        )
    raise CheckpointError(f"{folder} has no *.safetensors file")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a checkpoint: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
