"""``espalier data``: folders and tars into Parquet, and a look at what is there."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from commands import espalier as started
from image_tables import png, table, write
from pictures import BROKEN, PICTURES, cells

from orchestration.cli.app import cli
from pruners.errors import InputError
from trainers.data.arrow_store import Store
from trainers.sources.convert import convert, plan
from trainers.sources.parquet import read_table


def espalier(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestration.cli", "data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 3, 1 and 2 images, one of them deeper down, and what is no image."""
    root = tmp_path / "images"
    for file, number in (
        ("cat/a.png", 1),
        ("cat/b.PNG", 2),
        ("cat/deep/c.png", 3),
        ("ant/a.png", 4),
        ("dog/x.png", 5),
        ("dog/y.png", 6),
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(png(number))
    (root / "dog" / "notes.txt").write_text("no image")
    return root


def test_data__a_folder_of_class_folders(folder: Path, tmp_path: Path) -> None:
    done = espalier("convert", folder, tmp_path / "out", "--processes", 2)
    assert (done.returncode, done.stdout) == (0, f"6 images of 3 classes in 1 files in {tmp_path / 'out'}\n")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"ant": 0, "cat": 1, "dog": 2}
    store = Store.open(str(tmp_path / "out"))
    assert store.labels.tolist() == [0, 1, 1, 1, 2, 2]
    written = read_table(str(tmp_path / "out"))["image"].to_pylist()
    assert [image["path"] for image in written] == ["a.png", "a.png", "b.PNG", "c.png", "x.png", "y.png"]
    assert [store.cell(row) for row in (0, 3)] == [png(4), png(3)]  # to the byte
    features = json.loads(pq.read_schema(next((tmp_path / "out").glob("*.parquet"))).metadata[b"huggingface"])
    assert features["info"]["features"]["label"]["names"] == ["ant", "cat", "dog"]


def test_data__the_class_map_is_torchvision_s(folder: Path, tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    list(convert(plan(folder), tmp_path / "out", 1))
    assert (
        json.loads((tmp_path / "out" / "classes.json").read_text()) == ImageFolder(str(folder)).class_to_idx
    )


def test_data__it_goes_on_with_the_shards_that_are_missing(folder: Path, tmp_path: Path) -> None:
    conversion = plan(folder, shard_bytes=1500)
    assert len(conversion.shards) > 2
    made = {shard.name: shard.images for shard in convert(conversion, tmp_path / "out", 2)}
    assert sum(made.values()) == 6
    first, *others = sorted((tmp_path / "out").glob("*.parquet"))
    times = {path: path.stat().st_mtime_ns for path in others}
    before = first.read_bytes()
    first.unlink()
    (tmp_path / "out" / f".{first.name}.partial").write_text("broken off")
    assert {shard.name: shard.images for shard in convert(conversion, tmp_path / "out", 2)} == made
    assert first.read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in others} == times
    assert not list((tmp_path / "out").glob(".*partial"))


