"""The transformer's truth: an independent NumPy forward, the cache against the full pass, causality by gradients."""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import transformer
from rlhfjax.models.transformer import (
    TransformerConfig,
    make_language_model,
    make_scalar_model,
    scalar_params_from,
    score,
)

VOCAB = 13
LLAMA = TransformerConfig(vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=20)
GPT = TransformerConfig(
    vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=2, d_ff=24, norm="layer", mlp="plain", activation="gelu",
    tie_embeddings=True, scan_layers=True, head_dim=6,
)  # fmt: skip
# All that was added for checkpoints of others, in two networks that are nobody's.
ROTARY = TransformerConfig(
    vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=20, head_dim=6, norm="rms_plus_one",
    activation="gelu_exact", qk_norm=True, post_norms=True, embed_scale=True, rotary_dim=4, rope_theta=9.0,
    rope_factor=5.0, rope_band=(1.0, 2.0, 14), window=3, full_layers=(1,), window_rope_theta=20.0, query_scalar=5,
    attention_softcap=0.7, logit_softcap=1.5, tie_embeddings=True,
)  # fmt: skip
LEARNED = TransformerConfig(
    vocab_size=VOCAB, d_model=16, num_layers=2, num_heads=4, d_ff=20, norm="layer", biases=("qkv", "out", "mlp"),
    parallel=True, num_positions=8, window=4, full_layers=(0,), scan_layers=True,
)  # fmt: skip
CONFIGS = {"llama-unrolled": LLAMA, "gpt-scanned": GPT, "rotary-unrolled": ROTARY, "learned-scanned": LEARNED}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

# Row 0: left and right padding. Row 1: left padding. Row 2: nothing padded.
MASK = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
TOKENS = np.random.default_rng(0).integers(1, VOCAB, MASK.shape)


