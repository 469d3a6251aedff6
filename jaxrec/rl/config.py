"""Configurations of reinforcement learning, one for each algorithm. Imports nothing heavy: `jaxrec rl --help` reads the
defaults here."""

import dataclasses

METHOD_NAMES = ("reinforce", "plackett-luce", "top-k", "actor-critic")  # of `jaxrec.rl.logged.methods`


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """Weights of the named reward terms (`jaxrec.rl.rewards`)."""

    hit: float = 0.4
    genre: float = 0.3
    rating: float = 0.3
    centred_rating: float = 0.0
    novelty: float = 0.0
    diversity: float = 0.0


@dataclasses.dataclass(frozen=True)
class RerankingConfig:
    """Learning to rerank by cross-fitting (`jaxrec.rl.reranking`).

    Attributes:
        seed: Of everything random.
        folds: Parts that the users are divided into; each is decided on by models that were trained on the others.
        fold_epochs: Epochs of those models, with a learning rate that falls to 0 at their end.
        events: Last training events of each user that are decisions.
        decisions: Most decisions in all; of more, each user has fewer.
        updates: Of the weights.
        batch_size: Decisions per update.
        learning_rate: Of Adam; it falls to 2 % by a cosine.
        penalty: Of the squared weights.
        reward_weight: Of the slate's reward, beside the cross-entropy.
        slate_size: Items of a slate.
        samples: Rankings drawn for each decision and update.
        rewards: Weights of the reward terms.
    """

    seed: int = 0
    folds: int = 3
    fold_epochs: int = 8
    events: int = 40
    decisions: int = 40_000
    updates: int = 500
    batch_size: int = 256
    learning_rate: float = 1e-2
    penalty: float = 3e-4
    reward_weight: float = 1.0
    slate_size: int = 10
    samples: int = 4
    rewards: RewardWeights = dataclasses.field(default_factory=RewardWeights)

    def __post_init__(self) -> None:
        """Refuses a weight of diversity, which depends on the items above: here an item's reward may not."""
        if self.rewards.diversity:
            raise ValueError("diversity depends on the items above, so that its weight must be 0 for a reranker")


@dataclasses.dataclass(frozen=True)
class LoggedConfig:
    """Training on the events of the run's own log (`jaxrec.rl.logged`).

    Attributes:
        seed: Of everything random.
        updates: Updates of the policy, and of each of the two controls.
        updates_per_evaluation: Updates between two evaluations on validation; each is followed by a checkpoint.
        batch_size: Logged decisions per update.
        slate_size: Items of a slate.
        samples: Slates drawn for each decision and update.
        learning_rate: Peak of Adam's.
        kl_target: Nats of KL to the supervised policy that the weight of the KL penalty is controlled to.
        imitation_weight: Weight of the rating-weighted cross-entropy of the logged items.
        policy_width: Hidden units of PolicyHead.
        entropy_floor: Share of the supervised policy's entropy below which a penalty pulls back.
        coverage_floor: The same of the number of items that the recommendations of a batch are spread over.
        discount: Of the reward one event later; of the actor-critic alone.
        importance_cap: Largest importance weight.
        rewards: Weights of the reward terms.
    """

    seed: int = 0
    updates: int = 300
    updates_per_evaluation: int = 50
    batch_size: int = 256
    slate_size: int = 10
    samples: int = 1
    learning_rate: float = 3e-4
    kl_target: float = 0.005
    imitation_weight: float = 0.2
    policy_width: int = 128
    entropy_floor: float = 0.8
    coverage_floor: float = 0.8
    discount: float = 0.5
    importance_cap: float = 20.0
    rewards: RewardWeights = dataclasses.field(default_factory=RewardWeights)


@dataclasses.dataclass(frozen=True)
class ServedConfig:
    """Training on a server's log of recommendations (`jaxrec.rl.served`).

    Such a log is news to the models, unlike the one that they were trained on: hence a larger KL target and larger
    steps than LoggedConfig's. The low cap limits what can be gained by memorizing single users.

    Attributes (the others are as in LoggedConfig, relative to the policy in use instead of the supervised one):
        attribution_window: Seconds within which an event counts as a response to the recommendation that it names;
            None: within which 99 % of the log's responses came.
        minimum_effective: Effective sample size, in users, below which the new policy is refused.
    """

    seed: int = 0
    updates: int = 300
    batch_size: int = 256
    learning_rate: float = 3e-3
    kl_target: float = 0.1
    entropy_floor: float = 0.8
    coverage_floor: float = 0.8
    importance_cap: float = 5.0
    rewards: RewardWeights = dataclasses.field(default_factory=RewardWeights)
    attribution_window: int | None = None
    minimum_effective: float = 100.0


@dataclasses.dataclass(frozen=True)
class SimulatedConfig:
    """Training with simulated users (`jaxrec.rl.simulated`): short rollouts of many users.

    The KL penalty keeps the policy's entropy up, so that no entropy bonus is needed by default.

    Attributes (the others are as in LoggedConfig):
        updates_per_record: Updates that a record of the log is the mean of; each is followed by a checkpoint.
        users: Simulated users per update.
        steps: Requests of each user per update.
        learning_rate: Peak of Adam's; it falls linearly to a tenth.
        discount: Of the reward one request later (γ).
        trace: λ of the TD(λ) returns.
        entropy_weight: Of an entropy bonus, which falls linearly to 0.
        kl_target: Nats of KL to the policy at the start that the weight of the KL penalty is controlled to; None: there
            is no such penalty.
        logged_kl_weight: Weight of a second KL penalty, in the logged states of the run's own users.
        temperature: That slates are drawn at, as by `python -m serve run --explore`.
    """

    seed: int = 0
    updates: int = 300
    updates_per_record: int = 10
    users: int = 256
    steps: int = 8
    slate_size: int = 10
    learning_rate: float = 2e-3
    discount: float = 0.5
    trace: float = 0.9
    entropy_weight: float = 0.0
    kl_target: float | None = 0.1
    logged_kl_weight: float = 20.0
    temperature: float = 0.5
