"""What a checkpoint is, as data: template, positions, pooled token, pixel rule.

A model name resolves as bundled alias, then existing folder, then hub id. What the checkpoint is comes from
`umr.json` beside its weights, else from `KNOWN` by hub id, else from the `model_type` of its `config.json`.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from umr_plugins.errors import CheckpointError, InputError, ModelNotFoundError
from umr_plugins.types import PagesMode

Positions = Literal["sequential", "mrope"]
Resampler = Literal["torch", "pillow"]

GME_TEMPLATE = (
    "<|im_start|>system\n{instruction}<|im_end|>\n"
    "<|im_start|>user\n{body}<|im_end|>\n"
    "<|im_start|>assistant\n<|endoftext|>"
)


@dataclass(frozen=True)
class ModelSpec:
    """How inputs of a checkpoint are written, positioned, sized and pooled.

    Args:
        name: shown to people.
        family: key of `FAMILIES`, the module that runs it.
        template: the exact input string with the slots `{instruction}` (optional) and `{body}`.
        image_slot: what a picture becomes in the body, before the text; its pad token is repeated once per
            visual token.
        default_instruction: fills `{instruction}` for documents, and for queries without one of their own.
        positions: `sequential` (0..L-1 on all three axes) or `mrope` (2-D inside pictures).
        min_image_tokens: lower bound of visual tokens per picture (smaller pictures are enlarged).
        max_image_tokens: upper bound.
        max_length: tokens per item, template and picture included; longer text is cut, never the tail.
        resampler: `torch` (native uint8 bicubic with antialias, Hugging Face's default) or `pillow`.
        pages: what a PDF page is embedded as unless the caller says otherwise.
        dtype: weights' type to load, when the machine's default would be wrong for this model.
        demo: a demonstration model, labelled so wherever it is shown.
        trained_dims: shorter vector lengths it was trained for (MRL); other cuts are untrained.
    """

    name: str
    family: str = "qwen2_vl"
    role: Literal["embedder"] = "embedder"
    template: str = GME_TEMPLATE
    image_slot: str = "<|vision_start|><|image_pad|><|vision_end|>"
    default_instruction: str = "You are a helpful assistant."
    positions: Positions = "mrope"
    pooling: Literal["last"] = "last"
    min_image_tokens: int = 256
    max_image_tokens: int = 1280
    max_length: int = 1800
    resampler: Resampler = "torch"
    pages: PagesMode = "image"
    dtype: Literal["float32", "bfloat16"] | None = None
    license: str = "unknown"
    demo: bool = False
    trained_dims: tuple[int, ...] = ()

    @property
    def takes_instruction(self) -> bool:
        """Whether the template has a slot for an instruction."""
        return "{instruction}" in self.template


_GME = ModelSpec(name="GME", positions="sequential", license="apache-2.0")

KNOWN: dict[str, ModelSpec] = {
    "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct": dataclasses.replace(_GME, name="GME-Qwen2-VL-2B"),
    "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct": dataclasses.replace(_GME, name="GME-Qwen2-VL-7B"),
}
"""Checkpoints by hub id (arXiv 2412.16855)."""

BUNDLED: dict[str, tuple[str, str]] = {"umr-tiny": ("umr_plugins.demo", "umr-tiny")}
"""Models inside the wheel: alias to (package, folder)."""

FAMILIES: dict[str, str] = {"qwen2_vl": "umr_plugins.backbones.qwen_vl:QwenVL"}
"""`model_type` to the class that runs it."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.tiktoken", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model: where its files are and what they are."""

    given: str
    folder: Path
    spec: ModelSpec
    config: dict[str, Any]
    origin: Literal["bundled", "folder", "hub"]
    revision: str | None = None


def resolve(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint's files and what it is. Downloads from the hub when it is neither alias nor folder.

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
        return _open(given, folder, "bundled", None)
    folder = Path(given).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"revision={revision!r} belongs to a hub id; {given!r} is a folder")
        return _open(given, folder.resolve(), "folder", None)
    if not _HUB_ID.fullmatch(given) or folder.is_absolute():
        raise ModelNotFoundError(_not_found(given, "it has not the form of a hub id (owner/name)"))
    return _open(given, _download(given, revision), "hub", revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        cause = type(error).__name__
        raise ModelNotFoundError(
            _not_found(hub_id, f"the hub could not deliver it{at} and the local cache has no copy ({cause})")
        ) from error


def _not_found(given: str, hub: str) -> str:
    near = difflib.get_close_matches(given, [*BUNDLED, *KNOWN], n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"no model {given!r}.{meant} Tried: the bundled models {sorted(BUNDLED)} (no such name), a local "
        f"folder (none at that path), the Hugging Face hub ({hub}). What you can do: download the checkpoint "
        'on a machine that reaches the hub and pass its folder, e.g. Embedder("/models/gme-2b"); or try '
        'everything offline with the small demonstration model: Embedder("umr-tiny").'
    )


def _open(
    given: str, folder: Path, origin: Literal["bundled", "folder", "hub"], revision: str | None
) -> Checkpoint:
    config = _read_json(folder / "config.json")
    model_type = str(config.get("model_type"))
    sidecar = folder / "umr.json"
    if sidecar.is_file():
        spec = _from_sidecar(sidecar)
    elif given in KNOWN:
        spec = KNOWN[given]
    else:
        spec = _from_config(folder, config, model_type)
    if spec.family not in FAMILIES or (model_type not in FAMILIES):
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} is not supported; supported are {sorted(FAMILIES)}"
        )
    _check_weights(folder)
    return Checkpoint(given, folder, spec, config, origin, revision)


def _from_config(folder: Path, config: dict[str, Any], model_type: str) -> ModelSpec:
    # A GME checkpoint in a plain folder still names its remote code; that tells it from its base model,
    # whose positions differ.
    remote = json.dumps([config.get("auto_map"), config.get("architectures")]).lower()
    if "gme" in remote:
        return dataclasses.replace(_GME, name=folder.name)
    return ModelSpec(name=folder.name, family=model_type, positions="mrope")


def _from_sidecar(path: Path) -> ModelSpec:
    fields = {key: value for key, value in _read_json(path).items() if key != "format"}
    known = {field.name for field in dataclasses.fields(ModelSpec)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise CheckpointError(f"{path}: unknown keys {unknown}; allowed are {sorted(known)}")
    if "trained_dims" in fields:
        fields["trained_dims"] = tuple(fields["trained_dims"])
    spec = ModelSpec(**{"name": path.parent.name, **fields})
    if spec.template.count("{body}") != 1 or spec.template.count("{instruction}") > 1:
        raise CheckpointError(f"{path}: template needs {{body}} once and {{instruction}} at most once")
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
        "weights_bytes": size,
        "hidden_size": text.get("hidden_size"),
        **dataclasses.asdict(checkpoint.spec),
    }


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
