"""Find the columns of a Parquet table with images and labels, and the names of the classes in its schema.

Tables of the Hugging Face hub have both in their metadata (``features``, with ``Image`` and ``ClassLabel``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruners.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa  # recipes are read without it


@dataclass(frozen=True)
class Columns:
    """The columns that a user named; the others are found in each table's schema."""

    image: str | None = None
    label: str | None = None

    @property
    def named(self) -> bool:
        """Return whether the user named a column."""
        return self != Columns()

    def find(self, schema: pa.Schema, uri: str, key: str) -> tuple[str, str]:
        """Find the image column and the label column of a table.

        Args:
            schema: the table's schema.
            uri: the table, for error messages.
            key: the recipe key that named it, for error messages.

        Returns:
            Names of the image column and of the label column.

        Raises:
            InputError: there is none, or there are several and none is named.
        """
        return self.find_image(schema, uri, key), self.find_label(schema, uri, key)

    def find_image(self, schema: pa.Schema, uri: str, key: str) -> str:
        """Find the image column.

        It is the column that the user named, else the only ``Image`` of the metadata, else ``image``, else
        the only struct with a field ``bytes``.

        Args:
            schema: the table's schema.
            uri: the table, for error messages.
            key: the recipe key that named it, for error messages.

        Returns:
            The column's name.

        Raises:
            InputError: there is none of these, or there are several.
        """
        typed = _of_kind(schema, "Image") or [field.name for field in schema if _holds_bytes(field.type)]
        column, why = _choose("image", self.image, typed, schema.names)
        if column is None:
            raise InputError(key, uri, why)
        return column

    def find_label(self, schema: pa.Schema, uri: str, key: str) -> str:
        """Find the label column.

        It is the column that the user named, else the only ``ClassLabel`` of the metadata, else ``label``.

        Args:
            schema: the table's schema.
            uri: the table, for error messages.
            key: the recipe key that named it, for error messages.

        Returns:
            The column's name.

        Raises:
            InputError: there is none of these, or there are several.
        """
        column, why = _choose("label", self.label, _of_kind(schema, "ClassLabel"), schema.names)
        if column is None:
            raise InputError(key, uri, why)
        return column


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """The part of a command's options that names the columns of its images."""

    image_column: str | None = None
    label_column: str | None = None

    @property
    def columns(self) -> Columns:
        """The columns that the command's user named."""
        return Columns(self.image_column, self.label_column)


def class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """The names of the classes by their labels, as the metadata has them; ``()`` if it does not."""
    feature = _features(schema).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _choose(what: str, named: str | None, typed: list[str], columns: list[str]) -> tuple[str | None, str]:
    """The column of images or labels; or ``None``, with the reason."""
    has = f"it has {', '.join(columns)}"
    if named is not None:
        return (named, "") if named in columns else (None, f"needs a column {named!r}; {has}")
    if what in columns and (what in typed or not typed):
        return what, ""
    choices = typed + [what] * (what in columns)
    if len(choices) > 1:
        several = f"has several columns that may hold {what}s ({', '.join(choices)})"
        return None, f"{several}: name one of them by {what}_column"
    if choices:
        return choices[0], ""
    hint = f" (name the one with {what}s by {what}_column)" if len(columns) > 1 else ""
    return None, f"needs a column {what!r}; {has}{hint}"


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The description of the columns that ``datasets`` and the hub write into a schema."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = content["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _of_kind(schema: pa.Schema, kind: str) -> list[str]:
    features = _features(schema)
    return [
        name
        for name in schema.names
        if isinstance(features.get(name), dict) and features[name].get("_type") == kind
    ]


def _holds_bytes(kind: pa.DataType) -> bool:
    find = getattr(kind, "get_field_index", None)  # only structs have it
    return find is not None and find("bytes") >= 0
