"""Trains a policy on top of the supervised hybrid and two controls; evaluates them and what is in use on validation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.rl.checkpoint import PolicyCheckpoint
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.logged.behaviour import Fit
from jaxrec.rl.logged.evaluate import IN_USE, CaseResults, CaseStates, case_evaluator, case_states, logged_outcome
from jaxrec.rl.logged.loss import logged_loss, start_params
from jaxrec.rl.logged.methods import REINFORCE, Method
from jaxrec.rl.logged.states import States, training_states, with_behaviour
from jaxrec.rl.outcome import TrainedPolicy
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import PolicyParams, Scoring, frozen_scoring
from jaxrec.rl.updates import Learner, Updates, make_updates, means, new_learner, policy_optimizer, run_updates
from jaxrec.training.stopping import StopRequested, never

POLICY, IMITATION_ONLY, PERMUTED = "policy", "imitation only", "permuted rewards"
KEPT = "the checkpoint is written"
PHASES = {POLICY: (1.0, False), IMITATION_ONLY: (0.0, False), PERMUTED: (1.0, True)}
"""By name, the share of their rewards that decisions get, and whether rewards are permuted within a batch."""


class LoggedTraining(NamedTuple):
    """What the policy and its controls are trained with: the frozen `scoring`, the logged `states`, the structure and
    the parameters `start` of the supervised policy, the compiled `updates`, and `evaluate(head)` on the validation
    `cases`. `behaviour`: the fit of the behaviour model, where the method needs one."""

    scoring: Scoring
    states: States
    graphdef: nnx.GraphDef[PolicyHead]
    start: PolicyParams
    updates: Updates
    evaluate: Callable[[Any], CaseResults]
    config: LoggedConfig
    behaviour: Fit | None
    cases: CaseStates

    def new_learner(self) -> Learner:
        """A learner whose policy is the supervised one."""
        optimizer = policy_optimizer(self.config.learning_rate, self.config.updates)
        return jax.device_put(new_learner(self.start, optimizer), jax.devices()[0])


def train_logged(
    hybrid: Hybrid,
    data: PreparedData,
    config: LoggedConfig,
    method: Method = REINFORCE,
    checkpoint: PolicyCheckpoint | None = None,
    stop: StopRequested = never,
    in_use: PolicyHead | None = None,
) -> TrainedPolicy:
    """Trains from the supervised policy on, then two controls by as many updates: imitation without rewards, and
    rewards permuted among the decisions of a batch (`jaxrec.rl.logged.evaluate.logged_outcome` says what for).

    Args:
        hybrid: The supervised models.
        data: What they were trained on.
        config: Its slates are cut to the catalogue.
        method: What makes a loss of slates and logged decisions.
        checkpoint: Is resumed from, and written after every `updates_per_evaluation` updates.
        stop: Ends the training after such a chunk.
        in_use: The policy that is in use on top of these models, which the new one must be better than.

    Raises:
        DataError: There is nothing to learn from, no validation case, or the checkpoint is damaged.
        TrainingError: A metric is not finite.
        TrainingStopped: `stop()` was true; the checkpoint is written then.
    """
    training = logged_training(hybrid, data, config, method)
    learner, heads = training.new_learner(), list[Any]()
    progress: dict[str, Any] = {"phases": 0, "updates": [], "evaluations": []}
    if checkpoint is not None and (saved := checkpoint.progress()) is not None:
        progress, head = saved, learner.params.head
        arrays = checkpoint.arrays({"learner": learner, "heads": [head] * saved["phases"]})
        learner, heads = arrays["learner"], arrays["heads"]
    updates, evaluations, total = progress["updates"], progress["evaluations"], training.config.updates
    for number, (phase, control) in list(enumerate(PHASES.items()))[len(heads) :]:
        inputs = training.scoring, training.states, *control
        chunks = run_updates(
            training.updates,
            learner,
            inputs,
            jax.random.key(config.seed),
            total,
            config.updates_per_evaluation,
            phase,
            stop,
            KEPT,
        )
        for updated, records in chunks:
            learner, done = updated, int(updated.step)
            if phase == POLICY:
                validation = training.evaluate(learner.params.head).figures()
                evaluations.append({"step": done, **means(records), "validation": validation})
                updates += records
            if done == total:
                heads.append(jax.tree.map(np.array, learner.params.head))  # copied: updates donate the arrays
                learner = training.new_learner()
            if checkpoint is not None:
                progress = {"phases": len(heads), "updates": updates, "evaluations": evaluations}
                checkpoint.write(number * total + done, {"learner": learner, "heads": heads}, progress)
        if len(heads) < len(PHASES) and stop():
            raise TrainingStopped(f"{phase}: stopped after update {total} of {total}; {KEPT}")
    results = {name: training.evaluate(head) for name, head in zip(PHASES, heads, strict=True)}
    supervised = training.evaluate(training.start.head)
    evaluated = {"supervised": supervised, **results}
    if in_use is not None:
        graphdef, head = nnx.split(in_use)
        max_length, rewards = hybrid.lstm.config.max_length, training.config.rewards
        evaluate = case_evaluator(graphdef, training.scoring, training.cases, data, max_length, rewards)
        evaluated[IN_USE] = evaluate(head)
    compared = results[POLICY], supervised, results[IMITATION_ONLY], results[PERMUTED], evaluated.get(IN_USE)
    outcome = logged_outcome(*compared)
    figures = {name: one.figures() for name, one in evaluated.items()}
    if training.behaviour is not None:
        figures["behaviour model"] = dataclasses.asdict(training.behaviour)
    return TrainedPolicy(dataclasses.replace(outcome, figures=figures), heads[0], updates, evaluations)


def logged_training(
    hybrid: Hybrid, data: PreparedData, config: LoggedConfig, method: Method = REINFORCE
) -> LoggedTraining:
    """All that a training needs, with slates that fit the catalogue, and as many samples as the method needs at least.
    Raises DataError where there is nothing to learn from or no validation case."""
    if not len(data.split.validation):
        raise DataError("no validation case is left; the log is too short to evaluate a policy")
    items, device = len(data.catalog), jax.devices()[0]
    samples = max(config.samples, method.samples)
    config = dataclasses.replace(config, slate_size=min(config.slate_size, items), samples=samples)
    scoring = jax.device_put(frozen_scoring(hybrid, fit_reward_tables(data)), device)
    item_ratings = np.asarray(scoring.tables.item_ratings)
    states, behaviour = training_states(hybrid, data, item_ratings, config.seed), None
    if method.logged:
        states, behaviour = with_behaviour(states, items, config.seed)
    cases = case_states(hybrid, data, data.split.validation, item_ratings)
    graphdef, start = start_params(scoring.item_vectors.shape[1], items, config, method)
    optimizer = policy_optimizer(config.learning_rate, config.updates)
    return LoggedTraining(
        scoring,
        jax.device_put(states, device),
        graphdef,
        start,
        make_updates(logged_loss(graphdef, config, method), optimizer, config.kl_target),
        case_evaluator(graphdef, scoring, cases, data, hybrid.lstm.config.max_length, config.rewards),
        config,
        behaviour,
        cases,
    )
