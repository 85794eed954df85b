"""Two processes with uneven shares of a batch have the loss and gradient of one process with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from umr_plugins.training.distributed import any_true, barrier, gather, rank, world_size
from umr_plugins.training.losses import Relations, info_nce

WORLD = 2
QUERIES, DOCUMENTS = (3, 2), (7, 4)  # how many each process has
RELATIONS = Relations(
    positive=torch.tensor([0, 1, 2, 7, 8]),
    owner=torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4, 3, 4]),
)


class Tower(nn.Module):
    """A model and the temperature that its loss learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 4, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(items), self.temperature.clone()


def loss_of(
    queries: torch.Tensor, documents: torch.Tensor, temperature: torch.Tensor, rows: slice | None = None
) -> torch.Tensor:
    return info_nce(queries, documents, RELATIONS, temperature=temperature, rows=rows, query_query=True,
                    document_document=True)  # fmt: skip


def own_rows() -> slice:
    first = sum(QUERIES[: rank()])
    return slice(first, first + QUERIES[rank()])


# How a process may arrive at its losses of the gathered batch.
WAYS: dict[str, Callable[..., list[torch.Tensor]]] = {
    "whole": lambda *batch: [loss_of(*batch)],
    "slices": lambda *batch: [loss_of(*batch, slice(row, row + 2)) for row in range(0, sum(QUERIES), 2)],
    "own rows": lambda *batch: [world_size() * loss_of(*batch, own_rows())],
    "own rows, not multiplied": lambda *batch: [loss_of(*batch, own_rows())],
}


def step(way: str, *, cached: bool = False, detached: bool = False) -> dict[str, torch.Tensor]:
    """Losses and the gradients that an optimiser would see.

    `cached` takes each loss on the states alone and pulls the model afterwards, as GradCache does; `detached`
    is the mistake of gathering without gradient.
    """
    generator = torch.Generator().manual_seed(1)
    everything = torch.randn(sum(QUERIES) + sum(DOCUMENTS), 5, generator=generator, dtype=torch.float64)
    queries, documents = everything.split([sum(QUERIES), sum(DOCUMENTS)])
    model: nn.Module = Tower()
    if world_size() > 1:
        queries, documents = queries.split(QUERIES)[rank()], documents.split(DOCUMENTS)[rank()]
        model = DistributedDataParallel(model)
    states, temperature = model(torch.cat([queries, documents]))
    seen = (
        [each.detach().clone().requires_grad_() for each in (states, temperature)]
        if cached
        else [states, temperature]
    )
    parts = seen[0].split([len(queries), len(documents)])
    gathered = [gather(each) for each in parts]
    if detached:
        gathered = [each.detach() for each in gathered]
        for each, part, counts in zip(gathered, parts, (QUERIES, DOCUMENTS), strict=True):
            first = sum(counts[: rank()])
            each[first : first + len(part)] = part
    losses = WAYS[way](*gathered, seen[1])
    if cached:
        for loss in losses:
            loss.backward()
        torch.autograd.backward([states, temperature], [each.grad for each in seen])
    else:
        torch.stack(losses).sum().backward()
    gradients = {name.removeprefix("module."): each.grad for name, each in model.named_parameters()}
    return {"loss": torch.stack(losses).sum().detach(), **gradients}  # type: ignore[dict-item]


