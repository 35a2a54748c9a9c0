"""Folders of images: one for each class, or one for all with a file of labels (ILSVRC's, Kaggle's)."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pruners.errors import InputError, first_line
from trainers.sources.classes import Names
from trainers.sources.files import PARTS

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
Order = Literal["torchvision", "timm"]
Labelled = list[tuple[Path, int]]
_KEY = "IMAGEFOLDER"
_SYSTEM = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__pycache__",
    }
)
_LABEL_COLUMNS = frozenset(
    {"label", "labels", "class", "class_name", "target", "category", "predictionstring"}
)
_SEPARATED = {".csv": ",", ".tsv": "\t"}
_BOX = re.compile(r"(n\d{8})(?:\s+\d+){4}")  # Kaggle's PredictionString: an id, and where the object is


@dataclass(frozen=True)
class Reading:
    """What a user said of a source that its files leave open.

    Attributes:
        classes: the names of the classes in the order of their labels; ``()``: by their sorted names.
        order: of names that torchvision and timm sort otherwise.
        labels: a file with a label for each image of a folder.
        ids: a file that says which class a number stands for.
        first: what the numbers of labels begin with; ``None``: 0, and nothing else is taken.
        unlabelled: samples without an image or a label end the conversion, or are left out.
    """

    classes: Names = ()
    order: Order | None = None
    labels: Path | None = None
    ids: Path | None = None
    first: int | None = None
    unlabelled: Literal["stop", "skip"] = "stop"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's own (``._a.jpg``, ``.ipynb_checkpoints``, ``@eaDir``)."""
    return name.startswith(".") or name.lower() in _SYSTEM


def images_below(folder: Path) -> list[Path]:
    """All images of a folder and those in it, sorted; links are followed, hidden folders are not entered."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [name for name in folders if not is_hidden(name)]
        if real not in seen:
            found += [Path(root, name) for name in files if _is_image(name)]
        seen.add(real)
    return sorted(found)


def _is_image(name: str) -> bool:
    return not is_hidden(name) and name.lower().endswith(EXTENSIONS)


def natural_key(name: str) -> list[int | str]:
    """How timm sorts the names of classes: 2 before 10, whatever the case."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def class_folders(source: Path, reading: Reading) -> tuple[Names, Labelled, list[str]]:
    """Classes, images with their labels, and what must be said, of a folder with a folder for each class.

    Raises:
        InputError: no such folder, or one that is meant otherwise.
    """
    given = str(source)
    folders = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if not folders:
        raise InputError(_KEY, given, "must hold a folder for each class, or .tar files")
    if not reading.classes:
        _check_level(source, folders)
    named = {folder: folder for folder in folders}
    if reading.ids is not None:
        numbers = _numbers(reading.ids)
        named = {folder: _of_number(folder, numbers, reading.ids) for folder in folders}
        classes = reading.classes or tuple(sorted(set(numbers.values())))
        said: list[str] = []
    else:
        classes, said = _ordered(folders, reading)
    labels = {name: label for label, name in enumerate(classes)}
    found: Labelled = []
    for folder in sorted(folders, key=lambda folder: labels.get(named[folder], -1)):
        if named[folder] not in labels:
            raise InputError(
                _KEY, given, f"class folder {folder!r} is not among the {len(classes)} given classes"
            )
        images = images_below(source / folder)
        if not images and not reading.classes:
            expected = f"class folder {folder!r} holds no image; delete it, or name all classes by --classes"
            raise InputError(_KEY, given, expected)
        found += [(path, labels[named[folder]]) for path in images]
    return classes, found, said


def _check_level(source: Path, folders: list[str]) -> None:
    """Folders of parts, or one around the classes, are no classes."""
    parts = [name for name in folders if name.lower() in PARTS]
    if len(parts) > 1 or parts == folders:
        which = " and ".join(parts)
        expected = (
            f"holds {which}, which are parts and no classes; convert each by itself ({source}/{parts[0]}), "
            "or name the classes by --classes"
        )
        raise InputError(_KEY, str(source), expected)
    if len(folders) == 1:
        inner = [entry for entry in (source / folders[0]).iterdir() if not is_hidden(entry.name)]
        if sum(entry.is_dir() for entry in inner) > 1 and not any(_is_image(entry.name) for entry in inner):
            expected = f"holds {folders[0]} alone, which holds folders; {source}/{folders[0]} is meant"
            raise InputError(_KEY, str(source), expected)


def _ordered(names: Sequence[str], reading: Reading) -> tuple[Names, list[str]]:
    """Classes in the order of their labels, and a remark where others would number them otherwise."""
    if reading.classes:
        return reading.classes, []
    ours, theirs = sorted(names), sorted(names, key=natural_key)
    if reading.order == "timm":
        return tuple(theirs), []
    if reading.order is None and ours != theirs:
        first = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
        order = f"label {first} is {ours[first]!r}, as in torchvision; timm would take {theirs[first]!r}"
        return tuple(ours), [f"{order} (--order timm; --order torchvision says that this is meant)"]
    return tuple(ours), []


