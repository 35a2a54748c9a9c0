"""A row of a sweep's results."""

from __future__ import annotations

from orchestration.sweep.report import Row

ROW = Row(
    method="ovit",
    allocation="own",
    part="test",
    dense=0.9,
    one_shot=None,
    recovered=0.9,
    validation=0.9,
    sparsity=0.75,
    parameters=2,
    parameters_sparse=1,
    macs=2,
    macs_sparse=1,
    bytes=1,
    checkpoint="file:///runs/recovered",
    run="",
    version="1",
)
