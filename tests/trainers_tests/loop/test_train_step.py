"""An optimizer step never waits for the device: nothing in it reads a value back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import make_files, make_job

from pruners.model.masks import MaskSet
from trainers.loop.session import Session
from trainers.loop.train_step import train_step

MEANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lamb, accumulation": {"optimizer": "lamb", "accumulate": 2},
    "sgd, no clipping": {"optimizer": "sgd", "clip_grad": None},
    "deit": {"preset": "deit", "drop_path": 0.1},
    "distillation": {"distill": {"kind": "hard"}},
}


@pytest.fixture
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Session:
    """On torch's meta device tensors have no values: reading one back raises an error."""
    job = make_job(make_files(tmp_path), MEANS[request.param], {})
    session = Session.open(job, torch.device("meta"))
    session.pruned(MaskSet.dense(session.model, session.layers))
    return session


@pytest.mark.parametrize("session", MEANS, indirect=True)
def test_train_step__a_step_reads_nothing_back(session: Session) -> None:
    session.step = 1  # every tenth step looks whether the loss is finite
    for batch in session.train:
        train_step(session, batch)
        session.step += 1
    assert session.step == 8
    assert len(session.metrics.rates) == 7


@pytest.mark.parametrize("session", ["plain"], indirect=True)
def test_train_step__the_device_without_values_notices_a_read(session: Session) -> None:
    batch = next(iter(session.train))
    with pytest.raises(RuntimeError, match="meta"):
        train_step(session, batch)  # step 0: it looks whether the loss is finite
