"""The recipe: schema, loading and validation, phases, jobs, reference of its keys."""

__all__ = [
    "jobs",
    "loading",
    "phases",
    "population",
    "reference",
    "schema",
    "search",
]
