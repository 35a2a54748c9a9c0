"""Parquet as the hub has it: other columns, view types, huge row groups, and what classes are called."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Run
from image_tables import IMAGES, VIT, VIT_ARGS, dense_folder, edit_json, png, table, tiny, write

from orchestration.preflight.checks import prepare
from orchestration.recipe.loading import load_recipe
from orchestration.sweep.tasks import save_pretrained
from orchestration.tracking.pyfunc_model import classes_of, labels_of
from pruners import prune
from pruners.errors import InputError
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.config.data import DataSettings, ModelSettings
from trainers.config.jobs import TrainJob
from trainers.config.structured import StructuredSettings
from trainers.data.arrow_store import Store
from trainers.data.datasets import split
from trainers.data.preprocessing import preprocessing_of
from trainers.loop import builders
from trainers.models import factory
from trainers.sources.classes import check_alike, check_known, names_of, read_map
from trainers.sources.columns import Columns
from trainers.sources.parquet import check_table, decode, image_batches, open_parquet
from trainers.structured.cut import cut_model, plan_cut, save_cut

CLASS_LABEL, IMAGE = "ClassLabel", "Image"
NAMES = ["ash", "birch", "cedar"]


def hub(labels: dict[str, Any], kinds: dict[str, Any], *, image: str = "img", names: Any = None) -> pa.Table:
    """A table as ``datasets`` writes it: any names of columns, what they are in the metadata."""
    count = len(next(iter(labels.values())))
    cells = [{"bytes": png(i), "path": None} for i in range(count)]
    result = pa.table({image: pa.array(cells, IMAGES), **labels})
    features: dict[str, Any] = {image: {"_type": IMAGE}}
    for name, kind in kinds.items():
        features[name] = {"_type": kind, "names": names or NAMES}
    return result.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_columns__the_one_image_and_class_label_of_the_metadata(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", hub({"id": [7, 8, 9], "labels": [2, 0, 1]}, {"labels": CLASS_LABEL}))
    check_table(uri, 3, key="data.train")
    store = Store.open(uri)
    assert store.labels.tolist() == [2, 0, 1]
    assert store.cell(1) == png(1)
    assert names_of(uri) == tuple(NAMES)


def test_columns__several_columns_are_not_guessed_at(tmp_path: Path) -> None:
    labels = {"coarse_label": [0, 0, 1], "fine_label": [2, 0, 1]}
    uri = write(tmp_path / "a.parquet", hub(labels, dict.fromkeys(labels, CLASS_LABEL)))
    with pytest.raises(InputError, match=r"several.*labels \(coarse_label, fine_label\).*label_column"):
        check_table(uri, 3, key="data.train")
    for name, values in labels.items():
        settings = DataSettings(train=uri, validation=uri, label_column=name)
        assert split(settings, "validation", decode, 0).store.labels.tolist() == values  # type: ignore[arg-type]
        assert check_table(uri, 3, key="data", columns=settings.columns)
    with pytest.raises(InputError, match="needs a column 'lable'"):
        check_table(uri, 3, key="data", columns=Columns(label="lable"))
    # a plain number beside a label of classes: either may be meant
    mixed = write(tmp_path / "b.parquet", hub({"label": [0, 1], "kind": [1, 0]}, {"kind": CLASS_LABEL}))
    with pytest.raises(InputError, match=r"several.*\(kind, label\)"):
        Store.open(mixed)


def test_columns__without_metadata_a_number_is_no_label(tmp_path: Path) -> None:
    plain = pa.table({"img": pa.array([{"bytes": png(0), "path": ""}], IMAGES), "id": [5]})
    uri = write(tmp_path / "a.parquet", plain)
    with pytest.raises(InputError, match=r"needs a column 'label'; it has img, id .*label_column"):
        check_table(uri, 9, key="data")
    assert Store.open(uri, columns=Columns(label="id")).labels.tolist() == [5]


def test_columns__a_column_is_not_both() -> None:
    with pytest.raises(ValueError, match="label_column: is the image_column too"):
        DataSettings(train="a", image_column="x", label_column="x")


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary_view(),
        pa.large_binary(),
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
    ],
)
def test_columns__images_of_every_type_of_arrow_s(kind: pa.DataType, tmp_path: Path) -> None:
    contents = [png(0), png(1), None]
    nested = pa.types.is_struct(kind)
    cells = [{"bytes": content, "path": "x"} if nested else content for content in contents]
    uri = write(tmp_path / "a.parquet", pa.table({"image": pa.array(cells, kind), "label": [1, 0, None]}))
    usual = write(tmp_path / "b.parquet", table([1, 0]))
    assert check_table(uri, 2, key="data", tolerant=True)
    store = Store.open(uri, tolerant=True)
    assert [store.cell(row) for row in range(2)] == contents[:2]
    both = Store.open(str(Path(usual).parent), tolerant=True)
    assert [decode(both.cell(row)).size for row in range(4)] == [(16, 16)] * 4


def test_columns__a_row_group_over_two_gigabytes(tmp_path: Path) -> None:
    """Arrow holds no struct of over 2 GB in one array; the file is small, as all rows are alike."""
    blob, rows = bytes(range(256)) * (8 << 12), 260
    path = tmp_path / "a.parquet"
    cells = pa.StructArray.from_arrays(
        [
            pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([blob])),
            pa.array(["x"] * rows),
        ],
        ["bytes", "path"],
    )
    whole = pa.table({"image": cells, "label": list(range(rows))})
    pq.write_table(whole, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30)
    assert rows * len(blob) > 1 << 31
    with pa.memory_map(str(path)) as source:
        parquet = open_parquet(source)
        assert parquet.num_row_groups == 1
        labels: list[int] = []
        for batch in image_batches(parquet, 0, "image", "label"):
            labels += batch["label"].to_pylist()
            assert batch["image"][0].as_buffer().size == len(blob)
    assert labels == list(range(rows))


def test_columns__a_folder_of_train_and_test_is_no_training_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, labels in (("train-00000-of-00002", [0]), ("train-00001-of-00002", [1]), ("test-0000", [2])):
        write(data / f"{name}.parquet", table(labels))
    for read in (Store.open, lambda uri: check_table(uri, 3, key="data.train")):
        with pytest.raises(InputError, match=r"several parts: test .*train .*name one, as train-"):
            read(str(data))
    assert Store.open(f"{data}/train-*.parquet").labels.tolist() == [0, 1]
    assert Store.open(f"file://{data}/t[e]st-*.parquet").labels.tolist() == [2]
    with pytest.raises(InputError, match="no file matches dev"):
        Store.open(f"{data}/dev-*.parquet")
    with pytest.raises(InputError, match="it holds folders"):
        Store.open(str(tmp_path))


def test_columns__names_of_parts_are_no_names_of_files(tmp_path: Path) -> None:
    """``trainer``, ``latest`` and macOS's ``._`` files are not taken for parts."""
    for name in ("trainers", "latest", "contest"):
        write(tmp_path / f"{name}.parquet", table([0]))
    (tmp_path / "._latest.parquet").write_bytes(b"resource fork")
    assert len(Store.open(str(tmp_path))) == 3
    result = write(tmp_path / "odd[1].parquet", table([1]))
    assert Store.open(result).labels.tolist() == [1]  # no glob, as there is a file of this name


