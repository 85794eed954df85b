"""Three distributions in lockstep, and a wheel that holds what the quick start needs."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import umr_plugins

ROOT = Path(__file__).resolve().parents[1]
INTEGRATIONS = ROOT / "integrations"
DISTRIBUTIONS = ("llama-index-umr", "langchain-umr")


def project(name: str) -> dict[str, Any]:
    folder = INTEGRATIONS / name
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_adapters_have_the_version_of_the_core_and_ask_for_it(name: str) -> None:
    table = project(name)["project"]
    assert table["name"] == name
    assert table["version"] == umr_plugins.__version__
    wanted = [part.replace(" ", "") for part in table["dependencies"]]
    assert f"umr-plugins=={umr_plugins.__version__}" in wanted


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_adapters_build_with_the_tools_of_the_core(name: str) -> None:
    assert project(name)["build-system"]["build-backend"] == "hatchling.build"
    assert project(name)["project"]["requires-python"] == ">=3.11"


def test_namespace_folders_hold_no_init() -> None:
    top = INTEGRATIONS / "llama-index-umr" / "llama_index"
    folders = [top, *(path for path in top.iterdir() if path.is_dir() and path.name != "__pycache__")]
    assert len(folders) > 1
    assert [path for path in folders if (path / "__init__.py").exists()] == []


def test_every_package_is_typed() -> None:
    packages = [ROOT / "umr_plugins", INTEGRATIONS / "langchain-umr" / "langchain_umr"]
    packages += [
        init.parent for init in (INTEGRATIONS / "llama-index-umr" / "llama_index").glob("*/*/__init__.py")
    ]
    assert len(packages) >= 4
    assert [str(path) for path in packages if not (path / "py.typed").exists()] == []


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in rows}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_direct_dependency_by_plain_versions() -> None:
    pinned = pins()
    core = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *core["dependencies"],
        *(line for extra in core["optional-dependencies"].values() for line in extra),
    ]
    for name in DISTRIBUTIONS:
        lines += project(name)["project"]["dependencies"]
    wanted = {normal(re.split(r"[^A-Za-z0-9._-]", line)[0]) for line in lines}
    assert wanted - {"umr-plugins"} - set(pinned) == set()
    assert all("+" not in version for version in pinned.values()), "local versions exist in one place only"


def test_the_wheel_holds_the_demonstration_and_nothing_foreign(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    wheel = Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    names = set(sizes)
    assert {"umr_plugins/py.typed", "umr_plugins/cli/main.py", "umr_plugins/demo/queries.jsonl"} <= names
    assert any(name.startswith("umr_plugins/demo/corpus/") for name in names)
    assert "umr_plugins/demo/umr-tiny/model.safetensors" in names
    assert {name.split("/")[0] for name in names} == {
        "umr_plugins",
        f"umr_plugins-{umr_plugins.__version__}.dist-info",
    }
    assert not [name for name in names if "__pycache__" in name]
    weights = sum(size for name, size in sizes.items() if name.startswith("umr_plugins/demo/umr-tiny/"))
    corpus = sum(size for name, size in sizes.items() if name.startswith("umr_plugins/demo/corpus/"))
    assert weights <= 13_000_000
    assert corpus <= 4_000_000
