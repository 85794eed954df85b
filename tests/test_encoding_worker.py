"""The single-owner worker and the batch planner."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umr_plugins.encoding.plan import plan_batches
from umr_plugins.encoding.worker import Worker
from umr_plugins.errors import UMRError


def test_calls_run_one_at_a_time_on_one_thread() -> None:
    worker = Worker("test")
    inside, most, names = 0, 0, set()

    def job(number: int) -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        names.add(threading.current_thread().name)
        time.sleep(0.001)
        inside -= 1
        return number

    futures = [worker.submit(job, number) for number in range(50)]
    assert [future.result() for future in futures] == list(range(50))
    assert most == 1
    assert names == {"umr-test"}
    worker.close()


def test_an_error_reaches_its_caller_and_stops_nothing() -> None:
    worker = Worker("test")
    broken = worker.submit(lambda: 1 / 0)
    fine = worker.submit(lambda: "fine")
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert fine.result() == "fine"
    assert worker.run(lambda: worker.run(lambda: "nested")) == "nested"
    worker.close()
    with pytest.raises(UMRError, match="closed"):
        worker.submit(int)


def test_cancelled_work_never_runs() -> None:
    worker = Worker("test")
    gate = threading.Event()
    ran: list[int] = []
    blocking = worker.submit(gate.wait)
    late = worker.submit(ran.append, 1)
    assert late.cancel()
    gate.set()
    blocking.result()
    worker.close()
    assert ran == []


def test_a_forgotten_worker_ends_its_thread() -> None:
    worker = Worker("forgotten")
    thread = worker._thread
    worker.run(int)
    del worker
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_after_a_fork_it_says_so_instead_of_waiting_for_ever() -> None:
    worker = Worker("test")
    worker._pid = os.getpid() - 1  # what a forked child sees
    with pytest.raises(UMRError, match="parent process"):
        worker.submit(int)


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 400))
def test_plans_cover_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[position] for position in batch) <= budget
    longest = [max(lengths[position] for position in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_new_model_in_a_forked_child_works() -> None:
    script = """
import os
from PIL import Image
from umr_plugins import Embedder
items = [Image.new("RGB", (56, 56)), "x"]
Embedder("umr-tiny").encode_documents(items)
child = os.fork()
if child == 0:
    Embedder("umr-tiny").encode_documents(items)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # OpenMP's own threads do not survive fork either
    made = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    assert made.stdout.strip() == "0"


def test_models_keep_all_of_torchs_threads_whatever_the_pictures_pool_does() -> None:
    """The pool's threads compute alone; neither the model's nor later ones of the program inherit that."""
    script = """
import threading, torch
torch.set_num_threads(3)
from PIL import Image
from umr_plugins import Embedder
embedder = Embedder("umr-tiny")
embedder.encode_documents([Image.new("RGB", (56, 56)), "x"])
found = [embedder._engine.worker.run(torch.get_num_threads), torch.get_num_threads()]
later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
later.start()
later.join()
from umr_plugins.encoding.engine import media_pool
found.append(media_pool().submit(torch.get_num_threads).result())
print(found)
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[3, 3, 3, 1]"
