"""Build the sample corpus and the queries that ship in ``umr_plugins/demo``, and check them.

    python build.py --cache CACHE     # rebuild pictures, photos, guide.pdf, cards and queries, then check
    python build.py --check           # only check what is there

``content.toml`` says which drawings, cards and queries there are, ``guide.toml`` holds the text of the guide.
The notes are written by hand and live where they are indexed, in ``corpus/files/notes``; this script only
checks them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
import subprocess
import tarfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
from PIL import Image

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "umr_plugins" / "demo"
FILES = DEMO / "corpus" / "files"
CARDS = DEMO / "corpus" / "cards"
QUERIES = DEMO / "queries"

DRAWING_SETS = {"twemoji": "1.2.5", "fxemoji": "1.2.2"}  # versions of the npm packages @iconify-json/NAME
PICTURE_SIDE = 128
PHOTO_SIDE = 320
TYPES = {
    "text_to_picture": "tp",
    "picture_to_text": "pt",
    "picture_to_picture": "pp",
    "fused_to_picture": "fp",
    "text_to_page": "tg",
    "text_to_text": "tt",
}
MAX_BYTES = 4_000_000
MIN_DISTANCE = 30.0  # largest difference in levels at 24 x 24; a copy that was saved again stays below it


# --- drawings ---------------------------------------------------------------------------------------------
class Drawings:
    """One Iconify drawing set, taken from its npm package."""

    def __init__(self, name: str, version: str, cache: Path) -> None:
        archive = cache / f"iconify-json-{name}-{version}.tgz"
        if not archive.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["npm", "pack", f"@iconify-json/{name}@{version}"],
                cwd=cache,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            if member is None:
                raise SystemExit(f"{archive} has no icons.json")
            self._data: dict[str, Any] = json.load(member)
        self._name = name

    def render(self, icon: str, side: int = PICTURE_SIDE) -> Image.Image:
        """The drawing on white, ``side`` pixels wide and high."""
        import resvg_py

        entry = self._data["icons"].get(icon)
        if entry is None:
            alias = self._data.get("aliases", {}).get(icon)
            if alias is None or set(alias) != {"parent"}:
                raise SystemExit(f"{self._name} has no drawing called {icon!r}")
            entry = self._data["icons"][alias["parent"]]
        width = entry.get("width", self._data.get("width", 16))
        height = entry.get("height", self._data.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{entry.get("left", 0)} {entry.get("top", 0)} {width} {height}" '
            f'width="{width}" height="{height}">{entry["body"]}</svg>'
        )
        scale = side / max(width, height)
        png = resvg_py.svg_to_bytes(svg_string=svg, width=round(width * scale), height=round(height * scale))
        drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        canvas = Image.new("RGB", (side, side), "white")
        canvas.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2), drawing)
        return canvas


def named(block: str) -> Iterator[tuple[str, str]]:
    """``"camel=two-hump-camel lion"`` gives ``("camel", "two-hump-camel")`` and ``("lion", "lion")``."""
    for word in block.split():
        name, _, icon = word.partition("=")
        yield name, icon or name


def save_png(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


# --- photographs and figures ------------------------------------------------------------------------------
def packaged(package: str, *parts: str) -> Traversable:
    return package_files(package).joinpath(*parts)


PHOTOS: dict[str, tuple[str, ...]] = {  # name: package, then the path in it
    "astronaut": ("skimage", "data", "astronaut.png"),
    "bricks": ("skimage", "data", "brick.png"),
    "photographer": ("skimage", "data", "camera.png"),
    "cell": ("skimage", "data", "cell.png"),
    "cat": ("skimage", "data", "chelsea.png"),
    "coffee": ("skimage", "data", "coffee.png"),
    "coins": ("skimage", "data", "coins.png"),
    "grass": ("skimage", "data", "grass.png"),
    "gravel": ("skimage", "data", "gravel.png"),
    "galaxies": ("skimage", "data", "hubble_deep_field.jpg"),
    "tissue": ("skimage", "data", "ihc.png"),
    "vessels": ("skimage", "data", "microaneurysms.png"),
    "retina": ("skimage", "data", "retina.jpg"),
    "rocket": ("skimage", "data", "rocket.jpg"),
    "handwriting": ("skimage", "data", "text.png"),
    "pagoda": ("sklearn", "datasets", "images", "china.jpg"),
    "dahlia": ("sklearn", "datasets", "images", "flower.jpg"),
    "admiral": ("matplotlib", "mpl-data", "sample_data", "grace_hopper.jpg"),
}


def figure(width: float, height: float, dpi: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.add_subplot()


def rasterise(fig: Any) -> Image.Image:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return Image.open(buffer).convert("RGB")


def plot_iris() -> Image.Image:
    from sklearn.datasets import load_iris

    data = load_iris()
    fig, ax = figure(3.2, 2.6, 100)
    for k, name in enumerate(data.target_names):
        rows = data.data[data.target == k]
        ax.scatter(rows[:, 2], rows[:, 3], s=10, label=str(name))
    ax.set(xlabel="petal length (cm)", ylabel="petal width (cm)", title="Three kinds of iris")
    ax.legend(fontsize=7)
    return rasterise(fig)


def plot_digits() -> Image.Image:
    from sklearn.datasets import load_digits

    images = load_digits().images[:60].reshape(6, 10, 8, 8)
    grid = images.transpose(0, 2, 1, 3).reshape(48, 80)
    levels = (255 - grid * (255 / 16)).astype(np.uint8)
    return Image.fromarray(levels).resize((320, 192), Image.Resampling.NEAREST).convert("RGB")


def plot_wine() -> Image.Image:
    from sklearn.datasets import load_wine

    data = load_wine()
    fig, ax = figure(3.2, 2.6, 100)
    ax.boxplot([data.data[data.target == k, 0] for k in range(3)], tick_labels=["first", "second", "third"])
    ax.set(xlabel="vineyard", ylabel="alcohol (% by volume)", title="Alcohol in wine")
    return rasterise(fig)


def plot_tumours() -> Image.Image:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    fig, ax = figure(3.2, 2.6, 100)
    for k, name in enumerate(data.target_names):
        ax.hist(data.data[data.target == k, 0], bins=25, alpha=0.6, label=str(name))
    ax.set(xlabel="mean radius of cell nuclei", ylabel="patients", title="Tumour samples")
    ax.legend(fontsize=7)
    return rasterise(fig)


def plot_relief() -> Image.Image:
    from matplotlib.colors import LightSource

    with packaged("matplotlib", "mpl-data", "sample_data", "jacksboro_fault_dem.npz").open("rb") as file:
        heights = np.load(file)["elevation"]
    import matplotlib

    shaded = LightSource(azdeg=315, altdeg=45).shade(
        heights, cmap=matplotlib.colormaps["gist_earth"], vert_exag=0.05, blend_mode="overlay"
    )
    relief = Image.fromarray((shaded[..., :3] * 255).astype(np.uint8))
    relief.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    return relief


def plot_sea_floor() -> Image.Image:
    with packaged("matplotlib", "mpl-data", "sample_data", "topobathy.npz").open("rb") as file:
        data = np.load(file)
        heights, longitude, latitude = data["topo"], data["longitude"], data["latitude"]
    fig, ax = figure(3.2, 2.6, 100)
    mesh = ax.pcolormesh(longitude, latitude, heights, cmap="terrain", vmin=-4000, vmax=4000, shading="auto")
    fig.colorbar(mesh, label="height (m)")
    ax.set(xlabel="longitude", ylabel="latitude", title="Land and sea floor")
    return rasterise(fig)


FIGURES: dict[str, Callable[[], Image.Image]] = {
    "iris-plot": plot_iris,
    "digits": plot_digits,
    "wine-plot": plot_wine,
    "tumour-plot": plot_tumours,
    "relief-map": plot_relief,
    "sea-floor-map": plot_sea_floor,
}


def build_photos() -> None:
    folder = FILES / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (package, *parts) in PHOTOS.items():
        with packaged(package, *parts).open("rb") as file:
            opened = Image.open(file)
            photo = opened.convert("L" if opened.mode == "L" else "RGB")
        photo.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        photo.save(folder / f"{name}.jpg", quality=82, optimize=True)
    for name, plot in FIGURES.items():
        picture = plot()
        if name.endswith("-map"):
            picture.save(folder / f"{name}.jpg", quality=85, optimize=True)
        else:
            save_png(picture.quantize(64, dither=Image.Dither.NONE), folder / f"{name}.png")


# --- the guide --------------------------------------------------------------------------------------------
def guide_tides(ax: Any) -> None:
    hours = np.linspace(0, 48, 400)
    level = 3 + 2 * np.cos(2 * math.pi * hours / 12.42) + 0.25 * np.cos(2 * math.pi * hours / 24.84)
    ax.plot(hours, level, lw=2)
    ax.fill_between(hours, 0, level, alpha=0.15)
    ax.set(xlabel="hours", ylabel="water level (m)", xticks=range(0, 49, 6), ylim=(0, 6))


def guide_stars(ax: Any) -> None:
    plough = np.array([(0, 0), (1.1, 0.5), (1.9, 0.55), (2.9, 0.6), (3.1, -0.35), (4.8, -0.3), (4.9, 0.9)])
    order = [0, 1, 2, 3, 4, 5, 6, 3]
    pole = plough[6] + 5 * (plough[6] - plough[5])
    ax.set_facecolor("#0b1633")
    ax.plot(*plough[order].T, color="#8fa8e0", lw=1)
    ax.plot(*np.array([plough[5], pole]).T, color="#f0d060", lw=1, ls=":")
    ax.scatter(*plough.T, color="white", s=30, zorder=3)
    ax.scatter(*pole, color="#f7e28b", s=90, marker="*", zorder=3)
    ax.text(pole[0] - 0.3, pole[1] - 0.1, "Pole Star", color="white", ha="right")
    ax.text(1.0, -0.9, "the Plough", color="white")
    ax.set(xticks=[], yticks=[], xlim=(-1, 7), ylim=(-1.5, 7.6))


def guide_feeder(ax: Any) -> None:
    guests = {
        "great tit": 31,
        "house sparrow": 27,
        "blue tit": 18,
        "greenfinch": 9,
        "robin": 6,
        "nuthatch": 3,
    }
    ax.barh(list(guests), list(guests.values()), color="#c97b3c")
    ax.invert_yaxis()
    ax.set(xlabel="visits")


def guide_leaves(ax: Any) -> None:
    weeks = np.linspace(0, 12, 100)
    ax.plot(weeks, 100 / (1 + np.exp(1.3 * (weeks - 5))), color="#2e8b3d", lw=2, label="green")
    ax.plot(weeks, 45 - 2.2 * weeks, color="#e0b020", lw=2, label="yellow")
    ax.plot(weeks, 60 * np.exp(-(((weeks - 8) / 2.2) ** 2)), color="#b8322a", lw=2, label="red")
    ax.set(xlabel="weeks from the first of September", ylabel="pigment (%)")
    ax.legend()


def guide_compost(ax: Any) -> None:
    days = np.linspace(0, 60, 200)
    ax.plot(days, 15 + 50 * (days / 6) * np.exp(1 - days / 6) + 25 * np.exp(-(((days - 32) / 6) ** 2)), lw=2)
    ax.annotate("turned", (26, 30), (26, 52), arrowprops={"arrowstyle": "->"}, ha="center")
    ax.set(xlabel="days", ylabel="temperature (°C)", ylim=(0, 75))


def guide_knife(ax: Any) -> None:
    ax.fill([0, 10, 10, 0], [-0.9, -0.9, 0, 0], color="#9aa7ad")
    ax.text(5, -0.55, "whetstone", ha="center", color="white")
    slope = math.tan(math.radians(20))
    ax.plot([2, 9], [0, 7 * slope], color="#39464d", lw=6, solid_capstyle="butt")
    turn = np.radians(np.linspace(0, 20, 30))
    ax.plot(2 + 4 * np.cos(turn), 4 * np.sin(turn), color="#b8322a")
    ax.text(6.3, 0.6, "20°", color="#b8322a", fontsize=12)
    ax.text(6.2, 2.3, "blade", rotation=20)
    ax.set(xticks=[], yticks=[], xlim=(0, 10), ylim=(-1, 4))


def guide_daylight(ax: Any) -> None:
    days = np.arange(365)
    lean = np.radians(23.44) * np.sin(2 * math.pi * (days - 80) / 365)
    for latitude in (0, 35, 60):
        angle = np.clip(-math.tan(math.radians(latitude)) * np.tan(lean), -1, 1)
        ax.plot(days / 30.4, 24 / math.pi * np.arccos(angle), lw=2, label=f"{latitude}° north")
    ax.set(xlabel="month", ylabel="hours of light", xticks=range(0, 13, 2), ylim=(4, 20))
    ax.legend()


def guide_ice(ax: Any) -> None:
    loads = {"one angler": 5, "one skater": 8, "a group": 12, "a small car": 25}
    ax.bar(list(loads), list(loads.values()), color="#69a9d6")
    ax.set(ylabel="thickness (cm)")


GUIDE_PLOTS: dict[str, Callable[[Any], None]] = {
    "tides": guide_tides,
    "stars": guide_stars,
    "feeder": guide_feeder,
    "leaves": guide_leaves,
    "compost": guide_compost,
    "knife": guide_knife,
    "daylight": guide_daylight,
    "ice": guide_ice,
}


def build_guide(pages: list[dict[str, Any]], twemoji: Drawings) -> None:
    from reportlab.lib.pagesizes import A5
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.lib.utils import ImageReader
    from reportlab.pdfgen.canvas import Canvas
    from reportlab.platypus import Paragraph

    width, height = A5
    margin = 40.0
    body = ParagraphStyle("body", fontName="Helvetica", fontSize=11, leading=15.5)
    note = ParagraphStyle("note", fontName="Helvetica-Oblique", fontSize=8.5, leading=11, alignment=1)
    pdf = Canvas(str(FILES / "guide.pdf"), pagesize=A5, invariant=1, pageCompression=1)
    pdf.setTitle("A small almanac")
    pdf.setAuthor("umr-plugins")
    for number, page in enumerate(pages, 1):
        pdf.setFont("Helvetica-Bold", 17)
        pdf.drawString(margin, height - 58, page["title"])
        pdf.setLineWidth(1)
        pdf.line(margin, height - 66, width - margin, height - 66)
        top = height - 78
        if page["drawings"]:
            side = min(72.0, (width - 2 * margin + 8) / len(page["drawings"]) - 8)
            left = (width - len(page["drawings"]) * (side + 8) + 8) / 2
            for k, icon in enumerate(page["drawings"]):
                drawing = ImageReader(twemoji.render(icon))
                pdf.drawImage(drawing, left + k * (side + 8), top - side, side, side)
            top -= side + 6
        if "plot" in page:
            fig, ax = figure(4.2, 1.9, 110)
            GUIDE_PLOTS[page["plot"]](ax)
            plot = rasterise(fig)
            shown = 150 * plot.width / plot.height
            pdf.drawImage(ImageReader(plot), (width - shown) / 2, top - 150, shown, 150)
            top -= 152
        paragraphs = [(page["caption"], note), *((text, body) for text in page["text"].strip().split("\n\n"))]
        for text, style in paragraphs:
            block = Paragraph(text, style)
            _, used = block.wrap(width - 2 * margin, height)
            top -= used + 8
            if top < 45:
                raise SystemExit(f"page {number} of the guide is too long")
            block.drawOn(pdf, margin, top)
        pdf.setFont("Helvetica", 8.5)
        pdf.drawCentredString(width / 2, 28, str(number))
        pdf.showPage()
    pdf.save()


# --- cards and queries ------------------------------------------------------------------------------------
def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_cards(content: dict[str, Any], sets: dict[str, Drawings]) -> None:
    rows = []
    for set_name, cards in content["cards"].items():
        for card_id, icon, name, text in cards:
            save_png(sets[set_name].render(icon), CARDS / f"{name}.png")
            rows.append({"id": card_id, "text": text, "image": f"{name}.png"})
    write_rows(CARDS / "cards.jsonl", rows)


def answer(text: str) -> dict[str, Any]:
    if text.startswith("card-"):
        return {"id": text}
    path, _, page = text.partition("#")
    return {"path": path, "page": int(page)} if page else {"path": path}


def query_rows(content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Every query as a row of queries.jsonl, with its picture as ``set:icon``."""
    tables = content["queries"]
    for kind, prefix in TYPES.items():
        entries: list[tuple[list[str], str | None]] = [(entry, None) for entry in tables[kind]]
        if kind == "text_to_picture":
            entries += [(entry, "photograph") for entry in tables["photograph"]]
        for number, (entry, subset) in enumerate(entries, 1):
            fields = list(entry)
            picture = fields.pop(0) if kind.startswith(("picture", "fused")) else None
            text = None if kind.startswith("picture") else fields.pop(0)
            row: dict[str, Any] = {
                "id": f"{prefix}-{number:02d}",
                "type": kind,
                "text": text,
                "image": None if picture is None else f"queries/{picture.replace(':', '-')}.png",
                "answers": [answer(field) for field in fields],
            }
            if subset is not None:
                row["subset"] = subset
            yield row, picture


