"""The proposals of a search: Optuna's samplers, fed from the trial log.

A resumed search continues as if it had not been interrupted, because its sampler is brought into the same
state:

- TPE, random and GP depend on the results only, and draw for each proposal from the seed and its number. They
  get the results from the log.
- CMA-ES and NSGA-II also depend on their generations, which cannot be set. All proposals and results of the
  log are therefore replayed, in their order.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray.tune.search import ConcurrencyLimiter, Searcher

from orchestration.search.space import contains, from_optuna, inside, to_optuna
from orchestration.state.trial_log import TrialLog, TrialRecord

if TYPE_CHECKING:
    from orchestration.search.spec import Search

optuna.logging.set_verbosity(optuna.logging.ERROR)
ROUND = 500  # trials
_MOST_RESULTS = 1000
_ATTEMPTS = 5
_MOST_IN_GENERATION = 50
_POPULATION = "population"
_SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.RandomSampler,  # draws nothing: all points of the grid are given
    "cmaes": optuna.samplers.CmaEsSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "gp": optuna.samplers.GPSampler,
}
_BY_GENERATIONS = {"cmaes", "nsga2"}


class Proposals:
    """The proposals of one search, by the numbers of their trials.

    Attributes:
        numbers: number of each trial by Tune's name of it.
        study: Optuna's study.
    """

    def __init__(self, search: Search, log: TrialLog) -> None:
        self._search, self._log, self._space = search, log, search.space
        self.numbers: dict[str, int] = {}
        self._options: dict[str, Any] = {}
        if search.sampler == "nsga2":  # a search that is resumed with more trials keeps its population size
            size = log.settings.setdefault(_POPULATION, population(search.trials))
            self._options["population_size"] = size
        self._broken = {
            number: values for number, values in log.broken.items() if contains(search.space, values)
        }
        self._waiting = deque(self._broken.items())
        self._given = deque(self._not_tried())
        self.study = self._new_study()
        self._study_numbers: dict[int, int] = {}  # number of each trial in the study
        self._tried: set[str] = set()
        if search.sampler not in _BY_GENERATIONS:
            self._tell_results()
        elif not self._again():
            search.say(
                f"      {search.sampler} begins with new generations: what earlier versions recorded of "
                "trials, or another version of Optuna, does not let it go on with those it had"
            )
            self._tell_results()

    def _not_tried(self) -> list[dict[str, Any]]:
        """Given proposals that were not tried yet; a proposal that is given twice is tried twice."""
        known = [(record.values, record.given) for record in self._log.ended]
        known += [(values, self._log.is_given(number)) for number, values in self._broken.items()]
        untried: list[dict[str, Any]] = []
        for wanted in self._search.first:
            tried = next((record for record in known if self._comes_of(wanted, *record)), None)
            if tried is None:
                untried.append(wanted)
            else:
                known.remove(tried)
        return untried

    def _comes_of(self, wanted: dict[str, Any], values: dict[str, Any], given: bool) -> bool:
        """Return whether ``values`` come from the given proposal ``wanted``, as far as the space has it."""
        part = inside(self._space, wanted)
        same = all(values.get(key) == value for key, value in part.items())
        return same and (given or len(part) == len(self._space))

    def begin_round(self) -> None:
        """Begin a round of trials: after very many, the sampler gets only the best and the newest results."""
        if self._search.sampler not in _BY_GENERATIONS and self._log.proposed > _MOST_RESULTS:
            self._tell_results()

    @property
    def room(self) -> int:
        """How many trials are left in the round, interrupted ones included."""
        return (-self._log.proposed) % ROUND + len(self._waiting) or ROUND

    def ask(self, trial_id: str) -> dict[str, Any]:
        """The proposal of one of Tune's trials; interrupted ones come first."""
        if self._waiting:
            number, values = self._waiting.popleft()
        else:
            number = self._log.proposed
            given = self._given.popleft() if self._given else None
            values = self._propose(number, given)
            self._log.ask(number, values, given=given is not None)
        self.numbers[trial_id] = number
        return values

    def tell(self, record: TrialRecord) -> None:
        """Tell the sampler the results of a trial that has ended."""
        self._broken.pop(record.number, None)
        position = self._study_numbers.pop(record.number, None)
        if position is None:
            return
        results = self._results(record)
        if results is None:
            self.study.tell(position, state=TrialState.FAIL)
        else:
            self.study.tell(position, results)

    def _propose(self, number: int, given: dict[str, Any] | None) -> dict[str, Any]:
        """Propose the values of a trial.

        Args:
            number: of the trial.
            given: values to try; for values outside the space the sampler chooses others.

        Returns:
            The values. They differ from those of earlier trials, which would give the same result again, if
            the sampler finds such values in a few attempts: a child of NSGA-II may equal its parent, and
            small spaces have few points.
        """
        for attempt in range(_ATTEMPTS):
            if self._search.sampler not in _BY_GENERATIONS:  # those keep one sampler, whose state is replayed
                self.study.sampler = self._sampler(number, attempt)
            if given is not None:
                self.study.enqueue_trial(to_optuna(self._space, inside(self._space, given)))
            trial = self.study.ask(fixed_distributions=self._space)
            values = from_optuna(self._space, trial.params)
            if given is not None or _key(values) not in self._tried:
                break
            if attempt < _ATTEMPTS - 1:
                self.study.tell(trial, state=TrialState.FAIL)
        self._tried.add(_key(values))
        self._study_numbers[number] = trial.number
        return values

    def _sampler(self, *position: int) -> optuna.samplers.BaseSampler:
        seed = np.random.SeedSequence([self._search.seed, *position]).generate_state(1)
        return _SAMPLERS[self._search.sampler](seed=int(seed[0]), **self._options)

    def _new_study(self) -> optuna.Study:
        directions = ["maximize"] + (["minimize"] if self._search.cost else [])
        return optuna.create_study(directions=directions, sampler=self._sampler())

    def _results(self, record: TrialRecord) -> list[float] | None:
        """The values of a trial's objectives for the sampler; ``None`` for a failed trial."""
        figures: dict[str, Any] = {**record.metrics, "score": record.score}
        goals = ["score"] + ([self._search.cost] if self._search.cost else [])
        values = [figures.get(goal) for goal in goals]
        finite = [float(value) for value in values if value is not None and math.isfinite(value)]
        return finite if record.state != "failed" and len(finite) == len(goals) else None

    def _tell_results(self) -> None:
        """Make a new study of all ended trials, and of the interrupted ones as running."""
        self.study, self._study_numbers = self._new_study(), {}
        self._tried = {_key(record.values) for record in self._log.trials} | set(
            map(_key, self._broken.values())
        )
        whole = self._log.proposed // ROUND * ROUND  # the first of this round
        known = [record for record in self._log.ended if contains(self._space, record.values)]
        known.sort(key=lambda record: record.number)  # as they were proposed
        complete = best_and_newest([record for record in known if record.number < whole])
        ended = {record.number: record for record in complete}
        ended |= {record.number: record for record in known if record.number >= whole}
        for number in sorted(ended.keys() | self._broken.keys()):  # TPE weighs results by their order
            if number in ended:
                results = self._results(ended[number])
                if results is not None:
                    self._add(ended[number].values, values=results)
            else:
                self._study_numbers[number] = len(self.study.get_trials(deepcopy=False))
                self._add(self._broken[number], state=TrialState.RUNNING)

    def _add(self, proposal: dict[str, Any], **more: Any) -> None:
        params = to_optuna(self._space, {key: proposal[key] for key in self._space})
        self.study.add_trial(optuna.create_trial(params=params, distributions=self._space, **more))

    def _again(self) -> bool:
        """Replay the log in a new study; returns whether it made the same proposals."""
        if not self._log.ordered:
            return False
        for event in self._log.history:
            if event.kind == "asked":
                first = (
                    proposal
                    for proposal in self._search.first
                    if self._comes_of(proposal, event.values, True)
                )
                given = next(first, event.values) if event.given else None
                if self._propose(event.number, given) != event.values:
                    return False
            elif event.ended is not None:
                self.tell(event.ended)
        return True


