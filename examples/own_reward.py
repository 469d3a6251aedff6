"""Fine-tune the policy of a run for a reward of your own, and see what that costs.

    python examples/own_reward.py work/run

Every term of the reward lies in 0..1 (`jaxrec/rl/rewards.py`; a term of your own is a function there).
"""

import sys

import jaxrec

# Hits still count most, but items that few people know and slates of mixed genres earn something, too.
REWARDS = jaxrec.RewardWeights(hit=0.5, genre=0.0, rating=0.1, novelty=0.2, diversity=0.2)
COLUMNS = ["name", "request_time", "ndcg_10", "coverage_10", "mean_popularity_10"]


def main(run_folder: str, updates: int = 300) -> None:
    """Trains the policy, and compares it with the supervised models."""
    run = jaxrec.open_run(run_folder)
    outcome = jaxrec.fine_tune(run, jaxrec.LoggedConfig(updates=updates, rewards=REWARDS))

    # A policy is used only if its reward is higher on validation and its NDCG@10 is not lower.
    print(f"{'used' if outcome.used else 'not used'}: {outcome.reason}")

    # The row `policy` is there either way; the row of the model that is exported is what `serving` names.
    evaluation = jaxrec.evaluate(run)
    print(evaluation.to_frame()[COLUMNS].to_string(index=False))
    print(f"exported and served: {evaluation.serving}")


if __name__ == "__main__":
    main(*sys.argv[1:])
