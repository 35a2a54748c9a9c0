"""Export a model by ``torch.export``: a graph of operations for any batch size, in a ``.pt2`` file.

The file is a zip of JSON (the graph) and raw weights. ``torch.export.save`` would add two things, which are
left out: the example input, which is pickled, and the path of each operation's source on this machine.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from pruners.errors import InputError, first_line

TORCH_FILE = "model.pt2"


def captured(model: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """Capture the graph of a model in float32, in eval mode and on the CPU, for batches of any size.

    Args:
        model: a timm model; it is left as it is.
        input_size: (channels, height, width).

    Raises:
        InputError: a model that cannot be captured, or not with a free batch size.
    """
    plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    example = torch.zeros(2, *input_size)  # torch would treat a batch of one as a constant
    try:
        program = torch.export.export(plain, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch's own errors, and whatever a model raises
        expected = f"torch.export cannot capture it with a free batch size ({first_line(error)})"
        raise InputError("model", type(model).__name__, expected) from None
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def export_torch(
    model: nn.Module, path: Path, input_size: tuple[int, int, int], metadata: Mapping[str, str]
) -> None:
    """Write a model as a ``.pt2`` file.

    Args:
        model: a timm model.
        path: the file to write.
        input_size: (channels, height, width).
        metadata: kept in the file as extra files, by their names.

    Raises:
        InputError: as :func:`captured`.
    """
    torch.export.save(captured(model, input_size), path, extra_files=dict(metadata))


def read_metadata(path: Path, *names: str) -> dict[str, str]:
    """Extra files of a ``.pt2`` file by their names; missing ones are left out."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        entries = {entry.partition("/extra/")[2]: entry for entry in archive.namelist()}
        return {name: archive.read(entries[name]).decode("utf-8") for name in names if name in entries}
