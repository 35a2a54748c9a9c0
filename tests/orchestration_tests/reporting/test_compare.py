"""`espalier compare`: sweeps side by side, on the terminal and as a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from orchestration.cli.app import cli
from orchestration.common.redaction import strip_paths
from orchestration.recipe.loading import load_recipe
from orchestration.reporting import compare
from orchestration.reporting.compare_page import page
from orchestration.reporting.display import Display
from orchestration.state import heartbeat
from orchestration.state.stored_recipe import folder_of, store
from orchestration.state.trial_log import TrialLog, TrialRecord
from pruners.errors import InputError

COSTS = {"sparsity": 0.75, "parameters": 1_000_000, "parameters_sparse": 400_000, "macs": 9_000_000}


def trial(number: int, top1: float, **more: Any) -> TrialRecord:
    metrics = {**COSTS, "macs_sparse": 3_000_000 + number, "val_top1": top1, **more}
    return TrialRecord(number, {"stage.0": 0.5}, "finished", top1, metrics)


def row(method: str, **changes: Any) -> dict[str, Any]:
    figures = {"dense": 0.9, "one_shot": 0.7, "recovered": 0.88, "validation": 0.89, "macs_sparse": 3_000_000}
    rest = {"allocation": "searched", "part": "test", "bytes": 5_230_000, "version": "4", "kept": False}
    locations = {"checkpoint": "sweeps/x/recovered", "run": "http://127.0.0.1:5000/#/experiments/1/runs/a"}
    return {"method": method, **COSTS, **figures, **rest, **locations, **changes}


def sweep(
    runs: Path,
    name: str,
    *overrides: str,
    rows: list[dict[str, Any]] | None = None,
    gradual: bool = True,
    error: BaseException | None = None,
) -> None:
    """The folder of a sweep of one method that ran so far."""
    store(load_recipe("demo", [f"storage={runs}", f"name={name}", "pruning.methods=[ovit]", *overrides]))
    root = folder_of(str(runs), name)
    display = Display(Console(file=io.StringIO()))
    searches = {"allocation": TrialLog(f"{root}/allocation-ovit-a/trials.json", one_shot=True)}
    searches |= {"schedule": TrialLog(f"{root}/schedule-ovit-b/trials.json")} if gradual else {}
    for number in range(3):
        shares = {"stage.0": 0.5 + 0.01 * number, "module.QKV": 0.8}
        searches["allocation"].add(trial(number, 0.6 + 0.01 * number, shares=shares, allocation={"a": 5}))
    if gradual:
        for number in range(3):
            searches["schedule"].add(trial(number, 0.8 + 0.01 * number))
        why = "FileNotFoundError: [Errno 2] No such file: '/home/me/secret place/x.parquet'"
        searches["schedule"].add(TrialRecord(3, {}, "failed", None, error=why))
    try:
        with heartbeat.Heartbeat(str(runs), name, display, "/ray/session/logs"):
            for kind, log in searches.items():
                display.phase(f"ovit: {kind} search", trials=3, label=f"ovit-{kind}", log=log.uri)
                display.finished("done")
            if error is not None:
                raise error
    except type(error or KeyboardInterrupt()):
        pass
    if rows is not None:
        Path(root, "results.json").write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two sweeps: one finished, one interrupted in its schedule search."""
    data = "data={train: /data/mine/train.parquet, test: 's3://key:hunter2@bucket/test.parquet'}"
    sweep(tmp_path, "first", data, rows=[row("ovit"), row("ovit", sparsity=0.5, kept=True)])
    data = data.replace("/data/mine", "/data/yours")
    sweep(tmp_path, "second", data, "pruning.sparsity=0.75", "seed=3", error=KeyboardInterrupt())
    return tmp_path


