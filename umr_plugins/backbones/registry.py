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
import unicodedata
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from umr_plugins.errors import CheckpointError, InputError, ModelNotFoundError
from umr_plugins.types import PagesMode, Role

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
        bare_template: the form of a query without an instruction, where that is another one.
        document_template: the form of a document, where that is another one.
        default_instruction: fills `{instruction}` for documents, and for queries without one of their own;
            None where these have forms without a slot.
        punctuate: whether an instruction that does not end in punctuation gets a full stop.
        positions: `sequential` (0..L-1 on all three axes) or `mrope` (2-D inside pictures).
        min_image_tokens: lower bound of visual tokens per picture (smaller pictures are enlarged).
        max_image_tokens: upper bound.
        two_steps: whether a picture's size is rounded twice, as GME's released wrapper does, or once.
        max_images: most pictures in one item; the family was not trained on more.
        max_length: tokens per item, template and picture included; longer text is cut, never the tail.
        resampler: `torch` (native uint8 bicubic with antialias, Hugging Face's default) or `pillow`.
        pages: what a PDF page is embedded as unless the caller says otherwise.
        dtype: weights' type to load, when the machine's default would be wrong for this model.
        demo: a demonstration model, labelled so wherever it is shown.
        shortest_trained_dim: least length its vectors were trained to be cut to (MRL); None: not at all.
    """

    name: str
    family: str = "qwen2_vl"
    role: Literal["embedder"] = "embedder"
    template: str = GME_TEMPLATE
    bare_template: str | None = None
    document_template: str | None = None
    image_slot: str = "<|vision_start|><|image_pad|><|vision_end|>"
    default_instruction: str | None = "You are a helpful assistant."
    punctuate: bool = False
    positions: Positions = "mrope"
    pooling: Literal["last", "latent_attention"] = "last"
    min_image_tokens: int = 256
    max_image_tokens: int = 1280
    two_steps: bool = True
    max_images: int = 1
    max_length: int = 1800
    resampler: Resampler = "torch"
    pages: PagesMode = "image"
    dtype: Literal["float32", "bfloat16"] | None = None
    license: str = "unknown"
    demo: bool = False
    shortest_trained_dim: int | None = None

    @property
    def takes_instruction(self) -> bool:
        """Whether the template has a slot for an instruction."""
        return "{instruction}" in self.template

    def form(self, role: Role, instruction: str | None) -> str:
        """The template an input is written in."""
        if role == "document" and self.document_template is not None:
            return self.document_template
        if instruction is None and self.bare_template is not None:
            return self.bare_template
        return self.template

    def punctuated(self, instruction: str) -> str:
        """The instruction as the model was trained to see it: stripped and ended, if the spec says so."""
        if not self.punctuate:
            return instruction
        stripped = instruction.strip()
        return stripped if unicodedata.category(stripped[-1]).startswith("P") else stripped + "."


_GME = ModelSpec(name="GME", positions="sequential", license="apache-2.0")

_QWEN3_VL_EMBEDDING = ModelSpec(
    name="Qwen3-VL-Embedding",
    family="qwen3_vl",
    default_instruction="Represent the user's input.",
    punctuate=True,
    positions="mrope",
    min_image_tokens=4,
    max_image_tokens=1800,
    two_steps=False,
    max_images=64,
    max_length=8192,
    license="apache-2.0",
    shortest_trained_dim=64,
)

_MM_EMBED = ModelSpec(
    name="MM-Embed",
    family="llava_next",
    template="<s>Instruct: {instruction}\nQuery: {body}</s>",
    bare_template="<s>Query: {body}</s>",
    document_template="<s>{body}</s>",
    image_slot="<image>\n",
    default_instruction=None,
    positions="sequential",
    pooling="latent_attention",
    min_image_tokens=577,
    max_image_tokens=577,
    two_steps=False,
    max_length=4096,
    license="cc-by-nc-4.0",
)

KNOWN: dict[str, ModelSpec] = {
    "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct": dataclasses.replace(_GME, name="GME-Qwen2-VL-2B"),
    "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct": dataclasses.replace(_GME, name="GME-Qwen2-VL-7B"),
    "Qwen/Qwen3-VL-Embedding-2B": dataclasses.replace(_QWEN3_VL_EMBEDDING, name="Qwen3-VL-Embedding-2B"),
    "Qwen/Qwen3-VL-Embedding-8B": dataclasses.replace(_QWEN3_VL_EMBEDDING, name="Qwen3-VL-Embedding-8B"),
    "nvidia/MM-Embed": _MM_EMBED,
}
"""Checkpoints by hub id (GME: arXiv 2412.16855; MM-Embed: arXiv 2411.02571)."""

BUNDLED: dict[str, tuple[str, str]] = {"umr-tiny": ("umr_plugins.demo", "umr-tiny")}
"""Models inside the wheel: alias to (package, folder)."""

_QWEN = "umr_plugins.backbones.qwen_vl:QwenVL"
FAMILIES: dict[str, str] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "llava_next": "umr_plugins.backbones.llava_next:LlavaNext",
}
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
    adapter: Path | None = None


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
        tried, cause = "the hub could not deliver it and the local cache has no copy", error
    else:
        tried, cause = "it has not the form of a hub id (owner/name)", None
    raise ModelNotFoundError(
        f"no adapter {str(adapter)!r}: there is no such folder, and {tried}. Pass the folder that holds "
        "adapter_config.json and adapter_model.safetensors"
    ) from cause


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
    if model_type == "llava_next":
        if "nvmmembed" in remote:
            return dataclasses.replace(_MM_EMBED, name=folder.name)
        return dataclasses.replace(_MM_EMBED, name=folder.name, pooling="last", license="unknown")
    if model_type == "qwen3_vl":
        return dataclasses.replace(_QWEN3_VL_EMBEDDING, name=folder.name, license="unknown")
    return ModelSpec(
        name=folder.name, family=model_type, positions="mrope", two_steps=model_type == "qwen2_vl"
    )


def _from_sidecar(path: Path) -> ModelSpec:
    fields = {key: value for key, value in _read_json(path).items() if key != "format"}
    known = {field.name for field in dataclasses.fields(ModelSpec)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise CheckpointError(f"{path}: unknown keys {unknown}; allowed are {sorted(known)}")
    spec = ModelSpec(**{"name": path.parent.name, **fields})
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
