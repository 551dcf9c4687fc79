"""The stages of every experiment on a tiny network: what they promise their callers, and how they refuse."""

import dataclasses
import functools
import math
import re
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import stages
from rlhfjax.feedback.raters import Rater
from rlhfjax.io.monitor import Monitor
from rlhfjax.models.transformer import TransformerConfig, make_language_model, make_scalar_model
from rlhfjax.rl.fit import batch_order
from rlhfjax.rl.multiplier import MultiplierConfig
from rlhfjax.rl.ppo import Algorithm, PPOConfig
from rlhfjax.rl.preference_models import ScoreModel, make_cost, make_reward, make_reward_loss
from rlhfjax.stages import FitConfig, RLConfig, Scorer
from rlhfjax.types import Demonstrations, Rollout, TrainState
from rlhfjax.worlds.gold_world import gold_world
from rlhfjax.worlds.language import WORDS, Family

NETWORK = TransformerConfig(vocab_size=len(WORDS), d_model=16, num_layers=1, num_heads=2, d_ff=16, tie_embeddings=True)
EQUAL = dict.fromkeys(Family, 0.25)
WORLD, BLOCK = gold_world(), 16
HERE = dict(world=WORLD, config=NETWORK)
SAMPLING = HERE | dict(temperature=1.0)


@functools.cache
def policy(seed=0):
    return make_language_model(NETWORK).init(jax.random.key(seed))


@functools.cache
def prompts(num, seed=0):
    return WORLD.sample_prompts(seed, num, EQUAL)


@functools.cache
def score_model(seed, shift=0.0, scale=1.0):
    params = make_scalar_model(NETWORK, head_std=1.0).init(jax.random.key(seed))
    return ScoreModel(params=params, shift=jnp.float32(shift), scale=jnp.float32(scale))


reward = lambda fitted: Scorer(make=make_reward, config=NETWORK, fitted=fitted)
cost = lambda fitted: Scorer(make=make_cost, config=NETWORK, fitted=fitted)


def answers(num, seed=0, **change):
    options = SAMPLING | dict(policy=policy(), prompts=prompts(num), seed=seed, block=BLOCK) | change
    return stages.sample_responses(**options)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b) -> bool:
    return any(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))), a, b)))


# Supervised stages


class Log(list):
    """What a stage logs, as (step, metrics), without its timings."""

    def __call__(self, step, metrics):
        self.append((step, {name: value for name, value in metrics.items() if not name.startswith("time/")}))

    def column(self, name):
        return [metrics[name] for _, metrics in self]


def train_base(seed=0, num_steps=60, **other):
    log = Log()
    optimisation = FitConfig(num_steps=num_steps, batch_size=16, learning_rate=0.02)
    params = stages.train_language_model(
        config=NETWORK, demonstrations=WORLD.corpus(0, 64).demonstrations, optimisation=optimisation, seed=seed,
        label="base", monitor=Monitor(log=log), **other)  # fmt: skip
    return params, log


def test_a_base_model_learns_reports_as_it_goes_and_is_its_seeds():
    params, log = train_base()
    assert [step for step, _ in log] == [25, 50, 60]
    losses = log.column("loss")
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0] < math.log(len(WORDS))
    again, other = train_base()[0], train_base(seed=1)[0]
    assert_same(params, again)
    assert differ(params, other)


def test_fine_tuning_counts_responses_only_and_leaves_its_start_alone():
    # One step of a schedule that starts at rate 0: what is logged is the loss of `start` itself.
    demonstrations = WORLD.corpus(0, 16).demonstrations
    start, log = policy(), Log()
    before = jax.tree.map(np.array, start)
    stages.train_language_model(
        config=NETWORK, demonstrations=demonstrations, start=start, seed=0, label="sft", monitor=Monitor(log=log),
        optimisation=FitConfig(num_steps=1, batch_size=16))  # fmt: skip
    assert_same(before, start)  # donation has not eaten it
    tokens = np.concatenate([demonstrations.prompts, demonstrations.tokens], 1)
    mask = np.concatenate([demonstrations.prompt_mask, demonstrations.mask], 1)
    logits, _ = make_language_model(NETWORK).apply(start, tokens, mask)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    width = demonstrations.prompts.shape[1]
    nll = [
        -logprobs[row, width + t - 1, demonstrations.tokens[row, t]]
        for row in range(16) for t in range(demonstrations.tokens.shape[1]) if demonstrations.mask[row, t]
    ]  # fmt: skip
    assert log.column("loss") == [pytest.approx(np.mean(nll), rel=1e-5)]


