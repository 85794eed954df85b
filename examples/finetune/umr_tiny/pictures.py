"""Drawings as arrays, the augmentation, and the preparation that inference uses."""

from __future__ import annotations

import io
import json
import math
import re
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from concepts import Concept
from PIL import Image, ImageDraw, ImageFont
from sources import BY_NAME, UNSEEN_SETS, VALIDATION_SET, fetch, members, read_json

SIDE = 96
PATCH, MERGE = 14, 2
CELL = PATCH * MERGE
PIXELS = 4 * CELL * CELL
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
SQUARE = (2, 2)
OTHER_GRIDS = ((2, 1), (1, 2), (2, 1), (1, 2), (3, 1), (1, 3))


def slug(text: str) -> str:
    """The name an icon set gives to a label."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("’", "").replace("'", "").replace("ñ", "n")).strip(
        "-"
    )


def clean(hexcode: str) -> str:
    """A code point sequence without variation selectors, upper case."""
    return "-".join(part.lstrip("0") for part in hexcode.upper().split("-") if part != "FE0F")


def _rasterise(svg: str) -> bytes | None:
    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    except Exception:
        return None


def _decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def _drawings(cache: Path, short: str, table: list[Concept]) -> dict[int, str | bytes]:
    """``{concept: svg text or bitmap}`` of one set."""
    by_hex = {clean(concept.hexcode): concept.index for concept in table}
    files = members(fetch(cache, BY_NAME[short]))
    found: dict[int, str | bytes] = {}
    if "icons.json" not in files:
        for name, data in files.items():
            code = clean(Path(name).stem)
            if name.startswith("assets/") and code in by_hex:
                found[by_hex[code]] = data
        return found
    names = {slug(concept.label): concept.index for concept in reversed(table)}
    for other in ("noto", "fluent-emoji-flat") if short not in UNSEEN_SETS else (short, "noto"):
        chars = json.loads(members(fetch(cache, BY_NAME[other])).get("chars.json", b"{}"))
        for code, name in chars.items():
            if clean(code) in by_hex:
                names[name] = by_hex[clean(code)]
    icons = read_json(cache, short, "icons.json")
    assert isinstance(icons, dict)
    width, height = icons.get("width", 16), icons.get("height", 16)
    every = {
        **{key: value["parent"] for key, value in icons.get("aliases", {}).items() if len(value) == 1},
        **{key: key for key in icons["icons"]},
    }
    for name, parent in every.items():
        concept = names.get(name)
        if concept is None and short == "streamline-emojis":
            concept = names.get(re.sub(r"-\d+$", "", name))
        icon = icons["icons"].get(parent)
        if concept is None or icon is None or concept in found:
            continue
        w, h = icon.get("width", width), icon.get("height", height)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {w} {h}"
        body = icon["body"].replace("currentColor", "#222222")
        found[concept] = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'
    return found


def load_set(cache: Path, short: str, table: list[Concept]) -> tuple[np.ndarray, np.ndarray]:
    """Concept numbers ``[n]`` and RGBA pictures ``[n, SIDE, SIDE, 4]`` of a set, cached."""
    path = cache / "rasters" / f"{BY_NAME[short].archive}.{SIDE}.npz"
    if not path.exists():
        drawings = _drawings(cache, short, table)
        order = sorted(drawings)
        svgs = [drawings[index] for index in order]
        if svgs and isinstance(svgs[0], str):
            with ProcessPoolExecutor(2) as pool:
                raw = list(pool.map(_rasterise, svgs, chunksize=64))  # type: ignore[arg-type]
        else:
            raw = svgs  # type: ignore[assignment]
        kept = [(index, _decode(data)) for index, data in zip(order, raw, strict=True) if data]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path, concepts=np.array([index for index, _ in kept]), pictures=np.stack([p for _, p in kept])
        )
    stored = np.load(path)
    return stored["concepts"], stored["pictures"]


class PictureBank:
    """The drawings of the training sets: ``rows[concept]`` lists (set number, row in ``pixels``)."""

    def __init__(self, cache: Path, sets: tuple[str, ...], table: list[Concept]) -> None:
        assert not {VALIDATION_SET, *UNSEEN_SETS} & set(sets), "a held-out style must not be trained on"
        self.rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.counts: dict[str, int] = {}
        stacks, total = [], 0
        for number, short in enumerate(sets):
            concepts, pictures = load_set(cache, short, table)
            for offset, concept in enumerate(concepts.tolist()):
                self.rows[concept].append((number, total + offset))
            stacks.append(torch.from_numpy(pictures))
            total += len(pictures)
            self.counts[short] = len(pictures)
        self.pixels = torch.cat(stacks).permute(0, 3, 1, 2).contiguous()


def augment(
    rgba: torch.Tensor, mirrors: torch.Tensor, grid: tuple[int, int], rng: torch.Generator
) -> torch.Tensor:
    """RGBA uint8 ``[B, 4, S, S]`` to RGB uint8 ``[B, 3, h, w]``: moved, turned, recoloured, on a ground."""
    size = len(rgba)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(size).uniform_(low, high, generator=rng)

    def chance(probability: float) -> torch.Tensor:
        return (torch.rand(size, generator=rng) < probability).float()

    height, width = (round(42 * side) for side in grid)
    scale = torch.exp(uniform(-0.35, 0.2))
    angle = uniform(-0.3, 0.3) * chance(0.6)
    stretch = torch.exp(uniform(-0.12, 0.12))
    ratio = grid[1] / grid[0] * torch.exp(uniform(-0.35, 0.35)) if grid != SQUARE else torch.ones(size)
    across, down = scale * stretch / ratio.clamp(min=1.0), scale / stretch * ratio.clamp(max=1.0)
    flip = 1 - 2 * chance(0.5) * mirrors.float()
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack(
        [
            flip * cos / across,
            -flip * sin / down,
            uniform(-0.14, 0.14),
            sin / across,
            cos / down,
            uniform(-0.14, 0.14),
        ],
        1,
    ).view(size, 2, 3)
    pixels = rgba.float() / 255
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
    where = F.affine_grid(theta, [size, 4, height, width], align_corners=False)
    moved = F.grid_sample(pixels, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    ground = torch.rand(size, 3, generator=rng)
    ground = torch.lerp(ground, torch.ones(size, 3), uniform(0.0, 1.0)[:, None] * chance(0.7)[:, None])
    ground = torch.where(chance(0.55)[:, None] > 0, torch.ones(size, 3), ground)[:, :, None, None]
    picture = moved[:, :3] + (1 - moved[:, 3:]) * ground
    grey = picture.mean(1, keepdim=True)
    picture = torch.lerp(grey, picture, uniform(0.6, 1.3)[:, None, None, None])
    picture = (
        (picture - 0.5) * uniform(0.75, 1.2)[:, None, None, None]
        + 0.5
        + uniform(-0.1, 0.1)[:, None, None, None]
    )
    picture = picture * (1 + 0.08 * torch.randn(size, 3, 1, 1, generator=rng))
    blurred = F.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)
    picture = torch.lerp(picture, blurred, (uniform(0, 1) * chance(0.3))[:, None, None, None])
    rows, columns = torch.arange(height)[None, :] / height, torch.arange(width)[None, :] / width
    top, left, tall, wide = uniform(-0.1, 0.9), uniform(-0.1, 0.9), uniform(0.1, 0.35), uniform(0.1, 0.35)
    hole = ((rows >= top[:, None]) & (rows < (top + tall)[:, None]))[:, None, :, None]
    hole = hole & ((columns >= left[:, None]) & (columns < (left + wide)[:, None]))[:, None, None, :]
    hole = hole & (chance(0.2) > 0)[:, None, None, None]
    picture = torch.where(hole, torch.rand(size, 3, 1, 1, generator=rng), picture)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def on_white(rgba: torch.Tensor) -> torch.Tensor:
    """RGBA uint8 to RGB uint8 on white, as it is done for a user's transparent picture."""
    alpha = rgba[:, 3:].float() / 255
    return (rgba[:, :3].float() * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def grid_of(height: int, width: int) -> tuple[int, int]:
    """The grid in merged cells that the image processor chooses at a budget of exactly four visual tokens."""
    rows, columns = round(height / CELL), round(width / CELL)
    if rows * columns * CELL * CELL > PIXELS:
        beta = math.sqrt(height * width / PIXELS)
        rows, columns = (max(1, math.floor(side / beta / CELL)) for side in (height, width))
    elif rows * columns * CELL * CELL < PIXELS:
        beta = math.sqrt(PIXELS / (height * width))
        rows, columns = (math.ceil(side * beta / CELL) for side in (height, width))
    return rows, columns


def prepare(pictures: torch.Tensor, grid: tuple[int, int] = SQUARE) -> torch.Tensor:
    """RGB uint8 ``[B, 3, h, w]`` to patches ``[B, P, 588]`` in the processor's order, one temporal copy."""
    rows, columns = grid
    target = (rows * CELL, columns * CELL)
    resized = F.interpolate(pictures, size=target, mode="bicubic", antialias=True)
    values = (resized.float() / 255 - MEAN) / STD
    cells = values.view(len(values), 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
    return cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(values), rows * columns * MERGE * MERGE, -1)


def fake_pages(count: int, figures: torch.Tensor, seed: int) -> torch.Tensor:
    """Made-up document pages, RGB uint8 ``[count, 3, 136, 96]``: title, grey lines, maybe a small figure."""
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(7)
    pages = []
    for _ in range(count):
        page = Image.new("RGB", (96, 136), tuple(int(v) for v in rng.integers(238, 256, 3)))
        draw = ImageDraw.Draw(page)
        margin, y = int(rng.integers(6, 14)), int(rng.integers(6, 16))
        draw.text(
            (margin, y),
            "".join(chr(c) for c in rng.integers(97, 123, int(rng.integers(5, 16)))),
            (20, 20, 20),
            font,
        )
        y += 13
        gap, tone = int(rng.integers(3, 6)), int(rng.integers(60, 190))
        while y < 136 - margin:
            if rng.random() < 0.06 and y < 96:
                side = int(rng.integers(20, 38))
                figure = Image.fromarray(figures[int(rng.integers(len(figures)))].permute(1, 2, 0).numpy())
                page.paste(figure.resize((side, side)), (int(rng.integers(margin, 95 - margin - side)), y))
                y += side + gap
            if rng.random() < 0.85:
                short = 0 if rng.random() < 0.8 else int(rng.integers(0, 50))
                draw.line((margin, y, 96 - margin - short, y), (tone, tone, tone), 1)
            y += gap
        pages.append(np.asarray(page))
    return torch.from_numpy(np.stack(pages)).permute(0, 3, 1, 2).contiguous()
