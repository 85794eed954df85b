"""Importing the package, or asking the command line for help, loads none of the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "chromadb", "numpy", "PIL", "pypdfium2", "llama_index", "langchain_core")


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    tell = "import json, sys\nprint('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HELP = """
from umr_plugins.cli.main import main
try:
    main({arguments!r})
except SystemExit as done:
    assert done.code == 0, done.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import umr_plugins; dir(umr_plugins)",
        "from umr_plugins import Item, Hit, PageImage",
        HELP.format(arguments=["--help"]),
        HELP.format(arguments=["--version"]),
        HELP.format(arguments=["search", "--help"]),
        HELP.format(arguments=["demo", "--help"]),
    ],
    ids=["package", "types", "help", "version", "search-help", "demo-help"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_after(code).isdisjoint(HEAVY)


def test_the_check_sees_a_heavy_import() -> None:
    assert "numpy" in loaded_after("import umr_plugins, numpy")
