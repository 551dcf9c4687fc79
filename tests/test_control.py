"""Continuous control: the point mass, preferences between trajectories, the queue, three feedbacks and one PPO."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.evaluation.game_figures import gain_statistics, sector_paths
from rlhfjax.evaluation.statistics import verdict
from rlhfjax.io.launch import Preempted
from rlhfjax.io.monitor import Guard, Monitor
from rlhfjax.rl.control import (
    ControlConfig,
    Feedback,
    Trajectories,
    action_logprobs,
    make_control_ppo,
    mlp_init,
    push,
    reward_model,
    self_play,
    true_rewards,
)
from rlhfjax.worlds import control

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
paper = importlib.import_module("experiments.spo.control")
close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
rng = np.random.default_rng(0)
KEY = jax.random.key(0)


def episodes(returns, final=None, num_steps=4):
    """Made-up episodes with these returns, which end at these positions."""
    returns = np.asarray(returns, np.float32)
    num = len(returns)
    final = np.zeros((num, 2)) if final is None else np.asarray(final)
    seen = np.concatenate([final, np.zeros((num, 3))], -1).astype(np.float32)
    return Trajectories(
        observations=np.repeat(seen[:, None], num_steps, 1), actions=np.zeros((num, num_steps, 2), np.float32),
        logprobs=np.zeros((num, num_steps), np.float32), final=seen,
        rewards=np.repeat(returns[:, None] / num_steps, num_steps, 1))  # fmt: skip


# The environment


def play(env, actions, key=KEY):
    state, rewards = env.reset(key), []
    for action in actions:
        state, reward = env.step(state, jnp.asarray(action, jnp.float32))
        rewards.append(float(reward))
    return np.asarray(env.observe(state)), rewards


def test_a_push_by_hand():
    env = control.point_mass(horizon=2)
    start = np.asarray(env.observe(env.reset(KEY)))
    close(start[2:], [0, 0, -1])
    seen, rewards = play(env, [[1.0, -5.0], [0.0, 0.0]])
    close(seen[:2], start[:2] + [0.02 * 1.85, -0.02 * 1.85])  # clipped; then 0.85 of the velocity stays
    close(seen[2:], [5 * 0.017, -5 * 0.017, 1])
    close(rewards[1], -np.linalg.norm(seen[:2] - control.TARGET) / 2)


def test_the_environment_is_a_function_of_its_key():
    actions = rng.normal(size=(10, 2))
    for env in (control.point_mass(10), control.point_mass(10, wind=2.0)):
        np.testing.assert_array_equal(play(env, actions)[0], play(env, actions)[0])
        assert np.any(play(env, actions)[0] != play(env, actions, jax.random.key(1))[0])


def test_gusts_differ_from_step_to_step_and_leave_still_air_alone():
    still, windy = (play(control.point_mass(5, wind=wind), np.zeros((5, 2)))[0] for wind in (0.0, 2.0))
    close(still[2:4], 0)
    assert np.all(windy[2:4] != 0) and windy[2] != windy[3]


def test_an_environment_of_brax_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax", None)
    with pytest.raises(ImportError, match=r"reacher needs brax: pip install -e '.\[control\]'"):
        control.brax_environment("reacher")


# Preferences


def test_preferences_of_returns_by_hand():
    ours, theirs = episodes([1.0, 2.0]), episodes([2.0, 0.5, 3.0])
    close(control.max_reward(KEY, ours, theirs), [[0, 1, 0], [0.5, 1, 0]])
    many = control.noisy(KEY, episodes(np.ones(200)), episodes(np.zeros(200)), temperature=0.5)
    assert set(np.unique(many)) == {0, 1}
    close(many.mean(), 1 / (1 + np.exp(-2)), atol=0.01)


def test_sectors_by_angle():
    ends = [[1, 0.1], [-1, 0.1], [0, -1], [1, -0.1]]
    np.testing.assert_array_equal(control.sector(episodes(np.zeros(4), ends), (0.5, 0.3, 0.2)), [0, 0, 1, 2])
    shares = control.sector_shares(episodes(np.zeros(4), ends), (0.5, 0.3, 0.2))
    close([shares[f"sector_{i}"] for i in range(3)], [0.5, 0.25, 0.25])


def test_cyclic_preferences_follow_the_game_between_sectors():
    game = np.array([[0, 0.8, -0.2], [-0.8, 0, 0.4], [0.2, -0.4, 0]], np.float32)
    ends = np.array([[1, 1], [-1, -0.1], [0.1, -1]])  # one in each third
    each = episodes(np.zeros(600), np.repeat(ends, 200, 0))
    labels = np.asarray(control.cyclic(KEY, each, each, game, (1 / 3, 1 / 3, 1 / 3)))
    close(2 * labels.reshape(3, 200, 3, 200).mean((1, 3)) - 1, game, atol=0.03)


# The queue and the feedbacks


def test_the_queue_keeps_the_latest_in_order():
    queue = push(episodes([1, 2, 3, 4]), episodes([5, 6, 7]))
    close(queue.rewards.sum(1), [4, 5, 6, 7])
    close(push(queue, episodes(np.arange(8, 14))).rewards.sum(1), [10, 11, 12, 13])


def test_self_play_by_hand():
    feedback = self_play(control.max_reward, queue_size=3)
    queue = feedback.init(KEY, episodes([9.0, 1.0, 2.0, 3.0]))
    close(queue.rewards.sum(1), [1, 2, 3])
    played = episodes([0.0, 2.0, 9.0])
    queue, rewards, metrics = feedback.rewards(queue, KEY, played)
    # Beaten by all; beats one, ties one; beats all. Spread over 4 steps. No new episode is among the rivals.
    close(rewards, np.repeat(np.array([-0.5, 0.0, 0.5])[:, None] / 4, 4, 1))
    close(queue.rewards.sum(1), [0, 2, 9])
    close([metrics["queries"], metrics["win_rate"]], [9, 0.5])


def test_a_queue_that_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="a queue of 5 rivals cannot be filled from 4 episodes: lower queue_size"):
        self_play(control.max_reward, queue_size=5).init(KEY, episodes(np.zeros(4)))
    with pytest.raises(ValueError, match="30 episodes do not divide into 4 minibatches"):
        ControlConfig(num_episodes=30)


def test_a_reward_model_asks_as_many_queries_and_learns_their_order():
    options = dict(num_hidden=16, num_steps=200, learning_rate=1e-2)
    feedback = reward_model(control.max_reward, queue_size=8, **options)
    ends = rng.uniform(-1, 1, (16, 2))
    played = episodes(ends[:, 0], ends)  # the return is what the first observation says
    memory, rewards, metrics = feedback.rewards(feedback.init(KEY, played), KEY, played)
    assert np.corrcoef(np.asarray(rewards).sum(1), ends[:, 0])[0, 1] > 0.95
    assert metrics["queries"] == 16 * 8 and metrics["reward_loss"] < 0.3
    close(memory[0].rewards, played.rewards[-8:])


# PPO


def test_log_densities_are_those_of_a_gaussian():
    params = {"mean": mlp_init(KEY, (5, 8, 2)), "log_std": jnp.array([0.1, -0.4])}
    seen, actions = rng.normal(size=(3, 5)), rng.normal(size=(3, 2))
    layers = jax.tree.map(np.asarray, params["mean"])
    hidden = np.tanh(seen @ layers["0"]["kernel"] + layers["0"]["bias"])
    mean, std = hidden @ layers["1"]["kernel"] + layers["1"]["bias"], np.exp([0.1, -0.4])
    expected = -0.5 * ((actions - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
    close(action_logprobs(params, seen, actions), expected.sum(1), rtol=1e-5)


SMALL = ControlConfig(num_episodes=16, num_hidden=16, learning_rate=3e-3)


def train(feedback, num_iterations=30, seed=0, monitor=None, config=SMALL):
    history = []
    monitor = monitor or Monitor(log=lambda step, metrics: history.append(metrics))
    params = control.train(
        environment=functools.partial(control.point_mass, horizon=20), feedback=feedback, config=config, seed=seed,
        num_iterations=num_iterations, label="test", monitor=monitor)  # fmt: skip
    return params, np.array([metrics["return"] for metrics in history])


SPO = functools.partial(self_play, control.max_reward, 8)


def backwards(key, ours, theirs):
    return 1 - control.max_reward(key, ours, theirs)


def test_learning_raises_the_return_and_planted_faults_turn_the_claim_on_it():
    returns = {"oracle": train(true_rewards)[1], "SPO": train(SPO)[1]}
    start = returns["oracle"][0]
    assert returns["SPO"][0] == start, "arms share their start"
    assert min(values[-3:].mean() for values in returns.values()) > start + 0.15
    tiny = ControlConfig(num_episodes=16, num_hidden=16, learning_rate=1e-12)
    faults = {"negated": train(functools.partial(self_play, backwards, 8))[1], "still": train(SPO, config=tiny)[1]}
    for name, values in faults.items():
        statistics = gain_statistics(returns | {"SPO": values, "reward model": returns["oracle"]})
        assert judged("SP-1 control", statistics) == "contradicted", name
        assert judged("SP-1 samples", statistics) == "contradicted", name


def judged(name, statistics):
    claim = next(claim for claim in paper.CLAIMS if claim.id == name)
    value = statistics[claim.statistic]
    return verdict([value - 1e-4, value, value + 1e-4], claim.threshold, claim.direction)


def test_an_interrupted_run_ends_as_one_that_was_not(monkeypatch, tmp_path):
    """The queue is part of what is saved."""
    whole, _ = train(SPO, num_iterations=6)
    monitor = Monitor(directory=tmp_path / "checkpoints", identity="x", guard=Guard(checkpoint_every=2))
    asked = iter([False] * 3 + [True])
    monkeypatch.setattr("rlhfjax.io.monitor.stop_requested", lambda: next(asked))
    with pytest.raises(Preempted, match="stopped at step 3 of 6"):
        train(SPO, num_iterations=6, monitor=monitor)
    monkeypatch.setattr("rlhfjax.io.monitor.stop_requested", lambda: False)
    resumed, _ = train(SPO, num_iterations=6, monitor=monitor)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_an_update_that_is_not_finite_changes_no_network_and_is_counted():
    broken = Feedback(lambda key, start: (), lambda memory, key, played: ((), jnp.nan * played.rewards, {}))
    init, step = make_control_ppo(control.point_mass(5), broken, SMALL)
    state = init(KEY)
    after, metrics, _ = step(state, KEY)
    jax.tree.map(np.testing.assert_array_equal, after.policy, state.policy)
    assert metrics["skipped"] == SMALL.num_epochs * SMALL.num_minibatches


# Statistics


def test_gains_by_hand():
    oracle = np.concatenate([[0.0], np.full(39, 1.0)])
    slow = np.concatenate([np.zeros(20), np.full(20, 0.96)])
    never = np.full(40, 0.5)
    measured = gain_statistics({"oracle": oracle, "SPO": slow, "reward model": never})
    close(measured["share_of_oracle"], 0.96)
    assert (measured["iterations_oracle"], measured["iterations_SPO"]) == (6, 25)  # means of five with 0.9 in all
    assert measured["samples_ratio"] == 25 / 41


def test_paths_of_sectors_by_hand():
    history = {"sector_1": np.array([1.0, 0.0, 1.0]), "return": np.zeros(3), "sector_0": np.array([0.0, 1.0, 0.0])}
    latest, average = sector_paths(history)
    close(latest, [[0, 1], [1, 0], [0, 1]])
    close(average, [[0, 1], [0.5, 0.5], [1 / 3, 2 / 3]])
