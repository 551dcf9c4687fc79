"""RL from preferences between sibling answers: against each other (SPO, 2401.04056), or through a reward model.

Both wrap a learner of rewards, such as `make_ppo`'s, into one whose feedback is the comparisons themselves:
`step(state, ref_params, rollout, prefs, *, key, ptx=None)` with `prefs [B / K, K, K]`, P(i is preferred to j) among the
K answers to each prompt, which lie next to each other in the rollout.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from rlhfjax import losses
from rlhfjax.models.transformer import Model, score
from rlhfjax.rl.ppo import Algorithm, Metrics
from rlhfjax.types import Params, Rollout, TrainState, pytree, sequences


def make_self_play(learner: Algorithm) -> Algorithm:
    """Self-play preference optimisation: an answer's reward is its win rate among its siblings, minus 1/2.

    Its fixed point is a minimax winner, which exists whatever the preferences; no reward model stands between.
    Source: SPO (2401.04056), for language models: the queue of rivals is the siblings, since answers to different
    prompts cannot be compared.
    """

    def step(state, ref_params, rollout: Rollout, prefs, *, key, ptx=None):
        rewards = losses.self_play_rewards(prefs).reshape(-1)
        return learner.step(state, ref_params, rollout, rewards, key=key, ptx=ptx)

    return learner._replace(step=step)


@pytree
class IteratedRewardState:
    """The learner's state, and the reward model that is fitted beside it."""

    learner: object
    reward: TrainState

    @property
    def policy(self) -> TrainState:
        return self.learner.policy


def make_iterated_reward(
    learner: Algorithm, reward: Model, optimizer: optax.GradientTransformation, *, num_refits: int = 4
) -> Algorithm:
    """The rival of self-play: before each update a Bradley-Terry reward model is fitted to the same comparisons.

    It is never started anew, so it has learned from every query so far; each batch gives it `num_refits` steps on all
    pairs of siblings (`mean_{i<j}` of the soft Bradley-Terry loss), and its scores, centred, are the rewards.
    `init(reward_params, policy_params, ...)`. A cyclic preference has no such scores.
    Source: the iterated reward-model baseline of SPO (2401.04056).
    """
    read = score(reward)

    def init(reward_params: Params, *params: Params) -> IteratedRewardState:
        fitted = TrainState.create(reward_params, optimizer)
        return IteratedRewardState(learner=learner.init(*params), reward=fitted)

    def loss(params: Params, rollout: Rollout, prefs):
        scores = read(params, *sequences(rollout)).reshape(prefs.shape[:-1])
        first, second = jnp.triu_indices(prefs.shape[-1], 1)
        return jnp.mean(losses.soft_bradley_terry_loss(scores[:, first], scores[:, second], prefs[:, first, second]))

    def step(state: IteratedRewardState, ref_params, rollout: Rollout, prefs, *, key, ptx=None):
        def refit(fitted: TrainState, _):
            value, grads = jax.value_and_grad(loss)(fitted.params, rollout, prefs)
            finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(grads))
            return fitted.apply_gradients(grads, optimizer, where=finite), value

        fitted, values = jax.lax.scan(refit, state.reward, length=num_refits)
        scores = read(fitted.params, *sequences(rollout))
        inner, metrics = learner.step(state.learner, ref_params, rollout, scores - jnp.mean(scores), key=key, ptx=ptx)
        metrics: Metrics = metrics | {"reward_loss": values[0]}  # before the first step: on comparisons never seen
        return dataclasses.replace(state, learner=inner, reward=fitted), metrics

    axes = lambda: learner.logical_axes() | {"reward": reward.logical_axes()}
    return Algorithm(init, step, axes, learner.policy)
