"""LoRA: nothing changes at first, the algebra is that of merged weights, and one frozen copy serves all networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import stages
from rlhfjax.io.monitor import Monitor
from rlhfjax.models.lora import LoraConfig, adapt, bind, merge
from rlhfjax.models.transformer import TransformerConfig, make_language_model, make_scalar_model, score
from rlhfjax.models.wrap import wrap
from rlhfjax.parallel import mesh
from rlhfjax.rl.fit import adamw, make_fit_step, take, with_frozen
from rlhfjax.rl.multiplier import MultiplierConfig, make_multiplier
from rlhfjax.rl.ppo import PPOConfig, make_lagrangian_ppo, make_ppo
from rlhfjax.rl.preference_models import make_reward_loss
from rlhfjax.rl.sampling import make_sampler, response_logprobs
from rlhfjax.types import PreferenceBatch, TrainState

CONFIG = TransformerConfig(vocab_size=16, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24)
LORA = LoraConfig(rank=3, alpha=6.0)
FULL = make_language_model(CONFIG)
POLICY, SCALAR = adapt(FULL, LORA), adapt(make_scalar_model(CONFIG), LORA)
SCANNED = adapt(make_language_model(dataclasses.replace(CONFIG, scan_layers=True, remat=True)), LORA)
TOKENS = np.random.default_rng(0).integers(2, 16, (8, 7)).astype(np.int32)
MASK = np.arange(7) >= (np.arange(8) % 3)[:, None]
FROZEN = FULL.init(jax.random.key(0))


def moved(model, key: int = 1):
    """Parameters whose changes are no longer zero."""
    params, keys = model.init(jax.random.key(key)), iter(jax.random.split(jax.random.key(key + 10), 100))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


def test_at_first_nothing_has_changed():
    logits, _ = FULL.apply(FROZEN, TOKENS, MASK)
    again, _ = bind(POLICY, FROZEN).apply(POLICY.init(jax.random.key(1)), TOKENS, MASK)
    np.testing.assert_array_equal(logits, again)
    assert not np.any(score(bind(SCALAR, FROZEN))(SCALAR.init(jax.random.key(1)), TOKENS, MASK))


@pytest.mark.parametrize("model", [POLICY, SCANNED, SCALAR], ids=["unrolled", "scanned", "scalar"])
def test_low_rank_is_the_algebra_of_merged_weights(model):
    """x W + s (x A) B = x (W + s A B), s = alpha / rank = 2; a scalar model stands on a language model's weights."""
    params = moved(model)
    beside, _ = bind(model, FROZEN).apply(params, TOKENS, MASK)
    whole = merge(model, FROZEN, params)
    merged, _ = model.base.apply(whole, TOKENS, MASK)
    np.testing.assert_allclose(beside, merged, atol=2e-5)
    assert np.abs(beside - (model.base.apply(FROZEN | {"head": whole["head"]}, TOKENS, MASK)[0])).max() > 1e-2
    query, change = FROZEN["blocks"]["attention"]["query"], params["blocks"]["attention"]["query"]
    by_hand = query[1] + 2.0 * change["a"][1] @ change["b"][1]
    np.testing.assert_allclose(whole["blocks"]["attention"]["query"][1], by_hand, atol=1e-6)


def test_rank_0_trains_in_full():
    assert adapt(FULL, LoraConfig()) is FULL and bind(FULL, None) is FULL


def test_only_the_targets_learn():
    few = adapt(FULL, LoraConfig(rank=16, targets=("query", "down")))
    tree = few.init(jax.random.key(0))
    assert set(tree) == {"blocks"} and set(tree["blocks"]) == {"attention", "mlp"}
    assert set(tree["blocks"]["attention"]) == {"query"} and set(tree["blocks"]["mlp"]) == {"down"}
    assert tree["blocks"]["mlp"]["down"]["a"].shape == (2, 24, 16)
    assert set(SCALAR.init(jax.random.key(0))) == {"blocks", "head"}


def test_the_sampler_and_the_cache_read_the_changed_weights():
    params, bound = moved(POLICY), bind(POLICY, FROZEN)
    rollout = make_sampler(bound, max_tokens=5, eos_id=1, pad_id=0)(params, TOKENS, MASK, jax.random.key(2))
    again, _ = response_logprobs(bound, params, rollout, temperature=1.0)
    np.testing.assert_allclose(rollout.logprobs, again, atol=1e-5)


def test_a_reward_model_learns_and_the_frozen_weights_do_not():
    rng = np.random.default_rng(3)
    responses = rng.integers(2, 16, (64, 2, 5)).astype(np.int32)
    count = (responses == 7).sum(-1)
    pairs = PreferenceBatch(
        prompts=np.tile(TOKENS, (8, 1)), prompt_mask=np.tile(MASK, (8, 1)), responses=responses,
        responses_mask=np.ones_like(responses, bool),
        prefs=(0.5 + 0.5 * np.sign(count[:, 0] - count[:, 1])).astype("f4"),
    )
    optimizer, before = adamw(3e-2), jax.tree.map(np.array, FROZEN)
    step = jax.jit(make_fit_step(with_frozen(make_reward_loss, SCALAR), optimizer))
    state = TrainState.create(SCALAR.init(jax.random.key(0)), optimizer)
    batches = take(pairs, np.stack([rng.permutation(64)[:32] for _ in range(60)]))
    state, metrics = step(state, batches, FROZEN)
    _, last = step(state, take(pairs, np.arange(64)[None]), FROZEN)
    assert last["accuracy"] > 0.9
    jax.tree.map(np.testing.assert_array_equal, before, FROZEN)
    assert jax.tree.structure(state.opt_state[1][0].mu) == jax.tree.structure(state.params)


