"""The comparison as one HTML page, which needs neither espalier nor the storage nor a network."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from orchestration.common.redaction import strip_paths
from orchestration.reporting import plots
from orchestration.reporting.compare import HEADINGS, Compared, differences
from pruners.errors import InputError

Points = dict[str, list[tuple[float, float]]]

_SHOWN = 40  # trials of an allocation search; with more its picture is too wide


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI, and its description in words."""

    image: str
    description: str


def write(sweeps: Sequence[Compared], target: Path) -> None:
    """Write the page.

    Raises:
        InputError: the file cannot be written.
    """
    text = page(sweeps)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("target", str(target), f"cannot be written ({error.strerror})") from None


def page(sweeps: Sequence[Compared]) -> str:
    """The page's HTML; it needs nothing else, and shows nothing of this machine."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestration.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: strip_paths(value) if type(value) is str else value,
    )
    return environment.get_template("compare.html").render(
        sweeps=sweeps,
        headings=HEADINGS,
        pictures=list(_of_all(sweeps)),
        phases={sweep.name: list(_of_phases(sweep)) for sweep in sweeps},
        differences=differences(sweeps),
    )


def _of_all(sweeps: Sequence[Compared]) -> Iterator[Picture]:
    """The final models by sparsity, then every finished trial by its cost."""
    prefix = {sweep.name: f"{sweep.name}: " if len(sweeps) > 1 else "" for sweep in sweeps}
    final: Points = defaultdict(list)
    trials: Points = defaultdict(list)
    dense: dict[str, float] = {}
    for sweep in sweeps:
        for model in sweep.models:
            for kind, top1 in (("one shot", model.one_shot), ("recovered", model.recovered)):
                if top1 is not None:
                    final[f"{prefix[sweep.name]}{model.method}, {kind}"].append((model.sparsity, top1))
            if model.dense is not None:
                dense[f"{prefix[sweep.name]}dense"] = model.dense
        for search in sweep.searches:
            kind = "one shot" if search.kind == "allocation" else "recovered"
            trials[f"{prefix[sweep.name]}{search.method}, {kind}"] += [
                (trial.metrics["macs_sparse"], trial.metrics["val_top1"])
                for trial in search.finished
                if "macs_sparse" in trial.metrics
            ]
    if len(dense) == len(sweeps) and len(set(dense.values())) == 1:
        dense = {"dense": next(iter(dense.values()))}
    parts = sorted({model.part for sweep in sweeps for model in sweep.models})
    figure = plots.accuracy_over_sparsity(final, dense, " or ".join(parts))
    yield _picture(figure, "Accuracy of the final models against sparsity")
    if any(trials.values()):
        yield _picture(plots.pareto(trials), "Accuracy of all finished trials against multiply-accumulates")


def _of_phases(sweep: Compared) -> Iterator[Picture]:
    for search in sweep.searches:
        if sum("val_top1" in trial.metrics for trial in search.trials) > 1:
            figure = plots.trial_history(search.trials, search.title, sweep.dense)
            yield _picture(figure, f"{search.title}: accuracy of each trial in its order")
        if sum("shares" in trial.metrics for trial in search.finished) > 1:
            figure = plots.allocations(search.finished, search.title, most=_SHOWN)
            yield _picture(figure, f"{search.title}: sparsity of stages and modules, best trials to the left")


def _picture(figure: Figure, description: str) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}", description)