def test_columns__contradicting_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label 1 is 'birch' in train and 'cedar' in test"):
        check_alike({"train": NAMES, "validation": [], "test": ["ash", "cedar"]}, key="data")
    check_alike({"train": NAMES, "test": NAMES[:2]}, key="data")
    with pytest.raises(InputError, match="'birch' is label 0 of the images and 1 of the model"):
        check_known(NAMES, ["birch", "ash", "cedar"], key="--data", uri="x")
    check_known(["n01", "n02", "n03"], NAMES, key="--data", uri="x")  # other words for perhaps the same
    write(tmp_path / "a.parquet", hub({"labels": [0]}, {"labels": CLASS_LABEL}))
    (tmp_path / "classes.json").write_text(json.dumps({"birch": 0, "ash": 1, "cedar": 2}))
    with pytest.raises(InputError, match=r"contradict .*a\.parquet.*classes\.json"):
        names_of(str(tmp_path))
    with pytest.raises(InputError, match="contradict"):
        names_of(f"{tmp_path}/a*.parquet")


def test_columns__a_dry_run_refuses_parts_that_contradict(tmp_path: Path) -> None:
    uris = {}
    for part, names in (("train", NAMES), ("test", ["birch", "ash", "cedar"])):
        made = hub({"label": [0, 1, 2]}, {"label": CLASS_LABEL}, image="image", names=names)
        uris[part] = write(tmp_path / f"{part}.parquet", made)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        json.dumps(
            {
                "name": "x",
                "model": {"architecture": VIT, "args": VIT_ARGS, "classes": 3},
                "data": uris,
                "pruning": {"methods": ["magnitude"], "sparsity": 0.5},
                "dense": {"epochs": 1},
            }
        )
    )
    with pytest.raises(InputError, match="label 0 is 'ash' in train and 'birch' in test"):
        prepare(load_recipe(str(recipe), ()), dry_run=True)
    both = f"data.test={uris['train']}"
    assert prepare(load_recipe(str(recipe), (both,)), dry_run=True).data_hash
    # a checkpoint that learned other classes
    model, arguments = tiny()
    factory.name_classes(model, ["cedar", "birch", "ash"])
    save_checkpoint(tmp_path / "dense", model, model_args=arguments, masks=None, record={})
    given = (both, "dense=null", "model={checkpoint: %s, classes: 3}" % (tmp_path / "dense"))
    with pytest.raises(InputError, match="'ash' is label 0 of the images and 2 of the model"):
        prepare(load_recipe(str(recipe), given), dry_run=True)


