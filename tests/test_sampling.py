"""The sampler against a Markov chain whose every probability is known, and against the trainer's recomputation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models.transformer import Cache, Model, TransformerConfig, make_language_model
from rlhfjax.rl import sampling
from rlhfjax.rl.sampling import make_best_of_n, make_sampler, response_logprobs

PAD, EOS, VOCAB = 0, 1, 6
CONFIG = TransformerConfig(vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=16)
PROMPTS = np.array([[0, 0, 2, 3], [0, 4, 5, 2], [2, 2, 3, 4]])
PROMPT_MASK = PROMPTS != PAD


def markov_model(on_apply=lambda: None, on_run=None) -> Model:
    """A chain whose params are its logits `[V, V]`: row = the token read. Counts its traces and its executions."""

    def apply(params, tokens, mask, *, cache=None, num_outputs=None):
        on_apply()
        if on_run is not None:
            jax.debug.callback(on_run)
        return params[tokens][:, -(num_outputs or tokens.shape[1]) :], cache

    empty = Cache(layers=None, mask=jnp.zeros((1, 1), bool), length=jnp.zeros((), jnp.int32))
    return Model(config=CONFIG, init=None, apply=apply, init_cache=lambda rows, length: empty, logical_axes=None)


def chain(**rows):
    """Logits of a chain that never emits PAD; `t2=[...]` sets the probabilities of tokens 1.. after token 2."""
    table = np.full((VOCAB, VOCAB), -1e9, np.float32)
    table[:, 1:] = np.random.default_rng(0).normal(size=(VOCAB, VOCAB - 1))
    for name, probs in rows.items():
        table[int(name[1:])] = -1e9
        table[int(name[1:]), 1 : 1 + len(probs)] = np.log(np.maximum(probs, 1e-30))
    return jnp.asarray(table)


@functools.cache
def transformer(**change):
    model = make_language_model(dataclasses.replace(CONFIG, **change))
    return model, model.init(jax.random.key(0))


@functools.cache
def rollout_of(temperature, **change):
    model, params = transformer(**change)
    sample = make_sampler(model, max_tokens=6, eos_id=EOS, pad_id=PAD, temperature=temperature)
    prompts, mask = np.tile(PROMPTS, (8, 1)), np.tile(PROMPT_MASK, (8, 1))
    return sample(params, prompts, mask, jax.random.key(1))


def assert_well_formed(rollout, max_tokens):
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    assert tokens.shape == mask.shape == rollout.logprobs.shape == (len(rollout.prompts), max_tokens)
    for row in range(len(tokens)):
        ends = np.flatnonzero(tokens[row] == EOS)
        length = ends[0] + 1 if len(ends) else max_tokens
        np.testing.assert_array_equal(mask[row], np.arange(max_tokens) < length)
        assert (tokens[row, length:] == PAD).all() and (rollout.logprobs[row, length:] == 0).all()
        assert bool(rollout.finished[row]) == bool(len(ends))


def assert_recomputation_agrees(temperature, recomputed_at=None, tolerance=1e-5, **change):
    model, params = transformer(**change)
    rollout = rollout_of(temperature, **change)
    recompute = lambda params: response_logprobs(model, params, rollout, temperature=recomputed_at or temperature)
    logprobs, _ = jax.jit(recompute)(params)
    assert np.abs(logprobs - rollout.logprobs).max() < tolerance, "the trainer's log-probabilities differ"


@pytest.mark.parametrize("temperature, change", [(1.0, {}), (0.7, {}), (1.0, {"scan_layers": True})], ids=str)
def test_sampler_and_trainer_agree_on_logprobs(temperature, change):
    assert_well_formed(rollout_of(temperature, **change), 6)
    assert_recomputation_agrees(temperature, **change)


def test_sampler_and_trainer_agree_in_bfloat16_to_its_rounding():
    assert_recomputation_agrees(1.0, tolerance=0.05, compute_dtype="bfloat16")


def test_planted_fault_temperature_missing_in_the_recomputation_is_caught():
    with pytest.raises(AssertionError, match="log-probabilities differ"):
        assert_recomputation_agrees(0.7, recomputed_at=1.0)


@pytest.mark.parametrize(
    "fault", [lambda x, _: x[:, 1:], lambda x, _: jnp.roll(x, 1, axis=1)[:, :-1]], ids=["one late", "one early"]
)
def test_planted_fault_outputs_off_by_one_is_caught(monkeypatch, fault):
    monkeypatch.setattr(sampling, "before_response_tokens", fault)
    with pytest.raises(AssertionError, match="log-probabilities differ"):
        assert_recomputation_agrees(1.0)


def test_recomputation_by_hand():
    """Log-probabilities and entropy of a chain, from its table, in a NumPy loop; what is masked is not read."""
    table = chain(t2=[0.5, 0.25, 0.25])
    sample = make_sampler(markov_model(), max_tokens=5, eos_id=EOS, pad_id=PAD)
    rollout = sample(table, PROMPTS, PROMPT_MASK, jax.random.key(3))
    assert 0 < rollout.mask.mean() < 1
    garbage = dataclasses.replace(rollout, tokens=jnp.where(rollout.mask, rollout.tokens, 99))
    logprobs, entropy = response_logprobs(markov_model(), table, garbage, temperature=2.0)
    for row, prompt in enumerate(PROMPTS):
        last = prompt[-1]
        for t in range(5):
            if not rollout.mask[row, t]:
                assert logprobs[row, t] == entropy[row, t] == 0
                continue
            probs = np.exp(np.asarray(table[last], np.float64) / 2)
            probs /= probs.sum()
            last = rollout.tokens[row, t]
            np.testing.assert_allclose(logprobs[row, t], np.log(probs[last]), atol=1e-6)
            np.testing.assert_allclose(entropy[row, t], -sum(p * np.log(p) for p in probs if p > 0), atol=1e-6)


def test_recomputation_is_differentiable():
    """d/d logits of the summed log-probabilities is onehot - softmax, summed over visits."""
    table, rollout = chain(), rollout_of(1.0)
    grads = jax.grad(lambda p: response_logprobs(markov_model(), p, rollout, temperature=1.0)[0].sum())(table)
    expected = np.zeros((VOCAB, VOCAB))
    for row in range(len(rollout.tokens)):
        last = rollout.prompts[row, -1]
        for t in range(6):
            if rollout.mask[row, t]:
                expected[last] -= jax.nn.softmax(table[last])
                last = rollout.tokens[row, t]
                expected[rollout.prompts[row, -1] if t == 0 else rollout.tokens[row, t - 1], last] += 1
    np.testing.assert_allclose(grads, expected, atol=1e-5)


def test_samples_follow_the_tempered_distribution():
    """Chi-square of 20,000 two-token responses against exact joint probabilities of the transformer."""
    model, params = transformer()
    temperature, rows = 1.3, 20_000
    sample = make_sampler(model, max_tokens=2, eos_id=EOS, pad_id=PAD, temperature=temperature)
    prompt = np.array([[PAD, 2, 3]])
    prompts = np.repeat(prompt, rows, 0)
    rollout = sample(params, prompts, prompts != PAD, jax.random.key(7))

    def next_probs(*response):
        tokens = np.array([[PAD, 2, 3, *response]])
        logits, _ = model.apply(params, tokens, np.array([[False, True, True, *(True for _ in response)]]))
        return np.asarray(jax.nn.softmax(logits[0, -1] / temperature))

    expected, first = {}, next_probs()
    for a in range(VOCAB):
        second = next_probs(a) if a != EOS else np.eye(VOCAB)[PAD]
        expected |= {(a, b): first[a] * second[b] for b in range(VOCAB) if second[b] > 0}
    counts = {pair: 0 for pair in expected}
    for pair in map(tuple, np.asarray(rollout.tokens).tolist()):
        counts[pair] += 1
    chi_square = sum((counts[pair] - rows * p) ** 2 / (rows * p) for pair, p in expected.items())
    degrees = len(expected) - 1
    assert abs(sum(expected.values()) - 1) < 1e-5 and degrees == 30
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_decoding_stops_when_every_row_has_ended():
    """A chain that counts 2, 3, 4, 5, EOS: the longest response takes four tokens, so four passes of twelve run."""
    table = chain(t2=[0, 0, 1], t3=[0, 0, 0, 1], t4=[0, 0, 0, 0, 1], t5=[1])
    runs = []
    sample = make_sampler(markov_model(on_run=lambda: runs.append(1)), max_tokens=12, eos_id=EOS, pad_id=PAD)
    prompts = np.array([[2, 5], [2, 2]])
    rollout = jax.block_until_ready(sample(table, prompts, prompts > 0, jax.random.key(0)))
    jax.effects_barrier()
    assert_well_formed(rollout, 12)
    np.testing.assert_array_equal(rollout.tokens[:, :5], [[EOS, 0, 0, 0, 0], [3, 4, 5, EOS, 0]])
    np.testing.assert_allclose(rollout.logprobs, 0, atol=1e-6)
    assert rollout.finished.all() and len(runs) == 4


def test_an_unfinished_response_is_marked():
    table = chain(t2=[0, 0, 1], t3=[0, 0, 0, 1], t4=[1])
    sample = make_sampler(markov_model(), max_tokens=2, eos_id=EOS, pad_id=PAD)
    prompts = np.array([[2], [3], [4]])
    rollout = sample(table, prompts, prompts > 0, jax.random.key(0))
    np.testing.assert_array_equal(rollout.tokens, [[3, 4], [4, EOS], [EOS, PAD]])
    np.testing.assert_array_equal(rollout.mask, [[1, 1], [1, 1], [1, 0]])
    np.testing.assert_array_equal(rollout.finished, [False, True, True])


def test_one_key_gives_one_rollout_and_one_trace():
    traces = []
    sample = make_sampler(markov_model(on_apply=lambda: traces.append(1)), max_tokens=8, eos_id=EOS, pad_id=PAD)
    first = sample(chain(), PROMPTS, PROMPT_MASK, jax.random.key(0))
    traced = len(traces)
    again = sample(chain(), PROMPTS, PROMPT_MASK, jax.random.key(0))
    other = sample(chain(), PROMPTS, PROMPT_MASK, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first.tokens != other.tokens) and len(traces) == traced
    assert not first.truncated and first.tokens.dtype == jnp.int32


def numpy_kept(logits, top_k, top_p):
    """The set that top-k, then top-p, keeps."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    probs = np.exp(logits[ranked] - logits.max())
    probs, kept, total = probs / probs.sum(), set(), 0.0
    for token, p in zip(ranked, probs):
        if total < (top_p or 1):
            kept.add(token)
        total += p
    return kept


