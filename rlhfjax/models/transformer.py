"""A decoder transformer: `flax.nnx` modules inside, a pure face (`Model`) outside.

Everything that learns here is one of two models on the same trunk: a language model (logits `[B, S, V]`) or a scalar
model (`[B, S]`: reward, cost and value heads). Parameters are a plain nested dict

    {"embed", "blocks": {"attention_norm", "attention", "mlp_norm", "mlp"}, "final_norm", "head"}

whose block arrays are stacked on a leading layer axis, so that a deep stack is one `jax.lax.scan` (compile time does
not grow with depth) and a shallow one is unrolled (faster on a CPU, above all when decoding).

**Padding** may stand anywhere: a mask says which tokens are kept. Padded tokens are never attended to, their ids are
never read, and positions count kept tokens only, so left padding shifts nothing. Outputs at padded positions are finite
and mean nothing.

**Precision**: parameters are float32. With `compute_dtype="bfloat16"` matrix products and activations are bfloat16,
while norms' statistics, rotary angles, softmax and outputs stay float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlhfjax.masked import at_last
from rlhfjax.parallel.mesh import constrain
from rlhfjax.types import Params, pytree

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}
_DEEP = 8  # layers above which one scanned block beats an unrolled stack: compile time against decode speed
_RESIDUAL = ("batch", None, None)  # the residual stream [B, S, d]: split by rows, whole otherwise
_HIDDEN = -1e30  # a score no softmax sees; finite, so that a row that sees nothing gives no NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a pre-norm decoder without biases. The defaults are Llama's choices.

    num_kv_heads: key/value heads shared by groups of query heads (GQA); None: as many as `num_heads`.
    head_dim: None: `d_model / num_heads`.
    norm: "rms" (scale) or "layer" (scale and bias).
    mlp: "gated", `down(act(gate(x)) * up(x))`, or "plain", `down(act(up(x)))`.
    activation: "gelu" is the tanh approximation.
    tie_embeddings: a language model's logits are read with the embedding itself.
    scan_layers: None scans stacks deeper than 8 layers and unrolls the others.
    remat: recompute each block in the backward pass instead of storing its activations.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["gated", "plain"] = "gated"
    activation: Literal["silu", "gelu", "relu"] = "silu"
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    scan_layers: bool | None = None
    remat: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "kv_heads", "rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, choices in (
            ("norm", ("rms", "layer")),
            ("mlp", ("gated", "plain")),
            ("activation", tuple(_ACTIVATIONS)),
            ("compute_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide d_model={self.d_model}, or set head_dim")
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_size}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def scans(self) -> bool:
        return self.num_layers > _DEEP if self.scan_layers is None else self.scan_layers


@pytree
class Cache:
    """Keys and values of the tokens read so far.

    layers: (keys, values), each `[B, num_kv_heads, S, head_dim]`: one such pair per layer in a list when the stack is
    unrolled (decoding then copies nothing), one pair stacked on a leading layer axis when it is scanned.
    mask `[B, S]` bool: which slots hold a kept token. length `[]` int32: slots written so far.
    """

    layers: Any
    mask: jax.Array
    length: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network as pure functions.

    init(key) -> params, a plain nested dict of float32 arrays.
    apply(params, tokens, mask, *, cache=None, num_outputs=None) -> (outputs, cache): reads `tokens [B, S]` int where
        `mask [B, S]` bool keeps them. `num_outputs=n` runs the head on the last n positions only. With a cache, the
        tokens are written behind those already in it and attend to all of them; the cache given is not changed.
        A cache that is too short is an error where its length is known and overwrites its end where it is traced.
    init_cache(batch_size, length) -> an empty Cache of `length` slots.
    logical_axes() -> the tree of params with a tuple of axis names in place of each array.
    config: a TransformerConfig; of a wrapped network (`models.wrap`) anything with its `vocab_size`.
    base, scale: of a network that learns low-rank changes (`models.lora`): the network it changes, and by what factor.
    """

    config: Any
    init: Callable[..., Params]
    apply: Callable[..., tuple[jax.Array, Cache | None]]
    init_cache: Callable[[int, int], Cache]
    logical_axes: Callable[[], Any]
    base: "Model | None" = None
    scale: float = 1.0


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=axes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix that stands for `weight + scale a @ b`, in its place among the parameters. See `models.lora`."""

    weight: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float


def _linear(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """`x [..., d] @ weight [d, f]` in x's dtype; as one flat product, whose gradients need no transposes on a CPU."""
    flat, matrix = x.reshape(-1, x.shape[-1]), weight.get_value()
    times = lambda x, matrix: x @ matrix.astype(x.dtype)
    if isinstance(matrix, LowRank):
        flat = times(flat, matrix.weight) + matrix.scale * times(times(flat, matrix.a), matrix.b)
    else:
        flat = times(flat, matrix)
    return flat.reshape(*x.shape[:-1], -1)