def _key(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


class _Asking(Searcher):  # type: ignore[misc]
    """Tune's searcher interface to the proposals; results reach them through the trial log."""

    def __init__(self, proposals: Proposals) -> None:
        super().__init__(metric="score", mode="max")
        self._proposals = proposals

    def __reduce__(self) -> Any:
        # Tune pickles it to restore an experiment; we resume from the trial log, and a display has no pickle
        return Searcher, ()

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return self._proposals.ask(trial_id)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        return None

    def save(self, checkpoint_path: str) -> None:
        return None  # Tune would restore an experiment from it; we resume from the trial log

    def restore(self, checkpoint_path: str) -> None:
        return None


def limited(proposals: Proposals, most: int) -> ConcurrencyLimiter:
    """Proposals for Tune, with a limit of trials at once."""
    return ConcurrencyLimiter(_Asking(proposals), max_concurrent=most)


def population(trials: int) -> int:
    """NSGA-II's population size for a search of so many trials: 2·√trials, hence √trials / 2 generations.

    Optuna's own is 50, which a search of fewer trials draws all at random.
    """
    return min(max(2, int(2 * math.sqrt(trials))), _MOST_IN_GENERATION)


def best_and_newest(known: Sequence[TrialRecord]) -> list[TrialRecord]:
    """At most 1,000 records, the best 100 and the newest 900: TPE's cost grows with the number of trials."""
    if len(known) <= _MOST_RESULTS:
        return list(known)
    ranked = sorted(known, key=lambda record: math.inf if record.score is None else -record.score)
    best = ranked[: _MOST_RESULTS // 10]
    numbers = {record.number for record in best}
    newest = [record for record in known if record.number not in numbers][-(_MOST_RESULTS - len(best)) :]
    return sorted([*best, *newest], key=lambda record: record.number)