@pytest.mark.parametrize("top_k, top_p", [(1, None), (3, None), (None, 0.5), (None, 0.05), (4, 0.8), (6, 1.0)])
def test_top_k_and_top_p_keep_the_right_tokens(top_k, top_p):
    logits = np.random.default_rng(5).normal(size=(16, VOCAB)).astype(np.float32)
    cut = sampling._cut(jnp.asarray(logits), top_k, top_p)
    for row in range(16):
        kept = numpy_kept(logits[row], top_k, top_p)
        assert set(np.flatnonzero(np.isfinite(cut[row]))) == kept
        np.testing.assert_array_equal(cut[row, list(kept)], logits[row, list(kept)])


def test_a_cut_rollout_says_so_and_reports_uncut_logprobs():
    table = chain(t2=[0.1, 0.5, 0.4], t3=[0.2, 0.3, 0.5])
    sample = make_sampler(markov_model(), max_tokens=10, eos_id=EOS, pad_id=PAD, top_k=2)
    prompts = np.full((50, 1), 2)
    rollout = sample(table, prompts, prompts > 0, jax.random.key(0))
    assert rollout.truncated and set(np.unique(rollout.tokens)) == {2, 3}
    after_2 = rollout.tokens[:, 0]
    np.testing.assert_allclose(rollout.logprobs[:, 0], np.log([0.5, 0.4])[after_2 - 2], atol=1e-5)


def test_best_of_n_takes_the_best_of_each_prompt():
    sample = make_sampler(markov_model(), max_tokens=4, eos_id=EOS, pad_id=PAD)
    value = lambda rollout: jnp.sum(jnp.where(rollout.mask, rollout.tokens, 0), 1).astype(jnp.float32)
    seen = []

    def judge(rollout):
        seen.append(value(rollout))
        np.testing.assert_array_equal(rollout.prompts, np.repeat(PROMPTS, 8, 0))
        return seen[-1]

    best, scores = make_best_of_n(sample, judge, 8)(chain(), PROMPTS, PROMPT_MASK, jax.random.key(0))
    np.testing.assert_array_equal(scores, np.asarray(seen[0]).reshape(3, 8).max(1))
    np.testing.assert_array_equal(value(best), scores)
    np.testing.assert_array_equal(best.prompts, PROMPTS)
    assert len(set(np.asarray(seen[0]).reshape(3, 8)[0].tolist())) > 1

    one, _ = make_best_of_n(sample, value, 1)(chain(), PROMPTS, PROMPT_MASK, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, one, sample(chain(), PROMPTS, PROMPT_MASK, jax.random.key(0)))
