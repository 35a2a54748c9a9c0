"""What people have: WebDataset tars, folders of every shape, ILSVRC's flat validation images."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from image_tables import png

from pruners.errors import InputError
from trainers.sources.classes import names_of
from trainers.sources.convert import convert, plan
from trainers.sources.folders import SourceOptions, class_folders, images_below, labelled_folder, natural_key
from trainers.sources.webdataset import read_tar, stem

Files = list[tuple[str, bytes]]


def tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode: Any = f"w:{path.suffix[1:].replace('tgz', 'gz')}" if path.suffix != ".tar" else "w"
    with tarfile.open(path, mode) as made:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return path


def rows(path: Path, **reading: Any) -> list[tuple[str, int]]:
    labelled = list(read_tar(path, SourceOptions(**reading)))
    return [("", -1) if sample is None else (sample.name, sample.label) for sample in labelled]


def described(label: object) -> bytes:
    return json.dumps({"label": label, "class_name": "x"}).encode()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # timm's own: image, label and description, in any order
        ([("a.jpg", b"1"), ("a.cls", b"3"), ("a.json", b"{}"), ("b.jpg", b"2"), ("b.cls", b"4\n")], [3, 4]),
        ([("a.json", described(7)), ("a.jpg", b"1"), ("b.json", described(8)), ("b.jpg", b"2")], [7, 8]),
        ([("a.json", b"5"), ("a.PNG", b"1")], [5]),
        ([("a.JPEG", b"1"), ("a.CLS", b"3"), ("b.webp", b"1"), ("b.cls", b"0")], [3, 0]),
        (
            [("a.input.jpg", b"1"), ("a.target.cls", b"3"), ("b.input.jpg", b"1"), ("b.target.cls", b"4")],
            [3, 4],
        ),
        ([("a.input.jpg", b"1"), ("a.mask.png", b"2"), ("a.cls", b"3")], [3]),
        # the stem ends at its first dot, and folders are part of it
        ([("x/a.v1.jpg", b"1"), ("x/a.v1.cls", b"3"), ("y/a.v1.jpg", b"1"), ("y/a.v1.cls", b"4")], [3, 4]),
        (
            [("._a.jpg", b"0"), ("a.jpg", b"1"), ("._a.cls", b"0"), ("a.cls", b"3"), ("__MACOSX/b.jpg", b"")],
            [3],
        ),
        (
            [
                ("./a.jpg", b"1"),
                ("./a.cls", b"3"),
                ("LICENSE", b""),
                ("info.txt", b"x"),
                ("_info.json", b"{}"),
            ],
            [3],
        ),
    ],
)
def test_convert__samples(files: Files, expected: list[int], tmp_path: Path) -> None:
    labelled = rows(tar(tmp_path / "a.tar", files))
    assert [label for _, label in labelled] == expected
    assert labelled[0][0].startswith("a.")


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.xz"])
def test_convert__packed_tars(ending: str, tmp_path: Path) -> None:
    files = [("a.jpg", np.random.default_rng(0).bytes(5000)), ("a.cls", b"3")]
    path = tar(tmp_path / f"train-0.{ending}", files + [(f"b{name[1:]}", content) for name, content in files])
    assert rows(path) == [("a.jpg", 3), ("b.jpg", 3)]
    assert stem(path) == "train-0"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="must be a readable tar"):
        rows(path)


def test_convert__a_cut_or_damaged_tar_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    """Python's tarfile ends at any header that it cannot read, without a word."""
    path = tar(tmp_path / "a.tar", [(f"{n}.{kind}", b"1") for n in range(3) for kind in ("jpg", "cls")])
    whole, second = path.read_bytes(), 4 * 512  # a header and a block of content for each file
    damaged = whole[:second] + bytes(range(256)) * 2 + whole[second + 512 :]
    for content in (whole[:second], whole[: second + 100], whole[: second + 600], damaged):
        path.write_bytes(content)
        with pytest.raises(InputError, match="must be a readable tar"):
            rows(path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.cls", b"0")],
            r"a has no image or no label.*it has jpg; .*skip",
        ),
        ([("a.cls", b"1")], "a has no image or no label"),
        ([("a.jpg", b"1"), ("a.cls", b"-1")], "a has no image or no label"),
        ([("a.jpg", b"1"), ("a.cls", b"cat")], "a has a label that is no number: 'cat'"),
        ([("a.jpg", b"1"), ("a.json", described(1.7))], "a label that is no number: 1.7"),
        ([("a.jpg", b"1"), ("a.json", b"{")], "a has a label that cannot be read"),
        ([("a.jpg", b"1"), ("a.png", b"1"), ("a.cls", b"0")], "a has several images: jpg, png"),
        ([("a.jpg", b"1"), ("a.JPG", b"1")], "a has two files .jpg"),
    ],
)
def test_convert__a_sample_that_cannot_be_used_is_named(files: Files, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        rows(tar(tmp_path / "a.tar", files))


def test_convert__unlabelled_samples_are_left_out_if_wanted(tmp_path: Path) -> None:
    files = [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.cls", b"1"), ("c.jpg", b"3"), ("c.cls", b"-1")]
    path = tar(tmp_path / "a.tar", files)
    assert rows(path, unlabelled="skip") == [("", -1), ("b.jpg", 1), ("", -1)]
    for _ in range(2):  # also of a shard that was there
        (shard,) = convert(plan(path, SourceOptions(unlabelled="skip")), tmp_path / "out", 1)
        assert (shard.images, shard.skipped) == (1, 2)


def test_convert__labels_of_tars_by_a_class_map(tmp_path: Path) -> None:
    files = [("a.jpg", b"1"), ("a.cls", b"cat"), ("b.jpg", b"1"), ("b.cls", b"1")]
    path = tar(tmp_path / "a.tar", files)
    assert [label for _, label in rows(path, classes=("ant", "bee", "cat"))] == [2, 1]
    with pytest.raises(InputError, match="label 1 lies outside 0…0"):
        rows(path, classes=("cat",))
    assert [label for _, label in rows(tar(tmp_path / "b.tar", files[2:]), first=1)] == [0]


def test_convert__tars_of_several_parts_are_told_apart(tmp_path: Path) -> None:
    for name in ("set-train-00", "set-train-01", "set-validation-00"):
        tar(tmp_path / f"{name}.tar", [("a.jpg", b"1"), ("a.cls", b"3")])
    with pytest.raises(InputError, match=r"several parts: train .*validation .*by a glob"):
        plan(tmp_path)
    made = plan(Path(f"{tmp_path}/set-train-*.tar"))
    assert [shard.name for shard in made.shards] == ["set-train-00.parquet", "set-train-01.parquet"]


def images(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(len(path)))
    return root


def test_convert__what_a_system_leaves_is_no_class_and_no_image(tmp_path: Path) -> None:
    root = images(tmp_path / "x", "ant/a.png", "ant/@eaDir/thumb.jpg", "ant/._a.png", "bee/b.png")
    images(root, ".ipynb_checkpoints/b.png", "__MACOSX/ant/a.png", "@eaDir/x.jpg", "bee/.trash/c.png")
    classes, labelled, notes = class_folders(root, SourceOptions())
    assert classes == ("ant", "bee")
    assert [(path.relative_to(root).as_posix(), label) for path, label in labelled] == [
        ("ant/a.png", 0),
        ("bee/b.png", 1),
    ]
    assert not notes
    (root / "bee" / "loop").symlink_to(root / "bee")
    (root / "bee" / "more").symlink_to(images(tmp_path / "y", "d.png"))
    assert [path.name for path in images_below(root / "bee")] == ["b.png", "d.png"]


def test_convert__numbered_folders_are_sorted_as_torchvision_s_unless_timm_s_are_wanted(
    tmp_path: Path,
) -> None:
    from timm.utils.misc import natural_key as timms
    from torchvision.datasets import ImageFolder

    names = [str(number) for number in range(12)]
    root = images(tmp_path, *(f"{name}/a.png" for name in names))
    classes, _, notes = class_folders(root, SourceOptions())
    assert list(classes) == ImageFolder(str(root)).classes
    assert notes == [
        "label 2 is '10', as in torchvision; timm would take '2' "
        "(order: timm; order: torchvision says that this is meant)"
    ]
    assert class_folders(root, SourceOptions(order="torchvision"))[2] == []
    assert class_folders(root, SourceOptions(order="timm"))[0] == tuple(names)
    mixed = ["b10", "B2", "a", "C"]
    assert sorted(mixed, key=natural_key) == sorted(mixed, key=timms)


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (("train/a/x.png", "val/a/x.png"), "holds train and val, which are parts and no classes"),
        (("train/a/x.png", "train/b/x.png"), "holds train, which are parts"),
        (("images/a/x.png", "images/b/x.png"), "holds images alone, which holds folders"),
    ],
)
def test_convert__a_level_too_high(paths: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        plan(images(tmp_path, *paths))
    named = tuple(sorted({path.partition("/")[0] for path in paths}))
    assert plan(tmp_path, SourceOptions(classes=named)).classes == named  # it may be meant


def test_convert__one_class_map_for_all_parts(tmp_path: Path) -> None:
    """A part that lacks a class keeps the labels of the others."""
    part = images(tmp_path / "v", "ant/a.png", "cat/b.png")
    names = ("ant", "bee", "cat", "dog")
    (part / "dog").mkdir()
    made = plan(part, SourceOptions(classes=names))
    list(convert(made, tmp_path / "out", 1))
    assert [label for shard in made.shards for _, label in shard.files] == [0, 2]
    assert names_of(str(tmp_path / "out"), every=True) == names
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["cat"] == 2
    with pytest.raises(InputError, match="class folder 'cat' is not among the 1 given"):
        plan(part, SourceOptions(classes=("ant",)))


def flat(root: Path) -> Path:
    return images(root, *(f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)))


