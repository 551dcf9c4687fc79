"""Preferences as games: rewards of siblings, minimax winners, Hedge's regret, and the experiment by its own command."""

import functools
import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.evaluation.statistics import verdict
from rlhfjax.losses import exploitability, hedge_update, self_play_rewards
from rlhfjax.worlds import games

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
paper = importlib.import_module("experiments.spo.matrix_games")
close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
rng = np.random.default_rng(0)
CYCLE, WINNER, START = games.cyclic_game(0.4, 0.2, 0.1), [0.285714, 0.142857, 0.571429], np.array([0.8, 0.15, 0.05])


def random_prefs(*shape):
    above = np.triu(rng.uniform(size=shape), 1)
    return (above + np.tril(1 - np.swapaxes(above, -1, -2), -1)).astype(np.float32)


# Rewards of siblings


def test_rewards_of_three_siblings_by_hand():
    prefs = np.array([[np.nan, 0.7, 0.4], [0.3, np.nan, 0.9], [0.6, 0.1, np.nan]], np.float32)
    close(self_play_rewards(prefs), [0.05, 0.10, -0.15])


def test_rewards_are_centred_win_rates_among_the_others():
    prefs = random_prefs(2, 4, 6, 6)
    for index in np.ndindex(2, 4):
        expected = [np.mean([prefs[index][i, j] for j in range(6) if j != i]) - 0.5 for i in range(6)]
        close(self_play_rewards(prefs)[index], expected)
    close(self_play_rewards(prefs).sum(-1), 0)


def test_the_diagonal_is_never_read():
    prefs = random_prefs(5, 5)
    broken = np.where(np.eye(5, dtype=bool), np.nan, prefs)
    total = lambda p: jnp.sum(self_play_rewards(p) * jnp.arange(5.0))
    np.testing.assert_array_equal(self_play_rewards(broken), self_play_rewards(prefs))
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(broken), jax.jit(jax.grad(total))(prefs))


@pytest.mark.parametrize("change, message", [
    (lambda p: p[..., :3], r"prefs must have shape \[..., K, K\], got \[4, 3\]"),
    (lambda p: p[:1, :1], "an answer needs siblings"),
    (lambda p: p.at[0, 1].set(1.2).at[1, 0].set(-0.2), r"prefs must lie in \[0, 1\], got a violation of 0.2"),
    (lambda p: p.at[0, 1].add(0.05), r"prefs \+ prefs\^T must be 1 off the diagonal, got a violation of 0.05"),
    (lambda p: p.at[2, 3].set(jnp.nan), "got a violation of nan"),
])  # fmt: skip
def test_preferences_that_are_none_are_refused(change, message):
    prefs = jnp.asarray(np.clip(random_prefs(4, 4), 0.1, 0.9))
    with pytest.raises(ValueError, match=message):
        self_play_rewards(change(prefs))


# Games and their winners


def test_the_winner_of_a_cycle_by_hand():
    close(games.minimax_winner(CYCLE), WINNER)
    close(exploitability(CYCLE, games.minimax_winner(CYCLE)), 0, atol=1e-7)
    close(exploitability(CYCLE, np.eye(3)[0]), 0.1)
    close(exploitability(CYCLE, START), 0.055)  # A wins 0.4 * 0.15 - 0.1 * 0.05


def test_borda_crowns_a_class_that_the_winner_hardly_plays():
    close(CYCLE.mean(1), [0.1, -0.2 / 3, -0.1 / 3])


@pytest.mark.parametrize("num_classes", [2, 3, 5, 8])
def test_no_policy_wins_from_the_winner_of_a_random_game(num_classes):
    game = games.random_game(3, num_classes)
    np.testing.assert_array_equal(game, -game.T)
    winner = games.minimax_winner(game)
    close(winner.sum(), 1)
    assert winner.min() >= 0 and exploitability(game, winner) < 1e-6
    others = rng.dirichlet(np.ones(num_classes), 100)
    assert np.all(np.asarray(exploitability(np.broadcast_to(game, (100, *game.shape)), others)) > 0)


