"""``espalier benchmark``: models on engines, measured on this machine."""

from __future__ import annotations

import sys
from typing import Any

import click

from orchestration.cli import options
from orchestration.cli.export import of_registry
from orchestration.common import defaults
from orchestration.common.environment import INTERRUPTED


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--engines",
    metavar="ENGINE[:TYPE],…",
    help="torch, compile (both: float32, bfloat16), csr (float32), onnxruntime (float32, int8), openvino "
    "(float32, bfloat16, int8, int8-bfloat16), sparse (float32, int8), 2:4 (bfloat16, float16; CUDA). "
    "Default: all that are found, "
    "in their first type.",
)
@click.option("--batch", default=defaults.BATCHES, show_default=True, help="Images at once.")
@click.option("--data", metavar="PARQUET", help="Test images: each engine's accuracy is measured on them.")
@click.option(
    "--calibration", metavar="PARQUET", help="Training images, for openvino:int8; onnxruntime:int8 too."
)
@click.option("--images", type=click.IntRange(min=1), help="Only so many of the test images.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Of each engine. Default: as many as processors may be used.",
)
@click.option(
    "--repetitions",
    default=defaults.REPETITIONS,
    show_default=True,
    type=click.IntRange(min=3),
    help="Rounds in turns.",
)
@click.option(
    "--loss",
    default=defaults.LOSS,
    show_default=True,
    help="Of the first model's accuracy, for the recommendation.",
)
@click.option(
    "--device", default=defaults.BENCHMARK_DEVICE, show_default=True, help="Or cuda: torch, compile and 2:4."
)
@click.option("--json", metavar="FILE", help="Write all figures there, with machine and versions.")
@click.option("--plot", metavar="FILE", help="Accuracy against latency as a picture; needs --data.")
@click.option("--mlflow", is_flag=True, help="Log it as a run of the experiment espalier-benchmarks.")
@options.columns
@of_registry
def benchmark(**typed: Any) -> None:
    """Latency, throughput, memory, size and accuracy of each MODEL on each engine, on this machine.

    MODEL is a checkpoint folder, hf-hub:NAME, models:/NAME@alias, or a folder that 'espalier export' wrote.
    The first one is what the others are compared with. Status 1: an engine failed or gave wrong answers.
    """
    from orchestration.benchmark.options import BenchmarkOptions
    from orchestration.common.terminal import output_console

    options = BenchmarkOptions(**typed)
    options.check()
    try:
        from orchestration.benchmark.run import run

        report = run(options)
    except KeyboardInterrupt:
        from orchestration.commands.progress import leave

        leave(INTERRUPTED)
    output_console(150).print(report.table())
    for line in (*report.notes(), *report.recommendations()):
        click.echo(line)
    if not report.right:
        sys.exit(1)


COMMANDS = (benchmark,)
