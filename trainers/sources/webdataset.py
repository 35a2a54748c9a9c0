"""Read samples from WebDataset tars, grouped as the webdataset library and timm's reader group them.

A sample is a run of files whose names are equal up to the first dot (``a/n01.jpg``, ``a/n01.cls``); it is
complete when a file of another name follows.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path

from pruners.errors import InputError, first_line
from trainers.sources.folders import EXTENSIONS, SourceOptions, checked_label, is_hidden

_KEY = "source"
_SUFFIX = re.compile(r"(\.tar)(\.(gz|bz2|xz))?$|\.t(gz|bz2|xz)$", re.IGNORECASE)
_BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)
_FIELDS = ("label", "cls", "target")
_MAIN = ("", "input", "image", "target")  # accepted before the extension, as in n01.input.jpg


class _Member(tarfile.TarInfo):
    """A member of a tar whose damaged or truncated header is an error: tarfile would take it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the block of zeros that ends a tar
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut at byte {tar.offset:,}: {error}") from None


@dataclass(frozen=True)
class TarImage:
    """An encoded image, its name and its label."""

    name: str
    content: bytes
    label: int


def is_tar(name: str) -> bool:
    """Return whether a file's name is that of a tar, compressed or not."""
    return not is_hidden(name) and _SUFFIX.search(name) is not None


def stem(tar: Path) -> str:
    """The name of a tar without ``.tar``, ``.tar.gz``, ``.tgz``."""
    return _SUFFIX.sub("", tar.name)


def read_tar(path: Path, options: SourceOptions) -> Iterator[TarImage | None]:
    """Read the samples of a tar.

    Yields:
        The images; ``None`` for each sample that is left out because it has no image or no label.

    Raises:
        InputError: a tar that cannot be read, or a sample that cannot be used, by its name.
    """
    for name, files in _samples(path):
        pictures = [kind for kind in files if f".{kind.rpartition('.')[2]}" in EXTENSIONS]
        images, label = _of_kind(files, EXTENSIONS), _label(name, files, path, options)
        if images is None and len(pictures) > 1:
            raise InputError(_KEY, str(path), f"{name} has several images: {', '.join(pictures)}")
        if images is None or label is None:
            if label is None and not pictures and "cls" not in files:
                continue  # not a sample: a list of files, a licence
            if options.unlabelled == "skip":
                yield None
                continue
            held = ", ".join(files)
            hint = "unlabelled: skip leaves such samples out"
            raise InputError(
                _KEY, str(path), f"{name} has no image or no label (.cls); it has {held}; {hint}"
            )
        yield TarImage(f"{name.rpartition('/')[2]}.{images}", files[images], label)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The names of samples, each with the content of its files by extension (in lower case)."""
    current, files = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them in memory
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                begin, _, kind = name.partition(".")
                if not member.isfile() or not kind or any(map(is_hidden, (*folder.split("/"), name))):
                    continue
                sample = f"{folder}/{begin}" if folder else begin
                if sample != current:
                    if files:
                        yield current, files
                    current, files = sample, {}
                opened = tar.extractfile(member)
                assert opened is not None, "a file"
                if kind.lower() in files:
                    raise InputError(_KEY, str(path), f"{sample} has two files .{kind.lower()}")
                files[kind.lower()] = opened.read()
    except _BROKEN as error:
        raise InputError(_KEY, str(path), f"must be a readable tar ({first_line(error)})") from None
    if files:
        yield current, files


def _of_kind(files: dict[str, bytes], endings: tuple[str, ...]) -> str | None:
    """The file with one of these endings: the plain one, else the one of :data:`_MAIN`, else the only one."""
    kinds = [kind for kind in files if f".{kind.rpartition('.')[2]}" in endings]
    for main in _MAIN:
        chosen = [kind for kind in kinds if kind.rpartition(".")[0] == main]
        if chosen:
            return chosen[0] if len(chosen) == 1 else None
    return kinds[0] if len(kinds) == 1 else None


def _label(name: str, files: dict[str, bytes], path: Path, options: SourceOptions) -> int | None:
    """The label: from ``.cls``, else from the field ``label``, ``cls`` or ``target`` of ``.json``."""
    plain, described = _of_kind(files, (".cls",)), _of_kind(files, (".json",))
    label: object = None
    try:
        if plain is not None:
            label = files[plain].decode().strip()
        elif described is not None:
            content = json.loads(files[described])
            fields = content if isinstance(content, dict) else {"label": content}
            label = next((fields[field] for field in _FIELDS if fields.get(field) is not None), None)
    except ValueError:
        raise InputError(_KEY, str(path), f"{name} has a label that cannot be read") from None
    if isinstance(label, str) and label in options.classes:
        return options.classes.index(label)
    if isinstance(label, str) and re.fullmatch(r"-?\d+", label):
        label = int(label)
    if label is None or (type(label) is int and label < 0):  # -1 marks what nobody has labelled
        return None
    if type(label) is not int:
        raise InputError(_KEY, str(path), f"{name} has a label that is no number: {label!r}")
    return checked_label(label, options, _KEY, f"{path}, {name}")
