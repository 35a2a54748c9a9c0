"""``make check-gpu``, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(ROOT / "experiments" / "benchmarks" / "check_gpu.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, program, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_check_gpu__without_a_gpu_is_one_line() -> None:
    done = check()
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "check_gpu: --device = cuda: torch finds no GPU here; 'cpu' checks the program alone"
    ]


BLOCK = """
import importlib.abc, runpy, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "mlflow", "optuna", "click", "rich", "orchestration"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
program = sys.argv[1]
sys.path.insert(0, program.rpartition("/")[0])
runpy.run_path(program)
"""


def test_check_gpu__needs_no_ray_and_nothing_else_of_a_cluster_s() -> None:
    program = ROOT / "experiments" / "benchmarks" / "check_gpu.py"
    command = [sys.executable, "-c", BLOCK, str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
def test_check_gpu__its_own_checks_hold_on_the_cpu() -> None:
    small = ["--architecture", "vit_tiny_patch16_224", "--batch", "4", "--steps", "3", "--layers", "1"]
    done = check("--device", "cpu", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("all held")
    held = [line for line in done.stdout.splitlines() if line.endswith("  ok")]
    assert len(held) == 8  # masks and weights at three sparsities, zeros, the loss
