"""Kill indexing with SIGKILL at random moments, and check what is left.

    python benchmarks/crash/kill_index.py --kills 60                  `umr index` with umr-tiny
    python benchmarks/crash/kill_index.py --kills 60 --bare           and both stores written to directly
    python benchmarks/crash/kill_index.py --kills 5 --driver fake     without a model, in seconds

A run that nobody disturbs shows the time between first and last commit and what the index must become. Each
trial is killed at a moment drawn uniformly from that time. Then the index is opened anew: every item that
was reported committed must be there once with the right vector, and `verify` must pass without help. Then
the same command is run again and must end with the ledger of the undisturbed run.

With `--bare`, the same vectors are also written straight to a Chroma collection at its defaults, and through
`Index.add`, in equal batches; both are killed alike and judged by the same questions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
CHILDREN = Path(__file__).with_name("children.py")
TOLERANCE = 1e-4


@dataclass
class Run:
    """What a child did: its acknowledgements with their times, and how it ended."""

    commits: list[tuple[float, int]] = field(default_factory=list)
    status: int | None = None
    output: str = ""

    @property
    def committed(self) -> int:
        return self.commits[-1][1] if self.commits else 0


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run(command: list[str], kill_after: float | None = None) -> Run:
    """Run a child to its end, or kill it so many seconds after its first commit."""
    result = Run()
    child = subprocess.Popen(
        command,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    timer: Any = None
    try:
        for line in child.stderr:
            if not line.startswith('{"committed"'):
                result.output += line
                continue
            result.commits.append((time.monotonic(), json.loads(line)["committed"]))
            if kill_after is not None and timer is None:
                timer = threading.Timer(kill_after, child.kill)
                timer.start()
        result.output += child.stdout.read()
        result.status = child.wait()
    finally:
        if timer is not None:
            timer.cancel()
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdout.close()
        child.stderr.close()
        end_group(child.pid)
    return result


def end_group(pid: int) -> None:
    """End helpers of a killed child (the PDF reader), which would otherwise wait for it."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def write_source(folder: Path, files: int) -> None:
    """Pictures, texts and a few PDFs, all different."""
    folder.mkdir(parents=True)
    for number in range(files):
        place = folder / f"part{number % 7}"
        place.mkdir(exist_ok=True)
        if number % 40 == 7:
            pages = [page(number, side) for side in range(2)]
            pages[0].save(place / f"{number:04d}.pdf", save_all=True, append_images=pages[1:])
        elif number % 2:
            words = " ".join(f"word{(number * step) % 997}" for step in range(1, 40))
            (place / f"{number:04d}.md").write_text(f"# Note {number}\n\n{words}\n")
        else:
            page(number, 0).save(place / f"{number:04d}.png")


def page(number: int, side: int) -> Image.Image:
    colour = tuple(int(value) for value in np.random.default_rng([number, side]).integers(0, 256, 3))
    image = Image.new("RGB", (96, 64), colour)
    ImageDraw.Draw(image).text((4, 4), f"{number} / {side}", fill="white")
    return image


def ledger(db: Path) -> dict[str, np.ndarray]:
    """Ids and vectors of an index, oldest first."""
    from umr_plugins.index.index import Index

    with Index(db) as index:
        ids = index.ids()
        return dict(zip(ids, index.vectors(ids), strict=True))


def index_command(args: argparse.Namespace, source: Path, db: Path) -> list[str]:
    if args.driver == "fake":
        return [sys.executable, str(CHILDREN), "index", str(source), str(db), "--pause", str(args.pause)]
    verb = [sys.executable, "-m", "umr_plugins.cli", "index", str(source), "--db", str(db)]
    return [*verb, "--model", args.model, "--json"]


def opened(db: Path) -> dict[str, Any]:
    """What a new owner finds, without any help."""
    from umr_plugins.index.index import Index

    begun = time.monotonic()
    with Index(db) as index:
        seconds = time.monotonic() - begun
        report, ids = index.verify(), index.ids()
        vectors = index.vectors(ids)
        answered = bool(index.search_vector(vectors[0], 1)) if ids else True
        mended = index.info()["mended"]
    found = {"ids": ids, "vectors": vectors, "problems": list(report.problems), "mended": mended}
    return {**found, "answered": answered, "seconds": seconds}