class Norm(nnx.Module):
    """RMSNorm, `x / rms(x) * scale`, or LayerNorm, `(x - mean) / std * scale + bias`; statistics in float32."""

    def __init__(self, config: TransformerConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.d_model), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(config.d_model), axes=("embed",)) if config.norm == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, -1, keepdims=True)
        # Gathered first: split along d they would split the activations, whose rows are split already.
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps) * constrain(self.scale[...], None)
        if self.bias is not None:
            y = y + constrain(self.bias[...], None)
        return y.astype(x.dtype)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary positions on the last axis of `x [B, T, ..., D]`, pairing i with i + D/2 as Llama's public weights do."""
    cos, sin = (r.astype(x.dtype) for r in rotation)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nnx.Module):
    """Causal grouped-query attention; query head i reads key head i // (num_heads / num_kv_heads)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.kv_heads, self.head_size = config.kv_heads, config.head_size
        width, all_q, all_kv = config.d_model, config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.query = _weight(rngs, (width, all_q), width**-0.5, ("embed", "heads"))
        self.key = _weight(rngs, (width, all_kv), width**-0.5, ("embed", "kv_heads"))
        self.value = _weight(rngs, (width, all_kv), width**-0.5, ("embed", "kv_heads"))
        self.out = _weight(rngs, (all_q, width), (all_q * 2 * config.num_layers) ** -0.5, ("heads", "embed"))

    def __call__(self, x, rotation, visible, start, cached):
        """`x [B, T, d]`; `visible [B, 1, 1, T, S]` bool; `cached` (keys, values) to write at slot `start`, or None."""
        b, t, _ = x.shape
        queries = _rotate(_linear(x, self.query).reshape(b, t, self.kv_heads, -1, self.head_size), rotation)
        keys = _rotate(_linear(x, self.key).reshape(b, t, self.kv_heads, 1, self.head_size), rotation)[..., 0, :]
        values = _linear(x, self.value).reshape(b, t, self.kv_heads, self.head_size)
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # [B, H, S, D]: the layout that decodes fastest
        if cached is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
            keys, values = write(cached[0], keys), write(cached[1], values)
        scores = jnp.einsum("bthgd,bhsd->bhgts", queries, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(visible, scores * self.head_size**-0.5, _HIDDEN), axis=-1)
        mixed = jnp.einsum("bhgts,bhsd->bthgd", weights.astype(x.dtype), values).reshape(b, t, -1)
        return _linear(mixed, self.out), None if cached is None else (keys, values)


class Mlp(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or without the gate."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        self.activation = config.activation
        self.gate = _weight(rngs, (d, f), d**-0.5, ("embed", "mlp")) if config.mlp == "gated" else None
        self.up = _weight(rngs, (d, f), d**-0.5, ("embed", "mlp"))
        self.down = _weight(rngs, (f, d), (f * 2 * config.num_layers) ** -0.5, ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        act, up = _ACTIVATIONS[self.activation], _linear(x, self.up)
        hidden = act(up) if self.gate is None else act(_linear(x, self.gate)) * up
        return _linear(hidden, self.down)


class Block(nnx.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm, self.attention = Norm(config), Attention(config, rngs)
        self.mlp_norm, self.mlp = Norm(config), Mlp(config, rngs)

    def __call__(self, x, rotation, visible, start, cached):
        mixed, cached = self.attention(self.attention_norm(x), rotation, visible, start, cached)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cached


class Ends(nnx.Module):
    """What stands around the blocks: the embedding below; the last norm and the head above.

    head_shape: `(vocab_size,)` for logits, `()` for a scalar, None to read logits with the embedding.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, head_shape: tuple[int, ...] | None, head_std: float):
        self.compute_dtype, width = config.compute_dtype, config.d_model
        self.embed = _weight(rngs, (config.vocab_size, width), width**-0.5, ("vocab", "embed"))
        self.final_norm = Norm(config)
        axes = ("embed", "vocab")[: 1 + len(head_shape or ())]
        self.head = None if head_shape is None else _weight(rngs, (width, *head_shape), head_std, axes)

    def enter(self, tokens: jax.Array) -> jax.Array:
        # An id outside the vocabulary becomes NaN: an index would be clamped, or wrapped, in silence.
        table = constrain(self.embed[...], "vocab", None, what="the embedding")
        tokens = jnp.where(tokens >= 0, tokens, table.shape[0])
        return jnp.take(table, tokens, axis=0, mode="fill").astype(self.compute_dtype)

    def leave(self, x: jax.Array) -> jax.Array:
        head = self.embed[...].T if self.head is None else self.head[...]
        return jnp.tensordot(self.final_norm(x), head.astype(x.dtype), 1, preferred_element_type=jnp.float32)


