"""What allocation trials of a tiny dense model share, its magnitudes ordered, without Ray."""

from __future__ import annotations

from pathlib import Path

import torch
from image_tables import table, write

from orchestration.recipe.search import AllocationSearch
from orchestration.search.one_shot_trial import OneShotInputs, OneShotTrial
from orchestration.search.space import AllocationSpace
from orchestration.state.order_store import StoredOrder
from orchestration.sweep.tasks import order_facts
from trainers.config.data import DataSettings
from trainers.config.jobs import OrderJob
from trainers.config.pruning import PruningSettings
from trainers.loop.elimination import write_order

SPARSITY = 0.6


def one_shot_inputs(dense: str, search: AllocationSearch, folder: Path) -> OneShotInputs:
    """Of 40 made-up images, 10 of them held out."""
    pruning = PruningSettings.model_validate({"sparsity": SPARSITY, "methods": ["magnitude"]})
    train = write(folder / "train.parquet", table([i % 3 for i in range(40)]))
    images = DataSettings(train=train, holdout=0.25)
    order = StoredOrder(str(folder / "order"), "f")
    given = {"checkpoint": dense, "data": images, "pruning": pruning, "method": "magnitude"}
    write_order(OrderJob(**given, folder=order.folder, fingerprint="f"), torch.device("cpu"))
    facts = order_facts(dense, pruning, "magnitude", order, [SPARSITY])
    space = AllocationSpace.of(search, pruning, facts.layers, facts.own[SPARSITY], facts.pruned)
    return OneShotInputs(dense, images, 0, search, space, order, facts.costs, dense)


def actor(inputs: OneShotInputs) -> OneShotTrial:
    """The actor of the method's own allocation (Tune's part of it starts loggers, and is left out)."""
    trial = OneShotTrial.__new__(OneShotTrial)
    trial.setup(inputs.space.own_values(), inputs)
    return trial
