"""Folders of images: a folder for each class, or one folder with a file of labels (as ILSVRC, Kaggle)."""

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
_KEY = "source"
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
class SourceOptions:
    """Options for reading a source of images, where its files allow several readings.

    Attributes:
        classes: names of the classes in the order of their labels; ``()``: the sorted names.
        order: how names are sorted that torchvision and timm sort differently.
        labels: a file with a label for each image of a folder.
        ids: a file that maps numbers to classes.
        first: the number of the first class; ``None``: it must be 0.
        unlabelled: ``stop``: a sample without an image or a label ends the conversion; ``skip``: it is left
            out.
    """

    classes: Names = ()
    order: Order | None = None
    labels: Path | None = None
    ids: Path | None = None
    first: int | None = None
    unlabelled: Literal["stop", "skip"] = "stop"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is a system's own (``._a.jpg``, ``.ipynb_checkpoints``, ``@eaDir``)."""
    return name.startswith(".") or name.lower() in _SYSTEM


def images_below(folder: Path) -> list[Path]:
    """All images below a folder, sorted; links are followed, hidden folders are not entered."""
    paths, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [name for name in folders if not is_hidden(name)]
        if real not in seen:
            paths += [Path(root, name) for name in files if _is_image(name)]
        seen.add(real)
    return sorted(paths)


def _is_image(name: str) -> bool:
    return not is_hidden(name) and name.lower().endswith(EXTENSIONS)


