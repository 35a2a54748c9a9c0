"""Orders on the storage: made once, found by what they depend on, the same whoever made and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from image_tables import dense_folder, table, write
from orders import assert_same
from workers import start_workers

from orchestration.state.order_store import StoredOrder
from orchestration.sweep.tasks import order_facts
from pruners import create_pruner
from trainers import storage
from trainers.config.data import DataSettings
from trainers.config.jobs import OrderJob
from trainers.config.pruning import PruningSettings
from trainers.loop.elimination import round_of, write_order

FISHER = {"gradients": 6, "batch_size": 4, "block_size": 16, "damp": 1e-4}


def pruning(**changes: Any) -> PruningSettings:
    return PruningSettings.model_validate({"sparsity": 0.6, "fisher": FISHER, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dense model and its data, as jobs name them."""
    folder = tmp_path_factory.mktemp("files")
    train = write(folder / "train.parquet", table([i % 3 for i in range(40)]))
    return {
        "checkpoint": str(dense_folder(folder / "dense")),
        "data": DataSettings(train=train, holdout=0.2),
        "pruning": pruning(),
        "method": "ovit",
    }


def job(made: dict[str, Any], order: StoredOrder) -> OrderJob:
    return OrderJob(**made, folder=order.folder, fingerprint=order.fingerprint)


def stored_order(
    folder: Path, settings: PruningSettings, method: str = "ovit", **changes: Any
) -> StoredOrder:
    facts: dict[str, Any] = {"weights": "w", "data": "d", "seed": 0, **changes}
    return StoredOrder.of(str(folder), method, settings, **facts)


def test_order_store__an_order_is_found_by_what_decides_it(tmp_path: Path) -> None:
    known = stored_order(tmp_path, pruning()).fingerprint
    for same in (
        pruning(sparsity=0.8),
        pruning(floor=0.1),
        pruning(scope="layer"),
        pruning(schedule={"steps": 2}),
        pruning(fisher={**FISHER, "memory": "1GiB"}),
    ):
        assert stored_order(tmp_path, same).fingerprint == known
    for other in (
        pruning(fisher={**FISHER, "damp": 1e-5}),
        pruning(fisher={**FISHER, "batch_size": 5}),
        pruning(pattern="1x4"),
        pruning(ceiling=0.9),
        pruning(floor=0.5, sparsity=0.8),  # nothing below it is stored
        pruning(fisher={**FISHER, "damp": "auto"}),
    ):
        assert stored_order(tmp_path, other).fingerprint != known
    assert stored_order(tmp_path, pruning(), "woodfisher").fingerprint != known
    assert stored_order(tmp_path, pruning(), weights="v").fingerprint != known
    assert stored_order(tmp_path, pruning(), data="e").fingerprint != known
    assert stored_order(tmp_path, pruning(), seed=1).fingerprint != known


def test_order_store__weights_alone_decide_a_first_order_method(tmp_path: Path) -> None:
    known = stored_order(tmp_path, pruning(), "dimap").fingerprint
    assert stored_order(tmp_path, pruning(fisher={}), "dimap", data="e", seed=3).fingerprint == known


def test_order_store__lambda_is_tried_at_a_sparsity(tmp_path: Path) -> None:
    tried = {**FISHER, "damp": "auto"}
    orders = [stored_order(tmp_path, pruning(fisher=tried, sparsity=sparsity)) for sparsity in (0.5, 0.6)]
    assert orders[0].fingerprint != orders[1].fingerprint


def test_order_store__rounds_have_orders_of_their_own() -> None:
    settings = pruning(sparsity=0.8, fisher={**FISHER, "rounds": [0.5, 0.8]})
    pruner = create_pruner("ovit", **settings.options("ovit"))
    made, skipped = zip(*(round_of(settings, pruner, (0.5, 0.8), number) for number in (0, 1)), strict=True)
    assert [one.fisher.gradients for one in made] == [3, 3]
    assert [one.sparsity for one in made] == [0.5, 0.8]
    assert skipped == (0, 3)
    orders = [
        stored_order(Path("s"), one, weights=f"w{number}", skip=skip)
        for number, (one, skip) in enumerate(zip(made, skipped, strict=True))
    ]
    assert orders[0].fingerprint != orders[1].fingerprint
    # other gradients are another order, even of the same weights
    assert stored_order(Path("s"), made[1], weights="w0", skip=3).fingerprint != orders[0].fingerprint
    # the first round is a pruning with so many gradients
    alone = stored_order(Path("s"), pruning(fisher={**FISHER, "gradients": 3}), weights="w0")
    assert alone.fingerprint == orders[0].fingerprint


def order_as_worker(rank: int, world: int, folder: str, content: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        write_order(OrderJob.model_validate(content), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def test_order_store__parts_of_several_workers_are_one_order(made: dict[str, Any], tmp_path: Path) -> None:
    alone, shared = StoredOrder(str(tmp_path / "one"), "f"), StoredOrder(str(tmp_path / "two"), "f")
    assert not alone.known
    write_order(job(made, alone), torch.device("cpu"))
    arguments = (2, str(tmp_path), job(made, shared).model_dump(mode="json"))
    start_workers(order_as_worker, arguments, 2)
    assert (alone.facts["parts"], shared.facts["parts"]) == (1, 2)
    by_one, by_two = alone.open(), shared.open()
    assert set(by_one) == set(by_two)
    for name in by_one:
        assert torch.allclose(by_one[name].losses, by_two[name].losses, rtol=1e-3, atol=1e-9)
    own = order_facts(made["checkpoint"], made["pruning"], "ovit", alone, [0.5, 0.6]).own
    total = sum(len(order.losses) for order in by_one.values())
    assert [round(sum(own[sparsity].values()) / total, 3) for sparsity in (0.5, 0.6)] == [0.5, 0.6]


def test_order_store__an_order_elsewhere_is_copied_once(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    order = StoredOrder(str(tmp_path / "orders" / "f"), "f")
    write_order(job(made, order), torch.device("cpu"))
    near = order.open()
    monkeypatch.setattr(storage, "is_local", lambda uri: False)
    assert_same(near, order.open())
    (copied,) = (tmp_path / "cache" / "orders").glob("f")
    before = (copied / "part-0" / "order.safetensors").stat().st_mtime_ns
    assert_same(near, order.open())
    assert (copied / "part-0" / "order.safetensors").stat().st_mtime_ns == before
