"""Reranking against a loop over pairs and against sentence-transformers' CrossEncoder, on the same weights.

python bench_rerank.py --vocabulary qwen.tiktoken [--rounds N] [--dtype float32] [--out FILE]
python bench_rerank.py --vocabulary qwen.tiktoken --memory 50 1000 [--out FILE]

A random Qwen2-VL of about 110 million parameters with Qwen's vocabulary (of the wheel `dashscope`) judges
passages and pictures of the sample corpus. All three compute the same prompts, and their log-odds must
agree for a time to count; they take turns, and the least time of each counts. The peer needs torchvision;
where there is none for the CPU, torchvision_for_cpu.py says what to do. With --memory the peak memory of
judging so many documents, each in a process of its own, is measured instead.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision_for_cpu  # noqa: F401  # before transformers
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from umr_plugins import Embedder, Item, Reranker
from umr_plugins.backbones.features import SHARED
from umr_plugins.prompts.rerank import RerankPrompt

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "umr_plugins/demo/corpus"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
INSTRUCTION = (
    "Find the passage or the picture of the collection that answers the user's query completely, not only in "
    "part; a candidate that merely has the same subject does not count."
)
QUERY, DOCUMENT, ASK = (
    INSTRUCTION + "\nQuery: ",
    "\nCandidate: ",
    "\nDoes the candidate answer the query? yes or no",
)
END = "<|im_end|>\n<|im_start|>assistant\n"
PROMPT = RerankPrompt("bench", f"{QUERY}{{query}}{DOCUMENT}{{document}}{ASK}", "", ("yes", "no"), "exact")
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
SIDE, PASSAGE_WORDS, CANDIDATES = 560, 100, 20
Pair = tuple[Item, Item]


def tokenizer(vocabulary: Path) -> Tokenizer:
    """Qwen's byte-level BPE from its ranks: a token's merge is its last split into two earlier tokens."""
    lines = vocabulary.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    alphabet = {}
    shift = 0
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        alphabet[byte] = chr(byte) if printable else chr(256 + shift)
        shift += not printable

    def shown(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = min(range(len(joined)), key=joined.__getitem__)
            if joined[at] >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((shown(parts[0]), shown(parts[1])))
    made = Tokenizer(models.BPE({shown(token): rank for token, rank in ranks.items()}, merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return made


def write_checkpoint(folder: Path, vocabulary: Path) -> Path:
    """A random Qwen2-VL whose vision tower is to its language layers as GME-2B's is, with a processor."""
    made = tokenizer(vocabulary)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "model_max_length": 32768}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {name: made.token_to_id(name) for name in SPECIAL}
    text = {
        "vocab_size": 151_936,
        "hidden_size": 448,
        "intermediate_size": 1344,
        "num_hidden_layers": 14,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {"depth": 10, "num_heads": 5, "embed_dim": 320, "hidden_size": 448, "mlp_ratio": 4}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    area = 28 * 28
    pixels = {"min_pixels": 4 * area, "max_pixels": 1280 * area}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2} | pixels
        )
    )
    pieces = {"query": (SYSTEM + QUERY, ""), "document": (DOCUMENT, ASK)}
    turns = "".join(
        "{%- if message.role == '" + role + "' -%}{{ " + json.dumps(before) + " }}"
        "{%- for part in message.content -%}{%- if part.type == 'image' -%}{{ " + json.dumps(SLOT) + " }}"
        "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{{ " + json.dumps(after) + " }}{%- endif -%}"
        for role, (before, after) in pieces.items()
    )
    (folder / "chat_template.jinja").write_text(
        "{%- for message in messages -%}" + turns + "{%- endfor -%}{{ " + json.dumps(END) + " }}"
    )
    return folder


