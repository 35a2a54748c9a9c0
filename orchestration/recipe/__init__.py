"""The recipe: schema, loading and validation, phases, jobs, reference of its keys."""

__all__ = [
    "distribution",
    "dotted_keys",
    "jobs",
    "loading",
    "phases",
    "population",
    "reference",
    "schema",
    "search",
    "validation",
]
