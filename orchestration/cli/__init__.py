"""The command line: options and help (click); the work is done in other packages."""

from orchestration.cli.app import main

__all__ = ["main"]