def compare(found: dict[str, Any], reference: dict[str, np.ndarray], committed: int) -> dict[str, Any]:
    """Lost, doubled and wrong items. Files are committed in the same order on every run."""
    ids, vectors, expected = found["ids"], found["vectors"], list(reference)
    present = dict(zip(ids, vectors, strict=True))
    differences = [float(np.abs(present[name] - reference[name]).max()) for name in ids if name in reference]
    return {
        "lost": sum(name not in present for name in expected[:committed]),
        "strangers": sum(name not in reference for name in ids),
        "twice": len(ids) - len(set(ids)),
        "wrong": sum(difference > TOLERANCE for difference in differences),
        "max_difference": max(differences, default=0.0),
    }


def kill_indexing(args: argparse.Namespace, work: Path, chance: random.Random) -> dict[str, Any]:
    source = work / "source"
    write_source(source, args.files)
    calm = run(index_command(args, source, work / "calm"))
    if calm.status != 0 or len(calm.commits) < 3:
        raise SystemExit(f"the undisturbed run failed with status {calm.status}:\n{calm.output}")
    reference = ledger(work / "calm")
    window = calm.commits[-1][0] - calm.commits[0][0]
    say(f"undisturbed: {len(reference)} items, {len(calm.commits)} commits in {window:.1f} s")
    trials: list[dict[str, Any]] = []
    late = 0
    while len(trials) < args.kills:
        db = work / f"db{len(trials)}-{late}"
        killed = run(index_command(args, source, db), kill_after=chance.uniform(0, window))
        if killed.status != -signal.SIGKILL or killed.committed >= len(reference):
            late += 1  # it was faster than the undisturbed run and had made its last commit
            if late > args.kills + 20:
                raise SystemExit(f"too many trials ended before the kill; the last said:\n{killed.output}")
            continue
        found = opened(db)
        faults = compare(found, reference, killed.committed)
        again = run(index_command(args, source, db))
        final = opened(db)
        faults_after = compare(final, reference, len(reference))
        bad = [found["problems"], final["problems"]]
        bad += [
            value for part in (faults, faults_after) for key, value in part.items() if key != "max_difference"
        ]
        good = not any(bad) and found["answered"] and final["answered"] and again.status == 0
        trials.append(
            {
                "commits": len(killed.commits),
                "committed": killed.committed,
                "found": len(found["ids"]),
                "good": good,
                "after_kill": faults,
                "after_rerun": faults_after,
                "rerun_status": again.status,
                "rerun_embedded": again.committed,
                "problems": found["problems"] + final["problems"],
                "mended": found["mended"],
                "open_seconds": round(found["seconds"], 2),
            }
        )
        shutil.rmtree(db)
        outcome = "good" if good else "BAD"
        say(f"  {len(trials):3}/{args.kills}  killed after {killed.committed:4} items: {outcome}")
    return {
        "items": len(reference),
        "commits": len(calm.commits),
        "window_seconds": round(window, 2),
        "kills": len(trials),
        "good": sum(trial["good"] for trial in trials),
        "killed_after_the_last_commit": late,
        "mended_on_opening": sum(bool(trial["mended"]) for trial in trials),
        "slowest_opening_seconds": max((trial["open_seconds"] for trial in trials), default=0),
        "trials": trials,
    }


