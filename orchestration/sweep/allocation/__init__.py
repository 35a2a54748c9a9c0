"""The allocation search of a method, and the rounds of eliminations that it reads."""

__all__ = ["rounds", "search"]
