"""PPO for continuous actions whose rewards come from a feedback: true rewards, self-play, or a reward model.

One step plays a batch of episodes, asks the feedback what they are worth, and updates policy and critic; arms of a
comparison differ in the feedback alone. Networks are plain nested dicts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax import losses
from rlhfjax.masked import whiten
from rlhfjax.rl.fit import adamw
from rlhfjax.types import Params, TrainState, pytree


class Environment(NamedTuple):
    """Episodes of fixed length: `reset(key) -> state`, `observe(state) -> [O]`, `step(state, action [A]) -> (state,
    reward [])`, of one episode; `num_actions` is A."""

    reset: Callable[[jax.Array], Any]
    observe: Callable[[Any], jax.Array]
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    horizon: int
    num_actions: int


@pytree
class Trajectories:
    """N episodes of H steps: observations `[N, H, O]`, actions `[N, H, A]`, logprobs and true rewards `[N, H]`, and
    `final [N, O]`, what is observed after the last action."""

    observations: jax.Array
    actions: jax.Array
    logprobs: jax.Array
    rewards: jax.Array
    final: jax.Array


class Feedback(NamedTuple):
    """`init(key, start) -> memory` from episodes of the start; `rewards(memory, key, played) -> (memory, [N, H],
    metrics)`, which has the number of preference queries it asked under "queries"."""

    init: Callable[..., Any]
    rewards: Callable[..., tuple[Any, jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """What one iteration does, in every arm."""

    num_episodes: int = 32
    """Played per iteration."""
    num_hidden: int = 64
    """Units in each of two hidden layers of every network."""
    num_epochs: int = 4
    """Passes over the episodes."""
    num_minibatches: int = 4
    """Optimiser steps per pass."""
    learning_rate: float = 1e-3
    """Of policy and critic, constant."""
    clip: float = 0.2
    """PPO's ratio clip."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation; episodes are not discounted."""
    b2: float = 0.99
    """Decay of Adam's squared gradients."""
    whiten_advantages: bool = True
    """Whether every batch's advantages get the same spread. In a game their size is what says how far to move."""

    def __post_init__(self):
        if self.num_episodes % self.num_minibatches:
            raise ValueError(f"{self.num_episodes} episodes do not divide into {self.num_minibatches} minibatches")


@pytree
class ControlState:
    """Everything an iteration changes; `memory` is the feedback's (the queue of rivals, a reward model)."""

    policy: TrainState
    critic: TrainState
    memory: Any


def mlp_init(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    """Layers "0", "1", ... of a tanh network; the last starts at a hundredth of the usual scale."""
    layers = {}
    for index, shape in enumerate(zip(sizes, sizes[1:])):
        scale = (0.01 if index == len(sizes) - 2 else 1.0) / jnp.sqrt(shape[0])
        kernel = scale * jax.random.normal(jax.random.fold_in(key, index), shape)
        layers[str(index)] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
    return layers


def mlp(layers: Params, x: jax.Array) -> jax.Array:
    """`[..., sizes[0]] -> [..., sizes[-1]]`."""
    for index in range(len(layers)):
        x = jnp.tanh(x) if index else x
        x = x @ layers[str(index)]["kernel"] + layers[str(index)]["bias"]
    return x


def action_logprobs(params: Params, observations: jax.Array, actions: jax.Array) -> jax.Array:
    """Log-density `[...]` of actions `[..., A]` under the Gaussian policy."""
    log_std = params["log_std"]
    distance = (actions - mlp(params["mean"], observations)) * jnp.exp(-log_std)
    return jnp.sum(-0.5 * jnp.square(distance) - log_std - 0.5 * jnp.log(2 * jnp.pi), -1)


def true_rewards() -> Feedback:
    """The oracle: RL on the environment's own rewards, without any query."""
    return Feedback(lambda key, start: (), lambda memory, key, played: ((), played.rewards, {"queries": jnp.zeros(())}))


def push(queue: Trajectories, played: Trajectories) -> Trajectories:
    """The queue with the newest episodes at its end and as many of the oldest dropped."""
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new])[-len(old) :], queue, played)


def self_play(prefer: Callable, queue_size: int) -> Feedback:
    """SPO (2401.04056): an episode is worth its mean preference over the last `queue_size` episodes, never over itself;
    that win rate, centred, is spread evenly over its steps. `prefer(key, N, M episodes) -> [N, M]` in [0, 1]."""

    def rewards(queue, key, played):
        prefs = prefer(key, played, queue)
        share = (jnp.mean(prefs, 1, keepdims=True) - 0.5) / played.rewards.shape[1]
        metrics = {"queries": jnp.asarray(prefs.size, float), "win_rate": jnp.mean(prefs)}
        return push(queue, played), jnp.broadcast_to(share, played.rewards.shape), metrics

    return Feedback(lambda key, start: _last(start, queue_size), rewards)