@functools.cache
def language_model(config):
    """The model, jitted apply, and parameters with every norm and bias moved off its initial 1 or 0."""
    model = make_language_model(config)
    params = model.init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    noise = np.random.default_rng(1)
    leaves = [leaf + 0.1 * jnp.asarray(noise.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return model, jax.jit(model.apply, static_argnames="num_outputs"), jax.tree.unflatten(treedef, leaves)


def numpy_logits(config, params, tokens):
    """Logits of one unpadded sequence, written with loops over heads and positions."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    head_dim = config.head_dim or config.d_model // config.num_heads
    group = config.num_heads // (config.num_kv_heads or config.num_heads)

    def norm(p, x):
        if config.norm != "layer":
            scale = p["scale"] + (config.norm == "rms_plus_one")
            return x / np.sqrt((x**2).mean() + config.norm_eps) * scale
        return (x - x.mean()) / np.sqrt(x.var() + config.norm_eps) * p["scale"] + p["bias"]

    def act(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        if config.activation == "gelu_exact":
            return x * np.vectorize(statistics.NormalDist().cdf)(x)
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def frequency(i, local):
        size = config.rotary_dim or head_dim
        if local and config.window_rope_theta:
            return config.window_rope_theta ** (-2 * i / size)
        plain = config.rope_theta ** (-2 * i / size)
        if config.rope_band is None:
            return plain / config.rope_factor
        low, high, length = config.rope_band
        turns = length * plain / (2 * np.pi)
        kept = 1 if turns > high else 0 if turns < low else (turns - low) / (high - low)
        return kept * plain + (1 - kept) * plain / config.rope_factor

    def rotate(x, position, local):
        out, half = x.copy(), (config.rotary_dim or head_dim) // 2
        for i in range(half if config.num_positions is None else 0):
            angle = position * frequency(i, local)
            a, b = x[i], x[i + half]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    cap = lambda x, limit: x if limit is None else limit * np.tanh(x / limit)
    linear = lambda p, name, x: x @ p[name] + p.get(f"{name}_bias", 0)
    xs = [params["embed"][token] * (config.d_model**0.5 if config.embed_scale else 1) for token in tokens]
    if config.num_positions is not None:
        xs = [x + position for x, position in zip(xs, params["positions"])]
    for layer in range(config.num_layers):
        p = jax.tree.map(lambda w: w[layer], params["blocks"])  # noqa: B023
        normed = [norm(p["attention_norm"], x) for x in xs]
        local = config.window is not None and layer not in config.full_layers

        def head(name, t, h):
            x = linear(p["attention"], name, normed[t]).reshape(-1, head_dim)[h]  # noqa: B023
            x = norm(p["attention"][f"{name}_norm"], x) if config.qk_norm and name != "value" else x  # noqa: B023
            return x if name == "value" else rotate(x, t, local)  # noqa: B023

        for t in range(len(xs)):
            mixed, first = [], max(0, t - config.window + 1) if local else 0
            for h in range(config.num_heads):
                query = head("query", t, h) / np.sqrt(config.query_scalar or head_dim)
                logits = [query @ head("key", s, h // group) for s in range(first, t + 1)]
                logits = cap(np.array(logits), config.attention_softcap)
                weights = np.exp(logits - np.max(logits))
                weights /= weights.sum()
                mixed.append(sum(w * head("value", first + s, h // group) for s, w in enumerate(weights)))
            mixed = linear(p["attention"], "out", np.concatenate(mixed))
            xs[t], before = xs[t] + (norm(p["attention_post_norm"], mixed) if config.post_norms else mixed), xs[t]
            y = norm(p["mlp_norm"], before if config.parallel else xs[t])
            up = linear(p["mlp"], "up", y)
            hidden = act(up) if config.mlp == "plain" else act(linear(p["mlp"], "gate", y)) * up
            hidden = linear(p["mlp"], "down", hidden)
            xs[t] = xs[t] + (norm(p["mlp_post_norm"], hidden) if config.post_norms else hidden)
    table = params["embed"].T if config.tie_embeddings else params["head"]
    return np.stack([cap(norm(params["final_norm"], x) @ table, config.logit_softcap) for x in xs])


@each_config
def test_forward_is_the_numpy_forward_of_the_kept_tokens(config):
    _, apply, params = language_model(config)
    logits, cache = apply(params, TOKENS, MASK)
    assert cache is None and logits.dtype == jnp.float32 and logits.shape == (*TOKENS.shape, VOCAB)
    for row in range(len(TOKENS)):
        expected = numpy_logits(config, params, TOKENS[row][MASK[row]])
        np.testing.assert_allclose(logits[row][MASK[row]], expected, atol=2e-5)


@each_config
@pytest.mark.parametrize("chunks", [(7,), (3, 1, 1, 1, 1), (2, 4, 1)])
def test_cached_passes_equal_the_full_pass(config, chunks):
    model, apply, params = language_model(config)
    full, _ = apply(params, TOKENS, MASK)
    cache, pieces, start = model.init_cache(len(TOKENS), 9), [], 0
    for size in chunks:
        now = slice(start, start + size)
        outputs, cache = apply(params, TOKENS[:, now], MASK[:, now], cache=cache)
        pieces.append(outputs)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1)[MASK], full[MASK], atol=2e-6)
    assert int(cache.length) == 7
    np.testing.assert_array_equal(cache.mask, np.pad(MASK, ((0, 0), (0, 2))))


def test_a_decode_step_traces_once():
    model, _, params = language_model(LLAMA)
    traces = []

    @jax.jit
    def step(cache, tokens):
        traces.append(1)
        return model.apply(params, tokens, jnp.ones(tokens.shape, bool), cache=cache)[1]

    cache = model.init_cache(3, 7)
    for t in range(5):
        cache = step(cache, TOKENS[:, t : t + 1])
    assert len(traces) == 1 and int(cache.length) == 5


@each_config
def test_causality_by_gradients(config):
    """The output at t has exactly zero gradient to what stands behind t, and to padding; and none other is zero."""
    model = make_scalar_model(config, head_std=1.0)
    params = model.init(jax.random.key(2))
    tokens = np.arange(1, 8)[None]  # every position has its own row of the embedding
    mask = np.array([[1, 1, 0, 1, 1, 1, 1]], bool)
    outputs = lambda embed: model.apply(params | {"embed": embed}, tokens, mask)[0][0]
    influence = np.abs(jax.jit(jax.jacrev(outputs))(params["embed"])).sum(-1)[:, 1:8]  # [position of output, of input]
    expected = np.tril(np.ones((7, 7), bool)) & mask[0]
    np.testing.assert_array_equal((influence > 0)[mask[0]], expected[mask[0]])


@each_config
def test_padding_changes_nothing(config):
    """More left padding, and any ids in it, invalid ones too, leave kept outputs and all gradients as they were."""
    model, apply, params = language_model(config)
    full, _ = apply(params, TOKENS, MASK)
    wider_mask = np.pad(MASK, ((0, 0), (3, 1)))
    wider = np.pad(TOKENS, ((0, 0), (3, 1)), constant_values=5)
    np.testing.assert_allclose(apply(params, wider, wider_mask)[0][wider_mask], full[MASK], atol=2e-6)

    @jax.jit
    def value_and_grad(tokens):
        loss = lambda p: jnp.sum(jax.nn.log_softmax(model.apply(p, tokens, MASK)[0])[MASK] ** 2)
        return jax.value_and_grad(loss)(params)

    clean = value_and_grad(TOKENS)
    garbage = value_and_grad(np.where(MASK, TOKENS, np.random.default_rng(3).integers(-99, 99, MASK.shape)))
    jax.tree.map(np.testing.assert_array_equal, clean, garbage)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(clean))


def test_a_row_that_fills_the_table_of_positions_is_finite_and_a_longer_one_is_nan():
    _, apply, params = language_model(LEARNED)
    mask = np.arange(11) < np.array([[8], [9]])
    logits, _ = apply(params, np.ones(mask.shape, int), mask)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_a_row_of_padding_is_finite_and_a_foreign_id_is_nan():
    _, apply, params = language_model(LLAMA)
    mask = MASK.copy()
    mask[0] = False
    assert np.isfinite(apply(params, TOKENS, mask)[0]).all()
    tokens = TOKENS.copy()
    tokens[2, -1] = VOCAB
    logits, _ = apply(params, tokens, MASK)
    assert np.isnan(logits[2, -1]).all() and np.isfinite(logits[:2]).all()


def _loss_and_grads(config):
    _, _, params = language_model(LLAMA)
    model = make_language_model(config)
    loss = lambda p: jnp.sum(jax.nn.log_softmax(model.apply(p, TOKENS, MASK)[0])[MASK, 0])
    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("scan, remat", [(True, False), (False, True), (True, True)])
def test_scan_and_remat_change_neither_values_nor_gradients(scan, remat):
    changed = _loss_and_grads(dataclasses.replace(LLAMA, scan_layers=scan, remat=remat))
    plain = _loss_and_grads(LLAMA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), plain, changed)


def test_bfloat16_compute_is_close_over_float32_parameters():
    _, apply, params = language_model(LLAMA)
    model = make_language_model(dataclasses.replace(LLAMA, compute_dtype="bfloat16"))
    half, cache = jax.jit(model.apply)(params, TOKENS, MASK, cache=model.init_cache(3, 7))
    full, _ = apply(params, TOKENS, MASK)
    assert half.dtype == jnp.float32 and {x.dtype for pair in cache.layers for x in pair} == {jnp.dtype("bfloat16")}
    difference = np.abs(half - full)[MASK].max()
    assert 0 < difference < 0.1  # logits of size 1 to 4, seven bits of mantissa
    _, grads = _loss_and_grads(model.config)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_a_scanned_program_does_not_grow_with_depth():
    def size(num_layers):
        config = dataclasses.replace(LLAMA, num_layers=num_layers)
        model = make_language_model(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return len(str(jax.make_jaxpr(model.apply)(shapes, TOKENS, MASK)).splitlines())

    assert size(40) == size(10) < 2 * size(1)
    assert not dataclasses.replace(LLAMA, num_layers=8).scans and dataclasses.replace(LLAMA, num_layers=9).scans


@each_config
def test_logical_axes_name_every_axis_of_every_parameter(config):
    for model in (make_language_model(config), make_scalar_model(config)):
        params, axes = jax.eval_shape(model.init, jax.random.key(0)), model.logical_axes()
        ranks = jax.tree.map(lambda names: len(names), axes, is_leaf=lambda x: isinstance(x, tuple))
        assert ranks == jax.tree.map(lambda p: p.ndim, params)
        assert {type(node) for node in (params, params["blocks"], params["blocks"]["mlp"])} == {dict}
    sizes = {"vocab": VOCAB, "embed": 16, "mlp": config.d_ff, "layers": 2}
    sizes |= {"heads": config.num_heads * config.head_size, "kv_heads": config.kv_heads * config.head_size}
    sizes |= {"head_dim": config.head_size, "positions": config.num_positions}
    jax.tree.map(lambda p, names: np.testing.assert_array_equal(p.shape, [sizes[name] for name in names]), params, axes)


def test_num_outputs_runs_the_head_on_the_last_positions_only():
    _, apply, params = language_model(LLAMA)
    full, last = apply(params, TOKENS, MASK)[0], apply(params, TOKENS, MASK, num_outputs=2)[0]
    np.testing.assert_allclose(last, full[:, -2:], atol=1e-6)


def assert_score_reads_the_last_kept_token():
    model = make_scalar_model(LLAMA, head_std=1.0)
    params = model.init(jax.random.key(4))
    outputs, _ = jax.jit(model.apply)(params, TOKENS, MASK)
    scores = jax.jit(score(model))(params, TOKENS, MASK)
    np.testing.assert_allclose(scores, [outputs[0, 5], outputs[1, 6], outputs[2, 6]], atol=1e-6)


def test_score_reads_the_last_kept_token():
    assert_score_reads_the_last_kept_token()


@pytest.mark.parametrize(
    "slots",
    [lambda mask: [6, 6, 6], lambda mask: mask.sum(1) - 1, lambda mask: [4, 5, 5]],
    ids=["the last slot", "the count of kept tokens", "one token early"],
)
def test_planted_fault_score_at_the_wrong_token_is_caught(monkeypatch, slots):
    monkeypatch.setattr(transformer, "at_last", lambda x, mask: x[np.arange(3), slots(mask)])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_score_reads_the_last_kept_token()


def test_scalar_params_copy_the_trunk_and_draw_a_head():
    _, _, params = language_model(LLAMA)
    model = make_scalar_model(LLAMA)
    warm = scalar_params_from(params, model, jax.random.key(5))
    assert jax.tree.structure(warm) == jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, warm["blocks"], params["blocks"])
    assert warm["embed"].unsafe_buffer_pointer() != params["embed"].unsafe_buffer_pointer()
    assert warm["head"].shape == (16,) and not np.any(warm["head"])
    assert not np.any(score(model)(warm, TOKENS, MASK))
    drawn = scalar_params_from(params, make_scalar_model(LLAMA, head_std=17**-0.5), jax.random.key(5))["head"]
    assert 0.1 < float(jnp.std(drawn)) < 0.4