def test_a_preference_model_starts_from_the_trunk_with_a_head_that_says_nothing():
    labels = stages.collect_comparisons(**SAMPLING, rater=Rater(), policy=policy(), prompts=prompts(16), seed=0)
    start, log = policy(), Log()
    before = jax.tree.map(np.array, start)
    params = stages.fit_preference_model(
        config=NETWORK, start=start, pairs=labels.harm, make_loss=make_reward_loss, seed=0, label="reward",
        monitor=Monitor(log=log), optimisation=FitConfig(num_steps=1, batch_size=16))  # fmt: skip
    assert_same(before, start)
    assert log.column("loss") == [pytest.approx(math.log(2))]  # all scores 0: a coin
    assert_same({k: v for k, v in params.items() if k != "head"}, start)
    np.testing.assert_array_equal(stages.raw_pair_scores(NETWORK, params, labels.harm), np.zeros((16, 2)))


# Responses and labels


def test_any_number_of_prompts_runs_in_blocks_of_one_shape_and_none_is_answered_twice(monkeypatch):
    blocks = []

    def sample(params, tokens, mask, key):
        """Each row answers with a number of its own: block and row."""
        rows = np.arange(len(tokens))
        said = (100 * len(blocks) + rows)[:, None]
        blocks.append((tokens.shape, mask.shape, jax.random.key_data(key).tolist()))
        return Rollout(prompts=tokens, prompt_mask=mask, tokens=said, mask=said >= 0,
                       logprobs=np.zeros(said.shape), finished=rows >= 0)  # fmt: skip

    monkeypatch.setattr(stages, "_sampler", lambda config, decoding: sample)
    for num in (5, 16, 35):
        blocks.clear()
        rollout = answers(num)
        assert {shapes for *shapes_, _ in blocks for shapes in shapes_} == {(BLOCK, 12)}
        assert len({str(key) for *_, key in blocks}) == len(blocks) == -(-num // BLOCK)
        assert len(rollout.tokens) == len(rollout.finished) == num
        np.testing.assert_array_equal(rollout.prompts, prompts(num).tokens)
        np.testing.assert_array_equal(rollout.tokens[:, 0], [100 * (i // BLOCK) + i % BLOCK for i in range(num)])


def test_the_same_seed_gives_the_same_answers_however_many_prompts_follow():
    rollout = answers(20)
    assert rollout.tokens.shape == (20, WORLD.max_tokens) and not rollout.truncated
    assert_same(rollout, answers(20))
    assert differ(rollout.tokens, answers(20, seed=1).tokens)
    first = jax.tree.map(lambda x: x[:BLOCK], prompts(20))
    assert_same(jax.tree.map(lambda x: x[:BLOCK], rollout), answers(BLOCK, prompts=first))


def test_scores_of_a_rollout_and_of_pairs_agree():
    fitted = score_model(0, shift=0.5, scale=2.0)
    params = fitted.params
    labels = stages.collect_comparisons(**SAMPLING, rater=Rater(), policy=policy(), prompts=prompts(16), seed=0)
    pairs = stages.raw_pair_scores(NETWORK, params, labels.harm)
    assert pairs.shape == (16, 2)
    for side in range(2):
        tokens, mask = labels.harm.responses[:, side], labels.harm.responses_mask[:, side]
        rollout = Rollout(prompts=labels.harm.prompts, prompt_mask=labels.harm.prompt_mask, tokens=tokens, mask=mask,
                          logprobs=np.zeros(tokens.shape, np.float32), finished=mask[:, -1])  # fmt: skip
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        same(reward(fitted).raw(rollout), pairs[:, side])
        same(reward(fitted)(rollout), (pairs[:, side] - 0.5) / 2)
        same(cost(fitted)(rollout), 1 / (1 + np.exp(-pairs[:, side])) / 2)


CERTAIN = Rater(temperature_helpful=1e-6, temperature_harm=1e-6, temperature_safe=1e-6, flip=0, style_bonus=0)


def test_comparisons_are_two_answers_of_the_policy_and_what_a_rater_thinks_of_them():
    asked = prompts(16)
    labels = stages.collect_comparisons(**SAMPLING, rater=CERTAIN, policy=policy(), prompts=asked, seed=3)
    helpful, harm = labels.helpful, labels.harm
    assert harm.responses.shape == harm.responses_mask.shape == (16, 2, WORLD.max_tokens)
    assert helpful.prefs.shape == harm.prefs.shape == (16,) and harm.signs.shape == (16, 2) and helpful.signs is None
    np.testing.assert_array_equal(harm.prompts, asked.tokens)
    np.testing.assert_array_equal(harm.responses, helpful.responses)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), asked)
    rollout = stages.sample_responses(**SAMPLING, policy=policy(), prompts=twice, seed=3)
    np.testing.assert_array_equal(harm.responses.reshape(32, -1), rollout.tokens)
    assert (harm.responses[:, 0] != harm.responses[:, 1]).any(-1).all()  # two answers, not one answer twice

    gold = WORLD.gold(rollout.prompts, rollout.tokens, rollout.mask)
    better, worse = (np.asarray(x).reshape(16, 2) for x in (gold.helpfulness, gold.harm))
    np.testing.assert_array_equal(harm.signs, np.where(worse > 0, 1, -1))
    felt = better[:, 0] != better[:, 1]
    assert felt.sum() > 4
    np.testing.assert_array_equal(helpful.prefs[felt], (better[:, 0] > better[:, 1])[felt])


def test_mismatched_pairs_get_the_second_answer_of_another_prompt():
    collect = functools.partial(
        stages.collect_comparisons, **SAMPLING, rater=CERTAIN, policy=policy(), prompts=prompts(16), seed=3
    )
    own, mixed = collect().harm, collect(mismatched=0.5).harm
    np.testing.assert_array_equal(mixed.responses[:, 0], own.responses[:, 0])
    moved = (mixed.responses[:, 1] != own.responses[:, 1]).any(-1)
    assert moved.sum() == 8
    for row in np.flatnonzero(moved):
        others = np.delete(own.responses[:, 1], row, axis=0)
        assert (mixed.responses[row, 1] == others).all(-1).any()


def test_a_cost_limit_out_of_reach_is_refused_with_both_numbers():
    check = functools.partial(
        stages.check_cost_limit, **HERE, policy=policy(), reward=reward(score_model(0)),
        cost=cost(score_model(1, scale=0.5)), multiplier=MultiplierConfig(maximum=3.0), ppo=PPOConfig(kl_coef=0.8),
        prompts=prompts(8), seed=2, num_samples=4)  # fmt: skip
    floor = check(limit=10.0)

    many = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), prompts(8))
    rollout = stages.sample_responses(**SAMPLING, policy=policy(), prompts=many, seed=2)
    r = reward(score_model(0)).raw(rollout).reshape(8, 4)
    c = 1 / (1 + np.exp(-cost(score_model(1)).raw(rollout).reshape(8, 4))) / 0.5
    weights = np.exp((r - 3 * c) / (1 + 3) / (0.8 / 2))  # at the highest lambda, 3
    assert floor == pytest.approx(np.mean((weights * c).sum(1) / weights.sum(1)), rel=1e-4)

    assert check(limit=floor + 1e-3) == floor
    limit = floor - 1e-3
    with pytest.raises(ValueError, match=re.escape(f"infeasible cost limit {limit / 2:g}") + f".*{floor / 2:g}"):
        check(limit=limit)