def passages(count: int) -> list[Item]:
    """Stretches of the sample corpus' notes, all different."""
    files = sorted(CORPUS.rglob("*.md"))
    # Without words that spell special tokens: the others would take them for such.
    words = [word for path in files for word in path.read_text(encoding="utf-8").split() if "<|" not in word]
    step = max(1, (len(words) - PASSAGE_WORDS) // count)
    return [Item(" ".join(words[n * step : n * step + PASSAGE_WORDS])) for n in range(count)]


def photographs(count: int) -> list[Item]:
    """Pictures of the sample corpus at one size, all different."""
    found = sorted(path for path in CORPUS.rglob("*") if path.suffix in (".jpg", ".png", ".webp"))[-count:]
    if len(found) < count:
        raise SystemExit(f"the sample corpus has {len(found)} pictures, {count} are needed")
    return [Item(image=Image.open(path).convert("RGB").resize((SIDE, SIDE))) for path in found]


class Loop:
    """What is usually written: one pair at a time, the processor, the whole model, one position of logits."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        area = 28 * 28
        self.processor = Qwen2VLImageProcessorPil(min_pixels=4 * area, max_pixels=1280 * area)
        self.answers = [self.tokenizer.token_to_id(word) for word in PROMPT.answers]

    @torch.inference_mode()
    def odds(self, pairs: list[Pair]) -> list[float]:
        """Log-odds of each pair."""
        return [self._one(query, document) for query, document in pairs]

    def _one(self, query: Item, document: Item) -> float:
        pictures = [*query.pictures, *document.pictures]
        vision: dict[str, Any] = self.processor(images=pictures, return_tensors="pt") if pictures else {}
        asked, shown = (SLOT * len(item.pictures) + (item.text or "") for item in (query, document))
        parts = (SYSTEM + QUERY + asked + DOCUMENT + shown + ASK + END).split("<|image_pad|>")
        counts = [int(grid.prod()) // 4 for grid in vision.get("image_grid_thw", [])]
        filled = parts[0] + "".join(
            "<|image_pad|>" * n + part for n, part in zip(counts, parts[1:], strict=True)
        )
        ids = torch.tensor([self.tokenizer.encode(filled, add_special_tokens=False).ids])
        kinds = (ids == self.model.config.image_token_id).int()
        logits = self.model(input_ids=ids, mm_token_type_ids=kinds, logits_to_keep=1, **vision).logits[0, -1]
        positive, negative = logits[self.answers].float().tolist()
        return float(positive - negative)


class Peer:
    """sentence-transformers' CrossEncoder over a multimodal model, with its own templating and batches."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.cross_encoder.modules import LogitScore

        words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        reads = Transformer(str(folder), transformer_task="any-to-any", model_kwargs={"dtype": dtype})
        judges = LogitScore(*(words.token_to_id(word) for word in PROMPT.answers))
        self.model = CrossEncoder(modules=[reads, judges], device="cpu")

    def odds(self, pairs: list[Pair]) -> list[float]:
        """Log-odds of each pair, in batches of 32, its default."""
        inputs = [tuple(self._input(item) for item in pair) for pair in pairs]
        return [
            float(value)
            for value in self.model.predict(
                inputs, activation_fn=torch.nn.Identity(), show_progress_bar=False
            )
        ]

    @staticmethod
    def _input(item: Item) -> Any:
        return item.pictures[0] if item.pictures else item.text


def odds(scores: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities."""
    return np.log(scores.astype(np.float64) / (1 - scores.astype(np.float64)))


def compare(
    name: str,
    query: Item,
    documents: list[Item],
    runners: dict[str, Callable[[list[Pair]], list[float]]],
    ours: Callable[[Item, list[Item]], np.ndarray],
    before: Callable[[], None],
    rounds: int,
    tolerance: float,
) -> dict[str, Any]:
    """Time all in turns, and check that they agree; seconds are the least of all rounds."""
    pairs = [(query, document) for document in documents]
    least: dict[str, float] = dict.fromkeys(["ours", *runners], float("inf"))
    apart: dict[str, float] = dict.fromkeys(runners, 0.0)
    for _ in range(rounds):
        before()
        began = time.perf_counter()
        mine = odds(ours(query, documents))
        least["ours"] = min(least["ours"], time.perf_counter() - began)
        for key, run in runners.items():
            began = time.perf_counter()
            theirs = np.array(run(pairs))
            least[key] = min(least[key], time.perf_counter() - began)
            apart[key] = max(apart[key], float(np.abs(mine - theirs).max()))
    if max(apart.values()) > tolerance:
        raise SystemExit(f"{name}: the log-odds differ by {apart}, more than {tolerance}: no time counts")
    result = {
        "documents": len(documents),
        "largest_difference_of_log_odds": {key: round(value, 6) for key, value in apart.items()},
        "seconds": {key: round(value, 3) for key, value in least.items()},
        "ratio": {key: round(least[key] / least["ours"], 2) for key in runners},
    }
    print(json.dumps({name: result}), flush=True)
    return result


def peak(folder: Path, count: int) -> int:
    """Peak memory in bytes of this process after judging `count` texts, every second one with a picture."""
    reranker = Reranker(folder, dtype="float32", prompt=PROMPT)
    pictures = photographs(CANDIDATES)
    texts = passages(count)
    documents = [
        texts[n] if n % 2 else Item(texts[n].text, pictures[n % CANDIDATES].image) for n in range(count)
    ]
    scores = reranker.score(pictures[0], documents)
    assert len(scores) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(folder: Path, counts: list[int]) -> dict[str, Any]:
    """Peak memory by number of documents, each in a fresh process, and as a share of the first one's."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for count in counts:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peaks[count] = pool.submit(peak, folder, count).result()
    first = peaks[counts[0]]
    return {
        "peak_bytes": {str(count): value for count, value in peaks.items()},
        "ratio": {str(count): round(value / first, 3) for count, value in peaks.items()},
        "picture_tokens": (SIDE // 28) ** 2,
        "dtype": "float32",
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def main() -> None:
    """Write a random checkpoint, compare, time, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=Path, required=True, help="qwen.tiktoken of the wheel dashscope")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--memory", type=int, nargs="+", metavar="N", help="only: peak memory for N documents"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="folder to write the checkpoint to, or with one in it"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.checkpoint or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        write_checkpoint(folder, arguments.vocabulary)
    if arguments.memory is not None:
        _write(memory(folder, arguments.memory), arguments.out)
        return
    dtype = getattr(torch, arguments.dtype)
    reranker = Reranker(folder, dtype=dtype, prompt=PROMPT)
    embedder = Embedder(folder, dtype=dtype, min_image_tokens=4)
    loop, peer = Loop(folder, dtype), Peer(folder, dtype)
    runners = {"loop": loop.odds, "sentence-transformers": peer.odds}
    pictures, texts = photographs(CANDIDATES + 1), passages(CANDIDATES)
    question = Item(
        "Which warm-up schedule reaches the lowest loss within the first thousand steps, and does it still "
        "lead when training goes on for ten times as long?"
    )

    def forget() -> None:
        SHARED.clear()

    def embed(items: list[Item]) -> Callable[[], None]:
        def before() -> None:
            SHARED.clear()
            embedder.encode_documents(items)

        return before

    cases: dict[str, tuple[Item, list[Item], Callable[[], None]]] = {
        "text query, 20 texts": (question, texts, forget),
        "picture query, 20 texts": (pictures[0], texts, forget),
        "text query, 20 pictures, not seen before": (question, pictures[1:], forget),
        "text query, 20 pictures, just embedded": (question, pictures[1:], embed(pictures[1:])),
        "picture query, 20 pictures, all just embedded": (pictures[0], pictures[1:], embed(pictures)),
    }
    tolerance = 1e-3 if arguments.dtype == "float32" else 0.5
    results = {
        name: compare(name, query, documents, runners, reranker.score, before, arguments.rounds, tolerance)
        for name, (query, documents, before) in cases.items()
    }
    report = {
        "parameters": sum(parameter.numel() for parameter in loop.model.parameters()),
        "dtype": arguments.dtype,
        "picture_tokens": (SIDE // 28) ** 2,
        "passage_tokens": round(float(np.mean([embedder.count_tokens(each.text or "") for each in texts]))),
        "tokens_before_a_text_query's_candidate": embedder.count_tokens(
            SYSTEM.replace("<|", "").replace("|>", "") + QUERY + str(question.text)
        ),
        "rounds": arguments.rounds,
        "cases": results,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
        | {"python": platform.python_version()},
    }
    _write(report, arguments.out)


def _write(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
