"""Learners of RLAIF and SPO: REINFORCE by its own equation, self-play, and the reward model that is fitted beside it.

Networks are tables where gradients are written by hand: logits, values and scores depend on the last token alone.
"""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.models.transformer import Model, TransformerConfig, make_language_model, make_scalar_model
from rlhfjax.parallel import mesh
from rlhfjax.parallel.mesh import MeshConfig, make_mesh
from rlhfjax.rl import ppo
from rlhfjax.rl.self_play import make_iterated_reward, make_self_play
from rlhfjax.types import Rollout

RATE, CRITIC_RATE, SHARE, TEMPERATURE = 0.7, 0.4, 0.3, 0.9
VOCAB, ROWS, TOKENS = 5, 12, 4
KEY = jax.random.key(0)
rng = np.random.default_rng(0)
TABLE, REF_TABLE = rng.normal(size=(2, VOCAB, VOCAB))
CRITIC, REWARD = rng.normal(size=(2, VOCAB))
SCORES = rng.normal(size=ROWS)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def lookup(params, tokens, mask, *, num_outputs=None):
    return params[tokens][:, -(num_outputs or tokens.shape[1]) :], None


TABLE_MODEL = Model(config=None, init=None, apply=lookup, init_cache=None, logical_axes=lambda: ("vocab",))


def rollout_of(responses, lengths, prompt=0) -> Rollout:
    tokens = np.asarray(responses, np.int32)
    mask = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    prompts = np.full((len(tokens), 2), prompt, np.int32)
    return Rollout(prompts=prompts, prompt_mask=np.ones_like(prompts, bool), tokens=tokens, mask=mask,
                   logprobs=np.zeros(tokens.shape), finished=np.ones(len(tokens), bool))  # fmt: skip


ROLLOUT = rollout_of(rng.integers(0, VOCAB, (ROWS, TOKENS)), rng.integers(1, TOKENS + 1, ROWS))


def softmax(table, temperature=TEMPERATURE):
    weights = np.exp(table / temperature)
    return weights / weights.sum(-1, keepdims=True)


# REINFORCE


def shipped(config, rollout=ROLLOUT, scores=SCORES, table=TABLE):
    """Policy and critic after one step of SGD."""
    init, step, *_ = ppo.make_ppo(TABLE_MODEL, TABLE_MODEL, optax.sgd(RATE), optax.sgd(CRITIC_RATE), config)
    state, metrics = jax.jit(step)(init(table, CRITIC), REF_TABLE, rollout, scores, key=KEY)
    return np.asarray(state.policy.params), np.asarray(state.critic.params), metrics


def test_a_step_is_reinforce_with_a_baseline(float64):
    """Token by token: -(Z_t - V_t) grad log pi, Z_t what is left of (1 - b) r - b KL, all over 1 - b; V towards Z."""
    probs, ref = softmax(TABLE), softmax(REF_TABLE)
    policy_grad, critic_grad, num = np.zeros_like(TABLE), np.zeros_like(CRITIC), ROLLOUT.mask.sum()
    for row in range(ROWS):
        said = [0, *ROLLOUT.tokens[row, : ROLLOUT.mask[row].sum()]]
        steps, left = list(itertools.pairwise(said)), (1 - SHARE) * SCORES[row]
        for before, token in reversed(steps):
            left -= SHARE * np.log(probs[before, token] / ref[before, token])
            to_go = left / (1 - SHARE)
            policy_grad[before] -= (to_go - CRITIC[before]) * (np.eye(VOCAB)[token] - probs[before]) / TEMPERATURE / num
            critic_grad[before] += (CRITIC[before] - to_go) / num
    policy, critic, metrics = shipped(ppo.reinforce(SHARE, temperature=TEMPERATURE))
    np.testing.assert_allclose(policy, TABLE - RATE * policy_grad, atol=1e-12)
    np.testing.assert_allclose(critic, CRITIC - CRITIC_RATE * critic_grad, atol=1e-12)
    assert metrics["clip_fraction"] == metrics["skipped"] == 0 and abs(metrics["old_kl"]) < 1e-12


def every_answer():
    """All answers of two of three tokens, each as often as its probability under a policy of halves and quarters."""
    halves = np.array([[2, 1, 1], [1, 2, 1], [1, 1, 2]]) / 4
    answers = [[i, j] for i, j in itertools.product(range(3), repeat=2)
               for _ in range(round(16 * halves[0, i] * halves[i, j]))]  # fmt: skip
    assert len(answers) == 16
    return TEMPERATURE * np.log(halves), np.array(answers)


def exact_step(table, score):
    """The policy after a step along the gradient of (1 - b) E r - b KL itself, over 1 - b and two tokens."""

    def objective(table):
        logprobs, ref = (jax.nn.log_softmax(x / TEMPERATURE) for x in (table, jnp.asarray(REF_TABLE[:3, :3])))
        answers = list(itertools.product(range(3), repeat=2))
        of = lambda logprobs, i, j: logprobs[0, i] + logprobs[i, j]
        reward = sum(jnp.exp(of(logprobs, *a)) * score[a] for a in answers)
        kl = sum(jnp.exp(of(logprobs, *a)) * (of(logprobs, *a) - of(ref, *a)) for a in answers)
        return ((1 - SHARE) * reward - SHARE * kl) / (1 - SHARE) / 2

    return table + RATE * np.asarray(jax.grad(objective)(jnp.asarray(table)))