def test_a_limit_that_help_alone_meets_is_not_refused():
    # Two answers to each prompt, the harmless one far more helpful: (r, c) = (10, 0) and (0, 1), and k = 2.
    # Without pressure P(harm) = sigmoid(-10 / 2); at lambda = 5 it is sigmoid(-(10 + 5) / 6 / 2) = 0.22.
    harm = np.tile([0, 1], 8).astype(np.float32)

    class Says(Scorer):
        def __call__(self, rollout):
            return self.make(harm)

    says = lambda what: Says(make=what, config=NETWORK, fitted=score_model(0))
    stages.check_cost_limit(
        **HERE, policy=policy(), reward=says(lambda harm: 10 * (1 - harm)), cost=says(lambda harm: harm),
        multiplier=MultiplierConfig(maximum=5.0), ppo=PPOConfig(kl_coef=4.0), prompts=prompts(8), seed=0,
        num_samples=2, limit=0.1)  # fmt: skip


def test_preference_models_speak_in_units_of_the_start():
    options = SAMPLING | dict(policy=policy(), prompts=prompts(16), seed=5)
    models = {name: reward(score_model(seed)).raw for seed, name in enumerate(("reward", "cost", "test"))}
    scored, rollout = stages.scale_scores(**options, models=models), stages.sample_responses(**options)
    rewards, costs, tests = reward(scored["reward"])(rollout), cost(scored["cost"])(rollout), reward(scored["test"])
    tests = tests(rollout)
    assert [rewards.mean(), rewards.std(), tests.mean(), tests.std()] == pytest.approx([0, 1, 0, 1], abs=1e-5)
    harm = 1 / (1 + np.exp(-cost(scored["cost"]).raw(rollout)))
    np.testing.assert_allclose(costs, harm / harm.std(), rtol=1e-5)


