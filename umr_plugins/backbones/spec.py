"""What the families and known checkpoints are, as data: template, positions, pooled token, pixel rule.

A new checkpoint of a known family is a new entry of `KNOWN`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from dataclasses import dataclass
from typing import Literal

from umr_plugins.types import PagesMode, Role

Positions = Literal["sequential", "mrope"]
Resampler = Literal["torch", "pillow"]
ModelRole = Literal["embedder", "reranker"]

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
        role: what it is for; rerankers are in `rerankers`.
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
        video_slot: what two frames become in the body, before pictures and text; `{seconds}` is the time in
            their middle. None: the checkpoint was not trained on video.
        max_frames: most frames in one item.
        max_video_tokens: upper bound of visual tokens per video; frames are shrunk to keep it.
        max_length: tokens per item, template and picture included; longer text is cut, never the tail.
        resampler: `torch` (native uint8 bicubic with antialias, Hugging Face's default) or `pillow`.
        pages: what a PDF page is embedded as unless the caller says otherwise.
        dtype: weights' type to load, when the machine's default would be wrong for this model.
        demo: a demonstration model, labelled so wherever it is shown.
        parameters: how many a known checkpoint has, without language-model head; 0: not recorded.
        dim: length of a known checkpoint's vectors; 0: not recorded.
        shortest_trained_dim: least length its vectors were trained to be cut to (MRL); None: not at all.
        prompt: of rerankers, the name of the prompt they are asked with.
    """

    name: str
    family: str = "qwen2_vl"
    role: ModelRole = "embedder"
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
    video_slot: str | None = None
    max_frames: int = 0
    max_video_tokens: int = 0
    max_length: int = 1800
    resampler: Resampler = "torch"
    pages: PagesMode = "image"
    dtype: Literal["float32", "bfloat16"] | None = None
    license: str = "unknown"
    demo: bool = False
    parameters: int = 0
    dim: int = 0
    shortest_trained_dim: int | None = None
    prompt: str = "judge"

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

    def video_slots(self, frames: int) -> list[str]:
        """What frames, a second apart, become in the body: one slot for two; an odd last one stands twice.

        >>> ModelSpec("v", video_slot="<{seconds}>").video_slots(3)
        ['<0.5>', '<2.0>']
        """
        times = [(first + min(first + 1, frames - 1)) / 2 for first in range(0, frames, 2)]
        return [(self.video_slot or "").replace("{seconds}", f"{time:.1f}") for time in times]

    def punctuated(self, instruction: str) -> str:
        """The instruction as the model was trained to see it: stripped and ended, if the spec says so."""
        if not self.punctuate:
            return instruction
        stripped = instruction.strip()
        return stripped if unicodedata.category(stripped[-1]).startswith("P") else stripped + "."


GME = ModelSpec(name="GME", positions="sequential", license="apache-2.0")

QWEN3_VL_EMBEDDING = ModelSpec(
    name="Qwen3-VL-Embedding",
    family="qwen3_vl",
    default_instruction="Represent the user's input.",
    punctuate=True,
    positions="mrope",
    min_image_tokens=4,
    max_image_tokens=1800,
    two_steps=False,
    max_images=64,
    video_slot="<{seconds} seconds><|vision_start|><|video_pad|><|vision_end|>",
    max_frames=64,
    max_video_tokens=4500,
    max_length=8192,
    license="apache-2.0",
    shortest_trained_dim=64,
)

MM_EMBED = ModelSpec(
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
    parameters=8_180_000_000,
    dim=4096,
)

KNOWN: dict[str, ModelSpec] = {
    "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct": dataclasses.replace(
        GME, name="GME-Qwen2-VL-2B", parameters=2_208_985_600, dim=1536
    ),
    "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct": dataclasses.replace(
        GME, name="GME-Qwen2-VL-7B", parameters=7_746_378_240, dim=3584
    ),
    "Qwen/Qwen3-VL-Embedding-2B": dataclasses.replace(
        QWEN3_VL_EMBEDDING, name="Qwen3-VL-Embedding-2B", parameters=2_000_000_000, dim=2048
    ),
    "Qwen/Qwen3-VL-Embedding-8B": dataclasses.replace(
        QWEN3_VL_EMBEDDING, name="Qwen3-VL-Embedding-8B", parameters=8_000_000_000, dim=4096
    ),
    "nvidia/MM-Embed": MM_EMBED,
}
"""Checkpoints by hub id (GME: arXiv 2412.16855; MM-Embed: arXiv 2411.02571)."""

BUNDLED: dict[str, tuple[str, str]] = {"umr-tiny": ("umr_plugins.demo", "umr-tiny")}
"""Models inside the wheel: alias to (package, folder)."""

_QWEN = "umr_plugins.backbones.qwen_vl:QwenVL"


@dataclass(frozen=True)
class Family:
    """An architecture that can be run.

    Args:
        title: for people.
        runner: the class that runs it, `module:name`.
        reads: how a checkpoint without `umr.json` is read.
    """

    title: str
    runner: str
    reads: str


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("Qwen2-VL", _QWEN, "in the GME layout; M-RoPE unless it is a GME checkpoint"),
    "qwen2_5_vl": Family("Qwen2.5-VL", _QWEN, "in the GME layout with M-RoPE"),
    "qwen3_vl": Family("Qwen3-VL", _QWEN, "as Qwen3-VL-Embedding"),
    "llava_next": Family(
        "LLaVA-NeXT", "umr_plugins.backbones.llava_next:LlavaNext", "as MM-Embed, or pooled at the last token"
    ),
}
"""`model_type` to what runs it."""
