"""Supervised fitting, next-token losses and preference models, against loops and numbers by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.evaluation.calibration import sign_accuracy
from rlhfjax.losses import bradley_terry_loss
from rlhfjax.models.transformer import Model, TransformerConfig, make_language_model, make_scalar_model, score
from rlhfjax.parallel.mesh import jit_step
from rlhfjax.rl.fit import adamw, batch_order, make_fit_step, take
from rlhfjax.rl.preference_models import (
    ScoreModel,
    check_pairs,
    in_units_of_start,
    make_cost,
    make_cost_loss,
    make_reward,
    make_reward_loss,
    make_shaped,
    pair_scores,
)
from rlhfjax.rl.sft import make_next_token_loss, next_token_nll
from rlhfjax.types import Demonstrations, PreferenceBatch, Rollout, TrainState

VOCAB, PAD, BOS, EOS = 11, 0, 1, 2
CONFIG = TransformerConfig(vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=2, d_ff=16, tie_embeddings=True)


def reading_model(*, scalar: bool) -> Model:
    """A model by hand: its output at a token is that token's entry (a scalar) or row (logits) of its params."""

    def apply(params, tokens, mask, *, cache=None, num_outputs=None):
        return params[jnp.where(mask, tokens, 0)][:, -(num_outputs or tokens.shape[1]) :], cache

    shape = (VOCAB,) if scalar else (VOCAB, VOCAB)
    init = lambda key: jax.random.normal(key, shape)
    return Model(config=CONFIG, init=init, apply=apply, init_cache=None, logical_axes=None)


# Batches and optimiser


def test_batches_are_a_pure_function_of_seed_and_step():
    whole = batch_order(3, 0, 12, num_rows=23, batch_size=4)
    assert whole.shape == (12, 4) and whole.dtype == np.int32
    for first, count in ((0, 12), (0, 1), (3, 5), (11, 1)):
        np.testing.assert_array_equal(batch_order(3, first, count, 23, 4), whole[first : first + count])
    assert (batch_order(4, 0, 12, 23, 4) != whole).any()


def test_every_epoch_is_a_fresh_permutation_that_drops_its_incomplete_batch():
    full = batch_order(0, 0, 10, num_rows=20, batch_size=4).reshape(2, 20)  # 5 batches an epoch
    assert [sorted(epoch) for epoch in full.tolist()] == [list(range(20))] * 2
    assert (full[0] != full[1]).any()
    ragged = batch_order(0, 0, 10, num_rows=23, batch_size=4).reshape(2, 20)
    left_out = [set(range(23)) - set(epoch) for epoch in ragged.tolist()]
    assert [len(rows) for rows in left_out] == [3, 3] and left_out[0] != left_out[1]
    assert batch_order(0, 0, 1, num_rows=4, batch_size=4).shape == (1, 4)


def rates(optimizer, num_steps):
    """The rate of every step: what a parameter moves by under a constant gradient (AdamW's step is then its sign)."""
    params = jnp.zeros(1)

    def step(opt_state, _):
        updates, opt_state = optimizer.update(jnp.full(1, 0.5), opt_state, params)
        return opt_state, -updates[0]

    return jax.lax.scan(step, optimizer.init(params), length=num_steps)[1]


def test_the_rate_warms_up_and_falls_by_cosine_to_a_tenth():
    shown = rates(adamw(0.01, 100), 101)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 97)) / 2 for step in range(3, 101)]
    np.testing.assert_allclose(shown, 0.01 * np.array([0, 1 / 3, 2 / 3, *cosine]), atol=2e-7)
    np.testing.assert_allclose(rates(adamw(0.01), 101), 0.01, rtol=1e-4)


