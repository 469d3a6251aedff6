"""Actor-critic with a supervised loss: on shared features one head ranks (logits), one estimates long-term value (Q).

SNQN and SA2C: Xin et al. 2022, "Supervised Advantage Actor-Critic for Recommender Systems" (arXiv:2111.03474), after
Xin et al. 2020, "Self-Supervised Reinforcement Learning for Recommender Systems" (arXiv:2006.05779).

    L_s  = -log softmax(logits)[a+]                               the supervised loss of the logged item a+
    L_q  = (r + γ Q'(s', argmax_a Q(s', a)) - Q(s, a+))^2         double Q-learning, van Hasselt 2010
    L_n  = sum_(a- of N) (r_n + γ Q'(s, argmax_a Q(s, a)) - Q(s, a-))^2   sampled negatives; s stays as it is
    SNQN = L_s + L_q + L_n      SA2C = A(s, a+) L_s + L_q + L_n
    A(s, a+) = Q(s, a+) - (Q(s, a+) + sum_(a- of N) Q(s, a-)) / (|N| + 1)

Q weighs the actor as a constant, and targets are constants. There are two copies of the Q head: a coin says in each
step which of them learns (`q`, `q_next`) and which gives values (`q_next_target`, `q_target`). SA2C is SNQN in its
first epochs, since advantages of an untrained Q are noise. The off-policy correction of SA2C, (π/β)^smooth clipped to
0.1..10, with β from item frequencies, is an importance weight of the actor: `weight`.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrec.rl.losses.masking import masked_mean, zero_masked


def supervised_losses(logits: jax.Array, action: jax.Array) -> jax.Array:
    """L_s of each state.

    Args:
        logits: [batch, items + 1] float32.
        action: [batch] int32, the logged items.

    Returns:
        [batch] float32, nats.
    """
    chex.assert_rank([logits, action], [2, 1])
    return jax.nn.logsumexp(logits, axis=-1) - _at(logits, action)


def double_q_target(
    reward: jax.Array, discount: jax.Array, q_next: jax.Array, q_next_target: jax.Array, allowed: jax.Array
) -> jax.Array:
    """r + γ Q'(s', argmax_a Q(s', a)) of each state (van Hasselt 2010, "Double Q-learning").

    Args:
        reward: [batch] float32.
        discount: [batch] float32, γ; 0 ends an episode.
        q_next: [batch, items + 1] float32, Q(s', a) of the copy that learns.
        q_next_target: [batch, items + 1] float32, Q'(s', a) of the other copy.
        allowed: [batch, items + 1] bool, `jaxrec.rl.policy.recommendable` of s'. Where nothing is allowed the value of
            s' is 0.

    Returns:
        [batch] float32, a constant of the gradient.

    Examples:
        >>> one, every = jnp.array([1.0]), jnp.ones((1, 3), bool)
        >>> float(double_q_target(one, 0.5 * one, jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.0, 9.0, 5.0]]), every)[0])
        3.5
    """
    chex.assert_rank([reward, discount, q_next, q_next_target, allowed], [1, 1, 2, 2, 2])
    chex.assert_equal_shape([q_next, q_next_target, allowed])
    best = jnp.argmax(jnp.where(allowed, q_next, -jnp.inf), axis=-1)
    value = jnp.where(jnp.any(allowed, axis=-1), _at(q_next_target, best), 0.0)
    return jax.lax.stop_gradient(reward + discount * value)


def q_losses(q: jax.Array, action: jax.Array, target: jax.Array) -> jax.Array:
    """L_q of each state.

    Args:
        q: [batch, items + 1] float32, Q(s, a).
        action: [batch] int32, the logged items.
        target: [batch] float32, `double_q_target`; a constant of the gradient.

    Returns:
        [batch] float32.
    """
    chex.assert_rank([q, action, target], [2, 1, 1])
    return jnp.square(jax.lax.stop_gradient(target) - _at(q, action))


def negative_q_losses(q: jax.Array, negatives: jax.Array, target: jax.Array) -> jax.Array:
    """L_n of each state.

    Args:
        q: [batch, items + 1] float32, Q(s, a).
        negatives: [batch, count] int32, sampled items, which do not change the state.
        target: [batch] float32, `double_q_target` with the negative reward (0 in the paper) and with s in place of s'.

    Returns:
        [batch] float32, summed over the negatives.
    """
    chex.assert_rank([q, negatives, target], [2, 2, 1])
    return jnp.sum(jnp.square(jax.lax.stop_gradient(target)[:, None] - jnp.take_along_axis(q, negatives, -1)), axis=-1)


def advantage(q: jax.Array, action: jax.Array, negatives: jax.Array) -> jax.Array:
    """A(s, a+) of each state: how much better the logged item is than the mean of it and the negatives.

    Args:
        q: [batch, items + 1] float32, Q(s, a).
        action: [batch] int32, the logged items.
        negatives: [batch, count] int32, sampled items.

    Returns:
        [batch] float32, a constant of the gradient.

    Examples:
        >>> q = jnp.array([[0.0, 2.0, 1.0, -1.0]])
        >>> round(float(advantage(q, jnp.array([1]), jnp.array([[2, 3]]))[0]), 4)  # 2 - (2 + 1 - 1) / 3
        1.3333
    """
    chex.assert_rank([q, action, negatives], [2, 1, 2])
    chosen, others = _at(q, action), jnp.take_along_axis(q, negatives, axis=-1)
    return jax.lax.stop_gradient(chosen - (chosen + jnp.sum(others, axis=-1)) / (negatives.shape[-1] + 1))


def snqn_loss(
    logits: jax.Array,
    q: jax.Array,
    action: jax.Array,
    negatives: jax.Array,
    target: jax.Array,
    negative_target: jax.Array,
    where: jax.Array,
) -> jax.Array:
    """SNQN: the mean of L_s + L_q + L_n.

    Args:
        logits: [batch, items + 1] float32, of the actor.
        q: [batch, items + 1] float32, Q(s, a).
        action: [batch] int32, the logged items.
        negatives: [batch, count] int32, sampled items.
        target: [batch] float32, `double_q_target` of the logged items.
        negative_target: [batch] float32, `double_q_target` of the negatives.
        where: [batch] bool, the states that count; what others hold reaches neither value nor gradient.

    Returns:
        Scalar; 0 if no state counts.
    """
    chex.assert_equal_shape([logits, q])
    logits, q, target, negative_target = zero_masked(where, logits, q, target, negative_target)
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
    """SA2C: the mean of weight A(s, a+) L_s + L_q + L_n. The other arguments are those of `snqn_loss`.

    Args:
        weight: [batch] float32, 1 or importance weights; constants of the gradient.

    Returns:
        Scalar; 0 if no state counts.
    """
    chex.assert_equal_shape([logits, q])
    logits, q, target, negative_target, weight = zero_masked(where, logits, q, target, negative_target, weight)
    actor = jax.lax.stop_gradient(weight) * advantage(q, action, negatives) * supervised_losses(logits, action)
    critic = q_losses(q, action, target) + negative_q_losses(q, negatives, negative_target)
    return masked_mean(actor + critic, where)


def _at(values: jax.Array, items: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, items[..., None], axis=-1)[..., 0]