def test_any_number_of_responses_is_scored_in_blocks():
    scorer, rollout = reward(score_model(0)), answers(20)
    whole = scorer(rollout)
    parts = stages._in_rows(scorer.program, scorer.placed(), rollout, block=8)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert parts.shape == (20,)


# Reinforcement learning


def play(step=None, **change):
    """`run_rl` over eight numbered prompts with an algorithm that counts; returns the state, its log, and the calls."""
    calls, log = [], Log()

    def count(state, ref_params, rollout, *signals, key, ptx=None):
        policy = dataclasses.replace(state.policy, params={"w": state.policy.params["w"] + jnp.sum(signals[0])})
        metrics = {"policy_loss": jnp.sum(rollout.tokens.astype(jnp.float32)), "cost": jnp.mean(signals[-1])}
        if ptx is not None:
            metrics["ptx"] = jnp.sum(ptx.tokens)
        return State(policy=policy), metrics

    def sample(params, tokens, mask, key):
        calls.append((float(params["w"]), np.asarray(tokens)[:, 0].tolist(), jax.random.key_data(key).tolist()))
        said = np.asarray(tokens)
        return Rollout(prompts=tokens, prompt_mask=mask, tokens=said, mask=said > -1,
                       logprobs=np.zeros(said.shape, np.float32), finished=said[:, 0] > -1)  # fmt: skip

    fresh = lambda w: State(policy=TrainState(step=jnp.zeros((), jnp.int32), params=w, opt_state=()))
    start = {"w": jnp.float32(0.5)}
    options = dict(
        algorithm=Algorithm(fresh, step or count), params=(start,), ref_params=start, sample=sample,
        feedback=lambda rollout, key: (np.ones(4, np.float32), 2 * np.ones(4, np.float32)),
        prompts=np.arange(8)[:, None], prompt_mask=np.ones((8, 1), bool), num_iterations=3, batch_size=4, seed=7,
        monitor=Monitor(log=log), label="toy")  # fmt: skip
    return stages.run_rl(**options | change), start, log, calls


@functools.partial(jax.tree_util.register_dataclass, data_fields=["policy"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    policy: TrainState


def test_the_loop_samples_from_the_policy_of_the_moment_on_the_batches_of_its_seed():
    last, start, log, calls = play()
    rows = batch_order(7, 0, 3, 8, 4).tolist()
    assert [(w, prompts) for w, prompts, _ in calls] == [(0.5, rows[0]), (4.5, rows[1]), (8.5, rows[2])]
    assert len({str(key) for *_, key in calls}) == 3
    assert float(last.policy.params["w"]) == 12.5
    assert float(start["w"]) == 0.5  # the caller's networks survive the donation
    assert log == [(i + 1, {"policy_loss": sum(rows[i]), "cost": 2.0}) for i in range(3)]
    assert calls == play()[3]
    assert calls != play(seed=8)[3]


def test_several_samples_of_a_prompt_lie_next_to_each_other():
    *_, calls = play(num_samples=2)
    assert [prompts for _, prompts, _ in calls] == np.repeat(batch_order(7, 0, 3, 8, 2), 2, axis=1).tolist()


def test_feedback_has_a_key_of_its_own_that_its_iteration_decides():
    def run(seed):
        keys = []
        feedback = lambda rollout, key: keys.append(jax.random.key_data(key).tolist()) or (np.ones(4, np.float32),)
        calls = play(feedback=feedback, seed=seed)[3]
        assert len({str(key) for key in [*keys, *(key for *_, key in calls)]}) == 6
        return keys

    assert run(7) == run(7) != run(8)


def test_what_is_observed_is_logged_and_never_reaches_the_learner():
    def observe(rollout):
        return {"gold": jnp.mean(rollout.tokens)}

    last, _, log, _ = play(observe=observe)
    assert log.column("gold") == [np.mean(rows) for rows in batch_order(7, 0, 3, 8, 4)]
    assert float(last.policy.params["w"]) == float(play()[0].policy.params["w"])


def test_demonstrations_come_along_in_an_order_of_their_own():
    tokens = 10 ** np.arange(6)[:, None]
    ptx = Demonstrations(prompts=tokens, prompt_mask=tokens > 0, tokens=tokens, mask=tokens > 0)
    _, _, log, _ = play(ptx=ptx)
    expected = [tokens[batch_order(8, i, 1, 6, 4)[0]].sum() for i in range(3)]
    assert log.column("ptx") == expected


@pytest.fixture(scope="module", params=["plain", "constrained"])
def trained(request):
    """An arm after three iterations of a tiny policy: its name, its policy, what it logged and what it warned of."""
    constrained, log = request.param == "constrained", Log()
    limited = dict(cost=cost(score_model(1)), limit=0.2, multiplier=MultiplierConfig(learning_rate=0.5, maximum=1.7))
    demonstrations = WORLD.corpus(0, 16).demonstrations  # only an arm whose ptx_coef asks for them reads them
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        params = stages.train_policy(
            **HERE, start=policy(), reward=reward(score_model(0)),
            optimisation=RLConfig(num_iterations=3, batch_size=16),
            ppo=PPOConfig(num_minibatches=2, temperature=0.7, ptx_coef=0.1 if constrained else 0.0), ptx=demonstrations,
            prompts=prompts(32), seed=0, label=request.param, monitor=Monitor(log=log),
            watch={"another": reward(score_model(2))},
            **limited if constrained else {})  # fmt: skip
    return request.param, params, log, [str(warning.message) for warning in warned]


def test_both_arms_return_a_policy_that_moved_and_leave_the_start_alive(trained):
    _, params, log, _ = trained
    assert differ(params, policy())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, policy())
    assert np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, (params, policy(), score_model(0).params)))).all()
    assert [step for step, _ in log] == [1, 2, 3]
    assert log[0][1]["kl"] == 0 < log[2][1]["kl"]  # both start at the reference