IDS = "1 n03\n2 n01\n3 n02\n"
KAGGLE = "ImageId,PredictionString\nILSVRC2012_val_00000003,n03 1 2 3 4\n"


@pytest.mark.parametrize(
    ("file", "content", "reading", "classes", "labels"),
    [
        ("labels.txt", "2\n0\n1\n", {}, (), [2, 0, 1]),
        ("labels.txt", "3\n1\n2\n", {"first": 1}, (), [2, 0, 1]),
        (
            "ILSVRC2012_validation_ground_truth.txt",
            "1\n2\n1\n",
            {"ids": IDS},
            ("n01", "n02", "n03"),
            [2, 0, 2],
        ),
        (
            "val.txt",
            "ILSVRC2012_val_00000002.JPEG 0\nILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000003.JPEG 1",
            {},
            (),
            [1, 0, 1],
        ),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nILSVRC2012_val_00000003,n00000007 1 2 3 4 n00000007 5 6 7 8\n"
            "ILSVRC2012_val_00000001,n00000009 1 2 3 4\nILSVRC2012_val_00000002,n00000008 1 2 3 4\n",
            {},
            ("n00000007", "n00000008", "n00000009"),
            [2, 1, 0],
        ),
        (
            "labels.csv",
            "id,breed\nILSVRC2012_val_00000001,golden retriever\nILSVRC2012_val_00000002,boxer 2\n"
            "ILSVRC2012_val_00000003,golden retriever\n",
            {},
            ("boxer 2", "golden retriever"),
            [1, 0, 1],
        ),
    ],
)
def test_convert__one_folder_and_a_file_of_labels(
    *,
    file: str,
    content: str,
    reading: dict[str, Any],
    classes: tuple[str, ...],
    labels: list[int],
    tmp_path: Path,
) -> None:
    (tmp_path / file).write_text(content)
    if "ids" in reading:
        (tmp_path / "ids.txt").write_text(reading["ids"])
        reading = reading | {"ids": tmp_path / "ids.txt"}
    names, labelled, _ = labelled_folder(
        flat(tmp_path / "val"), SourceOptions(labels=tmp_path / file, **reading)
    )
    assert names == classes
    assert [label for _, label in labelled] == labels


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("labels.txt", "3\n1\n2\n", "labels go from 1 to 3: say by first"),
        ("labels.txt", "1\n0\n", "holds 2 for 3 images"),
        ("ILSVRC2012_validation_ground_truth.txt", "1\n2\n3\n", r"meta\.mat by ids"),
        (
            "val.txt",
            "ILSVRC2012_val_00000009.JPEG 0\n",
            r"names ILSVRC2012_val_00000009\.JPEG, and there is no",
        ),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 0\n", r"no label for ILSVRC2012_val_00000002\.JPEG \(2 "),
        ("a.csv", "id,width,label2\nILSVRC2012_val_00000001,500,0\n", "must have two columns"),
    ],
)
def test_convert__a_file_of_labels_that_does_not_fit(
    file: str, content: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=says):
        plan(flat(tmp_path / "val"), SourceOptions(labels=tmp_path / file))