def test_the_winner_of_scored_preferences_is_the_best_class():
    scores = np.array([0.3, 1.1, -0.4])
    close(games.minimax_winner(games.scored_game(scores)), [0, 1, 0])
    close(games.scored_game(scores)[1, 0], 2 / (1 + np.exp(-0.8)) - 1)


@pytest.mark.parametrize("call, message", [
    (lambda: games.minimax_winner(np.abs(CYCLE)), "payoffs of a symmetric game must be antisymmetric, .* reaches 0.8"),
    (lambda: exploitability(np.abs(CYCLE), START), r"payoffs \+ payoffs\^T must be 0, got a violation of 0.8"),
    (lambda: exploitability(CYCLE, 2 * START), "probabilities must sum to 1, got a violation of 1"),
    (lambda: exploitability(CYCLE, np.array([1.2, -0.2, 0])), "probabilities must not be negative, .* 0.2"),
    (lambda: hedge_update(START, START, learning_rate=-1.0), "learning_rate must lie in"),
])  # fmt: skip
def test_what_is_no_game_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Hedge


def test_hedge_multiplies_weights_by_hand():
    updated = np.exp(hedge_update(np.log([0.5, 0.3, 0.2]), np.array([1.0, 0.0, -1.0]), learning_rate=0.5))
    weights = [0.5 * 1.648721, 0.3, 0.2 * 0.606531]
    close(updated, np.array(weights) / sum(weights))


@pytest.mark.parametrize("adversary", ["random", "greedy"])
def test_the_regret_of_hedge_stays_below_its_bound(adversary):
    """Against payoffs in [-1, 1], those that hurt the current policy most among them; without learning it does not."""
    num_rounds, rate = 400, 0.12
    draws = rng.uniform(-1, 1, (num_rounds, 3))

    def regret(rate):
        logprobs, earned, total = jnp.log(START), 0.0, np.zeros(3)
        for draw in draws:
            policy = np.exp(np.asarray(logprobs, float))
            payoffs = draw + [0, 0, 0.5] if adversary == "random" else np.where(policy == policy.max(), -1.0, 1.0)
            payoffs = np.clip(payoffs, -1, 1)
            earned, total = earned + policy @ payoffs, total + payoffs
            logprobs = hedge_update(logprobs, payoffs, learning_rate=rate)
        return total.max() - earned

    bound = np.log(1 / START.min()) / rate + rate * num_rounds / 2
    assert regret(rate) < bound < regret(0.0)


def test_the_exploitability_of_the_average_is_the_regret_of_self_play_per_round():
    logprobs, policies, total = jnp.log(START), [], np.zeros(3)
    for _ in range(300):
        policies.append(np.exp(np.asarray(logprobs, float)))
        total += CYCLE @ policies[-1]  # what each class wins from the policy, which wins nothing from itself
        logprobs = hedge_update(logprobs, CYCLE @ policies[-1], learning_rate=0.1)
    close(exploitability(CYCLE, np.mean(policies, 0)), total.max() / 300, rtol=1e-4)


# Playing from labels


def play(feedback=games.self_play, rounds=3_000, payoffs=CYCLE, **options):
    options = dict(num_siblings=16, learning_rate=2.0, seed=0) | options
    return games.play(payoffs=payoffs[None], start=START, feedback=feedback, num_rounds=rounds, **options)


def test_a_round_of_self_play_estimates_what_each_class_wins_from_the_policy():
    """Over many draws the weighted rewards of sampled siblings have the mean `payoffs @ policy`, up to a shift."""
    classes = rng.choice(3, (20_000, 8), p=START)
    above = np.triu(rng.uniform(size=(20_000, 8, 8)) < (1 + CYCLE[classes[:, :, None], classes[:, None]]) / 2, 1)
    labels = (above + np.tril(1 - np.swapaxes(above, 1, 2), -1)).astype(np.float32)
    _, gains = jax.jit(jax.vmap(games.self_play, (None, 0, 0, None)))(None, classes, labels, jnp.log(START))
    shift = np.bincount(classes.ravel()) / classes.size / START  # 1 on average; its noise is the larger part
    close(np.mean(gains, 0) + shift, CYCLE @ START, atol=0.01)