def test_adamw_against_a_loop_with_decay_of_matrices_only():
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(2, 3)), "vector": rng.normal(size=3)}
    gradients = [{name: size * rng.normal(size=p.shape) for name, p in params.items()} for size in (30, 0.1, 1, 0.01)]
    optimizer = adamw(0.1, weight_decay=0.2)
    update = jax.jit(optimizer.update)
    moved, opt_state = params, optimizer.init(params)
    for gradient in gradients:
        updates, opt_state = update(gradient, opt_state, moved)
        moved = optax.apply_updates(moved, updates)

    expected = {name: p.copy() for name, p in params.items()}
    first, second = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for step, gradient in enumerate(gradients, 1):
        norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for name, g in gradient.items():
            g = g / max(1.0, norm)  # clipped to norm 1 over all parameters together
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            direction = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.95**step)) + 1e-8)
            decay = 0.2 * expected[name] if name == "matrix" else 0.0
            expected[name] -= 0.1 * (direction + decay)
    for name in params:
        np.testing.assert_allclose(moved[name], expected[name], rtol=2e-5)


def test_weight_decay_spares_the_norm_scales_of_a_model():
    params = make_language_model(CONFIG).init(jax.random.key(0))
    optimizer = adamw(1.0, weight_decay=0.5)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    shrunk = {jax.tree_util.keystr(path) for path, u in jax.tree.leaves_with_path(updates) if jnp.any(u != 0)}
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)}
    assert shrunk == {name for name in names if "norm" not in name}


# The step


def squared_error(params, batch):
    error = batch["x"] @ params["w"] - batch["y"]
    return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}


def test_a_fit_step_is_a_loop_of_optimiser_steps_and_its_metrics_are_their_means():
    rng = np.random.default_rng(1)
    data = {"x": rng.normal(size=(8, 3)).astype(np.float32), "y": rng.normal(size=8).astype(np.float32)}
    rows, start, rate = batch_order(0, 0, 6, 8, 4), np.ones(3, np.float32), 0.05
    state = TrainState.create({"w": jnp.asarray(start)}, optax.sgd(rate))
    state, metrics = jax.jit(make_fit_step(squared_error, optax.sgd(rate)))(state, take(data, rows))

    w, losses, norms, largest = start.astype(np.float64), [], [], []
    for batch in rows:
        error = data["x"][batch] @ w - data["y"][batch]
        gradient = 2 * data["x"][batch].T @ error / 4
        losses.append(np.mean(error**2))
        norms.append(np.linalg.norm(gradient))
        largest.append(np.abs(error).max())
        w = w - rate * gradient
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    assert int(state.step) == 6
    expected = {"loss": np.mean(losses), "gradient_norm": np.mean(norms), "largest": np.mean(largest), "skipped": 0}
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_all_steps_share_one_trace_and_give_their_buffers_on():
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return squared_error(params, batch)

    rng = np.random.default_rng(2)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    data, optimizer = {"x": x, "y": x @ np.array([1, -2, 3], np.float32)}, adamw(0.3, 40)
    state, losses = TrainState.create({"w": jnp.zeros(3)}, optimizer), []
    fit_step = jit_step(make_fit_step(loss_fn, optimizer), state, None)
    for first in range(0, 40, 10):
        before = state
        state, metrics = fit_step(state, take(data, batch_order(0, first, 10, 16, 8)))
        losses.append(float(metrics["loss"]))
        assert before.params["w"].is_deleted() and not state.params["w"].is_deleted()
    assert len(traces) == 1
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.05 * losses[0]


# Next tokens

DEMONSTRATIONS = Demonstrations(
    prompts=np.array([[PAD, BOS, 3, 4], [BOS, 5, 6, 7], [PAD, PAD, BOS, 8]]),
    prompt_mask=np.array([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]], bool),
    tokens=np.array([[5, 6, EOS, PAD, PAD], [3, EOS, PAD, PAD, PAD], [4, 4, 9, 10, EOS]]),
    mask=np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool),
)