def make_language_model(config: TransformerConfig) -> Model:
    """A language model: `apply` returns logits `[B, S, V]` float32, those at position i speaking of token i + 1."""
    head_shape = None if config.tie_embeddings else (config.vocab_size,)
    return _make_model(config, head_shape, config.d_model**-0.5)


def make_scalar_model(config: TransformerConfig, *, head_std: float = 0.0) -> Model:
    """A scalar model: `apply` returns `[B, S]` float32 from a linear head without bias.

    head_std: of the head's initial weights. 0 starts value heads at 0 (lm-human-preferences), which also suits reward
    and cost heads on a trained trunk; that code draws reward heads with `(d_model + 1) ** -0.5`.
    """
    return _make_model(config, (), head_std)


def _make_model(config: TransformerConfig, head_shape: tuple[int, ...] | None, head_std: float) -> Model:
    make_block = lambda key: Block(config, nnx.Rngs(key))
    make_ends = lambda key: Ends(config, nnx.Rngs(key), head_shape, head_std)
    block_def, block_state = nnx.split(nnx.eval_shape(make_block, jax.random.key(0)))
    ends_def, ends_state = nnx.split(nnx.eval_shape(make_ends, jax.random.key(0)))

    @jax.jit
    def init(key: jax.Array) -> Params:
        ends_key, blocks_key = jax.random.split(key)
        draw = lambda make, key: nnx.to_pure_dict(nnx.split(make(key))[1])
        blocks = jax.vmap(lambda key: draw(make_block, key))(jax.random.split(blocks_key, config.num_layers))
        return draw(make_ends, ends_key) | {"blocks": blocks}

    shapes = jax.eval_shape(init, jax.random.key(0))

    def logical_axes() -> Any:
        axes = lambda state, *lead: nnx.to_pure_dict(
            jax.tree.map(lambda p: (*lead, *p.get_metadata("axes")), state, is_leaf=lambda p: isinstance(p, nnx.Param))
        )
        return axes(ends_state) | {"blocks": axes(block_state, "layers")}

    def init_cache(batch_size: int, length: int) -> Cache:
        lead = (config.num_layers,) if config.scans else ()
        shape = (*lead, batch_size, config.kv_heads, length, config.head_size)
        axes = (*[None] * len(lead), "batch", "kv_heads", None, None)
        zeros = lambda: constrain(jnp.zeros(shape, config.compute_dtype), *axes, what="the cache")
        pair = lambda: (zeros(), zeros())
        return Cache(
            layers=pair() if config.scans else [pair() for _ in range(config.num_layers)],
            mask=jnp.zeros((batch_size, length), bool),
            length=jnp.zeros((), jnp.int32),
        )

    def apply(params: Params, tokens, mask, *, cache: Cache | None = None, num_outputs: int | None = None):
        check_inputs(tokens, mask, cache, num_outputs)
        _check_params(params, shapes)
        num_tokens = tokens.shape[1]
        if cache is None:
            start, seen, keep = 0, 0, mask
            layers = None if config.scans else [None] * config.num_layers
        else:
            start, seen, layers = cache.length, jnp.sum(cache.mask, axis=1, keepdims=True), cache.layers
            keep = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
        rotation = _rotation(config, seen + jnp.cumsum(mask, axis=1) - mask, keep.shape[1])
        causal = jnp.arange(keep.shape[1]) <= start + jnp.arange(num_tokens)[:, None]
        visible = (causal & keep[:, None])[:, None, None]

        def block(x, layer):
            block_params, cached = layer
            x, cached = nnx.merge(block_def, block_params)(x, rotation, visible, start, cached)
            return constrain(x, *_RESIDUAL, what="activations"), cached

        if config.remat:
            block = jax.checkpoint(block, prevent_cse=not config.scans)
        ends = nnx.merge(ends_def, {name: value for name, value in params.items() if name != "blocks"})
        x = constrain(ends.enter(jnp.where(mask, tokens, 0)), *_RESIDUAL, what="activations")
        if config.scans:
            x, layers = jax.lax.scan(block, x, (params["blocks"], layers))
        else:
            written = []
            for i, cached in enumerate(layers):
                x, pair = block(x, (jax.tree.map(lambda p, i=i: p[i], params["blocks"]), cached))
                written.append(pair)
            layers = written
        outputs = ends.leave(x if num_outputs is None else x[:, -num_outputs:])
        return outputs, None if cache is None else Cache(layers=layers, mask=keep, length=start + num_tokens)

    return Model(config=config, init=init, apply=apply, init_cache=init_cache, logical_axes=logical_axes)