def build_queries(content: dict[str, Any], sets: dict[str, Drawings]) -> None:
    rows = []
    for row, picture in query_rows(content):
        rows.append(row)
        if picture is not None:
            set_name, icon = picture.split(":")
            save_png(sets[set_name].render(icon), DEMO / row["image"])
    write_rows(DEMO / "queries.jsonl", rows)


def build(cache: Path) -> None:
    content = tomllib.loads((HERE / "content.toml").read_text(encoding="utf-8"))
    guide = tomllib.loads((HERE / "guide.toml").read_text(encoding="utf-8"))
    sets = {name: Drawings(name, version, cache) for name, version in DRAWING_SETS.items()}
    for folder in (FILES / "pictures", FILES / "photos", CARDS, QUERIES):
        shutil.rmtree(folder, ignore_errors=True)
    for set_name, block in content["pictures"].items():
        for name, icon in named(block):
            save_png(sets[set_name].render(icon), FILES / "pictures" / f"{name}.png")
    build_photos()
    build_guide(guide["page"], sets["twemoji"])
    build_cards(content, sets)
    build_queries(content, sets)


# --- checks -----------------------------------------------------------------------------------------------
def small(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize((24, 24), Image.Resampling.LANCZOS), dtype=np.float32)


def shingles(text: str, size: int = 6) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def check() -> list[str]:
    """What is wrong; empty when the corpus and the queries are as they should be."""
    wrong: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            wrong.append(message)

    content = tomllib.loads((HERE / "content.toml").read_text(encoding="utf-8"))
    guide = tomllib.loads((HERE / "guide.toml").read_text(encoding="utf-8"))["page"]

    # drawings: none is used twice in the corpus, none of the corpus is used in a query
    used = [f"{s}:{icon}" for s, block in content["pictures"].items() for _, icon in named(block)]
    used += [f"{s}:{card[1]}" for s, cards in content["cards"].items() for card in cards]
    need(len(used) == len(set(used)), f"used twice: {[d for d, n in Counter(used).items() if n > 1]}")
    used += [f"twemoji:{icon}" for page in guide for icon in page["drawings"]]
    asked = {picture for _, picture in query_rows(content) if picture}
    need(not asked & set(used), f"drawings both in the corpus and in a query: {sorted(asked & set(used))}")

    # the same by bytes and by pixels
    corpus_pictures = sorted(
        p for folder in (FILES, CARDS) for p in folder.rglob("*") if p.suffix in {".png", ".jpg"}
    )
    query_pictures = sorted(QUERIES.glob("*.png"))
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in [*corpus_pictures, *query_pictures]]
    need(len(digests) == len(set(digests)), "two pictures are the same file")
    stack = np.stack([small(p) for p in corpus_pictures])
    for path in query_pictures:
        distance = np.abs(stack - small(path)).max(axis=(1, 2, 3))
        nearest = int(distance.argmin())
        need(
            float(distance[nearest]) >= MIN_DISTANCE,
            f"{path.name} looks like {corpus_pictures[nearest].name} ({distance[nearest]:.0f})",
        )
    for path in corpus_pictures + query_pictures:
        with Image.open(path) as picture:
            need(max(picture.size) <= PHOTO_SIDE, f"{path.name} is {picture.size}")

    # texts
    texts = {}
    for note in sorted((FILES / "notes").glob("*.md")):
        texts[note.name] = note.read_text(encoding="utf-8")
        words = len(texts[note.name].split())
        lines = texts[note.name].splitlines()
        need(60 <= words <= 180, f"{note.name} has {words} words")
        need(sum(line.startswith("# ") for line in lines) == 1, f"{note.name} needs one title")
        need(sum(line.startswith("## ") for line in lines) <= 2, f"{note.name} has too many sections")
    pdf = pypdfium2.PdfDocument(FILES / "guide.pdf")
    need(len(pdf) == len(guide), f"guide.pdf has {len(pdf)} pages, not {len(guide)}")
    for number, page in enumerate(guide, 1):
        words = len(page["text"].split())
        need(80 <= words <= 150, f"page {number} has {words} words")
        layer = pdf[number - 1].get_textpage().get_text_bounded()
        need(page["title"] in layer, f"page {number} lacks its text layer")
        texts[f"guide.pdf#{number}"] = page["text"]
    pages = len(pdf)
    pdf.close()
    cards = read_rows(CARDS / "cards.jsonl")
    for card in cards:
        need((CARDS / card["image"]).is_file(), f"{card['id']} lacks its picture")
        texts[card["id"]] = card["text"]

    # queries
    rows = read_rows(DEMO / "queries.jsonl")
    need(rows == [row for row, _ in query_rows(content)], "queries.jsonl is not what content.toml says")
    need(len({row["id"] for row in rows}) == len(rows), "query ids repeat")
    need(len({(row["text"], row["image"]) for row in rows}) == len(rows), "queries repeat")
    card_ids = {card["id"] for card in cards}
    written = {key: shingles(text) for key, text in texts.items()}
    for row in rows:
        need(bool(row["answers"]), f"{row['id']} has no answer")
        need(bool(row["text"]) or bool(row["image"]), f"{row['id']} is empty")
        if row["image"]:
            need((DEMO / row["image"]).is_file(), f"{row['id']} lacks its picture")
        for given in row["answers"]:
            found = given["id"] in card_ids if "id" in given else (FILES / given["path"]).is_file()
            need(found and 1 <= given.get("page", 1) <= pages, f"{row['id']}: no such answer {given}")
        for key, known in written.items():
            need(not known & shingles(row["text"] or ""), f"{row['id']} copies a phrase of {key}")
    unused = {p.name for p in query_pictures} - {Path(row["image"]).name for row in rows if row["image"]}
    need(not unused, f"query pictures that nobody asks: {sorted(unused)}")

    # size
    shipped = [p for p in (DEMO / "corpus").rglob("*") if p.is_file()]
    shipped += [p for p in QUERIES.rglob("*") if p.is_file()] + [DEMO / "queries.jsonl"]
    size = sum(p.stat().st_size for p in shipped)
    need(size <= MAX_BYTES, f"{size} bytes in all")
    counts = {
        "pictures": len(list((FILES / "pictures").iterdir())),
        "photos": len(list((FILES / "photos").iterdir())),
        "notes": len(list((FILES / "notes").iterdir())),
        "pages": pages,
        "cards": len(cards),
    }
    for name, least in {"pictures": 140, "photos": 20, "notes": 40, "pages": 12, "cards": 30}.items():
        need(counts[name] >= least, f"only {counts[name]} {name}")
    need(sum(counts.values()) >= 200, "fewer than 200 items")
    need(len(rows) >= 150, f"only {len(rows)} queries")
    print(f"corpus: {counts}, {sum(counts.values())} items (a note counted once)")
    print(f"queries: {dict(Counter(row['type'] for row in rows))}, {len(rows)} in all")
    print(f"size: {size / 1e6:.2f} MB")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, help="folder for the npm packages; missing ones are downloaded")
    parser.add_argument("--check", action="store_true", help="check only, build nothing")
    arguments = parser.parse_args()
    if not arguments.check:
        if arguments.cache is None:
            parser.error("--cache is needed to build")
        build(arguments.cache)
    wrong = check()
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