def kill_store(store: str, args: argparse.Namespace, work: Path, chance: random.Random) -> dict[str, Any]:
    """Kill a process that writes vectors to one store, and ask a new process what is there."""
    vectors = work / "vectors.npy"
    amounts = ["--rounds", str(args.rounds), "--batch", str(args.batch)]

    def command(verb: str, db: Path) -> list[str]:
        return [sys.executable, str(CHILDREN), verb, store, str(db), str(vectors), *amounts]

    calm = run(command("write", work / f"{store}-calm"))
    if calm.status != 0:
        raise SystemExit(f"writing to {store} failed:\n{calm.output}")
    window = calm.commits[-1][0] - calm.commits[0][0]
    outcomes: list[dict[str, Any]] = []
    late = 0
    while len(outcomes) < args.kills:
        db = work / f"{store}-{len(outcomes)}-{late}"
        killed = run(command("write", db), kill_after=chance.uniform(0, window))
        if killed.status != -signal.SIGKILL or killed.committed >= calm.committed:
            late += 1
            if late > args.kills + 20:
                raise SystemExit(f"too many trials ended before the kill; the last said:\n{killed.output}")
            continue
        if args.keep is not None:
            shutil.copytree(db, work / "before")
        looked = run([*command("check", db), "--acknowledged", str(killed.committed)])
        found: dict[str, Any] = json.loads(looked.output.splitlines()[-1]) if looked.status == 0 else {}
        faults = [found.get(key) for key in ("lost_count", "wrong_count", "twice", "problems")]
        good = looked.status == 0 and not any(faults) and found["answered"]
        why = (
            found
            if looked.status == 0
            else {"wedged": (looked.output.strip().splitlines() or ["crashed"])[-1]}
        )
        outcomes.append({"committed": killed.committed, "good": good, "status": looked.status, **why})
        detail = "good" if good else f"BAD {why}"[:150]
        say(f"  {store}: {len(outcomes):3}/{args.kills}  killed after {killed.committed:6} items: {detail}")
        shutil.rmtree(db)
        if args.keep is not None:
            if good:
                shutil.rmtree(work / "before")
            else:
                shutil.move(work / "before", args.keep / db.name)
    return {
        "items": calm.committed,
        "window_seconds": round(window, 2),
        "kills": len(outcomes),
        "good": sum(outcome["good"] for outcome in outcomes),
        "wedged": sum(outcome["status"] != 0 for outcome in outcomes),
        "mended_on_opening": sum(bool(outcome.get("mended")) for outcome in outcomes),
        "slowest_opening_seconds": max((outcome.get("seconds", 0) for outcome in outcomes), default=0),
        "trials": outcomes,
    }


def histogram(title: str, values: list[int], top: int) -> str:
    """How many kills fell into each tenth of the run."""
    edges = np.linspace(0, top, 11)
    counts, _ = np.histogram(values, bins=edges)
    bars = [
        f"  {low:7.0f} – {high:7.0f}  {'#' * count} {count}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return "\n".join([title, *bars])


def bound(good: int, kills: int) -> str:
    """What so many good trials show (rule of three)."""
    return f"; with 95 % confidence fewer than {300 / kills:.1f} % fail" if kills and good == kills else ""


def machine() -> dict[str, Any]:
    names = ("umr-plugins", "chromadb", "numpy", "torch", "transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except ImportError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "libraries": versions,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", "--trials", type=int, default=60, help="trials of each kind (60)")
    parser.add_argument("--driver", choices=("cli", "fake"), default="cli", help="what is killed (cli)")
    parser.add_argument("--model", default="umr-tiny", help="of the cli driver (umr-tiny)")
    parser.add_argument("--files", type=int, default=300, help="in the source folder (300)")
    parser.add_argument("--pause", type=float, default=0.005, help="seconds per item of the fake driver")
    parser.add_argument(
        "--bare", action="store_true", help="also kill direct writes, to bare Chroma and to Index"
    )
    parser.add_argument("--bare-only", action="store_true", help="only these")
    parser.add_argument(
        "--rounds", type=int, default=60, help="how often each vector is written with --bare (60)"
    )
    parser.add_argument("--batch", type=int, default=250, help="vectors per write with --bare (250)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, help="keep the folder of a bad --bare trial here, as the kill left it"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    chance = random.Random(args.seed)
    sys.path.insert(0, str(ROOT))
    results: dict[str, Any] = {"command": " ".join(["kill_index.py", *sys.argv[1:]]), "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="umr-crash-") as name:
        work = Path(name)
        if not args.bare_only:
            results["index"] = kill_indexing(args, work, chance)
        if args.bare or args.bare_only:
            some = np.random.default_rng(args.seed).standard_normal((330, 32)).astype(np.float32)
            np.save(work / "vectors.npy", some / np.linalg.norm(some, axis=1, keepdims=True))
            for store in ("chroma", "umr"):
                results[f"store_{store}"] = kill_store(store, args, work, chance)
    names = {"index": "umr index", "store_chroma": "bare Chroma", "store_umr": "Index.add"}
    failed = 0
    for key, title in names.items():
        if key not in results:
            continue
        part = results[key]
        print(
            histogram(
                f"{title}: items committed at the kill",
                [t["committed"] for t in part["trials"]],
                part["items"],
            )
        )
        good, kills = part["good"], part["kills"]
        print(f"{title}: {good} of {kills} kills without loss{bound(good, kills)}")
        failed += key != "store_chroma" and good != kills
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