def _rotation(config: TransformerConfig, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles at `positions [B, T] < length`: two `[B, T, 1, 1, head_dim / 2]` float32.

    Read from a constant table: XLA would otherwise fuse, and so repeat, the sines in every use of them.
    """
    half = config.head_size // 2
    angles = np.outer(np.arange(length), config.rope_theta ** (-np.arange(half) / half))
    read = lambda table: jnp.asarray(table, jnp.float32)[positions][:, :, None, None]
    return read(np.cos(angles)), read(np.sin(angles))


def check_inputs(tokens, mask, cache: Cache | None, num_outputs: int | None) -> None:
    """Raise unless these are arguments of `Model.apply`."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers [B, S], got {tokens.dtype} {tokens.shape}")
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool (True = kept), got {mask.dtype}")
    if mask.shape != tokens.shape:
        raise ValueError(f"mask {mask.shape} and tokens {tokens.shape} must have one shape")
    if num_outputs is not None and not 0 < num_outputs <= tokens.shape[1]:
        raise ValueError(f"num_outputs={num_outputs} must lie in 1..{tokens.shape[1]}, the number of tokens")
    if cache is not None:
        rows, slots = cache.mask.shape
        used = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
        if rows != tokens.shape[0]:
            raise ValueError(f"the cache holds {rows} rows, tokens have {tokens.shape[0]}")
        if used + tokens.shape[1] > slots:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit a cache of {slots} slots of which {used} are used")


def _check_params(params: Params, wanted: Params) -> None:
    """Raise for parameters of another network: an index beyond their layers would be clamped in silence."""
    whole = jax.tree.map(lambda x: getattr(x, "weight", x), params, is_leaf=lambda x: isinstance(x, LowRank))
    shape = lambda tree: {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    have, want = shape(whole), shape(wanted)
    for name in have | want:
        if have.get(name) != want.get(name):
            raise ValueError(f"params{name} is {have.get(name, 'absent')} where this network has "
                             f"{want.get(name, 'none')}: give params and model one TransformerConfig")  # fmt: skip


def score(model: Model) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """The pure function `(params, tokens, mask) -> scores [B]` of a scalar model, read at the last kept token.

    That token is the EOS of a finished response and the last token of an unfinished one.
    """

    def scores(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        outputs, _ = model.apply(params, tokens, mask)
        if outputs.ndim != 2:
            raise TypeError(f"score needs a scalar model, with outputs [B, S]; this one gives {outputs.shape}")
        return at_last(outputs, mask)

    return scores


def scalar_params_from(params: Params, scalar_model: Model, key: jax.Array) -> Params:
    """Parameters of `scalar_model` with the trunk of another model's `params` (a warm start) and a fresh head.

    The trunk is copied, so that donating one model's parameters cannot delete the other's.
    """
    trunk = {name: value for name, value in params.items() if name != "head"}
    head = jax.jit(lambda key: scalar_model.init(key)["head"])(key)
    warm = jax.tree.map(jnp.copy, trunk) | {"head": head}

    _check_params(warm, jax.eval_shape(scalar_model.init, key))
    return warm
