"""An engine in a process of its own: what it answers, what it measures, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tables import dense_folder, tiny
from torch import nn

from pruners import prune
from trainers.config.engines import Choice
from trainers.data.preprocessing import Images, pattern_images, preprocessing_of
from trainers.engines import process
from trainers.engines.process import EngineError, EngineProcess, peak_memory
from trainers.engines.registry import Placement, keeps_2_of_4, load
from trainers.engines.sparse_linear import SparseRows

TORCH, CSR = Choice("torch", "float32"), Choice("csr", "float32")
ALONE = Placement(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    model, _ = tiny()
    path = tmp_path / "images.npy"
    np.save(path, pattern_images(preprocessing_of(model), 7))
    return path


def test_process__it_answers_and_is_timed(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a folder of this name where the command is typed is another project's
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers/__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    model, _ = tiny()
    with EngineProcess(TORCH, folder, ALONE, images) as process:
        answers = process.answers(images, 3)
        with torch.no_grad():
            expected = model(torch.from_numpy(np.load(images))).numpy()
        assert np.allclose(answers, expected, atol=1e-5)
        assert {path.name for path in tmp_path.iterdir()} == {"images.npy", "trainers"}
        first, second = process.warm(1), process.warm(7)
        assert 1e8 < first <= second < 4e9
        assert 0 < process.seconds(7, 2) < 60
        with pytest.raises(EngineError, match="FileNotFoundError"):
            process.answers(tmp_path / "none.npy", 3)
        assert process.seconds(1, 1) > 0, "a question that failed ends nothing"


def test_process__what_cannot_be_loaded_is_said_in_a_line(images: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        EngineProcess(TORCH, tmp_path / "none", ALONE, images)
    assert "no such folder" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_process__an_engine_that_dies_says_how(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    output = "x" * 200_000  # more than a pipe holds
    script.write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.stderr.write('{output}\\nlast words\\n')\nos.abort()\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(script))
    with pytest.raises(EngineError, match=r"its process ended \(signal 6\): last words"):
        EngineProcess(TORCH, folder, ALONE, images)


def test_process__peak_memory_is_of_this_process() -> None:
    before = peak_memory()
    held = np.ones(30_000_000)
    assert peak_memory() - before > 0.8 * held.nbytes or before > 1e9


def test_process__openvino_sends_nothing_home(tmp_path: Path) -> None:
    """Its tools, and NNCF's, note a client's number in the home folder before they send anything."""
    script = (
        "from trainers.optional_imports import import_openvino; import_openvino(); import nncf; "
        "from openvino.tools import ovc"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert not list(tmp_path.rglob("*cid*"))


def test_process__openvino_leaves_signals_alone() -> None:
    """On processors with AVX-512 a second ``Core`` that went after the first left a freed signal stack."""
    script = (
        "import gc, os, signal; from trainers.optional_imports import openvino_core; "
        "cores = [openvino_core(), openvino_core()]; "
        "[core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES') for core in cores]; "
        "cores.pop(0); gc.collect(); cores.pop(); gc.collect(); "
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled')); os.kill(os.getpid(), signal.SIGUSR1)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert ended.stdout == "handled\n"


# layers without their zeros


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4, 5)])
def test_process__sparse_rows_compute_the_same(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(5, 9, bias=bias)
    with torch.no_grad():
        dense.weight[torch.rand(9, 5) < 0.7] = 0
        dense.weight[3] = 0  # a row of nothing else
    inputs = torch.randn(shape)
    assert torch.allclose(SparseRows(dense)(inputs), dense(inputs), atol=1e-6)


def test_process__csr_runs_a_pruned_model(tmp_path: Path) -> None:
    from trainers.checkpoint.folder import save_checkpoint

    model, arguments = tiny()
    report = prune(model, "magnitude", 0.75)
    record = {"method": "magnitude", "sparsity": 0.75, "allocation": report.allocation}
    save_checkpoint(tmp_path / "pruned", model, model_args=arguments, masks=report.masks, record=record)
    pictures: Images = pattern_images(preprocessing_of(model), 3)
    with torch.no_grad():
        expected = model(torch.from_numpy(pictures)).numpy()
    changed: list[str] = []
    before = nn.Module.set_submodule

    def noted(self: nn.Module, name: str, module: nn.Module) -> None:
        changed.append(name)
        before(self, name, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "set_submodule", noted)
        run = load(CSR, tmp_path / "pruned", Placement(torch.get_num_threads()))
    assert len(changed) == 8
    assert np.allclose(run(pictures), expected, atol=1e-5)


def test_process__2_of_4_is_known() -> None:
    layer = nn.Linear(64, 32)
    assert not keeps_2_of_4(layer)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    assert keeps_2_of_4(layer)
    with torch.no_grad():
        layer.weight[0, 0] = 1
    assert not keeps_2_of_4(layer)
    narrow = nn.Linear(8, 4)
    nn.init.zeros_(narrow.weight)
    assert not keeps_2_of_4(narrow)


def test_process__pictures_are_the_same_bits_everywhere() -> None:
    about = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3}
    pictures = pattern_images(about, 6)
    assert pictures.dtype == np.float32
    assert np.array_equal(pictures, pattern_images(about, 8)[:6])
    pixels = 255 * (pictures * 0.25 + 0.5)
    assert np.allclose(pixels, pixels.round(), atol=1e-3)
    assert (pictures.std(axis=(1, 2, 3)) > 0.1).all()
    assert len({image.tobytes() for image in pictures}) == 6
