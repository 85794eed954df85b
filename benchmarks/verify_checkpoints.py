"""Compare real checkpoints with the values their makers published. For a machine that reaches the hub.

python benchmarks/verify_checkpoints.py [--model ID] [--pictures DIR] [--device D]

Downloads GME-2B (9 GB) unless it is in the hub's local cache, and the model card's two pictures unless
`--pictures` holds them. The published values are from float16, rounded to four places; positions, template,
pixel rule and pooled token all have to be right to come within the tolerance. Exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umr_plugins import Embedder
from umr_plugins.errors import UMRError

GME = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
TEXTS = (
    "The Tesla Cybertruck is a battery electric pickup truck built by Tesla, Inc. since 2023.",
    "Alibaba office.",
)
PICTURES = {
    "Tesla_Cybertruck_damaged_window.jpg": "e/e9",
    "TaobaoCity_Alibaba_Xixi_Park.jpg": "e/e0",
}
COMMONS = "https://upload.wikimedia.org/wikipedia/commons"
TOLERANCE = 0.01


@dataclass(frozen=True)
class Case:
    """One published value: cosine matrix of queries (rows) and documents (columns)."""

    name: str
    published: tuple[tuple[float, ...], ...]
    instruction: str | None = None
    fused: bool = False


CASES = (
    Case("text @ picture", ((0.3596, 0.0656), (0.0418, 0.3748))),
    Case(
        "text @ picture, instruction",
        ((0.4299, 0.1151), (0.0498, 0.4094)),
        "Find an image that matches the given text.",
    ),
    Case("fused @ fused, off the diagonal", ((1.0, 0.0551), (0.0551, 1.0)), fused=True),
)


def pictures(folder: Path) -> list[Path]:
    """The model card's pictures, downloaded to `folder` if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in PICTURES.items():
        if not (folder / name).is_file():
            request = urllib.request.Request(
                f"{COMMONS}/{place}/{name}", headers={"User-Agent": "umr-plugins verify-checkpoints"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                (folder / name).write_bytes(answer.read())
    return [folder / name for name in PICTURES]


def measured(case: Case, embedder: Embedder, images: list[Path]) -> np.ndarray:
    """The same matrix, from our vectors."""
    if case.fused:
        items = [{"text": text, "image": image} for text, image in zip(TEXTS, images, strict=True)]
        vectors = np.asarray(embedder.encode_queries(items))
        return vectors @ vectors.T
    documents = np.asarray(embedder.encode_documents([{"image": image} for image in images]))
    return np.asarray(embedder.encode_queries(TEXTS, case.instruction)) @ documents.T


def main() -> int:
    """Print every value beside the published one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=GME, help="id or folder of GME-2B")
    parser.add_argument("--pictures", type=Path, default=Path("verify-pictures"))
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    try:
        embedder = Embedder(arguments.model, device=arguments.device, dtype=arguments.dtype)
    except UMRError as error:
        sys.exit(str(error))
    images = pictures(arguments.pictures)
    wrong = 0
    for case in CASES:
        ours, theirs = measured(case, embedder, images), np.array(case.published)
        apart = float(np.abs(ours - theirs).max())
        wrong += apart > TOLERANCE
        verdict = "ok" if apart <= TOLERANCE else "WRONG"
        print(f"{verdict:5}  {case.name}, apart {apart:.4f}")
        print(f"       ours {np.round(ours, 4).tolist()}, published {theirs.tolist()}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