def small_step(config):
    """One step on every answer in proportion to its probability, and the exact one."""
    table, answers = every_answer()
    score = np.random.default_rng(3).normal(size=(3, 3))
    init, step, *_ = ppo.make_ppo(TABLE_MODEL, TABLE_MODEL, optax.sgd(RATE), optax.sgd(CRITIC_RATE), config)
    scores = jnp.asarray(score[tuple(answers.T)])
    state, _ = jax.jit(step)(init(table, CRITIC[:3]), REF_TABLE[:3, :3], rollout_of(answers, [2] * 16), scores, key=KEY)
    return np.asarray(state.policy.params), exact_step(table, score)


def test_on_every_answer_a_step_is_the_gradient_of_the_objective(float64):
    """The baseline, whatever it says, is gone in the mean."""
    np.testing.assert_allclose(*small_step(ppo.reinforce(SHARE, temperature=TEMPERATURE)), atol=1e-12)


@pytest.mark.parametrize("config", [
    ppo.reinforce(SHARE),
    dataclasses.replace(ppo.reinforce(SHARE, temperature=TEMPERATURE), kl_coef=SHARE),
    dataclasses.replace(ppo.reinforce(SHARE, temperature=TEMPERATURE), gae_lambda=0.95),
], ids=["another temperature", "the share as the coefficient", "a decay"])  # fmt: skip
def test_planted_faults_are_no_gradient_of_it(config, float64):
    step, exact = small_step(config)
    assert np.abs(step - exact).max() > 1e-3


def test_a_share_of_the_objective_is_a_coefficient_of_the_reward():
    assert ppo.reinforce(0.05).kl_coef == pytest.approx(0.05 / 0.95) and ppo.reinforce(0.0).kl_coef == 0
    with pytest.raises(ValueError, match=r"kl_share must lie in \[0, 1\), got 1"):
        ppo.reinforce(1)


# Self-play

