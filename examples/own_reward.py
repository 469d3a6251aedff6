"""Fine-tune the policy of a run for a reward of your own, and see what that costs.

    python examples/own_reward.py work/run

Every term of the reward lies in 0..1 (`jaxrec/rl/rewards.py`; a term of your own is a function there).
"""

import dataclasses
import sys

import jaxrec

# Hits still count most, but items that few people know earn something, too.
REWARDS = jaxrec.RewardWeights(hit=0.6, genre=0.0, rating=0.1, novelty=0.3)
COLUMNS = ["name", "request_time", "ndcg_10", "coverage_10", "mean_popularity_10"]


def main(run_folder: str, budget: float = 0.02, config: jaxrec.LoggedConfig = jaxrec.LoggedConfig()) -> None:
    """Trains a policy whose rewards may cost the share `budget` of NDCG@10, and compares it with the hybrid."""
    run = jaxrec.open_run(run_folder)
    outcome = jaxrec.fine_tune(run, dataclasses.replace(config, rewards=REWARDS, ndcg_budget=budget))

    # A policy is used only if it ranks better for users that the models and the policy do not know.
    print(f"{'used' if outcome.used else 'not used'}: {outcome.reason}")

    # The row `policy` is there either way; the row of the model that is exported is what `serving` names.
    evaluation = jaxrec.evaluate(run)
    print(evaluation.to_frame()[COLUMNS].to_string(index=False))
    print(f"exported and served: {evaluation.serving}")


if __name__ == "__main__":
    main(sys.argv[1])