def work(store: str, out: str) -> None:
    """What each process does; the parent looks at what it saves."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=WORLD
    )
    results: dict[str, Any] = {way: step(way) for way in WAYS}
    results["cached"] = {way: step(way, cached=True) for way in WAYS}
    results["detached"] = step("whole", detached=True)
    own = torch.arange(6.0).reshape(2, 3) + 10 * rank()
    results["types"] = [
        gather(each[: rank() + 1])
        for each in (
            own,
            own.T,
            own.long(),
            own.to(torch.bfloat16),
            own % 2 == 0,
            own[0],
            own[..., None, None],
        )
    ]
    results["empty"] = gather(own[: rank()])
    results["none at all"] = gather(own[:0])
    nothing = own[: rank()].clone().requires_grad_()
    (gather(nothing) * torch.tensor([1.0, 10.0, 100.0]) * (rank() + 1)).sum().backward()
    results["gradient of none"] = nothing.grad
    results["flags"] = [any_true(flag) for flag in (False, True, rank() == 1, rank() == 0)]
    results["place"] = (rank(), world_size())
    if rank() == 0:
        Path(store).with_name("first").touch()
    barrier()
    results["waited"] = Path(store).with_name("first").exists()
    torch.save(results, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gather")
    outs = [folder / f"{number}.pt" for number in range(WORLD)]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "store"), str(out)],
            env={**os.environ, "RANK": str(number), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, out in enumerate(outs)
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("cached", [False, True], ids=["direct", "cached"])
@pytest.mark.parametrize("way", ["whole", "slices", "own rows"])
def test_gradients_are_those_of_one_process_with_everything(
    results: list[dict[str, Any]], way: str, cached: bool
) -> None:
    alone = step("whole")
    for each in results:
        found = each["cached"][way] if cached else each[way]
        for name in ("linear.weight", "linear.bias", "temperature"):
            assert alone[name].abs().sum() > 0
            torch.testing.assert_close(found[name], alone[name], rtol=1e-10, atol=1e-14)


def test_the_loss_is_that_of_one_process_with_everything(results: list[dict[str, Any]]) -> None:
    alone = step("whole")["loss"]
    for each in results:
        for way in ("whole", "slices"):
            torch.testing.assert_close(each[way]["loss"], alone, rtol=1e-12, atol=0)
    shares = torch.stack([each["own rows"]["loss"] for each in results])
    torch.testing.assert_close(shares.mean(), alone, rtol=1e-12, atol=0)


def test_gathering_without_gradient_and_forgetting_the_factor_give_other_gradients(
    results: list[dict[str, Any]],
) -> None:
    alone = step("whole")["linear.weight"]
    for each in results:
        for wrong in (each["detached"], each["own rows, not multiplied"]):
            torch.testing.assert_close(wrong["linear.weight"], alone / WORLD, rtol=1e-10, atol=1e-14)


def test_rows_stand_in_rank_order_in_their_own_type(results: list[dict[str, Any]]) -> None:
    first = torch.arange(6.0).reshape(2, 3)
    second = first + 10
    rows = torch.cat([first[:1], second[:2]])
    expected = [
        rows,
        torch.cat([first.T[:1], second.T[:2]]),
        rows.long(),
        rows.to(torch.bfloat16),
        rows % 2 == 0,
        torch.cat([first[0, :1], second[0, :2]]),
        rows[..., None, None],
    ]
    for each in results:
        for found, right in zip(each["types"], expected, strict=True):
            assert found.dtype == right.dtype
            assert torch.equal(found, right)


def test_a_process_may_have_no_rows(results: list[dict[str, Any]]) -> None:
    for each in results:
        assert torch.equal(each["empty"], torch.tensor([[10.0, 11.0, 12.0]]))
        assert each["none at all"].shape == (0, 3)
    # Each process multiplied by its rank + 1; the sum of both gradients arrives.
    assert torch.equal(results[0]["gradient of none"], torch.zeros(0, 3))
    assert torch.equal(results[1]["gradient of none"], torch.tensor([[3.0, 30.0, 300.0]]))


def test_every_process_hears_a_flag_that_one_has_set(results: list[dict[str, Any]]) -> None:
    assert [each["flags"] for each in results] == [[False, True, True, True]] * WORLD


def test_processes_know_their_place_and_wait_for_each_other(results: list[dict[str, Any]]) -> None:
    assert [each["place"] for each in results] == [(0, WORLD), (1, WORLD)]
    assert all(each["waited"] for each in results)


def test_without_a_process_group_there_is_one_process() -> None:
    tensor = torch.ones(2, 3, requires_grad=True)
    assert gather(tensor) is tensor
    assert (rank(), world_size()) == (0, 1)
    assert any_true(True)
    assert not any_true(False)
    barrier()


if __name__ == "__main__":
    work(*sys.argv[1:])