def test_columns__class_names_stay_with_the_model(tmp_path: Path) -> None:
    """Through saving, loading, serving and a new head, as timm's own label_names."""
    from orchestration.tracking.served_model import _checkpoint

    model = load_checkpoint(str(dense_folder(tmp_path / "a"))).model
    factory.name_classes(model, ["two", "names"])  # which are not those of three classes
    assert factory.label_names(model) == ()
    factory.name_classes(model, NAMES)
    save_checkpoint(tmp_path / "b", model, model_args=tiny()[1], masks=None, record={})
    again = load_checkpoint(str(tmp_path / "b")).model
    assert factory.label_names(again) == tuple(NAMES)
    assert preprocessing_of(again)["labels"] == NAMES
    factory.replace_head(again, 3)
    assert factory.label_names(again) == ()
    # as some folders of the hub have them
    edit_json(tmp_path / "b/config.json", label_names={"2": "cedar", "0": "ash", "1": "birch"})
    edit_json(tmp_path / "b/config.json", pretrained_cfg=tiny()[0].pretrained_cfg | {"num_classes": 3})
    (tmp_path / "b/pruning.json").unlink()
    assert factory.label_names(load_checkpoint(str(tmp_path / "b")).model) == tuple(NAMES)
    assert list(_checkpoint(tmp_path / "b")[2]) == NAMES


