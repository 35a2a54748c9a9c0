"""Labelled images as people have them: Parquet, folders, WebDataset; conversion, audit."""

__all__ = [
    "audit",
    "classes",
    "columns",
    "convert",
    "files",
    "folders",
    "parquet",
    "webdataset",
]
