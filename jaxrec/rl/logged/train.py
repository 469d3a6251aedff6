"""Trains a policy on top of the supervised hybrid, and two controls beside it, and judges all three on validation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxrec.config import RLConfig
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError, TrainingError, TrainingStopped
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.rl.logged.behaviour import Fit
from jaxrec.rl.logged.evaluate import Judged, case_states, decide, make_judge
from jaxrec.rl.logged.learner import Learner, Updates, make_updates, new_learner, pay
from jaxrec.rl.logged.methods import REINFORCE, Method
from jaxrec.rl.logged.states import States, training_states, with_behaviour
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import Scoring, frozen_scoring
from jaxrec.training.stopping import StopRequested, never

POLICY, ANCHOR_ONLY, PERMUTED = PHASES = ("policy", "anchor only", "permuted rewards")


@dataclasses.dataclass(frozen=True)
class PolicyOutcome:
    """`used`: whether the policy replaces what was in use before, and `reason` why, with the figures. `step`: the
    updates that it took. `figures`: by name (supervised, policy, the controls, the behaviour model) on what it was
    judged on; `differences`: paired gains over the supervised policy as mean, low and high."""

    used: bool
    reason: str
    step: int
    figures: dict[str, dict[str, float]]
    differences: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """`variables` of PolicyHead after the last update. `steps`: one record per update of the policy; `log`: one per
    evaluation, means over the updates since the one before, and the figures on validation."""

    outcome: PolicyOutcome
    variables: Any
    steps: list[dict[str, float]]
    log: list[dict[str, Any]]


class Progress(NamedTuple):
    """All that an exact resumption needs: the learner of the phase under way, the heads of those that are over (in the
    order of PHASES), and the records so far."""

    learner: Learner
    heads: list[Any]
    steps: list[dict[str, float]]
    log: list[dict[str, Any]]


Save = Callable[[Progress], object]
Judge = Callable[[Any], Judged]


class Problem(NamedTuple):
    """What is trained on, and what judges. `behaviour`: how good the behaviour model is that the method needed."""

    scoring: Scoring
    states: States
    judge: Judge
    graphdef: nnx.GraphDef[PolicyHead]
    new_learner: Callable[[], Learner]
    behaviour: Fit | None


def train_policy(
    hybrid: Hybrid,
    data: PreparedData,
    config: RLConfig,
    method: Method = REINFORCE,
    resumed: Callable[[Problem], Progress | None] = lambda problem: None,
    save: Save = lambda progress: None,
    stop: StopRequested = never,
) -> TrainedPolicy:
    """Trains from the supervised policy on, then the two controls, each by the same updates: the anchor without
    rewards, and rewards permuted among the decisions of a batch. `jaxrec.rl.logged.evaluate.decide` says what they are
    for.

    Between `steps_per_evaluation` updates `save` gets the progress, and `stop` may end it: TrainingStopped. `resumed`
    gives the progress to go on from. Raises TrainingError where a figure is not finite.
    """
    config = settled(config, method, len(data.catalog))
    problem = new_problem(hybrid, data, config, method)
    progress = resumed(problem) or Progress(problem.new_learner(), [], [], [])
    updates, total = make_updates(problem.graphdef, config, method), config.steps * len(PHASES)
    done = len(progress.heads) * config.steps + int(progress.learner.step)
    with tqdm(total=total, initial=done, desc="train policy", unit="step") as bar:
        while len(progress.heads) < len(PHASES):
            progress = _train_phase(problem, updates, config, progress, save, stop, bar)
    supervised = problem.judge(problem.new_learner().head)
    judged = {name: problem.judge(head) for name, head in zip(PHASES, progress.heads, strict=True)}
    decision = decide(judged[POLICY], supervised, judged[ANCHOR_ONLY], judged[PERMUTED])
    figures = {"supervised": supervised.figures(), **{name: of_one.figures() for name, of_one in judged.items()}}
    if problem.behaviour is not None:
        figures["behaviour model"] = dataclasses.asdict(problem.behaviour)
    differences = {name: dataclasses.asdict(estimate) for name, estimate in decision.differences.items()}
    outcome = PolicyOutcome(decision.used, decision.reason, config.steps, figures, differences)
    return TrainedPolicy(outcome, progress.heads[0], progress.steps, progress.log)


def settled(config: RLConfig, method: Method, items: int) -> RLConfig:
    """The configuration with slates that fit the catalogue, and as many samples as the method wants at least."""
    samples = max(config.samples, method.samples)
    return dataclasses.replace(config, slate_size=min(config.slate_size, items), samples=samples)


def new_problem(hybrid: Hybrid, data: PreparedData, config: RLConfig, method: Method) -> Problem:
    """Raises DataError where there is nothing to learn from or nothing to judge by."""
    if not len(data.split.validation):
        raise DataError("no validation case is left; the log is too short to judge a policy")
    device = jax.devices()[0]
    scoring = jax.device_put(frozen_scoring(hybrid, fit_reward_tables(data)), device)
    item_ratings = np.asarray(scoring.tables.item_ratings)
    states, behaviour = training_states(hybrid, data, item_ratings, config.seed), None
    if method.logged:
        states, behaviour = with_behaviour(states, len(data.catalog), config.seed)
    states = jax.device_put(states, device)
    cases = case_states(hybrid, data, data.split.validation, item_ratings)
    width, items = scoring.item_vectors.shape[1], len(data.catalog)
    graphdef, _ = new_learner(width, items, config, method)
    judge = make_judge(graphdef, scoring, cases, data, hybrid.lstm.config.max_length, config.rewards)

    def fresh() -> Learner:
        return jax.device_put(new_learner(width, items, config, method)[1], device)

    return Problem(scoring, states, judge, graphdef, fresh, behaviour)


def _train_phase(
    problem: Problem,
    updates: Updates,
    config: RLConfig,
    progress: Progress,
    save: Save,
    stop: StopRequested,
    bar: "tqdm[Any]",
) -> Progress:
    """The updates that are left of the phase under way; the next one's learner is fresh."""
    phase = PHASES[len(progress.heads)]
    key, paid = jax.random.key(config.seed), pay(share=float(phase != ANCHOR_ONLY), permuted=phase == PERMUTED)
    while (start := int(progress.learner.step)) < config.steps:
        count = min(config.steps_per_evaluation, config.steps - start)
        learner, metrics = updates(progress.learner, problem.scoring, problem.states, key, count, paid)
        records = step_records(jax.device_get(metrics), start)
        means = {name: float(np.mean([record[name] for record in records])) for name in records[0] if name != "step"}
        progress = progress._replace(learner=learner)
        if phase == POLICY:
            figures = problem.judge(learner.head).figures()
            log = [*progress.log, {"step": start + count, **means, "validation": figures}]
            progress = progress._replace(steps=[*progress.steps, *records], log=log)
        bar.update(count)
        bar.set_postfix(phase=phase, reward=f"{means['reward']:.4f}", kl=f"{means['kl']:.4f}")
        if start + count == config.steps:
            head = jax.tree.map(np.array, learner.head)  # copied: the next update takes the buffers
            progress = progress._replace(heads=[*progress.heads, head], learner=problem.new_learner())
        save(progress)
        if len(progress.heads) < len(PHASES) and stop():
            raise TrainingStopped(f"stopped and saved after step {start + count} of {config.steps} of: {phase}")
        if start + count == config.steps:
            break
    return progress


def step_records(metrics: dict[str, np.ndarray], start: int) -> list[dict[str, float]]:
    """One record per update from metrics [steps]. Raises TrainingError where one is not finite."""
    for name, values in metrics.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise TrainingError(
                f"{name} is not finite at step {start + wrong[0]} (of steps {start}..{start + len(values) - 1}); "
                "no policy was written, and the one before stays in use"
            )
    count = len(next(iter(metrics.values())))
    return [
        {"step": start + number, **{name: float(values[number]) for name, values in metrics.items()}}
        for number in range(count)
    ]
