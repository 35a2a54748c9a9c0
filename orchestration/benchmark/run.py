"""``espalier benchmark`` from its options to its report, its files and its MLflow run."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from orchestration.benchmark.measure import measure
from orchestration.benchmark.models import load_variants
from orchestration.benchmark.options import BenchmarkOptions
from orchestration.benchmark.plot import accuracy_over_latency, figure
from orchestration.benchmark.report import Report
from orchestration.commands.output import forget_killed
from orchestration.commands.progress import Bars
from orchestration.tracking.check import check_uri
from orchestration.tracking.server import tracking_folder
from orchestration.tracking.tracker import Tracker, server_for
from pruners.errors import InputError, first_line
from trainers.engines.machine import describe_machine
from trainers.storage import as_json

EXPERIMENT = "espalier-benchmarks"


def run(options: BenchmarkOptions) -> Report:
    """Measure, write the requested files, and log the benchmark.

    Raises:
        InputError: models, images or engines that cannot be used, or a file that cannot be written.
    """
    if options.mlflow and options.tracking_uri is not None:
        check_uri(options.tracking_uri)
    machine = describe_machine()
    models, calibration, columns = options.models, options.calibration, options.columns
    with load_variants(
        models, calibration, options.tracking_uri, options.storage, columns=columns
    ) as variants:
        named = ", ".join(variant.name for variant in variants)
        with Bars(heading=f"{named}: on {', '.join(map(str, options.choices))}") as bars:
            rows = measure(variants, options, bars)
        size = variants[0].parameters
        same = frozenset(variant.name for variant in variants if variant.parameters == size is not None)
    report = Report(
        rows,
        options.hardware,
        options.repetitions,
        options.tolerated,
        None if options.data is None else PurePath(options.data).name,
        same,
        machine,
        round(os.getloadavg()[0], 2),
    )
    if options.json is not None:
        _write("--json", options.json, as_json(report.as_json(), sort_keys=False).encode())
    if options.plot is not None:
        _write("--plot", options.plot, accuracy_over_latency(report))
    if options.mlflow:
        log(report, options)
    return report


def log(report: Report, options: BenchmarkOptions) -> None:
    """Log a run to :data:`EXPERIMENT`: figures by model, engine and batch size, the table and the picture.

    Raises:
        InputError: a server that does not answer.
    """
    folder = tracking_folder(options.storage)
    with server_for(options.tracking_uri, folder) as (uri, ready):
        ready()
        tracker = Tracker(uri, EXPERIMENT)
        machine = report.machine
        params = {
            "threads": report.hardware.threads,
            "device": report.hardware.device,
            "processor": machine["processor"],
            "rounds": report.rounds,
            "images": report.images or "none",
        }
        run = tracker.start(" ".join(dict.fromkeys(row.model for row in report.rows)), None, params, {})
        points: dict[str, list[tuple[int, float]]] = {}
        for row in report.rows:
            name = f"{row.model}/{row.choice.engine.replace(':', '-')}-{row.choice.kind}"
            if row.timed:
                points.setdefault(f"{name}/milliseconds", []).append((row.batch, 1e3 * row.latency))
                points.setdefault(f"{name}/images_per_second", []).append((row.batch, row.throughput))
                if row.top1 is not None:
                    points.setdefault(f"{name}/top1", [(row.batch, row.top1)])
        tracker.metrics(run, points)
        tracker.table(run, report.as_json(), "benchmark.json")
        if any(row.top1 is not None for row in report.rows):
            tracker.figure(run, figure(report), "accuracy_over_latency")
        tracker.finish(run)
        tracker.close("FINISHED")


def _write(key: str, path_text: str, content: bytes) -> None:
    path = Path(path_text).expanduser()
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
        forget_killed(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        expected = f"cannot be written ({error.strerror or first_line(error)})"
        raise InputError(key, path_text, expected) from None