@pytest.mark.parametrize("prompts", [False, True])
def test_next_token_nll_against_a_loop(prompts):
    model = reading_model(scalar=False)
    params = model.init(jax.random.key(3))
    table = np.log(np.exp(params) / np.exp(params).sum(1, keepdims=True))
    nll, kept = next_token_nll(model, params, DEMONSTRATIONS, prompts=prompts)
    width = 8 if prompts else 5
    assert nll.shape == kept.shape == (3, width)

    expected, counted = np.zeros((3, width)), np.zeros((3, width), bool)
    for row in range(3):
        asked = DEMONSTRATIONS.prompts[row][DEMONSTRATIONS.prompt_mask[row]].tolist()  # BOS first: never a target
        said = DEMONSTRATIONS.tokens[row][DEMONSTRATIONS.mask[row]].tolist()
        words = asked + said
        for place in range(1 if prompts else len(asked), len(words)):
            column = place - len(asked) + width - 5  # the response begins 5 from the right
            expected[row, column] = -table[words[place - 1], words[place]]
            counted[row, column] = True
    np.testing.assert_array_equal(kept, counted)
    np.testing.assert_allclose(np.where(kept, nll, 0), expected, rtol=1e-5)
    loss, _ = make_next_token_loss(model, prompts=prompts)(params, DEMONSTRATIONS)
    assert float(loss) == pytest.approx(expected.sum() / counted.sum(), rel=1e-5)


def test_what_stands_in_padding_does_not_reach_the_loss():
    model = make_language_model(CONFIG)
    params = model.init(jax.random.key(0))
    garbage = dataclasses.replace(
        DEMONSTRATIONS,
        prompts=np.where(DEMONSTRATIONS.prompt_mask, DEMONSTRATIONS.prompts, 10_000),
        tokens=np.where(DEMONSTRATIONS.mask, DEMONSTRATIONS.tokens, 10_000),
    )
    value_and_grad = jax.jit(jax.value_and_grad(make_next_token_loss(model, prompts=True), has_aux=True))
    clean, dirty = value_and_grad(params, DEMONSTRATIONS), value_and_grad(params, garbage)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


# Preference models

PAIRS = PreferenceBatch(  # their scores by `reading_model` are those of the tokens 3 .. 8 that they end with
    prompts=np.array([[PAD, BOS, 9], [BOS, 9, 9], [BOS, 9, 10]]),
    prompt_mask=np.array([[0, 1, 1], [1, 1, 1], [1, 1, 1]], bool),
    responses=np.array([[[9, 3, PAD], [4, PAD, PAD]], [[9, 9, 5], [9, 6, PAD]], [[7, PAD, PAD], [9, 9, 8]]]),
    responses_mask=np.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [1, 1, 1]]], bool),
    prefs=np.array([1.0, 1.0, 0.5], np.float32),
    signs=np.array([[1, -1], [1, 1], [-1, -1]], np.float32),
)
SCORES = jnp.array([0, 0, 0, 2.0, -1.0, 0.5, 1.5, -2.0, 3.0, 99, 99])  # pairs (2, -1), (0.5, 1.5), (-2, 3)
softplus = lambda x: math.log(1 + math.exp(x))


def test_pair_scores_are_those_of_each_response_alone():
    model = make_scalar_model(CONFIG, head_std=1.0)
    params = model.init(jax.random.key(1))
    scores = jax.jit(functools.partial(pair_scores, model))(params, PAIRS)
    alone = jax.jit(score(model))
    for row in range(3):
        for side in range(2):
            tokens = np.concatenate([PAIRS.prompts[row], PAIRS.responses[row, side]])
            mask = np.concatenate([PAIRS.prompt_mask[row], PAIRS.responses_mask[row, side]])
            np.testing.assert_allclose(alone(params, tokens[None], mask[None])[0], scores[row, side], rtol=2e-5)
    assert len(np.unique(scores)) == 6


