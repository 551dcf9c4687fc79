"""A point that is pushed about on a plane, preferences between its trajectories, and the loop that learns from them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.io.monitor import Monitor
from rlhfjax.rl.control import ControlConfig, Environment, Feedback, Trajectories, make_control_ppo

VERSION = "1.0"
TARGET = (0.6, 0.4)


def point_mass(horizon: int = 40, wind: float = 0.0) -> Environment:
    """A point with inertia, pushed by two forces in [-1, 1] from near the origin; its reward is nearness to a target.

    Observation: position (2), velocity (2), time from -1 to 1. Reward of a step: `-|position - TARGET| / horizon`, so
    that a return is minus the mean distance. wind: standard deviation of gusts, in units of the largest push.
    """

    def reset(key):
        start = 0.05 * jax.random.normal(key, (2,))
        return {"position": start, "velocity": jnp.zeros(2), "time": jnp.zeros(()), "key": key}

    def observe(state):
        return jnp.concatenate([state["position"], 5 * state["velocity"], 2 * state["time"][None] / horizon - 1])

    def step(state, action):
        key, gust_key = jax.random.split(state["key"])
        push = jnp.clip(action, -1, 1) + wind * jax.random.normal(gust_key, (2,))
        velocity = 0.85 * state["velocity"] + 0.02 * push
        position = state["position"] + velocity
        reward = -jnp.linalg.norm(position - jnp.asarray(TARGET)) / horizon
        return {"position": position, "velocity": velocity, "time": state["time"] + 1, "key": key}, reward

    return Environment(reset, observe, step, horizon, num_actions=2)


def brax_environment(name: str, horizon: int = 200) -> Environment:
    """An environment of brax (`pip install -e '.[control]'`), such as "reacher", for `horizon` steps; CPU: tens of
    seconds to compile."""
    try:
        from brax import envs
    except ImportError as error:
        raise ImportError(f"{name} needs brax: pip install -e '.[control]'") from error
    env = envs.create(name, episode_length=horizon, auto_reset=False, backend="spring")

    def step(state, action):
        state = env.step(state, jnp.clip(action, -1, 1))
        return state, state.reward

    return Environment(env.reset, lambda state: state.obs, step, horizon, env.action_size)


# Preferences: (key, N episodes, M episodes) -> labels [N, M], 1 where the first is preferred, ties 1/2.


def max_reward(key: jax.Array, ours: Trajectories, theirs: Trajectories) -> jax.Array:
    """The larger return is preferred, always."""
    return (1 + jnp.sign(_gaps(ours, theirs))) / 2


def noisy(key: jax.Array, ours: Trajectories, theirs: Trajectories, temperature: float) -> jax.Array:
    """Bradley-Terry labels of returns: `P = sigmoid(difference / temperature)`, drawn anew for every query."""
    return jax.random.bernoulli(key, jax.nn.sigmoid(_gaps(ours, theirs) / temperature)).astype(jnp.float32)


def cyclic(key: jax.Array, ours: Trajectories, theirs: Trajectories, payoffs: Any, shares: Any) -> jax.Array:
    """Three kinds of people, no one reward: labels drawn from the game `payoffs` between the sectors where both end."""
    first, second = (sector(episodes, shares) for episodes in (ours, theirs))
    prefs = (1 + jnp.asarray(payoffs)[first[:, None], second]) / 2
    return jax.random.bernoulli(key, prefs).astype(jnp.float32)


def _gaps(ours: Trajectories, theirs: Trajectories) -> jax.Array:
    returns, others = (jnp.sum(episodes.rewards, -1) for episodes in (ours, theirs))
    return returns[:, None] - others


def sector(episodes: Trajectories, shares: Any) -> jax.Array:
    """Index `[N]` of the sector, by angle about the origin, in which each episode of `point_mass` ends.

    shares: of the full circle, `[K]`; an aimless policy ends in them about so often.
    """
    turns = jnp.arctan2(episodes.final[:, 1], episodes.final[:, 0]) / (2 * jnp.pi) % 1.0
    return jnp.sum(turns[:, None] >= jnp.cumsum(jnp.asarray(shares))[:-1], -1)


def sector_shares(episodes: Trajectories, shares: Any) -> dict[str, jax.Array]:
    """The share of the episodes that end in each sector, as metrics "sector_0", "sector_1", ..."""
    counts = jnp.mean(jax.nn.one_hot(sector(episodes, shares), len(shares)), 0)
    return {f"sector_{index}": share for index, share in enumerate(counts)}


def train(
    *, environment: Callable[[], Environment], feedback: Callable[[], Feedback], config: ControlConfig,
    num_iterations: int, seed: int, label: str, monitor: Monitor,
    observe: Callable[[Trajectories], dict[str, jax.Array]] = lambda episodes: {},
) -> Any:  # fmt: skip
    """A policy's parameters after PPO on what `feedback()` says of its episodes in `environment()`.

    `observe` gives further metrics of each iteration's episodes and never reaches the learner.
    """
    init, learn = make_control_ppo(environment(), feedback(), config)

    @jax.jit
    def iteration(state, key, index):  # the key is an argument: one compiled program serves all seeds
        state, metrics, episodes = learn(state, jax.random.fold_in(key, index))
        return state, metrics | observe(episodes)

    key = jax.random.key(seed)
    step = lambda state, first, clock: iteration(state, key, first)
    state = monitor.train(step, jax.jit(init)(key), num_iterations, label=label, unit="iterations", shown=("return",))
    return state.policy.params