def test_columns__tars_are_given_the_names_of_a_class_map(run: Run, tmp_path: Path) -> None:
    """As metadata of the table, which is what remains where single files are moved about."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number, label in enumerate((b"cedar", b"0", b"birch")):
            for kind, content in (("png", png(number)), ("cls", label)):
                member = tarfile.TarInfo(f"n{number}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    Path("classes.json").write_text(json.dumps({"birch": 1, "cedar": 2, "ash": 0}))
    status, _, error = run("data convert train-0.tar out --classes classes.json --processes 1")
    assert status == 0, error
    assert names_of("out") == tuple(NAMES)
    assert Store.open("out").labels.tolist() == [2, 0, 1]
    (table,) = Path("out").glob("*.parquet")
    table.rename("alone.parquet")
    assert names_of("alone.parquet") == tuple(NAMES)
    assert classes_of("alone.parquet") == {"ash": 0, "birch": 1, "cedar": 2}


def named_folder(folder: Path) -> Path:
    """A sparse model that knows the names of its classes."""
    model, arguments = tiny()
    factory.name_classes(model, NAMES)
    masks = prune(model, "dimap", 0.9).masks
    save_checkpoint(folder, model, model_args=arguments, masks=masks, record={"method": "dimap"})
    return folder


def names_in(folder: Path) -> tuple[str, ...]:
    """What espalier reads, and what stands in the configuration for timm and everybody else."""
    config = json.loads((folder / "config.json").read_text())
    names = factory.label_names(load_checkpoint(str(folder)).model)
    assert config["pretrained_cfg"]["label_names"] == list(names)
    return names


def test_columns__class_names_stay_with_a_model_that_is_compressed(run: Run, tmp_path: Path) -> None:
    named_folder(tmp_path / "named")
    status, _, error = run("export named small --format compressed")
    assert status == 0, error
    assert not (tmp_path / "small/model.safetensors").exists()
    assert names_in(tmp_path / "small") == tuple(NAMES)


def test_columns__class_names_stay_with_a_model_that_is_cut(tmp_path: Path) -> None:
    loaded = load_checkpoint(str(named_folder(tmp_path / "named")))
    settings = StructuredSettings.model_validate({"mlp": 0.5, "importance": "magnitude"})
    plan = plan_cut(loaded.model, loaded.arguments, settings)
    made = cut_model(loaded.model, plan, settings, [])
    save_cut(tmp_path / "cut", made, plan, {}, sparse=True)
    assert names_in(tmp_path / "cut") == tuple(NAMES)


def test_columns__weights_of_a_file_take_the_names_of_the_images(run: Run, tmp_path: Path) -> None:
    """A file of weights has none: a sweep that begins with it, and ``finetune`` after ``import``."""
    uri = write(tmp_path / "a.parquet", hub({"label": [0, 1, 2]}, {"label": CLASS_LABEL}))
    torch.save(tiny()[0].state_dict(), "weights.pth")
    settings = {"architecture": VIT, "args": VIT_ARGS, "classes": 3, "checkpoint": "weights.pth"}
    save_pretrained(ModelSettings.model_validate(settings), DataSettings(train=uri), str(tmp_path / "dense"))
    assert names_in(tmp_path / "dense") == tuple(NAMES)
    given = " ".join(f"--arg {key}={value}" for key, value in VIT_ARGS.items())
    for command in (
        f"import weights.pth --architecture {VIT} {given} --out imported",
        "finetune imported --train a.parquet --validation a.parquet --out tuned epochs=1",
    ):
        status, _, error = run(command)
        assert status == 0, error
    assert names_in(tmp_path / "tuned") == tuple(NAMES)


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.json", {"b": 1, "a": 0}, ("a", "b")),
        ("a.json", ["b", "a"], ("b", "a")),
        ("a.txt", "b\na\n\n", ("b", "a")),
        ("a.json", {"a": 1, "b": 2}, None),
        ("a.json", {"a": 0, "b": 0}, None),
        ("a.json", {"a": "0"}, None),
        ("a.json", ["a", "a"], None),
        ("a.json", [], None),
    ],
)
def test_columns__class_maps(name: str, content: Any, names: tuple[str, ...] | None, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    if names is not None:
        assert read_map(file, "--classes") == names
        return
    with pytest.raises(InputError, match="must give each of the labels"):
        read_map(file, "--classes")


def test_columns__commands_name_the_columns(tmp_path: Path, run: Run) -> None:
    """A table with labels of two kinds: which is meant is said, else refused."""
    names = {"coarse_label": [0, 0, 1], "fine_label": [2, 0, 1]}
    write(tmp_path / "a.parquet", hub(names, dict.fromkeys(names, CLASS_LABEL)))
    dense_folder(tmp_path / "vit")
    for command in (
        "evaluate vit --data a.parquet",
        "prune vit --method ovit --gradients 2 --batch-size 2 --sparsity 0.5 --out pruned --data a.parquet",
        "finetune vit --out tuned --train a.parquet epochs=1 --validation a.parquet",
        "data check a.parquet --processes 1",
    ):
        status, _, error = run(command)
        assert status == 2
        assert "several columns that may hold labels" in error
        status, _, error = run(f"{command} --label-column fine_label")
        assert status == 0, error
    # what it learned by is what it is measured by
    assert factory.label_names(load_checkpoint(str(tmp_path / "tuned")).model) == tuple(NAMES)
    write(tmp_path / "b.parquet", hub({"label": [0]}, {"label": CLASS_LABEL}, names=NAMES[::-1]))
    status, _, error = run("evaluate tuned --data b.parquet")
    assert status == 2
    assert "its classes contradict the model's: 'cedar' is label 0 of the images and 2 of the model" in error
    status, _, error = run("data check a.parquet b.parquet --label-column label")
    assert status == 2
    write(tmp_path / "c.parquet", hub({"label": [0]}, {"label": CLASS_LABEL}))
    status, output, error = run("data check b.parquet c.parquet")
    assert (status, output) == (2, "")
    assert "label 0 is 'cedar' in b.parquet and 'ash' in c.parquet" in error


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The commands here name their files themselves."""
    return tmp_path


def test_columns__a_training_run_refuses_a_checkpoint_of_other_classes(tmp_path: Path) -> None:
    """Also where it was fetched after the recipe had been checked; else the model takes the data's names."""
    uri = write(tmp_path / "a.parquet", hub({"label": [0, 1, 2]}, {"label": CLASS_LABEL}))
    made = {"name": "x", "seed": 0, "data": {"train": uri}, "training": {"epochs": 1}}
    job = TrainJob.model_validate({**made, "model": {"checkpoint": "dense", "classes": 3}})
    model, _ = tiny()
    factory.name_classes(model, NAMES[::-1])
    with pytest.raises(InputError, match="'ash' is label 0 of the images and 2 of the model"):
        builders.name_classes(job, model)
    model, _ = tiny()
    builders.name_classes(job, model)
    assert factory.label_names(model) == tuple(NAMES)


def test_columns__what_mlflow_is_told_of_classes(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", hub({"label": [0]}, {"label": CLASS_LABEL}))
    assert classes_of(uri) == {"ash": 0, "birch": 1, "cedar": 2}
    assert labels_of(uri) == NAMES
    twice = ["crane", "birch", "crane"]  # a bird and a machine: ImageNet has such
    uri = write(tmp_path / "b.parquet", hub({"label": [0]}, {"label": CLASS_LABEL}, names=twice))
    assert classes_of(uri) is None
    assert labels_of(uri) == twice