def reward_model(prefer: Callable, queue_size: int, *, num_hidden: int, num_steps: int, learning_rate: float):
    """The baseline: the queries of `self_play`, to which a Bradley-Terry model of rewards per step, summed over the
    episode, is refit by `num_steps` gradient steps from where it was; RL is on its rewards per step."""
    optimizer = adamw(learning_rate)
    inputs = lambda episodes: jnp.concatenate([episodes.observations, episodes.actions], -1)
    per_step = lambda params, episodes: mlp(params, inputs(episodes))[..., 0]

    def init(key, start):
        params = mlp_init(key, (inputs(start).shape[-1], num_hidden, num_hidden, 1))
        return _last(start, queue_size), TrainState.create(params, optimizer)

    def rewards(memory, key, played):
        queue, model = memory
        prefs = prefer(key, played, queue)

        def loss_fn(params):
            ours, theirs = (jnp.sum(per_step(params, episodes), 1) for episodes in (played, queue))
            ours, theirs = jnp.broadcast_arrays(ours[:, None], theirs)
            return jnp.mean(losses.soft_bradley_terry_loss(ours, theirs, prefs))

        def fit(model, _):
            loss, grads = jax.value_and_grad(loss_fn)(model.params)
            return model.apply_gradients(grads, optimizer, where=jnp.isfinite(loss)), loss

        model, loss = jax.lax.scan(fit, model, length=num_steps)
        metrics = {"queries": jnp.asarray(prefs.size, float), "reward_loss": loss[-1]}
        return (push(queue, played), model), per_step(model.params, played), metrics

    return Feedback(init, rewards)


def _last(episodes: Trajectories, num: int) -> Trajectories:
    if (have := len(episodes.rewards)) < num:
        raise ValueError(f"a queue of {num} rivals cannot be filled from {have} episodes: lower queue_size")
    return jax.tree.map(lambda x: x[-num:], episodes)


def make_control_ppo(env: Environment, feedback: Feedback, config: ControlConfig):
    """`init(key) -> state` and `step(state, key) -> (state, metrics, trajectories)`, one iteration."""
    optimizer = adamw(config.learning_rate, b2=config.b2)

    def rollout(params: Params, key: jax.Array) -> Trajectories:
        def one_step(state, step_key):
            seen = env.observe(state)
            mean = mlp(params["mean"], seen)
            action = mean + jnp.exp(params["log_std"]) * jax.random.normal(step_key, mean.shape)
            state, reward = env.step(state, action)
            logprob = action_logprobs(params, seen, action)
            return state, dict(observations=seen, actions=action, logprobs=logprob, rewards=reward)

        def episode(key):
            reset_key, key = jax.random.split(key)
            state, steps = jax.lax.scan(one_step, env.reset(reset_key), jax.random.split(key, env.horizon))
            return Trajectories(**steps, final=env.observe(state))

        return jax.vmap(episode)(jax.random.split(key, config.num_episodes))

    def init(key: jax.Array) -> ControlState:
        policy_key, critic_key, play_key, memory_key = jax.random.split(key, 4)
        (num_seen,) = jax.eval_shape(lambda key: env.observe(env.reset(key)), key).shape
        sizes = num_seen, config.num_hidden, config.num_hidden
        params = {"mean": mlp_init(policy_key, (*sizes, env.num_actions)),
                  "log_std": jnp.full(env.num_actions, -0.5)}  # fmt: skip
        return ControlState(
            policy=TrainState.create(params, optimizer),
            critic=TrainState.create(mlp_init(critic_key, (*sizes, 1)), optimizer),
            memory=feedback.init(memory_key, rollout(params, play_key)),
        )

    def loss_fn(params, played, advantages, returns):
        logprobs = action_logprobs(params[0], played.observations, played.actions)
        policy_loss = jnp.mean(losses.ppo_clip_loss(logprobs, played.logprobs, advantages, clip=config.clip))
        critic_loss = jnp.mean(0.5 * jnp.square(mlp(params[1], played.observations)[..., 0] - returns))
        return policy_loss + critic_loss, {"policy_loss": policy_loss, "critic_loss": critic_loss}

    def update(learners, minibatch):
        params = [learner.params for learner in learners]
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *minibatch)
        finite = jnp.isfinite(optax.tree.norm(grads)) & jnp.isfinite(loss)
        learners = tuple(x.apply_gradients(g, optimizer, where=finite) for x, g in zip(learners, grads))
        return learners, metrics | {"skipped": ~finite}

    def step(state: ControlState, key: jax.Array) -> tuple[ControlState, dict[str, jax.Array], Trajectories]:
        play_key, feedback_key, order_key = jax.random.split(key, 3)
        played = rollout(state.policy.params, play_key)
        memory, rewards, metrics = feedback.rewards(state.memory, feedback_key, played)
        every = jnp.ones(rewards.shape, bool)
        values = mlp(state.critic.params, played.observations)[..., 0]
        advantages, returns = losses.gae(rewards, values, every, gamma=1.0, gae_lambda=config.gae_lambda)
        advantages = whiten(advantages, every) if config.whiten_advantages else advantages
        epochs = jnp.tile(jnp.arange(config.num_episodes), (config.num_epochs, 1))
        rows = jax.random.permutation(order_key, epochs, axis=1, independent=True)
        rows = rows.reshape(config.num_epochs * config.num_minibatches, -1)
        minibatches = jax.tree.map(lambda x: x[rows], (played, advantages, returns))
        (policy, critic), means = jax.lax.scan(update, (state.policy, state.critic), minibatches)
        metrics |= {"return": jnp.mean(jnp.sum(played.rewards, -1)), "skipped": jnp.sum(means.pop("skipped"))}
        metrics |= jax.tree.map(jnp.mean, means)
        return ControlState(policy=policy, critic=critic, memory=memory), metrics, played

    return init, step