def lagrangian(num_iterations: int = 2):
    """Safe RLHF with five learners and scorers on one frozen copy: the last state and what was logged."""
    algorithm = make_lagrangian_ppo(POLICY, SCALAR, optax.sgd(0.1), optax.sgd(0.1),
                                    PPOConfig(num_minibatches=2), make_multiplier(0.1, MultiplierConfig()))  # fmt: skip
    host = lambda tree: jax.tree.map(np.asarray, tree)
    place = lambda model, tree: mesh.place(host(tree), model.logical_axes())
    frozen, log = place(FULL, FROZEN), []
    judges = [place(SCALAR, moved(SCALAR, k)) for k in (3, 4)]
    say = jax.jit(lambda params, frozen, r: mesh.constrain(
        score(bind(SCALAR, frozen))(params, jnp.concatenate([r.prompts, r.tokens], 1),
                                    jnp.concatenate([r.prompt_mask, r.mask], 1)), None))  # fmt: skip
    state = stages.run_rl(
        algorithm=algorithm, params=(place(POLICY, moved(POLICY)), *judges), ref_params=frozen,
        sample=make_sampler(FULL, max_tokens=5, eos_id=1, pad_id=0),
        feedback=lambda rollout, key: tuple(say(judge, frozen, rollout) for judge in judges),
        prompts=np.tile(TOKENS, (4, 1)), prompt_mask=np.tile(MASK, (4, 1)), num_iterations=num_iterations,
        batch_size=16, seed=0, label="adapted",
        monitor=Monitor(log=lambda step, metrics: log.append(metrics)))  # fmt: skip
    return mesh.fetch(state), log


def test_constrained_rl_on_one_frozen_copy_on_one_device_and_on_eight():
    state, log = lagrangian()
    sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert sizes(state.policy.params) + 2 * sizes(state.critic.params) < 1.5 * sizes(FROZEN)
    assert log[0]["sampler_mismatch"] < 1e-5 and log[0]["kl"] > 1e-4  # it did not start from the reference
    with jax.set_mesh(mesh.make_mesh(mesh.MeshConfig(data=2, fsdp=2, tensor=2))):
        other, others = lagrangian()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), state, other)
    np.testing.assert_allclose(log[1]["kl"], others[1]["kl"], rtol=1e-3)


def test_planted_fault_a_reference_that_moves_with_the_policy():
    """At lr 0 the reference is the frozen copy: were it the policy, KL would be 0."""
    algorithm = make_ppo(POLICY, SCALAR, optax.sgd(0.0), optax.sgd(0.0), PPOConfig(num_minibatches=1))
    params = moved(POLICY)
    sample = make_sampler(bind(POLICY, FROZEN), max_tokens=5, eos_id=1, pad_id=0)
    rollout = sample(params, TOKENS, MASK, jax.random.key(2))
    state = algorithm.init(params, SCALAR.init(jax.random.key(1)))
    _, metrics = algorithm.step(state, FROZEN, rollout, jnp.zeros(8), key=jax.random.key(3))
    whole = merge(POLICY, FROZEN, params)
    mine, _ = response_logprobs(FULL, whole, rollout, temperature=1.0)
    ref, _ = response_logprobs(FULL, FROZEN, rollout, temperature=1.0)
    np.testing.assert_allclose(metrics["kl_k1"], jnp.mean(jnp.sum(mine - ref, -1)), atol=1e-4)
    assert metrics["kl"] > 1e-3


def test_weights_in_bfloat16_keep_small_changes():
    """Beside a bfloat16 weight a change of 1e-3 of it counts; merged into it, it would round away."""
    frozen = jax.tree.map(lambda p: p.astype(jnp.bfloat16), FROZEN)
    params = jax.tree.map(lambda p: 1e-2 * p, moved(POLICY))
    outputs = lambda changes: bind(POLICY, frozen).apply(changes, TOKENS, MASK)[0]
    assert np.abs(outputs(params) - outputs(jax.tree.map(jnp.zeros_like, params))).max() > 1e-6


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: LoraConfig(rank=-1), ValueError, "rank must not be negative and alpha positive, got -1"),
        (lambda: LoraConfig(targets=("q_proj",)), ValueError, r"targets must be some of query, .*, got q_proj"),
        (lambda: LoraConfig(targets=()), ValueError, "got none"),
        (lambda: adapt(wrap(lambda key: {}, lambda *args: 0), LORA), TypeError, "only the library's own transformer"),
        (lambda: POLICY.apply(POLICY.init(jax.random.key(0)), TOKENS, MASK), TypeError, "bind.* first"),
        (lambda: bind(POLICY, make_language_model(dataclasses.replace(CONFIG, d_ff=8)).init(jax.random.key(0))).apply(
            moved(POLICY), TOKENS, MASK), ValueError, "give params and model one TransformerConfig"),
    ],
)  # fmt: skip
def test_bad_adapters(make, error, message):
    with pytest.raises(error, match=message):
        make()