SIBLINGS = np.array([[[np.nan, 0.7, 0.4], [0.3, np.nan, 0.9], [0.6, 0.1, np.nan]],
                     [[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]])  # fmt: skip
SIX = jax.tree.map(lambda x: x[:6], ROLLOUT)


def spy(state=lambda *params: params):
    """A learner that keeps what it is told."""
    told = []

    def step(state, ref_params, rollout, rewards, *, key, ptx=None):
        told.append((np.asarray(rewards), ref_params, key, ptx))
        return state, {"score": jnp.mean(rewards)}

    return ppo.Algorithm(state, step, lambda: {"policy": {}}), told


def test_self_play_rewards_win_rates_among_siblings_minus_a_half():
    """Row by row of the rollout: siblings of a prompt lie next to each other."""
    learner, told = spy()
    algorithm = make_self_play(learner)
    state, metrics = algorithm.step("state", "reference", SIX, SIBLINGS, key="key", ptx="ptx")
    ((rewards, *passed),) = told
    np.testing.assert_allclose(rewards, [0.05, 0.10, -0.15, 0.5, 0.0, -0.5], atol=1e-7)
    assert passed == ["reference", "key", "ptx"] and state == "state"
    assert (algorithm.init, algorithm.logical_axes) == (learner.init, learner.logical_axes)


# A reward model beside the policy

PREFS = np.array([[[0.5, 1, 0.3], [0, 0.5, 1], [0.7, 0, 0.5]], [[0.5, 1, 1], [0, 0.5, 0], [0, 1, 0.5]]])
LAST = SIX.tokens[np.arange(6), SIX.mask.sum(1) - 1]


def hand_step(table):
    """Gradient descent on the mean of -p log s(gap) - (1 - p) log s(-gap) over the pairs of siblings; and that mean."""
    grad, losses = np.zeros_like(table), []
    for group, first, second in itertools.product(range(2), range(3), range(3)):
        if first < second:
            one, two, p = LAST[3 * group + first], LAST[3 * group + second], PREFS[group, first, second]
            chance = 1 / (1 + np.exp(table[two] - table[one]))
            losses.append(-p * np.log(chance) - (1 - p) * np.log(1 - chance))
            grad[one] += (chance - p) / 6
            grad[two] -= (chance - p) / 6
    return table - RATE * grad, np.mean(losses)


def refitted(num_refits, prefs=PREFS):
    learner, told = spy()
    algorithm = make_iterated_reward(learner, TABLE_MODEL, optax.sgd(RATE), num_refits=num_refits)
    start = algorithm.init(jnp.asarray(REWARD), "policy")
    state, metrics = algorithm.step(start, None, SIX, jnp.asarray(prefs), key=KEY)
    assert state.learner == ("policy",)
    return state, metrics, told[0][0]


def test_a_refit_is_gradient_descent_by_hand_and_its_scores_are_the_rewards(float64):
    assert len(set(LAST)) > 3
    table = REWARD
    for num_refits in (1, 2):
        table, _ = hand_step(table)
        state, metrics, rewards = refitted(num_refits)
        np.testing.assert_allclose(state.reward.params, table, atol=1e-12)
        np.testing.assert_allclose(rewards, table[LAST] - table[LAST].mean(), atol=1e-12)
        assert metrics["reward_loss"] == pytest.approx(hand_step(REWARD)[1])  # before the first
        assert state.reward.step == num_refits


def test_refitting_lowers_the_loss_and_goes_on_from_where_it_was(float64):
    learner, _ = spy()
    algorithm = make_iterated_reward(learner, TABLE_MODEL, optax.sgd(RATE))
    state, table, seen = algorithm.init(jnp.asarray(REWARD), "policy"), REWARD, []
    for _ in range(3):
        state, metrics = algorithm.step(state, None, SIX, jnp.asarray(PREFS), key=KEY)
        seen.append(float(metrics["reward_loss"]))
        assert seen[-1] == pytest.approx(hand_step(table)[1])
        for _ in range(4):
            table, _ = hand_step(table)
    np.testing.assert_allclose(state.reward.params, table, atol=1e-12)
    assert (np.diff([*seen, hand_step(table)[1]]) < -1e-3).all()


def test_comparisons_that_are_not_finite_leave_the_reward_model_alone(float64):
    state, metrics, _ = refitted(2, prefs=np.full_like(PREFS, np.nan))
    np.testing.assert_array_equal(state.reward.params, REWARD)
    assert state.reward.step == 0 and np.isnan(metrics["reward_loss"])


# On a mesh

NETWORK = TransformerConfig(vocab_size=16, d_model=16, num_layers=1, num_heads=2, d_ff=32)
POLICY, SCALAR = make_language_model(NETWORK), make_scalar_model(NETWORK, head_std=0.1)


def test_the_state_is_a_tree_and_every_leaf_of_it_has_axes():
    optimizer = optax.adamw(1e-2)
    algorithm = make_iterated_reward(ppo.make_ppo(POLICY, SCALAR, optimizer, optimizer, ppo.PPOConfig()), SCALAR,
                                     optimizer)  # fmt: skip
    params = [jax.jit(model.init)(jax.random.key(k)) for k, model in enumerate((SCALAR, POLICY, SCALAR))]
    state = algorithm.init(*params)
    again = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
    assert again.policy is again.learner.policy and type(again) is type(state)
    jax.tree.map(np.testing.assert_array_equal, (again.reward.params, again.policy.params), tuple(params[:2]))
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        found = mesh.shardings(state, algorithm.logical_axes())
        split = lambda tree: {str(x.spec) for x in jax.tree.leaves(tree)}
        for fitted in (found.reward, found.learner.policy, found.learner.critic):
            assert any("fsdp" in spec for spec in split(fitted.params))
            assert split(fitted.opt_state) >= split(fitted.params)  # moments follow their parameters
        with pytest.raises(ValueError, match="reward/params/.* matches no parameter with logical axes"):
            mesh.shardings(state, {name: axes for name, axes in algorithm.logical_axes().items() if name != "reward"})


def refits(config: MeshConfig | None):
    """Two batches of made-up comparisons, beside a learner that does nothing: reward models and rewards, on the host.

    Where a gradient is noise alone, Adam's first step is the sign of that noise: a larger eps lets rounding be small.
    """
    bystander = ppo.Algorithm(tuple, lambda state, ref, rollout, rewards, *, key, ptx: (state, {"rewards": rewards}))
    algorithm = make_iterated_reward(bystander, SCALAR, optax.adamw(1e-2, eps=1e-3))
    rng, axes, seen = np.random.default_rng(0), algorithm.logical_axes(), []
    rollout = rollout_of(rng.integers(2, 16, (32, 4)), rng.integers(1, 5, 32))
    rollout = dataclasses.replace(rollout, logprobs=np.float32(rollout.logprobs))
    above = np.triu(rng.random((8, 4, 4)), 1)
    prefs = np.float32(above + np.tril(1 - np.swapaxes(above, 1, 2), -1))
    start = jax.tree.map(np.asarray, jax.jit(SCALAR.init)(KEY))
    with jax.set_mesh(make_mesh(config)) if config else contextlib.nullcontext():
        state = mesh.create(algorithm.init, mesh.place(start, SCALAR.logical_axes()), axes=axes)
        update = mesh.jit_step(algorithm.step, state, axes)
        for _ in range(2):
            state, metrics = update(state, None, *mesh.place_rows((rollout, prefs)), key=KEY)
            seen.append(mesh.fetch(metrics))
        return mesh.fetch(state.reward), seen


def test_refits_on_a_mesh_agree_with_one_device_to_rounding():
    one, many = refits(None), refits(MeshConfig(data=2, fsdp=2, tensor=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)
    (fitted, (first, second)) = one
    assert fitted.step == 8 and second["reward_loss"] < first["reward_loss"] - 0.01
