"""Actor-critic with a supervised anchor: on shared features one head ranks (logits), one estimates long-term value (Q).

SQN and SAC: Xin et al. 2020, "Self-Supervised Reinforcement Learning for Recommender Systems" (arXiv:2006.05779).
SNQN and SA2C: Xin et al. 2022, "Supervised Advantage Actor-Critic for Recommender Systems" (arXiv:2111.03474).

    L_s  = -log softmax(logits)[a+]                               the supervised loss of the logged item a+
    L_q  = (r + γ Q'(s', argmax_a Q(s', a)) - Q(s, a+))^2         double Q-learning, van Hasselt 2010
    L_n  = sum_(a- of N) (r_n + γ Q'(s, argmax_a Q(s, a)) - Q(s, a-))^2   sampled negatives; s stays as it is
    SQN  = L_s + L_q            SAC  = Q(s, a+) L_s + L_q
    SNQN = L_s + L_q + L_n      SA2C = A(s, a+) L_s + L_q + L_n
    A(s, a+) = Q(s, a+) - (Q(s, a+) + sum_(a- of N) Q(s, a-)) / (|N| + 1)

Q weighs the actor as a constant, and targets are constants. There are two copies of the Q head: a coin says in each
step which of them learns (`q`, `q_next`) and which gives values (`q_next_target`, `q_target`). SA2C is SNQN in its
first epochs, since advantages of an untrained Q are noise. The off-policy correction of SA2C, (π/β)^smooth clipped to
0.1..10, with β from item frequencies, is an importance weight of the actor: `weight`. What an entry outside of `where`
holds (a NaN, too) reaches neither the mean nor its gradient.
"""

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of values [batch] over the entries of `where` [batch]; 0 where there is none."""
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)


def supervised_losses(logits: jax.Array, action: jax.Array) -> jax.Array:
    """L_s [batch] nats: cross-entropy of action [batch] int32 under logits [batch, items + 1]."""
    return jax.nn.logsumexp(logits, axis=-1) - _at(logits, action)


def double_q_target(
    reward: jax.Array, discount: jax.Array, q_next: jax.Array, q_next_target: jax.Array, allowed: jax.Array
) -> jax.Array:
    """[batch]: r + γ Q'(s', argmax_a Q(s', a)), constant. Reward and discount [batch] (discount 0 ends an episode).

    `q_next`, `q_next_target` and `allowed` (bool, `jaxrec.rl.policy.recommendable` of s') are [batch, items + 1]. Where
    nothing is allowed in s' its value is 0.
    """
    best = jnp.argmax(jnp.where(allowed, q_next, -jnp.inf), axis=-1)
    value = jnp.where(jnp.any(allowed, axis=-1), _at(q_next_target, best), 0.0)
    return jax.lax.stop_gradient(reward + discount * value)


def q_losses(q: jax.Array, action: jax.Array, target: jax.Array) -> jax.Array:
    """L_q [batch]: squared error of Q(s, a+) for q [batch, items + 1], action [batch] int32, target [batch]."""
    return jnp.square(jax.lax.stop_gradient(target) - _at(q, action))


def negative_q_losses(q: jax.Array, negatives: jax.Array, target: jax.Array) -> jax.Array:
    """L_n [batch]: squared errors summed over negatives [batch, count] int32, which did not change the state.

    `target` [batch] is `double_q_target` with the negative reward (0 in the paper) and with s in place of s'.
    """
    return jnp.sum(jnp.square(jax.lax.stop_gradient(target)[:, None] - jnp.take_along_axis(q, negatives, -1)), axis=-1)


def advantage(q: jax.Array, action: jax.Array, negatives: jax.Array) -> jax.Array:
    """A(s, a+) [batch], constant: how much better the logged item is than the mean of it and the negatives."""
    chosen, others = _at(q, action), jnp.take_along_axis(q, negatives, axis=-1)
    return jax.lax.stop_gradient(chosen - (chosen + jnp.sum(others, axis=-1)) / (negatives.shape[-1] + 1))


def sqn_loss(logits: jax.Array, q: jax.Array, action: jax.Array, target: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of L_s + L_q over `where` [batch]."""
    logits, q, target = _counted(where, logits, q, target)
    return masked_mean(supervised_losses(logits, action) + q_losses(q, action, target), where)


def sac_loss(logits: jax.Array, q: jax.Array, action: jax.Array, target: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of Q(s, a+) L_s + L_q over `where` [batch]."""
    logits, q, target = _counted(where, logits, q, target)
    actor = jax.lax.stop_gradient(_at(q, action)) * supervised_losses(logits, action)
    return masked_mean(actor + q_losses(q, action, target), where)


def snqn_loss(
    logits: jax.Array,
    q: jax.Array,
    action: jax.Array,
    negatives: jax.Array,
    target: jax.Array,
    negative_target: jax.Array,
    where: jax.Array,
) -> jax.Array:
    """Mean of L_s + L_q + L_n over `where` [batch]."""
    logits, q, target, negative_target = _counted(where, logits, q, target, negative_target)
    critic = q_losses(q, action, target) + negative_q_losses(q, negatives, negative_target)
    return masked_mean(supervised_losses(logits, action) + critic, where)


def sa2c_loss(
    logits: jax.Array,
    q: jax.Array,
    action: jax.Array,
    negatives: jax.Array,
    target: jax.Array,
    negative_target: jax.Array,
    weight: jax.Array,
    where: jax.Array,
) -> jax.Array:
    """Mean of weight A(s, a+) L_s + L_q + L_n over `where` [batch]; `weight` [batch]: 1, or importance weights."""
    logits, q, target, negative_target, weight = _counted(where, logits, q, target, negative_target, weight)
    actor = jax.lax.stop_gradient(weight) * advantage(q, action, negatives) * supervised_losses(logits, action)
    critic = q_losses(q, action, target) + negative_q_losses(q, negatives, negative_target)
    return masked_mean(actor + critic, where)


def _counted(where: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """0 outside of `where` [batch], before anything is computed: 0 times the derivative at a NaN is a NaN."""
    return tuple(jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0) for x in inputs)


def _at(values: jax.Array, items: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, items[..., None], axis=-1)[..., 0]