def shown(runs: Path, *names: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(compare.tables(compare.read(str(runs), names)))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_compare__the_tables(runs: Path) -> None:
    lines = shown(runs, "first", "second", "first").splitlines()
    models = [cells(line) for line in lines if " M → " in line]
    assert [row[:2] for row in models] == [["first", "ovit"], ["", "ovit"], ["second", "ovit"]]
    assert models[0][2:8] == ["searched", "test", "90.00 %", "70.00 %", "88.00 %", "75.00 %"]
    assert models[0][8:] == ["1.00 M → 400.00 k", "9.00 M → 3.00 M", "5.23 MB", "4"]
    assert models[2][2:8] == ["–", "validation", "–", "62.00 %", "82.00 %", "75.00 %"]
    assert models[2][10:] == ["–", "–"]
    assert any(line.startswith("first: finished ") and line.strip()[-1].isdigit() for line in lines)
    assert any(
        line.startswith("second: interrupted ") and "has not come to its end" in line for line in lines
    )
    assert ["seed", "0", "3"] in [cells(line) for line in lines]
    assert any("second: ovit-schedule-003 failed: FileNotFoundError" in line for line in lines)


def test_compare__what_differs_shows_no_place_and_no_password(runs: Path) -> None:
    differing = compare.differences(compare.read(str(runs), ["first", "second"]))
    assert set(differing) == {"data.train", "seed"}
    assert all(re.fullmatch(r"train\.parquet \([0-9a-f]{4}\)", text) for text in differing["data.train"])
    assert len(set(differing["data.train"])) == 2
    assert compare.differences(compare.read(str(runs), ["first"])) == {}


def test_compare__a_sweep_that_has_only_one_shot_trials(tmp_path: Path) -> None:
    sweep(tmp_path, "early", gradual=False, error=RuntimeError("no trial ran to its end"))
    (compared,) = compare.read(str(tmp_path), ["early"])
    (model,) = compared.models
    assert (model.one_shot, model.recovered) == (0.62, None)
    assert compared.failures == ["no trial ran to its end"]
    assert "validation" in page([compared])


def test_compare__a_sweep_that_was_begun_again_says_so(tmp_path: Path) -> None:
    sweep(tmp_path, "again", rows=[row("ovit")], error=KeyboardInterrupt())
    assert "was begun again: the table is of its last end" in shown(tmp_path, "again")


def test_compare__a_sweep_of_before_is_read_by_its_results(tmp_path: Path) -> None:
    sweep(tmp_path, "old", rows=[row("ovit")])
    (tmp_path / "sweeps/old/state.json").unlink()
    assert "old: state not known" in shown(tmp_path, "old")


def test_compare__without_any_finished_trial_there_are_no_results(tmp_path: Path) -> None:
    store(load_recipe("demo", [f"storage={tmp_path}"]))
    with pytest.raises(InputError, match="has no results yet"):
        compare.read(str(tmp_path), ["demo"])


class Seen(HTMLParser):
    """What a page would fetch, run or link to, its pictures, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        if given.get("src", "").startswith("data:"):
            self.pictures.append((given["src"], given["alt"]))
        else:
            self.fetched += [
                value for key, value in given.items() if key in ("src", "href", "srcset", "data")
            ]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_compare__the_page_needs_nothing_and_tells_nothing_of_this_machine(runs: Path) -> None:
    result = CliRunner().invoke(
        cli, ["compare", "first", "second", "--storage", str(runs), "--html", str(runs / "page.html")]
    )
    assert (result.exit_code, result.exception) == (0, None)
    assert result.output == f"page: {runs}/page.html\n"
    text = (runs / "page.html").read_text(encoding="utf-8")
    seen = Seen(text)
    assert seen.fetched == []
    assert not {"script", "link", "iframe", "object", "base"} & set(seen.tags)
    assert "default-src 'none'" in text
    drawn = [base64.b64decode(image.partition(",")[2]).decode() for image, _ in seen.pictures]
    for content in (re.sub(r"data:image/svg\+xml;base64,[\w+/=]+", "", text), *drawn):
        content_only = re.sub(
            r'(xmlns(:\w+)?|xlink:href)="[^"]*"|<!DOCTYPE.*?>', "", content, flags=re.DOTALL
        )
        content_only = re.sub(r'rdf:\w+="[^"]*"', "", content_only)
        for secret in ("http:", "https:", "url(http", str(runs), "/home", "/data/", "hunter2", "127.0.0.1"):
            assert secret not in content_only, secret
    assert "FileNotFoundError" in seen.words
    # accuracy and cost of all; of each sweep a history and a heat map of one search, a history of the other
    assert len(seen.pictures) == 2 + 2 * (2 + 1)
    assert all(words for _, words in seen.pictures)


def test_compare__names_are_escaped(tmp_path: Path) -> None:
    sweep(tmp_path, "a", 'description="<script>alert(1)</script>"', rows=[row("<b>ovit")])
    text = page(compare.read(str(tmp_path), ["a"]))
    assert "<script>" not in text
    assert "<b>" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No such file: '/home/me/x.parquet'", "No such file: 'x.parquet'"),
        ('File "/a/b/c.py", line 3', 'File "c.py", line 3'),
        ("local-dir:/models/vit and ~/.cache/x", "local-dir:vit and x"),
        ("file:///a/b, s3://key:secret@bucket/a/b", "b, s3://bucket/a/b"),
        ("dimap/swin_t at 1/2, 3 / 4, https://host/a/b", "dimap/swin_t at 1/2, 3 / 4, https://host/a/b"),
        ("http://me:pass@host:5000/x", "http://host:5000/x"),
        ("s3://bucket/a@b, 's3://key:se@cret@bucket/a@b'", "s3://bucket/a@b, 's3://bucket/a@b'"),
        ("http://h:1,s3://key:secret@bucket/a", "http://h:1,s3://bucket/a"),
    ],
)
def test_compare__a_text_for_others(text: str, expected: str) -> None:
    assert strip_paths(text) == expected
