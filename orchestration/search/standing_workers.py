"""Ray Train runs of one process, one after the other, that reuse the same workers.

For every run Ray Train starts new processes: a controller, a queue to Tune, a cleaner, a barrier, and the
workers, each of which imports torch and timm. Here the controller runs in the process that starts the run. A
group of workers whose run has ended in order, or was stopped by a message, waits for the next run. If
anything has failed in a group, Ray ends it as usual, so that a retry begins in new processes.

This module uses Ray's private API: the controller, its callbacks and the worker group; checked with 2.60.0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import invoke_context_managers
from ray.train.v2.api.result import Result

from trainers.ray_worker import RUN, begin_again, stop_training

_UNNEEDED = (PlacementGroupCleanerCallback, DatasetsCallback)  # the pool has a cleaner, no run has Ray Data
_STOP_SECONDS = 15.0  # for workers to come to a step where they can stop; after that they are killed
_LOOK_SECONDS = 0.02
_ANSWER_SECONDS = 10.0  # for workers at rest to say that they are alive


class WorkerPool(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """The idle workers of one process, and Ray's cleaner, which frees their resources after a kill."""

    def __init__(self) -> None:
        self._resting: tuple[WorkerGroupContext, WorkerGroupState] | None = None
        self._cleaner: PlacementGroupCleanerCallback | None = None

    def take(self, context: WorkerGroupContext) -> WorkerGroupState | None:
        """The idle workers; ``None`` if there are none, other ones are needed, or one of them has died."""
        if self._resting is None:
            return None
        before, state = self._resting
        if _size(before) == _size(context):
            questions = [worker.actor.get_metadata.remote() for worker in state.workers]
            with suppress(RayError):
                ray.get([*questions, state.sync_actor.reset.remote()], timeout=_ANSWER_SECONDS)
                self._resting = None
                return state
        self.release()
        return None

    def keep(self, context: WorkerGroupContext, state: WorkerGroupState) -> None:
        """Keep the workers of a run that has ended for the next run."""
        self._resting = context, state

    def release(self) -> None:
        """End the idle workers, if there are any, and free their resources."""
        if self._resting is not None:
            _, state = self._resting
            self._resting = None
            state.shutdown()

    def close(self) -> None:
        """End the idle workers, and the cleaner."""
        self.release()
        if self._cleaner is not None:
            self._cleaner.before_controller_abort()
            self._cleaner = None

    def after_controller_start(self, train_run_context: Any) -> None:
        # a driver's resources are freed when its job ends; an actor may be killed long before
        if self._cleaner is None and _own_actor() is not None:
            self._cleaner = PlacementGroupCleanerCallback()
            self._cleaner.after_controller_start(train_run_context)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        if self._cleaner is not None:
            self._cleaner.after_worker_group_start(worker_group)


