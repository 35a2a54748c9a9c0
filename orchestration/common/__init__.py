"""Small things that all of orchestration shares: redaction, units, ports, the terminal."""

__all__ = [
    "defaults",
    "environment",
    "hashing",
    "network",
    "redaction",
    "terminal",
    "units",
]
