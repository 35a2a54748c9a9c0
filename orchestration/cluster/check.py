"""``espalier cluster check``: resources of a cluster, and whether its nodes can work together on a recipe."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.table import Table

from orchestration.cluster import node_probe
from orchestration.cluster.capacity import ClusterSize, check_size
from orchestration.cluster.connect import connect
from orchestration.recipe.schema import Recipe
from pruners.errors import InputError, first_line
from trainers import storage

_ANSWER_SECONDS = 90.0  # a node's first task imports what it needs


@dataclass
class Offer:
    """A node: its resources, its versions, its problems."""

    id: str
    address: str
    resources: dict[str, float]
    versions: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_cluster(
    address: str | None, recipe: Recipe | None, storage_uri: str | None
) -> tuple[list[Offer], list[str]]:
    """Check the nodes of a cluster, and whether they can work together.

    Args:
        address: of the cluster; ``None``: the one that is joined, or this machine.
        recipe: the recipe that must fit; ``None``: no check of a recipe.
        storage_uri: the storage, which every node must see; ``None``: no check of it.

    Returns:
        The nodes, and one line for each problem.

    Raises:
        InputError: no cluster answers at the address.
    """
    with connect(address) as size:
        nodes = probe(storage_uri, recipe.tracking.uri if recipe else None)
        problems = [f"{node.address}: {problem}" for node in nodes for problem in node.problems]
        return nodes, problems + _differences(nodes) + _misfits(recipe, size)


def check_storage(storage_uri: str) -> None:
    """Check that every node of the joined cluster can write to the storage, and sees the files of the others.

    Raises:
        InputError: a node cannot, or does not see them.
    """
    for node in probe(storage_uri, None):
        for problem in node.problems:
            expected = f"must be a place that every node reaches ({node.address}: {problem})"
            raise InputError("storage", storage_uri, expected)


def probe(storage_uri: str | None, uri: str | None) -> list[Offer]:
    """Ask every node of the cluster that is joined, by a task of its own."""
    cloudpickle.register_pickle_by_value(node_probe)
    nodes = [
        Offer(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]))
        for node in ray.nodes()
        if node["Alive"]
    ]
    nodes.sort(key=lambda node: ("node:__internal_head__" not in node.resources, node.address))
    folder = (
        None
        if storage_uri is None
        else f"{storage.absolute(storage_uri)}/.espalier-check-{uuid.uuid4().hex[:8]}"
    )
    waiting = [(node, _ask(node, node_probe.look, folder, uri, node.id)) for node in nodes]
    for node, answer in waiting:
        if report := _answer(node, answer):
            node.versions = report["versions"]
            node.problems += report["problems"]
    if folder is not None:
        _exchange(folder, [node for node in nodes if not node.problems])
    return nodes


def _exchange(folder: str, nodes: list[Offer]) -> None:
    """Let the first node read the files of all nodes, and the others its file; then delete all files."""
    if not nodes:
        return
    head, others = nodes[0], nodes[1:]
    unseen = _answer(head, _ask(head, node_probe.see, folder, [node.id for node in nodes])) or []
    waiting = [(node, _ask(node, node_probe.see, folder, [head.id])) for node in others]
    for node, answer in waiting:
        if node.id in unseen or _answer(node, answer):
            node.problems.append(f"does not share the storage with {head.address}")
    if head.id in unseen:
        head.problems.append("cannot read back what it wrote to the storage")
    for node in nodes:  # a storage that is not shared has a folder on each node
        if wrong := _answer(node, _ask(node, node_probe.remove, folder)):
            node.problems.append(f"cannot remove a file from the storage ({wrong})")


def _ask(node: Offer, function: Callable[..., Any], *arguments: Any) -> Any:
    on_node = NodeAffinitySchedulingStrategy(node.id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(function)
    return task.remote(*arguments)


def _answer(node: Offer, answer: Any) -> Any:
    try:
        return ray.get(answer, timeout=_ANSWER_SECONDS)
    except RayError as error:
        lines = str(getattr(error, "cause", None) or error).strip().splitlines()
        node.problems.append(f"runs no task ({lines[-1] if lines else type(error).__name__})")
    return None


def _differences(nodes: list[Offer]) -> list[str]:
    """Nodes whose versions are not those of the head, a line for each package."""
    answered = [node for node in nodes if node.versions]
    return [
        f"{node.address}: {package} {node.versions[package]}, the head has {version}"
        for node in answered[1:]
        for package, version in answered[0].versions.items()
        if node.versions[package] != version
    ]


def _misfits(recipe: Recipe | None, size: ClusterSize) -> list[str]:
    if recipe is None:
        return []
    try:
        check_size(recipe, size)
    except InputError as error:
        return [str(error)]
    return []


def offers(nodes: list[Offer]) -> Table:
    """The nodes as a table, the head first."""
    versions = list(nodes[0].versions) if nodes else []
    table = Table("node", *(name for name in ("CPUs", "GPUs", "memory", "accelerator")), *versions)
    for node in nodes:
        resources = node.resources
        kinds = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
        table.add_row(
            node.address,
            f"{resources.get('CPU', 0):g}",
            f"{resources.get('GPU', 0):g}",
            f"{resources.get('memory', 0) / 2**30:.1f} GiB",
            ", ".join(kinds) or "–",
            *(node.versions.get(package, "?") for package in versions),
        )
    return table


def check_through_client(
    address: str, recipe: dict[str, Any] | None, storage_uri: str | None
) -> tuple[list[Offer], list[str]]:
    """:func:`check_cluster` from a laptop through ``ray://``: it runs as a task on the cluster.

    Args:
        address: ``ray://HOST:10001``.
        recipe: as JSON, because the cluster may lack Espalier; ``None``: no check of a recipe.
        storage_uri: the storage, which every node must see; ``None``: no check of it.

    Returns:
        The nodes, and one line for each problem.

    Raises:
        InputError: no cluster answers, or it runs no task of ours.
    """
    from orchestration.cluster.connect import joined

    with joined(address):
        task = ray.remote(num_cpus=0, max_retries=0)(_check_on_cluster).remote(recipe, storage_uri)
        try:
            result: tuple[list[Offer], list[str]] = ray.get(task)
        except RayError as error:
            raise InputError("--address", address, f"runs no task of ours ({first_line(error)})") from None
        return result


def _check_on_cluster(
    recipe: dict[str, Any] | None, storage_uri: str | None
) -> tuple[list[Offer], list[str]]:
    return check_cluster(None, None if recipe is None else Recipe.model_validate(recipe), storage_uri)
