"""The content of the records of folders: checkpoints, INT8 models and files for engines.

Keys may be missing: records of earlier versions have fewer, and a record has only what is known of its model.
Readers therefore take a record as a plain mapping; these types are for the code that writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from trainers.data.preprocessing import Preprocessing


class Provenance(TypedDict, total=False):
    """The kind and the origin of a model; an INT8 folder takes it over from its float checkpoint.

    Attributes:
        method: the pruning method, or ``dense`` or ``structured``.
        sparsity: share of zeros in the pruned layers, 0…1.
        allocation: number of pruned weights by layer.
        costs: parameters and multiply-accumulates, dense and sparse (:class:`pruners.model.costs.Costs`).
        parent: SHA-256 of the weights of the model that it was made from.
        data: fingerprint of the data.
        git_commit: of the code.
        recipe_digest: hash of the recipe.
        sweep: name of the sweep.
    """

    method: str
    sparsity: float
    allocation: dict[str, int]
    costs: dict[str, int]
    parent: str
    data: str
    git_commit: str | None
    recipe_digest: str
    sweep: str


class PruningRecord(Provenance, total=False):
    """``pruning.json``.

    Attributes:
        format: :data:`trainers.checkpoint.folder.CHECKPOINT_FORMAT`.
        figures: what was measured of the model (:class:`trainers.loop.report.EpochReport`, its numbers).
        recipe: the settings of the job that made it.
        structured: what was cut, by a structured step (:meth:`trainers.structured.cut.Plan.facts`).
        source: file and set of weights that the model was imported from.
        packed_from: of a compressed folder, SHA-256 of the uncompressed weights.
        versions: of the packages that the result depends on.
        files: SHA-256 of each file of the folder.
    """

    format: str
    figures: Mapping[str, Any]
    recipe: dict[str, Any]
    structured: dict[str, Any]
    source: str
    packed_from: str
    versions: dict[str, str]
    files: dict[str, str]


# keys with the names of built-in types, which no class body can annotate
class _Builtins(TypedDict, total=False):
    float: str
    bytes: int


class QuantizationRecord(Provenance, _Builtins, total=False):
    """``quantization.json``.

    Attributes:
        format: :data:`trainers.quantization.int8_folder.INT8_FORMAT`.
        mode: ``dynamic``, ``static`` or ``qat``.
        engine: name and version of the engine that runs the model.
        float: SHA-256 of the float weights.
        zeros: number of pruned weights, each of which is 0 in the file.
        int8_share: share of the parameters that are int8.
        same_class: ``images`` compared, and the ``share`` for which INT8 and float predict the same class.
        figures: what was measured of the model as its engine runs it.
        probe: number of synthetic ``images``, their ``logits``, and their ``agreement`` with torch.
        bytes: size of ``model.onnx``.
        packed_from: of a compressed folder, SHA-256 of ``model.onnx``.
        versions: of the packages that the result depends on.
        files: SHA-256 of each file of the folder.
    """

    format: str
    mode: str
    engine: str
    zeros: int
    int8_share: float
    same_class: dict[str, Any]
    figures: Mapping[str, Any]
    probe: dict[str, Any]
    packed_from: str
    versions: dict[str, str]
    files: dict[str, str]


class ExportRecord(TypedDict, total=False):
    """``export.json``: a model's file for an engine.

    Attributes:
        format: :data:`trainers.deploy.checked.FORMAT`.
        kind: the export format.
        engine: that runs the file.
        type: data type that the engine computes in.
        file: what the engine is given.
        calibration: number of images that fixed the ranges of activations, if any did.
        preprocessing: of its images (:func:`trainers.data.preprocessing.preprocessing_of`).
        check: on which ``images`` its answers were compared with torch's, the ``tolerance``, and what came
            out in ``batches`` of each size.
        int8_share: share of the parameters that are int8, of an INT8 file.
        probe: number of synthetic ``images``, and their ``logits``.
        source: what is known of the checkpoint (:class:`Provenance`), and the hash of its ``weights``.
        versions: of the packages that the result depends on.
        files: SHA-256 of each file of the folder.
    """

    format: str
    kind: str
    engine: str
    type: str
    file: str
    calibration: int | None
    preprocessing: Preprocessing
    check: dict[str, Any]
    int8_share: float
    probe: dict[str, Any]
    source: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]


PROVENANCE_KEYS = tuple(Provenance.__annotations__)
"""The keys that an INT8 folder takes over from the record of its float checkpoint."""
