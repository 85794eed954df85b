"""Peak memory of loading a checkpoint, against the size of its weights.

python peak_memory.py [--out FILE]

Writes a random Qwen2-VL of about 0.5 GB in float32 (as GME-2B is released), loads it in a fresh process,
reads every weight once, and asks the kernel for that process's peak resident memory. The base is the same
process before, after it has loaded a tiny checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROBE = """
import json, sys
from pathlib import Path
import torch
from umr_plugins.backbones.registry import resolve
from umr_plugins.backbones.qwen_vl import QwenVL

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def load(folder):
    return QwenVL(resolve(folder), torch.device("cpu"), getattr(torch, sys.argv[2]))

load(sys.argv[3])  # a small one first: imports are not weights
before = peak()
backbone = load(sys.argv[1])
touched = sum(float(p.sum()) for p in backbone.model.parameters())  # mapped files count once they are read
weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
print(json.dumps({"dtype": sys.argv[2], "weights_bytes": weights, "peak_bytes": peak() - before}))
"""


def write(folder: Path, small: Path) -> int:
    """A checkpoint of 12 layers of width 768 with Qwen2-VL's vision tower in small; returns its bytes."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_checkpoints
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tiny_checkpoints.write_qwen_vl(small)
    tiny_checkpoints.write_qwen_vl(folder)
    (folder / "model.safetensors").unlink()
    config = Qwen2VLConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 768, 3072, 12
    text.num_attention_heads, text.num_key_value_heads = 12, 2
    text.layer_types = ["full_attention"] * 12
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision.embed_dim, vision.hidden_size, vision.depth, vision.num_heads = 512, 768, 8, 8
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder, max_shard_size="200MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Measure both types and print, or write, the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
        files = write(Path(folder), Path(small))
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, "-c", PROBE, folder, dtype, small]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            row = json.loads(answer.stdout.splitlines()[-1])
            row["peak_over_weights"] = round(row["peak_bytes"] / row["weights_bytes"], 3)
            rows.append(row)
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    result = {"files_bytes": files, "rows": rows, "libraries": libraries, "machine": platform.platform()}
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