def test_convert__folders_by_ilsvrc_s_numbers(tmp_path: Path) -> None:
    """As its development kit counts, which is not the order of the sorted ids; inner nodes are no classes."""
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "U9"), ("num_children", "f8")]
    synsets = [(1, "n00000003", 0), (2, "n00000001", 0), (3, "n00000002", 0), (4, "n00000000", 3)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(synsets, kind)})
    root = images(tmp_path / "val", "1/a.png", "2/b.png", "3/c.png")
    classes, labelled, notes = class_folders(root, SourceOptions(ids=tmp_path / "meta.mat"))
    assert classes == ("n00000001", "n00000002", "n00000003")
    assert sorted((path.parent.name, label) for path, label in labelled) == [("1", 2), ("2", 0), ("3", 1)]
    assert not notes
    with pytest.raises(InputError, match="says of no class that it is '4'"):
        class_folders(images(root, "4/d.png"), SourceOptions(ids=tmp_path / "meta.mat"))


def test_convert__one_conversion_at_a_time(tmp_path: Path) -> None:
    """And what a killed one left, also of shards that there are none of any more, goes with the next."""
    made, out = plan(images(tmp_path / "x", "ant/a.png", "bee/b.png")), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(InputError, match="another conversion to it is at work"):
        list(convert(made, out, 1))
    list(convert(made, out, 1))
    (out / ".00007-of-00009.parquet.partial").write_bytes(b"half")
    list(convert(made, out, 1))
    assert sorted(path.name for path in out.iterdir()) == [
        "00000-of-00001.parquet",
        "classes.json",
        "conversion.json",
    ]
