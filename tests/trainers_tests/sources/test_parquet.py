"""Parquet tables of images: the layout that is read, and each that is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from image_tables import IMAGES, png, table, write

from pruners.errors import InputError
from trainers.sources.parquet import check_table, decode, read_table


def test_parquet__one_file(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", table([2, 0, 1]))
    read = read_table(uri)
    assert read.column_names == ["image", "label"]
    assert read["label"].to_pylist() == [2, 0, 1]
    assert read_table(f"file://{uri}").equals(read)
    assert read_table(uri, ["label"]).column_names == ["label"]


def test_parquet__a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    for name, label in (("b", 1), ("a", 0), ("c", 2)):
        write(tmp_path / f"{name}.parquet", table([label]))
    (tmp_path / "README.md").write_text("not data")
    assert read_table(str(tmp_path))["label"].to_pylist() == [0, 1, 2]
    check_table(str(tmp_path), 3, key="data.train")


def test_parquet__more_columns_are_no_matter(tmp_path: Path) -> None:
    more = table([0, 1]).append_column("split", pa.array(["train", "train"]))
    assert read_table(write(tmp_path / "a.parquet", more)).column_names == ["image", "label"]


def test_parquet__images_as_plain_bytes(tmp_path: Path) -> None:
    plain = pa.table({"image": pa.array([png(0)], pa.binary()), "label": [0]})
    uri = write(tmp_path / "a.parquet", plain)
    check_table(uri, 1, key="data")
    cell = read_table(uri)["image"][0].as_py()
    assert decode(cell).size == decode({"bytes": png(0), "path": None}).size == (16, 16)
    assert decode(cell).mode == "RGB"


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "a.png"}, "text", 3])
def test_parquet__cells_without_bytes(cell: object) -> None:
    with pytest.raises(TypeError):
        decode(cell)


def test_parquet__the_fingerprint_follows_labels_and_images(tmp_path: Path) -> None:
    prints = {
        check_table(write(tmp_path / f"{number}.parquet", content), 3, key="data")
        for number, content in enumerate(
            [table([0, 1, 2]), table([0, 2, 1]), table([0, 1]), table([0, 1, 2], first=9)]
        )
    }
    assert len(prints) == 4
    relabelled = table([0, 1, 2]).set_column(1, "label", pa.array([0, 2, 1]))
    assert check_table(write(tmp_path / "r.parquet", relabelled), 3, key="data") not in prints
    again = write(tmp_path / "copy" / "other.parquet", table([0, 1, 2]))
    assert check_table(again, 3, key="data") in prints


def broken(path: Path) -> None:
    path.write_bytes(b"PAR1 and no more")


def cut(path: Path) -> None:
    write(path, table([0, 1]))
    path.write_bytes(path.read_bytes()[:-20])


def holding(content: Callable[[], pa.Table]) -> Callable[[Path], None]:
    return lambda path: write(path, content()) and None


def scribble(bad: object) -> pa.Table:
    return pa.table({"image": pa.array([{"bytes": bad, "path": "x"}], IMAGES), "label": [0]})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), r"must hold \*.parquet"),
        (broken, "must be a readable Parquet file"),
        (cut, "must be a readable Parquet file"),
        (holding(lambda: table([0]).drop_columns("label")), "needs a column 'label'; it has image"),
        (holding(lambda: table([0]).drop_columns("image")), "needs a column 'image'; it has label"),
        (holding(lambda: table([0]).slice(0, 0)), "at least one image"),
        (holding(lambda: table(["a"], kind=pa.string())), "must be integers, not string"),
        (holding(lambda: table([0.0], kind=pa.float64())), "must be integers, not double"),
        (holding(lambda: table([0, None])), "1 images have no label"),
        (holding(lambda: table([0, 3, 7])), "label 7 lies outside the model's classes 0…2"),
        (holding(lambda: table([0, 3])), "label 3 lies outside"),
        (holding(lambda: table([-2, 9])), "label -2 lies outside"),
        (holding(lambda: scribble(b"no image")), "row 0 holds no image"),
        (holding(lambda: scribble(None)), "row 0 holds no image"),
        (holding(lambda: scribble(png(0)[:60])), "row 0 holds no image"),
    ],
)
def test_parquet__what_is_refused(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    make(path)
    with pytest.raises(InputError, match=says) as error:
        check_table(str(path), 3, key="data.train")
    assert error.value.key == "data.train"
    assert error.value.value == str(path)
    assert "\n" not in str(error.value)


def test_parquet__the_bad_file_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table([0, 1]))
    write(tmp_path / "b.parquet", table([1, 9]))
    with pytest.raises(InputError, match="label 9"):
        check_table(str(tmp_path), 3, key="data")


def test_parquet__files_of_different_types(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table([0, 1]))
    write(tmp_path / "b.parquet", table(["a"], kind=pa.string()))
    with pytest.raises(InputError, match=str(tmp_path)):
        read_table(str(tmp_path))


def test_parquet__every_row_group_has_its_labels_checked(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", table([0, 1, 2, 5]), row_group_size=1)
    with pytest.raises(InputError, match="label 5"):
        check_table(uri, 3, key="data")


def test_parquet__a_first_row_group_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table([0]).slice(0, 0))
    write(tmp_path / "b.parquet", table([0, 1]))
    assert check_table(str(tmp_path), 3, key="data")


@quick(150)
@given(st.integers(0, len(png(0)) - 1), st.integers(1, 255), st.booleans())
def test_parquet__broken_images_are_broken_in_one_way(offset: int, change: int, cut: bool) -> None:
    content = bytearray(png(0))
    content[offset] ^= change
    with contextlib.suppress(OSError):
        assert decode(bytes(content[: offset + 1] if cut else content)).mode == "RGB"