def labelled_folder(source: Path, reading: Reading) -> tuple[Names, Labelled, list[str]]:
    """The same of one folder for all images, whose labels are in a file.

    The file holds a label a line, in the order of the images' names; or an image and its label a line, as
    text or CSV. A label is a number or a name.

    Raises:
        InputError: a file that does not fit the images.
    """
    assert reading.labels is not None, "the caller has seen it"
    images = images_below(source)
    given, shown = str(source), str(reading.labels)
    if not images:
        raise InputError(_KEY, given, "holds no image")
    pairs = dict(_pairs(reading.labels, images))
    missing = [path for path in images if path not in pairs]
    if missing and reading.unlabelled == "stop":
        name = missing[0].relative_to(source)
        raise InputError("--labels", shown, f"has no label for {name} ({len(missing):,} images have none)")
    said = [f"{len(missing):,} images without a label are left out"] if missing else []
    labelled = [path for path in images if path in pairs]
    classes = reading.classes
    if all(re.fullmatch(r"-?\d+", label) for label in pairs.values()):
        labels = [int(pairs[path]) for path in labelled]
        if reading.ids is None:
            return classes, list(zip(labelled, _counted(labels, reading), strict=True)), said
        numbers = _numbers(reading.ids)
        names = [_of_number(str(label), numbers, reading.ids) for label in labels]
        classes = classes or tuple(sorted(set(numbers.values())))
    else:
        names = [pairs[path] for path in labelled]
        classes, more = _ordered(sorted(set(names)), reading)
        said += more
    known = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise InputError("--labels", shown, f"{unknown!r} is not among the {len(classes)} given classes")
    return classes, [(path, known[name]) for path, name in zip(labelled, names, strict=True)], said


def _counted(labels: list[int], reading: Reading) -> list[int]:
    """Labels that count from 0."""
    shown, least, most = str(reading.labels), min(labels), max(labels)
    if "ilsvrc" in shown.lower() and "ground_truth" in shown.lower():
        expected = "counts as ILSVRC's development kit does, which is not the order of sorted class folders"
        raise InputError("--labels", shown, f"{expected}: give its meta.mat by --ids")
    return [checked_label(label, reading, "--labels", shown, (least, most)) for label in labels]


def checked_label(
    label: int, reading: Reading, key: str, value: str, ends: tuple[int, int] | None = None
) -> int:
    """A label as it counts from 0.

    Args:
        ends: the least and the largest of all labels, where they are known.

    Raises:
        InputError: it lies outside the classes, or it is not said what labels begin with.
    """
    if reading.first is None and ends is not None and ends[0] != 0:
        expected = (
            f"labels go from {ends[0]} to {ends[1]}: say by --first-label what they begin with (0 or 1)"
        )
        raise InputError(key, value, expected)
    found = label - (reading.first or 0)
    if found < 0 or (reading.classes and found >= len(reading.classes)):
        most = len(reading.classes) - 1 + (reading.first or 0) if reading.classes else ""
        raise InputError(key, value, f"label {label} lies outside {reading.first or 0}…{most}")
    return found


def _pairs(file: Path, images: list[Path]) -> Iterator[tuple[Path, str]]:
    """Images with what a file of labels says of each."""
    lines = [row for row in _rows(file) if row]
    if lines and all(len(row) == 1 for row in lines):
        if len(lines) != len(images):
            expected = f"must hold a line for each image; it holds {len(lines):,} for {len(images):,} images"
            raise InputError("--labels", str(file), expected)
        yield from zip(images, (row[0] for row in lines), strict=True)
        return
    by_name = {name: path for path in images for name in (path.stem, path.name)}
    if len({path.stem for path in images}) < len(images):
        raise InputError("--labels", str(file), "two images of the folder have the same name")
    place, lines = _label_column(file, lines, by_name)
    for row in lines:
        name = Path(row[0]).name
        if name not in by_name:
            raise InputError("--labels", str(file), f"names {row[0]}, and there is no such image")
        box = _BOX.match(row[place]) if len(row) > place else None
        yield by_name[name], box[1] if box else row[place].strip() if len(row) > place else ""


def _rows(file: Path) -> list[list[str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError("--labels", str(file), f"cannot be read ({reason})") from None
    separator = _SEPARATED.get(file.suffix.lower())
    if separator is not None:
        return list(csv.reader(text.splitlines(), delimiter=separator))
    return [line.split(maxsplit=1) for line in text.splitlines()]


def _label_column(file: Path, lines: list[list[str]], images: dict[str, Path]) -> tuple[int, list[list[str]]]:
    """Which column has the label, and the lines without their heading."""
    first, wide = lines[0], any(len(row) > 2 for row in lines)
    heading = file.suffix.lower() in _SEPARATED and Path(first[0]).name not in images
    named = [place for place, cell in enumerate(first) if cell.strip().lower() in _LABEL_COLUMNS and place]
    if wide and not (heading and len(named) == 1):
        raise InputError("--labels", str(file), "must have two columns, or one with the heading 'label'")
    return named[0] if heading and len(named) == 1 else 1, lines[heading:]


def _of_number(text: str, numbers: dict[int, str], file: Path) -> str:
    found = numbers.get(int(text)) if text.isdecimal() else None
    if found is None:
        raise InputError("--ids", str(file), f"says of no class that it is {text!r}")
    return found


def _numbers(file: Path) -> dict[int, str]:
    """Classes by their numbers: of ILSVRC's ``meta.mat``, or of a text with a number and a name a line."""
    try:
        if file.suffix.lower() == ".mat":
            from scipy.io import loadmat

            synsets = loadmat(file, squeeze_me=True)["synsets"]
            leaves = [one for one in synsets if int(one["num_children"]) == 0]
            return {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in leaves}
        pairs = [
            line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        return {int(number): name.strip() for number, name in pairs}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            "--ids", str(file), f"must be meta.mat, or numbers with names ({first_line(error)})"
        ) from None
