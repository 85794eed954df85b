"""Compare real checkpoints with the values their makers published. For a machine that reaches the hub.

python benchmarks/verify_checkpoints.py [--only gme|mm-embed] [--folder FOLDER] [--pictures DIR] [--device D]

Downloads the weights (GME-2B 9 GB, MM-Embed 16 GB) unless they are in the hub's local cache, the pictures
of the model cards unless `--pictures` holds them, and MM-Embed's card, which has its texts. The published
values are from half precision; template, positions, pixel rule, pooling and its mask all have to be right
to come within the tolerance. Exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from umr_plugins import Embedder
from umr_plugins.errors import UMRError

TOLERANCE = 0.01
MODELS = {"gme": "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "mm-embed": "nvidia/MM-Embed"}

GME_TEXTS = (
    "The Tesla Cybertruck is a battery electric pickup truck built by Tesla, Inc. since 2023.",
    "Alibaba office.",
)
COMMONS = "https://upload.wikimedia.org/wikipedia/commons"
GME_PICTURES = (
    f"{COMMONS}/e/e9/Tesla_Cybertruck_damaged_window.jpg",
    f"{COMMONS}/e/e0/TaobaoCity_Alibaba_Xixi_Park.jpg",
)
GME_INSTRUCTION = "Find an image that matches the given text."

Outcome = tuple[str, np.ndarray, list[list[float]]]
"""Name, our cosine matrix of queries (rows) and documents (columns), the published one."""


def fetched(urls: tuple[str, ...] | list[str], folder: Path) -> list[Path]:
    """Pictures by their address, downloaded to `folder` if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / url.rpartition("/")[2] for url in urls]
    for url, path in zip(urls, paths, strict=True):
        if not path.is_file():
            request = urllib.request.Request(url, headers={"User-Agent": "umr-plugins verify-checkpoints"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                path.write_bytes(answer.read())
    return paths


def gme(embedder: Embedder, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """The model card's three examples."""
    images = fetched(GME_PICTURES, arguments.pictures)
    documents = np.asarray(embedder.encode_documents([{"image": image} for image in images]))
    plain = np.asarray(embedder.encode_queries(GME_TEXTS))
    yield "text @ picture", plain @ documents.T, [[0.3596, 0.0656], [0.0418, 0.3748]]
    asked = np.asarray(embedder.encode_queries(GME_TEXTS, GME_INSTRUCTION))
    yield "text @ picture, instruction", asked @ documents.T, [[0.4299, 0.1151], [0.0498, 0.4094]]
    items = [{"text": text, "image": image} for text, image in zip(GME_TEXTS, images, strict=True)]
    fused = np.asarray(embedder.encode_queries(items))
    yield "fused @ fused, off the diagonal", fused @ fused.T, [[1.0, 0.0551], [0.0551, 1.0]]


def mm_embed(embedder: Embedder, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """The model card's example: questions about two pictures, and two passages, all read from the card."""
    card = arguments.card.read_text(encoding="utf-8") if arguments.card else _card(MODELS["mm-embed"])
    urls = re.findall(r"img\d_url = '(.+?)'", card)
    questions = re.findall(r"'txt': '(.+?)', 'img'", card)
    passages = re.findall(r"\{'txt': \"(.+?)\"\}", card)
    instructions = re.findall(r"\"example\": \"(.+?)\"", card)
    if [len(urls), len(questions), len(passages), len(instructions)] != [2, 2, 2, 1]:
        sys.exit("MM-Embed's model card no longer has the example that these values belong to")
    images = fetched(urls, arguments.pictures)
    queries: list[Any] = [
        {"text": text, "image": image} for text, image in zip(questions, images, strict=True)
    ]
    found = np.asarray(embedder.encode_queries(queries, instructions[0]))
    documents = np.asarray(embedder.encode_documents(passages))
    yield "fused @ text, instruction", found @ documents.T, [[0.31020, 0.12754], [0.11135, 0.22126]]


def _card(model: str) -> str:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "README.md")).read_text(encoding="utf-8")


CHECKS = {"gme": gme, "mm-embed": mm_embed}


def main() -> int:
    """Print every value beside the published one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CHECKS, help="one of the checkpoints (both)")
    parser.add_argument("--folder", help="with --only: where the checkpoint is, instead of the hub")
    parser.add_argument("--pictures", type=Path, default=Path("verify-pictures"))
    parser.add_argument("--card", type=Path, help="MM-Embed's README.md, instead of the hub's")
    parser.add_argument("--device")
    parser.add_argument("--dtype", help="float32 or bfloat16; GME is compared in float32 by default")
    arguments = parser.parse_args()
    if arguments.folder and not arguments.only:
        parser.error("--folder needs --only")
    wrong = 0
    for name in [arguments.only] if arguments.only else list(CHECKS):
        model = arguments.folder or MODELS[name]
        dtype = arguments.dtype or ("float32" if name == "gme" else None)
        try:
            embedder = Embedder(model, device=arguments.device, dtype=dtype)
        except UMRError as error:
            sys.exit(str(error))
        for title, ours, published in CHECKS[name](embedder, arguments):
            apart = float(np.abs(ours - np.array(published)).max())
            wrong += apart > TOLERANCE
            print(f"{'ok' if apart <= TOLERANCE else 'WRONG':5}  {name}: {title}, apart {apart:.4f}")
            print(f"       ours {np.round(ours, 4).tolist()}, published {published}")
        embedder.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
