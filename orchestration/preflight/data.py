"""Preflight checks of a recipe's images: they exist, fit the model, and all parts name the classes alike."""

from __future__ import annotations

from pyarrow import fs

from orchestration.common.hashing import digest
from orchestration.recipe.schema import Recipe
from pruners.errors import InputError
from trainers import remote_calls, storage
from trainers.config.data import DataSettings
from trainers.data import digits
from trainers.sources.classes import Names, check_alike, names_of
from trainers.sources.files import split_glob
from trainers.sources.parquet import check_table, count_rows

_COLUMNS = ("image_column", "label_column")


def check_classes_of_digits(recipe: Recipe) -> None:
    """Check that a model for the digits has a class for each.

    Raises:
        InputError: it has another number of classes.
    """
    if recipe.model.classes != digits.CLASSES:
        raise InputError("model.classes", recipe.model.classes, f"digits have {digits.CLASSES} classes")


def check_calibration(recipe: Recipe, data: DataSettings, missing: list[str]) -> None:
    """Check that there are as many training images as the calibration for INT8 takes.

    Args:
        recipe: the recipe, which may ask for INT8.
        data: its images, with whole addresses.
        missing: images that this machine does not see; nothing is checked if there are any.

    Raises:
        InputError: there are fewer images.
    """
    asked = None if recipe.quantize is None else recipe.quantize.images
    if asked is None or data.train is None or missing:
        return
    rows = count_rows(data.train, key="data.train")
    images = rows if data.validation is not None else rows - max(1, round(data.holdout * rows))
    if asked > images:
        raise InputError("quantize.images", asked, f"there are {images} training images to choose from")


def _is_here(uri: str, key: str) -> bool:
    """Return whether this machine sees a file (or the folder of a glob).

    A bucket that does not answer from here may answer from the cluster.
    """
    try:
        return bool(storage.info(split_glob(uri)[0], key).type != fs.FileType.NotFound)
    except storage.UnreachableError:
        return False


def known_data(recipe: Recipe, dry_run: bool) -> tuple[DataSettings, str, list[str]]:
    """Check the images of a recipe.

    Returns:
        Their settings with whole addresses; a hash of all that results on them depend on; the images that
        this machine does not see (in a dry run only).

    Raises:
        InputError: images that cannot be used, or parts whose classes have different names.
    """
    data, classes = recipe.data, recipe.model.classes
    missing: list[str] = []
    if data.source == "digits":
        if dry_run:
            return data, "", []
        data = digits.prepare_digits(storage.absolute(recipe.storage))
    hashes: dict[str, str] = {}
    addresses: dict[str, str] = {}
    names: dict[str, Names] = {}
    for part in ("train", "validation", "test"):
        uri: str | None = getattr(data, part)
        if uri is None:
            continue
        addresses[part] = storage.absolute(uri, f"data.{part}")
        if dry_run and not _is_here(uri, f"data.{part}"):
            missing.append(uri)
            continue
        tolerant = data.bad_images == "skip"
        location, key, wanted = addresses[part], f"data.{part}", data.columns
        hashes[part] = remote_calls.call_interruptible(
            uri, check_table, location, classes, key=key, tolerant=tolerant, columns=wanted
        )
        names[part] = remote_calls.call_interruptible(
            uri, names_of, location, key=key, columns=wanted, every=True
        )
    check_alike(names, key="data")
    # the columns' content is in the hashes
    rest = data.model_dump(exclude={*addresses, *_COLUMNS})
    # the seed draws validation images that are held out of train; others do not depend on it
    drawn = () if data.validation is not None else ({"seed": recipe.seed},)
    return data.model_copy(update=addresses), digest(hashes, rest, *drawn), missing
