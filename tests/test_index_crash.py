"""A handful of kills; `make crash` does sixty, and bare Chroma beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).resolve().parents[1] / "benchmarks" / "crash" / "kill_index.py"


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    options = ["--kills", "5", "--driver", "fake", "--files", "120", "--pause", "0.01"]
    command = [sys.executable, str(HARNESS), *options, "--out", str(tmp_path / "crash.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "crash.json").read_text())["index"]
    assert (result["kills"], result["good"]) == (5, 5)
    for trial in result["trials"]:
        assert 0 < trial["committed"] < result["items"] == 123
        assert trial["found"] >= trial["committed"]
        # What was there before the kill was not embedded again.
        assert trial["rerun_embedded"] == result["items"] - trial["found"]


@pytest.mark.slow
def test_direct_writes_are_judged_alike_in_both_stores(tmp_path: Path) -> None:
    options = ["--kills", "1", "--bare-only", "--rounds", "4", "--batch", "40"]
    command = [sys.executable, str(HARNESS), *options, "--out", str(tmp_path / "crash.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "crash.json").read_text())
    assert results["store_umr"]["good"] == 1
    assert results["store_chroma"]["kills"] == 1
    assert "bare Chroma" in done.stdout
