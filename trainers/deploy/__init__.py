"""Files for engines: the formats, a file written and checked by its engine, and a folder that is run."""

__all__ = [
    "checked",
    "formats",
    "runnable",
]