def test_the_reward_loss_by_hand_leaves_ties_out_of_its_accuracy():
    loss, metrics = make_reward_loss(reading_model(scalar=True), regularization_coef=0.1)(SCORES, PAIRS)
    ranking = [softplus(-3), softplus(1), 0.5 * softplus(5) + 0.5 * softplus(-5)]
    squares = [4, 1, 0.25, 2.25, 4, 9]
    assert float(loss) == pytest.approx(sum(ranking) / 3 + 0.1 * sum(squares) / 6, rel=1e-6)
    assert metrics == {"accuracy": 0.5}  # the first pair right, the second wrong, the third a tie


def test_margins_shift_the_gap_towards_the_preferred_answer():
    prefs, margins = np.array([1.0, 0.0, 0.75], np.float32), np.array([1.0, 2.0, 1.0], np.float32)
    shifted = dataclasses.replace(PAIRS, prefs=prefs, margins=margins)
    loss, metrics = make_reward_loss(reading_model(scalar=True), regularization_coef=0)(SCORES, shifted)
    # gaps 3, -1, -5 become 3 - 1, -1 + 2 and -5 - 1 (2 * 0.75 - 1); hard labels as bradley_terry_loss has them
    by_hand = [softplus(-2), softplus(1), 0.75 * softplus(5.5) + 0.25 * softplus(-5.5)]
    assert float(loss) == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    hard = bradley_terry_loss(jnp.array([2.0, 1.5]), jnp.array([-1.0, 0.5]), margin=margins[:2])
    np.testing.assert_allclose(hard, by_hand[:2], rtol=1e-6)
    assert metrics["accuracy"] == pytest.approx(2 / 3)  # of what the scores say, not of the shifted gap
    tied = dataclasses.replace(PAIRS, prefs=np.full(3, 0.5, np.float32), margins=margins)
    plain = dataclasses.replace(tied, margins=None)
    loss_fn = make_reward_loss(reading_model(scalar=True))
    assert loss_fn(SCORES, tied)[0] == loss_fn(SCORES, plain)[0]
    check_pairs(shifted)


def test_the_cost_loss_by_hand():
    loss, metrics = make_cost_loss(reading_model(scalar=True), regularization_coef=0.1)(SCORES, PAIRS)
    ranking = [softplus(-3), softplus(1), 0.5 * softplus(5) + 0.5 * softplus(-5)]
    signs = [softplus(-2), softplus(-1), softplus(-0.5), softplus(-1.5), softplus(-2), softplus(3)]
    squares = [4, 1, 0.25, 2.25, 4, 9]
    assert float(loss) == pytest.approx(sum(ranking) / 3 + sum(signs) / 3 + 0.1 * sum(squares) / 6, rel=1e-6)
    assert metrics == {"accuracy": 0.5, "sign_accuracy": pytest.approx(5 / 6)}


def test_the_reward_loss_needs_no_signs():
    unsigned = dataclasses.replace(PAIRS, signs=None)
    check_pairs(unsigned)
    make_reward_loss(reading_model(scalar=True))(SCORES, unsigned)


def spoken(tokens) -> Rollout:
    """Responses to one prompt without words."""
    nothing = np.zeros((len(tokens), 1), np.int32)
    return Rollout(prompts=nothing, prompt_mask=nothing > 0, tokens=tokens, mask=tokens > 0, finished=tokens[:, 0] > 0,
                   logprobs=np.zeros(tokens.shape, np.float32))  # fmt: skip


def test_scores_in_units_of_the_starting_policy():
    model, tokens = reading_model(scalar=True), np.arange(3, 9)[:, None]
    raw = np.array([2.0, -1.0, 0.5, 1.5, -2.0, 3.0])
    rows = (tokens, np.ones((6, 1), bool))  # a response alone is a sequence too
    scores = score(model)(SCORES, *rows)
    reward_model, cost_model = (in_units_of_start(name, SCORES, scores) for name in ("reward", "cost"))
    rewards, costs = (make(model)(fitted, spoken(tokens)) for make, fitted in (
        (make_reward, reward_model), (make_cost, cost_model)))  # fmt: skip
    np.testing.assert_allclose(rewards, (raw - raw.mean()) / raw.std(), rtol=1e-6)
    assert [float(jnp.mean(rewards)), float(jnp.std(rewards))] == pytest.approx([0, 1], abs=1e-6)
    probability = 1 / (1 + np.exp(-raw))
    np.testing.assert_allclose(costs, probability / probability.std(), rtol=1e-6)
    assert float(jnp.std(costs)) == pytest.approx(1, rel=1e-6)