def test_data__tars(tmp_path: Path) -> None:
    """WebDataset: one Parquet file for each tar; a label in .cls or in .json."""
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"train-{number:04d}.tar", "w") as tar:
            for sample in range(3):
                label = {"cls": b"%d" % (10 * number + sample)}
                if sample == 2:
                    label = {"json": json.dumps({"label": 7}).encode()}
                for kind, content in {"png": png(sample), **label}.items():
                    member = tarfile.TarInfo(f"./n{sample:03d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    done = espalier("convert", tmp_path / "tars", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"6 images in 2 files in {tmp_path / 'out'}\n")
    store = Store.open(str(tmp_path / "out"))
    assert store.labels.tolist() == [0, 1, 7, 10, 11, 7]
    assert store.cell(1) == png(1)
    assert read_table(str(tmp_path / "out"))["image"][1].as_py() == {"bytes": png(1), "path": "n001.png"}


def tar_of(path: Path, number: int) -> None:
    with tarfile.open(path, "w") as tar:
        for kind, content in (("png", png(number)), ("cls", b"%d" % number)):
            member = tarfile.TarInfo(f"n.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_data__a_killed_conversion_leaves_no_workers(tmp_path: Path) -> None:
    """And no half shard once the same command has succeeded."""
    names = [f"train-{number}.tar" for number in range(2)]
    for name in names:
        os.mkfifo(tmp_path / name)  # its worker waits for what never comes
    typed = ("data", "convert", "train-*.tar", "out", "--processes", "2")
    with started(*typed, cwd=tmp_path) as killed:
        killed.until(lambda: len(list(tmp_path.glob("out/.*.partial"))) == 2, 120, "two workers at work")
        at_work = set(killed.family.look()) - {killed.process.pid}
        assert len(at_work) >= 2
        killed.process.kill()
        killed.process.wait(10)
        assert killed.left(20.0) == {}
    for number, name in enumerate(names):
        (tmp_path / name).unlink()
        tar_of(tmp_path / name, number)
    with started(*typed, cwd=tmp_path) as again:
        assert again.wait() == 0, again.err
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["conversion.json", "train-0.parquet", "train-1.parquet"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nowhere", "no such folder"),
        ("empty", "must hold a folder for each class"),
        ("no images", "class folder 'cat' holds no image"),
        ("a file", "must be a folder of class folders"),
        ("another conversion", "holds a conversion of something else"),
        ("other files", "must be an empty folder"),
        ("a broken tar", "must be a readable tar"),
        ("no label", "has no image or no label"),
    ],
)
def test_data__bad_input_is_one_line(what: str, says: str, folder: Path, tmp_path: Path) -> None:
    source, target = folder, tmp_path / "out"
    if what == "nowhere":
        source = tmp_path / "nowhere"
    elif what == "empty":
        source = tmp_path / "empty"
        source.mkdir()
    elif what == "no images":
        shutil.rmtree(folder / "cat")
        (folder / "cat").mkdir()
    elif what == "a file":
        source = tmp_path / "file"
        source.write_text("text")
    elif what == "another conversion":
        list(convert(plan(folder), target, 1))
        (folder / "cat" / "new.png").write_bytes(png(9))
    elif what == "other files":
        target.mkdir()
        (target / "mine.txt").write_text("keep")
    elif what == "a broken tar":
        source = tmp_path / "a.tar"
        source.write_bytes(b"no tar at all" * 100)
    elif what == "no label":
        source = tmp_path / "b.tar"
        with tarfile.open(source, "w") as tar:
            member = tarfile.TarInfo("n001.png")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    done = espalier("convert", source, target)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_data__a_check_counts_and_lists(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.parquet", table([0, 1, 1, 2], first=0), row_group_size=2)
    contents = [png(0), BROKEN, png(2), PICTURES["20 megapixels"][0]()]
    write(tmp_path / "d" / "b.parquet", cells(contents, [0, 1, None, 2]))
    (tmp_path / "d" / "c.parquet").write_bytes(b"truncated")
    done = espalier("check", tmp_path / "d", "--processes", 2)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("b.parquet, row 1: cannot be decoded")
    assert lines[1] == "b.parquet, row 2: has the label None"
    assert lines[2].startswith("c.parquet: cannot be read")
    assert lines[3:] == [
        "images:  8",
        "labels:  3 (0 to 2), 2 to 3 images each",
        "sizes:   16×16 to 5472×3648",
        "bad:     3",
    ]


def test_data__a_check_of_what_is_sound(folder: Path, tmp_path: Path) -> None:
    list(convert(plan(folder), tmp_path / "out", 1))
    done = espalier("check", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "bad:     0"
    assert espalier("check", tmp_path / "nowhere").returncode == 2


@pytest.mark.parametrize(
    ("labels", "options", "line"),
    [
        (
            "3 1 2",
            "",
            "--labels = 'labels.txt': labels go from 1 to 3: say by --first-label what they begin with",
        ),
        ("1 2", "", "--labels = 'labels.txt': must hold a line for each image; it holds 2 for 3 images"),
        (
            "cat cat bird",
            "--classes names.txt",
            "--labels = 'labels.txt': 'bird' is not among the 2 given classes",
        ),
        ("3 1 2", "--ids ids.txt", "--ids = 'ids.txt': says of no class that it is '3'"),
    ],
)
def test_data__an_error_names_the_option(
    labels: str, options: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flat").mkdir()
    for number in range(3):
        Path("flat", f"{number}.png").write_bytes(png(number))
    Path("labels.txt").write_text(labels.replace(" ", "\n"))
    Path("names.txt").write_text("cat\ndog\n")
    Path("ids.txt").write_text("1 x\n")
    result = CliRunner().invoke(
        cli, ["data", "convert", "flat", "out", "--labels", "labels.txt", *options.split()]
    )
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(line)


def test_data__an_error_of_the_source_names_the_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flat").mkdir()
    Path("other").mkdir()
    Path("other/mine.txt").write_text("keep")
    for name in ("2/a.png", "10/b.png"):
        Path("source", name).parent.mkdir(parents=True)
        Path("source", name).write_bytes(png(1))
    for command, line in (
        ("convert nowhere out", "IMAGEFOLDER = 'nowhere': no such folder"),
        ("convert source other", "OUT = 'other': must be an empty folder"),
        ("check nowhere", "PATH = 'nowhere': "),
    ):
        result = CliRunner().invoke(cli, ["data", *command.split()])
        assert str(result.exception).startswith(line), result.exception
    result = CliRunner().invoke(cli, ["data", "convert", "source", "out", "--processes", "1"])
    order = "(--order timm; --order torchvision says that this is meant)"
    assert result.output.splitlines()[0] == f"label 0 is '10', as in torchvision; timm would take '2' {order}"
