"""Files and folders, local and on another pyarrow file system."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyarrow import fs

from pruners.errors import InputError
from trainers import storage


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``far://…`` is a file system over the returned folder that is none of pyarrow's local ones."""
    root = tmp_path / "far"
    root.mkdir()
    system = fs.SubTreeFileSystem(str(root), fs.LocalFileSystem())
    real = storage.resolve

    def resolve(uri: str, key: str = "storage") -> tuple[fs.FileSystem, str]:
        return (system, uri.removeprefix("far://")) if uri.startswith("far://") else real(uri, key)

    monkeypatch.setattr(storage, "resolve", resolve)
    return root


@pytest.fixture(params=["path", "file://", "far://"])
def location(request: pytest.FixtureRequest, tmp_path: Path, remote: Path) -> tuple[str, Path]:
    """A base URI and the local folder behind it."""
    base = tmp_path / "base"
    return {
        "path": (str(base), base),
        "file://": (f"file://{base}", base),
        "far://": ("far://base", remote / "base"),
    }[request.param]


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_storage__files(location: tuple[str, Path]) -> None:
    uri, behind = location
    assert not storage.exists(f"{uri}/a/b.json")
    storage.write_json(f"{uri}/a/b.json", {"ä": [1, 0.5]})
    assert storage.exists(f"{uri}/a/b.json")
    assert storage.read_json(f"{uri}/a/b.json") == {"ä": [1, 0.5]}
    storage.write_bytes(f"{uri}/a/b.json", b"abc")
    assert storage.read_bytes(f"{uri}/a/b.json") == (behind / "a/b.json").read_bytes() == b"abc"
    assert storage.size(f"{uri}/a/b.json") == 3
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(f"{uri}/a/b.json") == known
    storage.remove_file(f"{uri}/a/b.json")
    assert not storage.exists(f"{uri}/a/b.json")


def test_storage__what_is_written_is_json_for_every_parser(location: tuple[str, Path]) -> None:
    """Which has no NaN and no infinity; Python would write both."""
    uri, behind = location
    content = {"b": [1.5, float("nan"), {"c": float("-inf")}], "a": (float("inf"), "NaN"), "n": None, "i": 3}

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    storage.write_json(f"{uri}/x.json", content)
    stored = json.loads((behind / "x.json").read_text(), parse_constant=refused)
    assert stored == {"b": [1.5, None, {"c": None}], "a": [None, "NaN"], "n": None, "i": 3}
    assert list(stored) == ["a", "b", "i", "n"]


def test_storage__no_partial_file_stays(location: tuple[str, Path]) -> None:
    uri, behind = location
    storage.write_bytes(f"{uri}/x", b"1")
    assert [path.name for path in behind.iterdir()] == ["x"]


def test_storage__a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{tmp_path}/x", b"old")

    def fail(self: Path, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(f"{tmp_path}/x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_storage__upload_and_local_copy(location: tuple[str, Path], tmp_path: Path) -> None:
    uri, behind = location
    storage.upload(folder_of(tmp_path / "one", a="1", b="2"), f"{uri}/models/m")
    assert {path.name: path.read_text() for path in (behind / "models/m").iterdir()} == {"a": "1", "b": "2"}
    with storage.local_copy(f"{uri}/models/m") as local:
        assert (local / "b").read_text() == "2"
    assert (behind / "models/m/b").exists()
    storage.remove(f"{uri}/models/m")
    storage.remove(f"{uri}/models/m")  # what is not there needs no removal
    assert not (behind / "models/m").exists()


def test_storage__upload_replaces_the_whole_folder(location: tuple[str, Path], tmp_path: Path) -> None:
    uri, behind = location
    storage.upload(folder_of(tmp_path / "one", a="1", masks="old"), f"{uri}/m")
    storage.upload(folder_of(tmp_path / "two", a="2"), f"{uri}/m")
    assert {path.name: path.read_text() for path in (behind / "m").iterdir()} == {"a": "2"}


def test_storage__an_upload_that_was_cut_off_is_no_obstacle(tmp_path: Path) -> None:
    folder_of(tmp_path / "m.partial", stale="x")
    storage.upload(folder_of(tmp_path / "one", a="1"), f"{tmp_path}/m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "one"]
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["a"]


def test_storage__a_remote_folder_is_copied_and_the_copy_removed(remote: Path) -> None:
    folder_of(remote / "m", a="1")
    with storage.local_copy("far://m") as local:
        assert remote not in local.parents
        assert (local / "a").read_text() == "1"
    assert not local.exists()


def test_storage__local_folders_are_used_where_they_are(tmp_path: Path) -> None:
    for uri in (str(tmp_path), f"file://{tmp_path}"):
        with storage.local_copy(uri) as local:
            assert local == tmp_path


def test_storage__relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.resolve("runs")[1] == str(tmp_path / "runs")
    assert storage.absolute("s3://bucket/runs") == "s3://bucket/runs"
    monkeypatch.setenv("HOME", "/home/somebody")
    assert storage.absolute("~/runs") == "/home/somebody/runs"


@pytest.mark.parametrize("uri", ["nowhere://a/b", "file://relative/path", "://"])
def test_storage__unknown_schemes_are_refused(uri: str) -> None:
    with pytest.raises(InputError) as error:
        storage.resolve(uri, "data.train")
    assert error.value.key == "data.train"
    assert error.value.value == uri
    assert "pyarrow URI" in str(error.value)


def test_storage__what_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json.*must hold JSON"):
        storage.read_json(f"{tmp_path}/x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="must hold JSON"):
        storage.read_json(f"{tmp_path}/x.json")


@pytest.mark.parametrize("over", ["nothing", "another"])
def test_storage__a_folder_that_was_cut_short_is_not_taken_for_whole(
    location: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    """Killed in the middle of an upload: its mark is not there, whatever of the rest is."""
    uri, _ = location
    folder = folder_of(tmp_path / "one", **{"pruning.json": "{}", "config.json": "{}", "z.safetensors": "z"})
    if over == "another":
        storage.upload(folder, f"{uri}/m")
        assert storage.exists(f"{uri}/m/pruning.json")
    copy, copied = fs.copy_files, []

    def killed(source: str, *arguments: object, **options: object) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(source)
        copy(source, *arguments, **options)

    monkeypatch.setattr(storage.fs, "copy_files", killed)
    if uri.startswith("far://"):
        with pytest.raises(KeyboardInterrupt):
            storage.upload(folder, f"{uri}/m")
        assert storage.names(f"{uri}/m") == ["config.json"]
        monkeypatch.undo()
    else:  # one call, and the name is given when all is there
        storage.upload(folder, f"{uri}/m")
        assert storage.names(f"{uri}/m") == ["config.json", "pruning.json", "z.safetensors"]


def test_storage__two_may_write_a_file_at_once(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(100):
            storage.write_json(f"{tmp_path}/figures/a.json", {"top1": number})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert storage.read_json(f"{tmp_path}/figures/a.json")["top1"] in range(4)
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["a.json"]