def test_a_reward_model_recovers_the_scores_that_made_its_labels():
    scores = np.array([0.0, 0.8, -0.8])
    memory, logprobs = (jnp.zeros((3, 3)), jnp.zeros(3)), jnp.log(jnp.ones(3) / 3)
    step = jax.jit(games.reward_model)
    for _ in range(300):
        classes = rng.integers(0, 3, 16)
        above = np.triu(rng.uniform(size=(16, 16)) < (1 + games.scored_game(scores)[classes[:, None], classes]) / 2, 1)
        memory, fitted = step(memory, classes, (above + np.tril(1 - above.T, -1)).astype(np.float32), logprobs)
    close(fitted, scores, atol=0.05)


def test_play_depends_on_its_seed_alone():
    one, again, other = play(rounds=50), play(rounds=50), play(rounds=50, seed=1)
    np.testing.assert_array_equal(one["policy"], again["policy"])
    assert np.any(one["policy"] != other["policy"])
    np.testing.assert_allclose(one["policy"][0, 0], START, rtol=1e-6)
    assert one["round"][0] == 1 and one["round"][-1] == 50


def test_the_slope_of_a_power_law_is_its_exponent():
    rounds = np.arange(1, 1001)
    values = np.stack([0.3 * rounds**-0.5, rounds**-0.7], 1)
    assert games.decay_exponent(rounds, values, 10) == pytest.approx(-0.6)


# Planted faults: each turns a claim's verdict


def average(played):
    return played["average"][-1, 0]


def claim(name, values):
    row = next(c for c in paper.CLAIMS if c.id == name)
    return verdict([value + jitter for value, jitter in zip(values, (-1e-4, 0, 1e-4))], row.threshold, row.direction)


def negated(memory, classes, labels, logprobs):
    return games.self_play(memory, classes, labels.T, logprobs)


def without_weights(memory, classes, labels, logprobs):
    return memory, jnp.zeros_like(logprobs).at[classes].add(2 * self_play_rewards(labels) - 1) / len(classes)


def test_planted_faults_in_self_play_turn_the_claims_on_the_winner():
    distance = lambda played: [np.abs(average(played) - WINNER).sum()] * 3
    wins = lambda played: [float(exploitability(CYCLE, average(played)))] * 3
    sound = play(rounds=60_000)
    assert (claim("SP-3 mix", distance(sound)), claim("SP-3 exploit", wins(sound))) == ("supported",) * 2
    still = play(learning_rate=0.0)
    assert (claim("SP-3 mix", distance(still)), claim("SP-3 exploit", wins(still))) == ("contradicted",) * 2
    assert claim("SP-3 mix", distance(play(without_weights))) == "contradicted"


def test_planted_faults_turn_the_claims_on_reward_models():
    ratio = lambda played, which: [float(exploitability(CYCLE, played[which][-1, 0])) / 0.1] * 3
    for name, options in (("SP-4 once", dict(on_policy=False)), ("SP-4 iterated", {})):
        assert claim(name, ratio(play(games.reward_model, **options), "policy")) == "supported"
    sound = play(rounds=60_000)
    for name in ("SP-4 once", "SP-4 iterated", "SP-4 average", "SP-4 queue"):  # of self-play's average they are false
        assert claim(name, ratio(sound, "average")) == "contradicted"


def test_planted_faults_turn_the_control():
    """A cycle run backwards has the same winner, so that a sign error shows where a best class exists."""
    scored = games.scored_game([0.0, 0.8, -0.8])

    def wins(feedback, **options):
        return [float(exploitability(scored, average(play(feedback, payoffs=scored, **options))))] * 3

    for sound in (games.self_play, games.reward_model):
        assert claim("SP-4 transitive", wins(sound)) == "supported"
        assert claim("SP-4 transitive", wins(sound, learning_rate=0.0)) == "contradicted"
    assert claim("SP-4 transitive", wins(negated)) == "contradicted"


def test_a_planted_fault_turns_the_claim_on_the_rate():
    curve = lambda played: games.exploitability_curves(CYCLE[None], played)["average"]
    stopped = play(learning_rate=0.0)
    assert claim("SP-6", [games.decay_exponent(stopped["round"], curve(stopped), 100)] * 3) == "contradicted"