class StandingTrainer(TorchTrainer):  # type: ignore[misc]
    """A run whose controller is in this process, and whose workers come from a pool and return to it.

    Args:
        pool: the pool of this process.
        callback: is called in this process with the reports of the workers.
    """

    def __init__(self, *arguments: Any, pool: WorkerPool, callback: UserCallback, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pool, self._callback = pool, callback
        self._stopping = False

    def stop(self) -> None:
        """Have the run end soon; :meth:`fit` then raises :class:`asyncio.CancelledError` in its thread."""
        self._stopping = True

    def _create_default_callbacks(self) -> list[Any]:
        ours = UserCallbackHandler(user_callbacks=[self._callback], train_run_context=self.train_run_context)
        usual = super()._create_default_callbacks()
        kept = [callback for callback in usual if not isinstance(callback, _UNNEEDED)]
        return [*kept, self._pool, ours]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        if not self.scaling_config.elasticity_enabled and not _grows():
            arguments["scaling_policy"] = _AsItIs(self.scaling_config)
        controller = _Controller(**arguments, stopping=lambda: self._stopping)
        asyncio.run(controller.run())
        return controller.get_result()


class _AsItIs(FixedScalingPolicy):  # type: ignore[misc]
    """Ray's policy for a fixed number of workers, without its requests for nodes, which need an actor.

    It is used on clusters without autoscaling, where such requests have no effect.
    """

    def _send_resource_request(self) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...


class _Controller(TrainController):  # type: ignore[misc]
    """Ray's controller, which also checks whether the run must stop each time it polls its workers."""

    def __init__(self, *, stopping: Callable[[], bool], **arguments: Any) -> None:
        self._stopping = stopping
        super().__init__(**arguments)

    async def run(self) -> None:
        try:
            await super().run()
        except asyncio.CancelledError:
            if self._worker_group is not None:
                self._worker_group.stop()
                self._shutdown_worker_group()
            await self._controller_callback_manager.async_invoke("before_controller_shutdown")
            raise

    async def _poll_workers(self) -> Any:
        if self._stopping():
            raise asyncio.CancelledError
        return await super()._poll_workers()


class _StandingGroup(WorkerGroup):  # type: ignore[misc]
    """Ray's worker group, which takes idle workers from the pool, and returns its workers to the pool."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pool = next(callback for callback in self._callbacks if isinstance(callback, WorkerPool))
        self._stopped = False

    def stop(self) -> None:
        """Ask the workers to stop, and wait until they have stopped; their reports are not read meanwhile."""
        state = self.get_worker_group_state()
        deadline = time.monotonic() + _STOP_SECONDS
        asked = self.execute_async(stop_training, self._train_run_context.train_loop_config[RUN])
        with suppress(RayError):
            ray.get(asked, timeout=_STOP_SECONDS)
            while time.monotonic() < deadline:
                polls = [worker.actor.poll_status.remote() for worker in state.workers]
                statuses = ray.get(polls, timeout=max(deadline - time.monotonic(), 0.0))
                if not any(status.running for status in statuses):
                    self._stopped = all(status.error is None for status in statuses)
                    return
                time.sleep(_LOOK_SECONDS)

    def shutdown(self) -> None:
        if not self._ended_in_order() or self._train_run_context.scaling_config.elasticity_enabled:
            super().shutdown()
            return
        state = self.get_worker_group_state()
        with invoke_context_managers([callback.on_worker_group_shutdown for callback in self._callbacks]):
            for callback in self._callbacks:
                callback.before_worker_group_shutdown(self)
            self._clear_state()
            self._pool.keep(self._worker_group_context, state)
            for callback in self._callbacks:
                callback.after_worker_group_shutdown(self._worker_group_context)

    def _ended_in_order(self) -> bool:
        status = self.get_latest_poll_status()
        if status is None or status.errors or status.get_preemption_info() is not None:
            return False
        return self._stopped or bool(status.finished)

    def _start(self) -> None:
        state = self._pool.take(self._worker_group_context)
        if state is None:
            super()._start()
            return
        try:
            self._start_on(state)
        except BaseException:
            self._clear_state()
            state.shutdown()
            raise

    def _start_on(self, state: WorkerGroupState) -> None:
        """Begin the run on existing workers, in the same steps as Ray begins it on new ones."""
        context, workers = self._worker_group_context, state.workers
        with invoke_context_managers([callback.on_worker_group_start for callback in self._callbacks]):
            for callback in self._callbacks:
                callback.before_worker_group_start(context)
            self._replica_groups = [
                ReplicaGroup([worker], context.resources_per_worker, self._replica_group_callbacks)
                for worker in workers
            ]
            ranks = [worker.distributed_context.world_rank for worker in workers]
            self._worker_rank_to_replica_group_rank = {rank: rank for rank in ranks}
            self._init_train_context(workers, state.sync_actor)
            self._worker_group_state = state
            self.execute(begin_again)
            for callback in self._callbacks:
                callback.after_worker_group_start(self)
        ray.get([worker.actor.run_train_fn.remote(context.train_fn_ref) for worker in workers])
        for callback in self._callbacks:
            callback.after_worker_group_training_start(self)

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        tasks = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=_own_actor(),  # Ray's own method fails in a driver, which is none
                **{name: values[rank] for name, values in train_context_args.items()},
            )
            for rank, worker in enumerate(workers)
        ]
        ray.get(tasks)
        self._decorate_worker_log_file_paths(workers)


_Controller.worker_group_cls = _StandingGroup


def _grows() -> bool:
    """Return whether the cluster has autoscaling."""
    return bool(ray._private.state.state.get_max_resources_from_cluster_config())


def _own_actor() -> Any | None:
    """The actor that this process is; ``None`` in a driver."""
    context = ray.get_runtime_context()
    return None if context.get_actor_id() is None else context.current_actor


def _size(context: WorkerGroupContext) -> Any:
    """The settings that must be equal for workers to serve another run."""
    return (
        context.num_workers,
        context.resources_per_worker,
        context.placement_strategy,
        context.label_selector,
    )
