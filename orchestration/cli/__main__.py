"""``python -m orchestration.cli``, as the command ``espalier``."""

from orchestration.cli.app import main

main()
