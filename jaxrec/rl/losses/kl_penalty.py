"""The weight of a KL penalty, which keeps a policy near the one that it started from: by the KL itself, or by what the
policy's changes cost."""

import chex
import jax
import jax.numpy as jnp

KL_WEIGHT_RANGE = (1e-3, 1e3)
KL_CONTROL_RATE = 0.1  # Ziegler et al. 2019: K_beta
KL_CONTROL_CLIP = 0.2
COST_RATE = 0.03  # by which the weight's logarithm changes in an update, if the cost is COST_SCALE above its budget
COST_SCALE = 0.002  # nats


def next_kl_weight(kl_weight: jax.Array, kl: jax.Array, target: float) -> jax.Array:
    """The weight after an update in which the KL divergence was `kl`: larger if it was above its target.

    A proportional controller in log space whose relative error is clipped to 20 % (Ziegler et al. 2019, "Fine-Tuning
    Language Models from Human Preferences", section 2.2). Deviation: the weight stays within KL_WEIGHT_RANGE.

    Args:
        kl_weight: [] float32, above 0.
        kl: [] float32, nats, measured with that weight.
        target: nats, above 0.

    Returns:
        [] float32.

    Examples:
        >>> following = next_kl_weight(jnp.float32(1.0), kl=jnp.float32(0.11), target=0.1)
        >>> round(float(following), 4)  # 1 + 0.1 * (0.11 / 0.1 - 1)
        1.01
    """
    chex.assert_rank([kl_weight, kl], 0)
    error = jnp.clip(kl / target - 1.0, -KL_CONTROL_CLIP, KL_CONTROL_CLIP)
    return jnp.clip(kl_weight * (1.0 + KL_CONTROL_RATE * error), *KL_WEIGHT_RANGE)


def next_weight_by_cost(weight: jax.Array, cost: jax.Array, budget: float) -> jax.Array:
    """The weight of a penalty after an update in which the changes that it limits cost `cost`: larger above the budget.

    An integral controller, as the multiplier of a Lagrangian is (Stooke, Achiam and Abbeel 2020, "Responsive Safety in
    Reinforcement Learning by PID Lagrangian Methods", section 3). Deviations: the penalty need not be the cost itself;
    the logarithm of the weight is what changes; the excess is limited to COST_SCALE, so that one noisy batch moves the
    weight by 3 % at most; the weight stays within KL_WEIGHT_RANGE.

    Args:
        weight: [] float32, above 0.
        cost: [] float32, nats, an estimate by one batch.
        budget: nats.

    Returns:
        [] float32.

    Examples:
        >>> following = next_weight_by_cost(jnp.float32(2.0), cost=jnp.float32(0.012), budget=0.002)
        >>> round(float(following), 4)  # 2 e^0.03
        2.0609
    """
    chex.assert_rank([weight, cost], 0)
    excess = jnp.clip((cost - budget) / COST_SCALE, -1.0, 1.0)
    return jnp.clip(weight * jnp.exp(COST_RATE * excess), *KL_WEIGHT_RANGE)