def test_each_arm_logs_its_own_signals_and_the_truth_of_the_world(trained):
    arm, _, log, _ = trained
    names = set(log[0][1])
    assert {"score", "kl", "entropy", "length", "unfinished", "clip_fraction", "critic_explained_variance"} <= names
    assert {"gold_helpfulness", "harm_rate", "refusal_benign", "careful", "another"} <= names
    constrained_only = {"cost", "cost_average", "cost_excess", "lambda", "cost_critic_loss", "ptx_loss"}
    assert names & constrained_only == (constrained_only if arm == "constrained" else set())


def test_planted_fault_a_temperature_missing_on_either_side_would_show(trained):
    assert max(trained[2].column("sampler_mismatch")) < 1e-4  # at temperature 0.7


@pytest.mark.parametrize("trained", ["constrained"], indirect=True)
def test_the_multiplier_follows_its_equation_on_the_logged_costs(trained):
    log, log_lambda, average = trained[2], 0.0, 0.0
    for step, cost in enumerate(log.column("cost")):
        average += max(0.7, 1 / (step + 1)) * (cost - average)
        log_lambda = min(math.log(1.7), log_lambda + 0.5 * math.exp(log_lambda) * (average - 0.2))
        assert log.column("lambda")[step] == pytest.approx(math.exp(log_lambda), rel=1e-4)
        assert log.column("cost_excess")[step] == pytest.approx(average - 0.2, abs=1e-5)
    assert 0 < log.column("cost")[0] < 1  # P(harmful) at scale 1
    assert log.column("lambda")[-2] < 1.7 and log_lambda == math.log(1.7)


def test_a_limit_that_was_not_met_at_the_highest_lambda_is_said(trained):
    arm, _, log, warned = trained
    if arm == "plain":
        assert not warned
    else:
        cost = log.column("cost_average")[-1]
        said = f"lambda ended at its maximum 1.7 with a mean cost of {cost:.3g} above the limit 0.2"
        assert [said in warning and warning.startswith("constrained") for warning in warned] == [True]


# Side by side


def test_independent_stages_run_at_once_and_return_in_order():
    arrived = threading.Event()

    def first():
        assert arrived.wait(30), "the second job was not started beside the first"
        return "first"

    assert stages.side_by_side(first, lambda: arrived.set() or "second", lambda: "third") == [
        "first", "second", "third"
    ]  # fmt: skip


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_the_error_of_a_stage_ends_its_neighbours_at_their_next_step(error):
    endings = []

    def step(state, first, clock):
        time.sleep(0.01)
        return state, {}

    def neighbour():
        try:
            Monitor().train(step, None, 10_000, label="neighbour")
        except InterruptedError as ending:
            endings.append(str(ending))

    def fail():
        time.sleep(0.05)
        raise error("cost: loss is not finite")

    with pytest.raises(error, match="cost: loss"):
        stages.side_by_side(neighbour, fail)
    assert len(endings) == 1 and "beside this one" in endings[0]
    Monitor().train(step, None, 3, label="later")  # is not stopped
