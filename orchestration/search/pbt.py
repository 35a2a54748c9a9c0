"""Population-based training (Jaderberg et al., 2017) of gradual runs: Ray's own, on a cluster of any size.

Trials are compared now and then. Each of the worst then continues from a checkpoint of one of the best, with
slightly changed values. A trial reports which member of the population it is at that time
(:class:`orchestration.search.pbt_trial.Member`).
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from orchestration.search.pbt_trial import MEMBER, origin_of, read_member_checkpoint
from orchestration.search.space import Space, contains
from orchestration.state.trial_log import History, TrialLog
from trainers import storage


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Ray's scheduler, with a limit of trials at once and copies of checkpoints that others continue from.

    Tune starts every pending trial itself. Trials are therefore paused, and only the scheduler starts them.

    Args:
        space: the searched keys and their distributions, all of them floats.
        runs: folder or URI of the Train runs.
        every: epochs at the final sparsity between two comparisons of a trial.
        share: share of the population that is replaced by as many of the best, at most 0.5.
        epochs: length of a run; a trial that has reached it is not changed any more.
        slots: number of trials that run at once.
        seed: of all random choices.
    """

    def __init__(
        self, space: Space, runs: str, *, every: int, share: float, epochs: int, slots: int, seed: int
    ) -> None:
        random.seed(seed)  # Ray draws from both
        np.random.seed(seed % 2**32)
        # a Tune function around a whole run cannot be called back, so its process goes with it
        warnings.filterwarnings("ignore", message="Consider boosting PBT performance")
        super().__init__(
            time_attr="recovery_epochs",
            metric="score",
            mode="max",
            perturbation_interval=every,
            burn_in_period=every,
            hyperparam_mutations=domains(space),
            quantile_fraction=share,
            custom_explore_fn=lambda values: within(space, values),
            log_config=False,
        )
        self._runs, self._epochs, self._slots = runs, epochs, slots

    def set_max_concurrency(self, slots: int) -> None:
        """Set how many trials run at once; running ones are not stopped."""
        self._slots = slots

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        trial.set_status(Trial.PAUSED)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The waiting trial with the fewest epochs, if there is room for one."""
        trials = tune_controller.get_trials()
        busy = sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in trials)
        waiting = [trial for trial in trials if trial.status == Trial.PAUSED]
        if busy >= self._slots or not waiting:
            return None
        return min(waiting, key=lambda trial: self._trial_state[trial].last_train_time)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get("epoch", 0) >= self._epochs:
            return str(TrialScheduler.CONTINUE)
        before = self._num_perturbations
        decision = super().on_trial_result(tune_controller, trial, result)
        if self._num_perturbations > before:
            self._hold(trial)
        live = sum(not trial.is_finished() for trial in tune_controller.get_trials())
        if decision == TrialScheduler.PAUSE and live <= self._slots:
            return str(TrialScheduler.CONTINUE)  # every waiting trial has a slot
        return str(decision)

    def _hold(self, trial: Trial) -> None:
        """Copy the checkpoint that a trial continues from: its owner keeps only its newest ones.

        If the copy fails, the trial fails: it finds no checkpoint to begin from.
        """
        origin = origin_of(self._runs, trial.trial_id)
        storage.remove(origin)
        try:
            storage.copy(read_member_checkpoint(trial.checkpoint)["checkpoint"], origin)
        except OSError:
            storage.remove(origin)


def domains(space: Space) -> dict[str, Any]:
    """Tune's distributions of a space of floats."""
    return {
        key: (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
        for key, domain in space.items()
    }


def within(space: Space, values: Mapping[str, Any]) -> dict[str, float]:
    """The nearest values that lie in the space."""
    return {key: float(min(max(values[key], domain.low), domain.high)) for key, domain in space.items()}


def draws(
    space: Space, log: TrialLog, first: Sequence[dict[str, Any]], trials: int, seed: int
) -> BasicVariantGenerator:
    """Make the given proposals, then random ones; an interrupted search has those of the undisturbed one.

    Interrupted trials come first. They are matched by their values: if two have the same values, only one
    resumes; the other starts again.

    Args:
        space: the searched keys and their distributions.
        log: the trial log of the search.
        first: proposals with which a new search begins.
        trials: the number of proposals.
        seed: of the random proposals.

    Returns:
        Tune's generator of the proposals.
    """
    pending = [values for values in log.pending if contains(space, values)]
    apart = [values for number, values in enumerate(pending) if values not in pending[:number]]
    known = len(log.trials) + len(log.pending)
    missing = max(0, trials - len(apart))
    anew = itertools.islice(itertools.chain(first, _random(space, seed)), known, known + missing)
    return BasicVariantGenerator(points_to_evaluate=[*apart[:trials], *anew])


def _random(space: Space, seed: int) -> Iterator[dict[str, float]]:
    """Random values of each key, without end."""
    generator = np.random.default_rng(seed)
    while True:
        yield {
            key: float(
                np.exp(generator.uniform(np.log(domain.low), np.log(domain.high)))
                if domain.log
                else generator.uniform(domain.low, domain.high)
            )
            for key, domain in space.items()
        }


def history(member: Mapping[str, Any]) -> History:
    """The figures that record where a trial's model came from; empty outside of a population."""
    taken = member.get("taken")
    return {} if taken is None else {"pbt.exploits": len(taken), "pbt.taken": taken}


def take_note(
    log: TrialLog, number: int, result: Mapping[str, Any], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """Return the member that a result reports; the first result of a member is logged.

    Args:
        log: the trial log of the search.
        number: number of the trial.
        result: what the trial reported.
        numbers: number of each trial by Tune's name of it, for the trials that it took weights from.

    Returns:
        The member as the log holds it; empty if the result reports none.
    """
    if MEMBER not in result:
        return {}
    member = dict(result[MEMBER])
    member["taken"] = [
        {**step, "trial": numbers.get(step["trial"], step["trial"])} for step in member["taken"]
    ]
    old = log.member(number)
    if old is None or old["run"] != member["run"]:
        log.note(number, member["values"], member)
        if old is not None:  # no other member continues from it: it was among the worst
            storage.remove(f"{member['runs']}/{old['run']}")
    return member