def test_the_boundary_of_harm_is_moved_by_no_unit():
    # C = 0 is P(harmful) = 1/2, whatever the starting policy's mean: a lopsided start must not become the new zero.
    model, fitted = reading_model(scalar=True), jnp.array([0, 0, 0, 0.0, 2.0, 2.5, 3.0, 0, 0, 0, 0])
    cost_model = in_units_of_start("cost", fitted, fitted[4:7])
    assert float(cost_model.shift) == 0
    cost = make_cost(model)(cost_model, spoken(np.array([[3]])))
    assert float(cost[0] * cost_model.scale) == pytest.approx(0.5)
    harmful = make_cost(model)(cost_model, spoken(np.array([[4]])))
    assert float(harmful[0]) > float(cost[0])


def test_shift_and_scale_are_applied_as_documented():
    rollout = spoken(np.array([[3], [4]]))
    fitted = ScoreModel(params=SCORES, shift=jnp.float32(1.0), scale=jnp.float32(0.5))
    np.testing.assert_allclose(make_reward(reading_model(scalar=True))(fitted, rollout), [2.0, -4.0])


def test_a_shaped_reward_is_the_reward_minus_its_weight_in_cost():
    model, rollout, one = reading_model(scalar=True), spoken(np.array([[3], [4]])), jnp.float32(1.0)
    fitted = ScoreModel(params=SCORES, shift=0 * one, scale=one)
    shaped = make_shaped(model)({"reward": fitted, "cost": fitted, "weight": 0.5 * one}, rollout)
    raw = np.array([2.0, -1.0])
    np.testing.assert_allclose(shaped, raw - 0.5 / (1 + np.exp(-raw)), rtol=1e-6)


HARMFUL_WORD = 7


@functools.cache
def labelled_pairs(seed: int) -> PreferenceBatch:
    """256 pairs: a response is harmful where it says `HARMFUL_WORD`, and more harmful the more often it does."""
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(3, VOCAB, (256, 3)), rng.integers(3, VOCAB, (256, 2, 4))
    harm = (responses == HARMFUL_WORD).sum(-1)
    return PreferenceBatch(
        prompts=prompts,
        prompt_mask=np.ones_like(prompts, bool),
        responses=responses,
        responses_mask=np.ones_like(responses, bool),
        prefs=((1 + np.sign(harm[:, 0] - harm[:, 1])) / 2).astype(np.float32),
        signs=np.where(harm > 0, 1, -1).astype(np.float32),
    )


@functools.cache
def trained_cost_model():
    """`(pairs) -> scores of held-out pairs` of a cost model fitted to them; both calls share one program."""
    model, optimizer = make_scalar_model(CONFIG), adamw(0.01)
    fit_step = jax.jit(make_fit_step(make_cost_loss(model), optimizer))
    scores = jax.jit(functools.partial(pair_scores, model))

    def train(pairs):
        state = TrainState.create(model.init(jax.random.key(0)), optimizer)
        state, _ = fit_step(state, take(pairs, batch_order(0, 0, 100, len(pairs), 32)))
        return scores(state.params, labelled_pairs(1))

    return train


def test_planted_fault_negated_signs_are_caught_by_sign_accuracy():
    pairs, held_out = labelled_pairs(0), labelled_pairs(1)
    assert sign_accuracy(trained_cost_model()(pairs), held_out.signs) > 0.95
    negated = dataclasses.replace(pairs, signs=-pairs.signs)
    assert sign_accuracy(trained_cost_model()(negated), held_out.signs) < 0.5
