"""Ray's private API, as far as the cluster package needs it, in one place for upgrades.

Checked with Ray 2.60.0. Tune's private API lies in ``orchestration/search/runner.py``.
"""

from __future__ import annotations

import ray

PACKAGING_LOGGER = "ray._private.runtime_env.packaging"
"""Logger that writes a line for each folder that goes with a job."""


def resources_with_autoscaling() -> dict[str, float]:
    """Resources that the cluster that is joined can grow to; empty where it does not grow.

    Ray has no public call for it: ``ray.cluster_resources()`` counts the nodes that are there.
    """
    possible: dict[str, float] | None = ray._private.state.state.get_max_resources_from_cluster_config()
    return possible or {}


def logs_folder() -> str:
    """Folder in which the cluster that is joined keeps its logs on this machine.

    Ray's State API lists log files by node, and does not say where they lie.
    """
    return str(ray._private.worker._global_node.get_logs_dir_path())
