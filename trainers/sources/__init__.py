"""Labelled images as people have them: Parquet, folders, WebDataset, scikit-learn's digits; conversion."""

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
