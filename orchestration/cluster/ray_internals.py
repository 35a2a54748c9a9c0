"""Ray's private API, as far as the cluster package needs it, in one place for upgrades.

Checked with Ray 2.60.0. Tune's private API lies in ``orchestration/search/runner.py``.
"""

from __future__ import annotations

import ray

PACKAGING_LOGGER = "ray._private.runtime_env.packaging"
"""Logger that writes a line for each folder that is sent with a job."""


def resources_with_autoscaling() -> dict[str, float]:
    """The largest resources of the joined cluster with autoscaling; empty if it does not autoscale.

    Ray has no public call for this: ``ray.cluster_resources()`` counts the present nodes only.
    """
    possible: dict[str, float] | None = ray._private.state.state.get_max_resources_from_cluster_config()
    return possible or {}


def logs_folder() -> str:
    """The folder of this machine in which the joined cluster keeps its logs.

    Ray's State API lists log files by node, and does not give their folder.
    """
    return str(ray._private.worker._global_node.get_logs_dir_path())
