"""Configurations of reinforcement learning, one for each algorithm. Imports nothing heavy: `jaxrec rl --help` reads the
defaults here."""

import dataclasses

POLICY_WIDTH = 128  # hidden units of PolicyHead
PL_RANK, REINFORCE = "pl-rank", "reinforce"
BUDGET_WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0)  # of the reward, that a budget chooses from


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
class LoggedConfig:
    """Training on the events of the run's own log, by cross-fitting (`jaxrec.rl.logged`).

    Attributes:
        seed: Of everything random.
        method: Of the gradient of the slate's reward: PL_RANK, or REINFORCE with the other samples as the baseline.
        folds: Parts that the users are divided into. The decisions of a part are scored by models that were trained on
            the other parts.
        fold_epochs: Epochs of those models, with the whole schedule of the learning rate.
        events: Last training events of each user that are decisions.
        decisions: Largest number of decisions. If there are more, each user contributes fewer.
        updates: Of the weights.
        batch_size: Decisions per update.
        learning_rate: Of Adam; it falls to 2 % by a cosine.
        penalty: Of the squared weights.
        reward_weight: Of the slate's reward, beside the cross-entropy.
        ndcg_budget: Share of NDCG@10 out of fold that the rewards may cost, compared with the cross-entropy alone. The
            weight of the reward is then the one of BUDGET_WEIGHTS that earns most within it, instead of
            `reward_weight`; None: `reward_weight`.
        slate_size: Items of a slate.
        samples: Rankings drawn for each decision and update.
        rewards: Weights of the reward terms.
    """

    seed: int = 0
    method: str = PL_RANK
    folds: int = 3
    fold_epochs: int = 8
    events: int = 40
    decisions: int = 40_000
    updates: int = 500
    batch_size: int = 256
    learning_rate: float = 1e-2
    penalty: float = 3e-4
    reward_weight: float = 1.0
    ndcg_budget: float | None = None
    slate_size: int = 10
    samples: int = 4
    rewards: RewardWeights = dataclasses.field(default_factory=RewardWeights)

    def __post_init__(self) -> None:
        """Refuses what cannot be trained.

        Raises:
            ValueError: A value is outside of its range, `method` is none, or diversity has a weight: it depends on the
                items above, and here an item's reward may not.
        """
        least = {
            "folds": 2,
            "fold_epochs": 1,
            "events": 1,
            "updates": 1,
            "batch_size": 1,
            "slate_size": 1,
            "samples": 1,
        }
        for name, smallest in {**least, "decisions": self.folds}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {smallest}")
        for name in ("penalty", "reward_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number of at least 0")
        if self.ndcg_budget is not None and not 0 <= self.ndcg_budget < 1:
            raise ValueError(f"ndcg_budget is {self.ndcg_budget}, expected a share from 0 to below 1, such as 0.01")
        if self.method not in (PL_RANK, REINFORCE):
            raise ValueError(f"method {self.method!r}, expected {PL_RANK!r} or {REINFORCE!r}")
        if self.method == REINFORCE and self.samples < 2:
            raise ValueError(f"samples is {self.samples}, expected at least 2: the other samples are the baseline")
        if self.rewards.diversity:
            raise ValueError("diversity depends on the items above, so that its weight must be 0 for a reranker")


@dataclasses.dataclass(frozen=True)
class ServedConfig:
    """Training on a server's log of recommendations (`jaxrec.rl.served`).

    The low cap limits what can be gained by memorizing single users.

    Attributes:
        seed: Of everything random.
        updates: Updates of the policy.
        batch_size: Recommendations per update.
        learning_rate: Peak of Adam's.
        kl_target: Nats of KL to the policy in use that the weight of the KL penalty is controlled to.
        entropy_floor: Share of that policy's entropy below which a penalty pulls back.
        coverage_floor: The same of the number of items that the recommendations of a batch are spread over.
        importance_cap: Largest importance weight.
        rewards: Weights of the reward terms.
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

    A KL penalty, whose weight is controlled by what real events lose, keeps the policy near its start. It also keeps
    the entropy up, so that no entropy bonus is needed by default.

    Attributes:
        seed: Of everything random.
        updates: Updates of the policy.
        slate_size: Items of a slate.
        updates_per_record: Updates that a record of the log is the mean of; each is followed by a checkpoint.
        users: Simulated users per update.
        steps: Requests of each user per update.
        learning_rate: Peak of Adam's; it falls linearly to a tenth.
        discount: Of the reward one request later (γ).
        trace: λ of the TD(λ) returns.
        entropy_weight: Of an entropy bonus, which falls linearly to 0.
        likelihood_budget: Nats of log-likelihood that real events may lose on average: those of the people whose
            simulated copies train the policy, as far as their taste was not fitted to them.
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
    likelihood_budget: float = 0.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for a budget that is no number of at least 0."""
        if not 0 <= self.likelihood_budget < float("inf"):
            raise ValueError(f"likelihood_budget is {self.likelihood_budget}, expected a number of at least 0")
