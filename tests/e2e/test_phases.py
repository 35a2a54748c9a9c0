"""A sweep by phases: ended early, begun late, with two objectives and a long run."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
from commands import SMALL, Command, espalier, run

from orchestration.recipe.search import Pareto
from orchestration.search.pareto import chosen, front
from orchestration.state.trial_log import TrialLog

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1200)]

SWEEP = (
    "sweep",
    str(SMALL),
    "name=phases",
    "pruning.methods=[lamp]",
    "allocation.trials=8",
    "allocation.sampler=nsga2",
    "allocation.pareto={against: size, between: [0.55, 0.8], tolerance: 0.05}",
    "schedule.trials=2",
    "long_run={recovery.epochs: 4}",
    "resources.workers=1",
    "resources.long_run={workers: 2}",
)


def known(command: Command) -> int:
    """Phases that had nothing to do."""
    return command.err.count("known, ") + command.err.count("      reused, ")


def rows(command: Command) -> list[list[str]]:
    """The cells of the table that a sweep ends with."""
    lines = [line for line in command.out.splitlines() if "│ lamp" in line]
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]


def test_phases__phase_by_phase(tmp_path: Path) -> None:
    with espalier(*SWEEP, "--from", "schedule", cwd=tmp_path) as command:
        assert command.wait() == 2, command.err
        assert "--from = 'schedule'" in command.err
        assert "run that first, by --until dense" in command.err

    until = run(*SWEEP, "--until", "allocation", cwd=tmp_path)
    assert "done until allocation; to go on: espalier resume phases" in until.out
    root = tmp_path / "runs" / "sweeps" / "phases"
    assert not list(root.glob("schedule-*"))
    (trials_file,) = root.glob("allocation-lamp-*/trials.json")
    log = TrialLog(str(trials_file))
    sparsities = [trial.metrics["sparsity"] for trial in log.ended]
    assert len(sparsities) == 8
    assert len(set(sparsities)) > 2
    assert all(0.55 - 1e-4 <= one <= 0.8 + 1e-4 for one in sparsities)
    rule = Pareto.model_validate({"against": "size", "between": [0.55, 0.8], "tolerance": 0.05})
    best = chosen(log.trials, rule)
    assert best in front(log.trials, "parameters_sparse")

    whole = run(*SWEEP, "--from", "schedule", cwd=tmp_path)
    assert known(whole) == 2  # the dense model and the allocations
    assert TrialLog(str(trials_file)).trials == log.trials
    (schedule,) = root.glob("schedule-lamp-*/trials.json")
    (long_run,) = root.glob("long_run-lamp-*/trials.json")
    searched, final = TrialLog(str(schedule)), TrialLog(str(long_run))
    (last,) = final.trials
    assert last.metrics["epoch"] == 4
    assert abs(last.metrics["sparsity"] - best.metrics["sparsity"]) < 1e-4
    assert {trial.metrics["epoch"] for trial in searched.ended if trial.state == "finished"} == {3}

    for trial in searched.ended:
        if trial.state == "finished":
            assert trial.metrics["sparsity"] == pytest.approx(best.metrics["sparsity"], abs=1e-4)
    ((_, allocation, _, one_shot, recovered, sparsity, *_),) = rows(whole)
    assert allocation in ("own", "searched")
    assert sparsity == f"{100 * best.metrics['sparsity']:.2f} %"
    assert one_shot.endswith(" %")  # of the model that the search chose: the row is of its sparsity
    assert recovered.endswith(" %")

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db")
    (version,) = client.search_model_versions("name='espalier-phases'")  # of the long run alone
    assert version.run_id == last.run_id
    params = client.get_run(str(last.run_id)).data.params
    peak = searched.best().values["recovery.lr.peak"]
    assert float(params["recovery.lr.peak"]) == pytest.approx(peak)
    record = json.loads((long_run.parent / "recovered" / "pruning.json").read_text())
    assert record["sparsity"] == pytest.approx(best.metrics["sparsity"], abs=1e-4)

    again = run(*SWEEP, cwd=tmp_path)
    assert known(again) == 4
    assert [line for line in again.out.splitlines() if "│ lamp" in line] == [
        line for line in whole.out.splitlines() if "│ lamp" in line
    ]


FASTEST = (
    "sweep",
    str(SMALL),
    "name=fastest",
    "pruning.methods=[lamp]",
    "allocation={trials: 6, objective: latency, loss: 1.0, between: [0.55, 0.9], sampler: nsga2}",
    "resources.workers=1",
    "--until",
    "allocation",
)


def test_phases__the_fastest_by_a_table_of_this_machine(tmp_path: Path) -> None:
    """Any loss will do here, so that the fastest of all is taken; a second sweep reads the same table."""
    first = run(*FASTEST, cwd=tmp_path)
    assert "measured: csr:float32 (batch 1, threads 1): " in first.err
    (trials_file,) = (tmp_path / "runs/sweeps/fastest").glob("allocation-lamp-*/trials.json")
    log = TrialLog(str(trials_file))
    times = [trial.metrics["latency"] for trial in log.ended]
    assert len(times) == 6
    assert min(times) > 0
    assert {trial.metrics["dense_top1"] for trial in log.ended} == {log.ended[0].metrics["dense_top1"]}
    record = json.loads((trials_file.parent / "one-shot" / "pruning.json").read_text())
    fastest = min(log.ended, key=lambda trial: trial.metrics["latency"])
    assert record["sparsity"] == pytest.approx(fastest.metrics["sparsity"])
    (table,) = (tmp_path / "runs/latency").iterdir()
    known = table.read_bytes()
    again = run(*FASTEST, "--as", "again", cwd=tmp_path)
    assert "known: csr:float32 (batch 1, threads 1): " in again.err
    assert table.read_bytes() == known


SOLVED = (
    "sweep",
    str(SMALL),
    "name=solved",
    "pruning.methods=[ovit]",
    "pruning.fisher.rounds=[0.5, 0.75]",
    "pruning.reconstruct=32",
    "allocation={trials: 3, reconstruct: 16}",
    "schedule={trials: 1, space: {}}",
    "resources.workers=1",
)


def test_phases__one_shot_in_rounds_and_solved_again(tmp_path: Path) -> None:
    """Each round has an order of its own, the model between them is kept, the best one is solved again."""
    until = run(*SOLVED, "--until", "allocation", cwd=tmp_path)
    assert "elimination of round 2 of 2, to 75 %" in until.err
    assert "once its weights are solved again" in until.err
    storage = tmp_path / "runs"
    assert len(list(storage.glob("orders/*/facts.json"))) == 2
    (between,) = storage.glob("rounds/*/pruning.json")
    assert json.loads(between.read_text())["sparsity"] == pytest.approx(0.5, abs=1e-3)
    (record,) = storage.glob("sweeps/solved/allocation-ovit-*/one-shot/pruning.json")
    content = json.loads(record.read_text())
    assert content["reconstruction"] == {"images": 32}
    assert content["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert f"{100 * content['figures']['val_top1']:.2f} % once" in until.err

    whole = run(*SOLVED, cwd=tmp_path)  # gradual runs, whose pruning steps have both too
    assert known(whole) == 2
    (log,) = storage.glob("sweeps/solved/schedule-ovit-*/trials.json")
    (trial,) = TrialLog(str(log)).ended
    assert trial.metrics["sparsity"] == pytest.approx(0.75, abs=1e-3)
    again = run(*SOLVED, "--as", "other", "--until", "allocation", cwd=tmp_path)
    assert "elimination" not in again.err  # all orders are there
