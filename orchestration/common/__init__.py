"""Small things that all of orchestration shares: redaction, units, ports, the terminal."""

__all__ = [
    "environment",
    "network",
    "redaction",
    "terminal",
    "units",
]