def natural_key(name: str) -> list[int | str]:
    """Sort key by which timm orders the names of classes: 2 before 10, ignoring case."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def class_folders(source: Path, options: SourceOptions) -> tuple[Names, Labelled, list[str]]:
    """List the images of a source that has a folder for each class.

    Args:
        source: the folder that holds the class folders.
        options: how to read it.

    Returns:
        Names of the classes, images with their labels, and notes for the user.

    Raises:
        InputError: no such folder, a folder that is not among the given classes, or one without images.
    """
    given = str(source)
    folders = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if not folders:
        raise InputError(_KEY, given, "must hold a folder for each class, or .tar files")
    if not options.classes:
        _check_level(source, folders)
    named = {folder: folder for folder in folders}
    if options.ids is not None:
        numbers = _numbers(options.ids)
        named = {folder: _of_number(folder, numbers, options.ids) for folder in folders}
        classes = options.classes or tuple(sorted(set(numbers.values())))
        notes: list[str] = []
    else:
        classes, notes = _ordered(folders, options)
    labels = {name: label for label, name in enumerate(classes)}
    labelled: Labelled = []
    for folder in sorted(folders, key=lambda folder: labels.get(named[folder], -1)):
        if named[folder] not in labels:
            raise InputError(
                _KEY, given, f"class folder {folder!r} is not among the {len(classes)} given classes"
            )
        images = images_below(source / folder)
        if not images and not options.classes:
            expected = f"class folder {folder!r} holds no image; delete it, or name all classes by classes"
            raise InputError(_KEY, given, expected)
        labelled += [(path, labels[named[folder]]) for path in images]
    return classes, labelled, notes


def _check_level(source: Path, folders: list[str]) -> None:
    """Refuse folders that are splits (train, val), and a single folder that holds the class folders."""
    parts = [name for name in folders if name.lower() in PARTS]
    if len(parts) > 1 or parts == folders:
        which = " and ".join(parts)
        expected = (
            f"holds {which}, which are parts and no classes; convert each by itself ({source}/{parts[0]}), "
            "or name the classes by classes"
        )
        raise InputError(_KEY, str(source), expected)
    if len(folders) == 1:
        inner = [entry for entry in (source / folders[0]).iterdir() if not is_hidden(entry.name)]
        if sum(entry.is_dir() for entry in inner) > 1 and not any(_is_image(entry.name) for entry in inner):
            expected = f"holds {folders[0]} alone, which holds folders; {source}/{folders[0]} is meant"
            raise InputError(_KEY, str(source), expected)


def _ordered(names: Sequence[str], options: SourceOptions) -> tuple[Names, list[str]]:
    """Classes in the order of their labels, and a note where torchvision and timm order them differently."""
    if options.classes:
        return options.classes, []
    ours, theirs = sorted(names), sorted(names, key=natural_key)
    if options.order == "timm":
        return tuple(theirs), []
    if options.order is None and ours != theirs:
        first = next(i for i, (own, natural) in enumerate(zip(ours, theirs, strict=True)) if own != natural)
        order = f"label {first} is {ours[first]!r}, as in torchvision; timm would take {theirs[first]!r}"
        return tuple(ours), [f"{order} (order: timm; order: torchvision says that this is meant)"]
    return tuple(ours), []


def labelled_folder(source: Path, options: SourceOptions) -> tuple[Names, Labelled, list[str]]:
    """List the images of one folder whose labels are in a file.

    Each line of the file holds a label, in the order of the images' names, or an image and its label, as text
    or CSV. A label is a number or a name.

    Args:
        source: the folder of images.
        options: how to read it; ``options.labels`` is the file.

    Returns:
        Names of the classes, images with their labels, and notes for the user.

    Raises:
        InputError: a file that does not fit the images.
    """
    assert options.labels is not None, "only called with a file of labels"
    images = images_below(source)
    given, shown = str(source), str(options.labels)
    if not images:
        raise InputError(_KEY, given, "holds no image")
    pairs = dict(_pairs(options.labels, images))
    missing = [path for path in images if path not in pairs]
    if missing and options.unlabelled == "stop":
        name = missing[0].relative_to(source)
        raise InputError("labels", shown, f"has no label for {name} ({len(missing):,} images have none)")
    notes = [f"{len(missing):,} images without a label are left out"] if missing else []
    labelled = [path for path in images if path in pairs]
    classes = options.classes
    if all(re.fullmatch(r"-?\d+", label) for label in pairs.values()):
        labels = [int(pairs[path]) for path in labelled]
        if options.ids is None:
            return classes, list(zip(labelled, _counted(labels, options), strict=True)), notes
        numbers = _numbers(options.ids)
        names = [_of_number(str(label), numbers, options.ids) for label in labels]
        classes = classes or tuple(sorted(set(numbers.values())))
    else:
        names = [pairs[path] for path in labelled]
        classes, more = _ordered(sorted(set(names)), options)
        notes += more
    known = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise InputError("labels", shown, f"{unknown!r} is not among the {len(classes)} given classes")
    return classes, [(path, known[name]) for path, name in zip(labelled, names, strict=True)], notes


def _counted(labels: list[int], options: SourceOptions) -> list[int]:
    """Shift labels so that they count from 0."""
    shown, least, most = str(options.labels), min(labels), max(labels)
    if "ilsvrc" in shown.lower() and "ground_truth" in shown.lower():
        expected = "counts as ILSVRC's development kit does, which is not the order of sorted class folders"
        raise InputError("labels", shown, f"{expected}: give its meta.mat by ids")
    return [checked_label(label, options, "labels", shown, (least, most)) for label in labels]


def checked_label(
    label: int, options: SourceOptions, key: str, value: str, extremes: tuple[int, int] | None = None
) -> int:
    """Shift a label so that labels count from 0, and check it.

    Args:
        label: as the source has it.
        options: the number of the first class, and the names of the classes.
        key: the option to name in an error message.
        value: the file to name in an error message.
        extremes: the smallest and the largest of all labels, where they are known.

    Returns:
        The label, counted from 0.

    Raises:
        InputError: it lies outside the classes, or labels do not begin with 0 and ``options`` do not say with
            what they begin.
    """
    if options.first is None and extremes is not None and extremes[0] != 0:
        least, most = extremes
        expected = f"labels go from {least} to {most}: say by first what they begin with (0 or 1)"
        raise InputError(key, value, expected)
    shifted = label - (options.first or 0)
    if shifted < 0 or (options.classes and shifted >= len(options.classes)):
        last = len(options.classes) - 1 + (options.first or 0) if options.classes else ""
        raise InputError(key, value, f"label {label} lies outside {options.first or 0}…{last}")
    return shifted


def _pairs(file: Path, images: list[Path]) -> Iterator[tuple[Path, str]]:
    """Images, each with the label that a file gives it, as text."""
    lines = [row for row in _rows(file) if row]
    if lines and all(len(row) == 1 for row in lines):
        if len(lines) != len(images):
            expected = f"must hold a line for each image; it holds {len(lines):,} for {len(images):,} images"
            raise InputError("labels", str(file), expected)
        yield from zip(images, (row[0] for row in lines), strict=True)
        return
    by_name = {name: path for path in images for name in (path.stem, path.name)}
    if len({path.stem for path in images}) < len(images):
        raise InputError("labels", str(file), "two images of the folder have the same name")
    column, lines = _label_column(file, lines, by_name)
    for row in lines:
        name = Path(row[0]).name
        if name not in by_name:
            raise InputError("labels", str(file), f"names {row[0]}, and there is no such image")
        box = _BOX.match(row[column]) if len(row) > column else None
        yield by_name[name], box[1] if box else row[column].strip() if len(row) > column else ""


def _rows(file: Path) -> list[list[str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError("labels", str(file), f"cannot be read ({reason})") from None
    separator = _SEPARATED.get(file.suffix.lower())
    if separator is not None:
        return list(csv.reader(text.splitlines(), delimiter=separator))
    return [line.split(maxsplit=1) for line in text.splitlines()]


def _label_column(file: Path, lines: list[list[str]], images: dict[str, Path]) -> tuple[int, list[list[str]]]:
    """The index of the column with the labels, and the lines without their heading."""
    first, wide = lines[0], any(len(row) > 2 for row in lines)
    heading = file.suffix.lower() in _SEPARATED and Path(first[0]).name not in images
    named = [column for column, cell in enumerate(first) if cell.strip().lower() in _LABEL_COLUMNS and column]
    if wide and not (heading and len(named) == 1):
        raise InputError("labels", str(file), "must have two columns, or one with the heading 'label'")
    return named[0] if heading and len(named) == 1 else 1, lines[heading:]


def _of_number(text: str, numbers: dict[int, str], file: Path) -> str:
    name = numbers.get(int(text)) if text.isdecimal() else None
    if name is None:
        raise InputError("ids", str(file), f"says of no class that it is {text!r}")
    return name


def _numbers(file: Path) -> dict[int, str]:
    """Read classes by their numbers from ILSVRC's ``meta.mat``, or from lines of a number and a name."""
    try:
        if file.suffix.lower() == ".mat":
            from scipy.io import loadmat

            synsets = loadmat(file, squeeze_me=True)["synsets"]
            leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
            return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
        pairs = [
            line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        return {int(number): name.strip() for number, name in pairs}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            "ids", str(file), f"must be meta.mat, or numbers with names ({first_line(error)})"
        ) from None
