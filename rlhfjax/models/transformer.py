"""A decoder transformer: `flax.nnx` modules inside, a pure face (`Model`) outside.

Everything that learns here is one of two models on the same trunk: a language model (logits `[B, S, V]`) or a scalar
model (`[B, S]`: reward, cost and value heads). Parameters are a plain nested dict

    {"embed", "blocks": {"attention_norm", "attention", "mlp_norm", "mlp"}, "final_norm", "head"}

(with norms behind attention and MLP, `attention_post_norm` and `mlp_post_norm`, and a table of `positions`, where the
config asks for them)

whose block arrays are stacked on a leading layer axis, so that a deep stack is one `jax.lax.scan` (compile time does
not grow with depth) and a shallow one is unrolled (faster on a CPU, above all when decoding).

**Padding** may stand anywhere: a mask says which tokens are kept. Padded tokens are never attended to, their ids are
never read, and positions count kept tokens only, so left padding shifts nothing, be they rotary, learned or what a
sliding window counts. Outputs at padded positions are finite and mean nothing.

**Precision**: `init` draws float32 parameters; bfloat16 ones, as checkpoints have them, do as well. With
`compute_dtype="bfloat16"` matrix products and activations are bfloat16, while norms' statistics, rotary angles, softmax
and outputs stay float32.
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
from rlhfjax.types import Params, added, pytree

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu,
                "gelu_exact": functools.partial(jax.nn.gelu, approximate=False)}  # fmt: skip
_DEEP = 8  # layers above which one scanned block beats an unrolled stack: compile time against decode speed
_RESIDUAL = ("batch", None, None)  # the residual stream [B, S, d]: split by rows, whole otherwise
_HIDDEN = -1e30  # a score no softmax sees; finite, so that a row that sees nothing gives no NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a pre-norm decoder. The defaults are Llama's choices.

    num_kv_heads: key/value heads shared by groups of query heads (GQA); None: as many as `num_heads`.
    head_dim: None: `d_model / num_heads`.
    norm: "rms" (scale), "rms_plus_one" (Gemma's: its scale is 1 + the parameter, which float32 cannot store as a sum
        and give back bit for bit) or "layer" (scale and bias).
    mlp: "gated", `down(act(gate(x)) * up(x))`, or "plain", `down(act(up(x)))`.
    activation: "gelu" is the tanh approximation, "gelu_exact" the error function.
    tie_embeddings: a language model's logits are read with the embedding itself.
    scan_layers: None scans stacks deeper than 8 layers and unrolls the others.
    remat: recompute each block in the backward pass instead of storing its activations.
    biases: which linear maps have one: "qkv", "out" (of attention), "mlp".
    qk_norm: queries and keys are normed per head, before rotary positions.
    post_norms: what attention and MLP add to the residual stream is normed too.
    parallel: the MLP reads the stream that attention reads, not what attention has added to it.
    embed_scale: embeddings are multiplied by sqrt(d_model).
    num_positions: rows of a learned table of positions, used instead of rotary ones; None: rotary. A position beyond
        the table gives NaN.
    rotary_dim: how many of a head's first dimensions are rotated; None: all.
    rope_factor: rotary frequencies are divided by it (linear scaling), those of `rope_band` less or not at all.
    rope_band: None, or Llama 3.1's (low, high, length): frequencies that turn more than `high` times in `length`
        positions are kept, fewer than `low` times are divided, between the two they are blended.
    window: a token sees this many tokens, itself included; None: all. full_layers: layers (from 0) that see all still.
    window_rope_theta: of the layers with a window, unscaled; None: rotary positions as in the others.
    query_scalar: attention scores are divided by its square root; None: head_dim.
    attention_softcap, logit_softcap: scores, and a language model's logits, become `cap * tanh(x / cap)`.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    mlp: Literal["gated", "plain"] = "gated"
    activation: Literal["silu", "gelu", "relu", "gelu_exact"] = "silu"
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    scan_layers: bool | None = None
    remat: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    biases: tuple[Literal["qkv", "out", "mlp"], ...] = added(())
    qk_norm: bool = added(False)
    post_norms: bool = added(False)
    parallel: bool = added(False)
    embed_scale: bool = added(False)
    num_positions: int | None = added(None)
    rotary_dim: int | None = added(None)
    rope_factor: float = added(1.0)
    rope_band: tuple[float, float, int] | None = added(None)
    window: int | None = added(None)
    full_layers: tuple[int, ...] = added(())
    window_rope_theta: float | None = added(None)
    query_scalar: float | None = added(None)
    attention_softcap: float | None = added(None)
    logit_softcap: float | None = added(None)

    def __post_init__(self):
        for name in ("biases", "full_layers", "rope_band"):  # JSON has lists, and a config must be hashable
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "kv_heads", "rope_theta", "norm_eps",
                     "num_positions", "rotary_size", "rope_factor", "window", "window_rope_theta", "query_scalar",
                     "attention_softcap", "logit_softcap"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, choices in (
            ("norm", ("rms", "rms_plus_one", "layer")),
            ("mlp", ("gated", "plain")),
            ("activation", tuple(_ACTIVATIONS)),
            ("compute_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if unknown := set(self.biases) - {"qkv", "out", "mlp"}:
            raise ValueError(f"biases must be some of qkv, out, mlp, got {sorted(unknown)}")
        if beyond := set(self.full_layers) - set(range(self.num_layers)):
            raise ValueError(f"full_layers must lie in 0..{self.num_layers - 1}, got {sorted(beyond)}")
        if self.rope_band is not None and not 0 < self.rope_band[0] < self.rope_band[1] < float("inf"):
            raise ValueError(f"rope_band must be (low, high, length) with 0 < low < high, got {self.rope_band}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide d_model={self.d_model}, or set head_dim")
        if self.num_positions is None and (self.head_size < 2 or self.head_size % 2):
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_size}")
        if self.num_positions is None and (self.rotary_size > self.head_size or self.rotary_size % 2):
            raise ValueError(f"rotary_dim must be even and at most head_dim={self.head_size}, got {self.rotary_dim}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        return self.head_size if self.rotary_dim is None else self.rotary_dim

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether it has the window."""
        return tuple(self.window is not None and i not in self.full_layers for i in range(self.num_layers))

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


def _bias(size: int, axis: str, wanted: bool) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(size), axes=(axis,)) if wanted else None


def _linear(x: jax.Array, weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
    """`x [..., d] @ weight [d, f] + bias [f]` in x's dtype; as one flat product, whose gradients need no transposes on
    a CPU."""
    flat, matrix = x.reshape(-1, x.shape[-1]), weight.get_value()
    times = lambda x, matrix: x @ matrix.astype(x.dtype)
    if isinstance(matrix, LowRank):
        flat = times(flat, matrix.weight) + matrix.scale * times(times(flat, matrix.a), matrix.b)
    else:
        flat = times(flat, matrix)
    if bias is not None:
        flat = flat + constrain(bias[...], None).astype(x.dtype)
    return flat.reshape(*x.shape[:-1], -1)


class Norm(nnx.Module):
    """RMSNorm, `x / rms(x) * scale`, or LayerNorm, `(x - mean) / std * scale + bias`; statistics in float32."""

    def __init__(self, config: TransformerConfig, size: int, axis: str = "embed"):
        self.eps, self.plus_one = config.norm_eps, config.norm == "rms_plus_one"
        self.scale = nnx.Param(jnp.zeros(size) if self.plus_one else jnp.ones(size), axes=(axis,))
        self.bias = _bias(size, axis, config.norm == "layer")

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, -1, keepdims=True)
        # Gathered first: split along d they would split the activations, whose rows are split already.
        scale = constrain(self.scale[...], None)
        scale = 1.0 + scale.astype(jnp.float32) if self.plus_one else scale
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps) * scale
        if self.bias is not None:
            y = y + constrain(self.bias[...], None)
        return y.astype(x.dtype)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotary positions on the first R of the last axis of `x [B, T, ..., D]`, pairing i with i + R/2 as Llama's public
    weights do; R is twice the width of the angles. None: as it is."""
    if rotation is None:
        return x
    cos, sin = (r.astype(x.dtype) for r in rotation)
    size = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :size], 2, axis=-1)
    rest = [x[..., size:]] if size < x.shape[-1] else []
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], -1)


def _softcap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


class Attention(nnx.Module):
    """Causal grouped-query attention; query head i reads key head i // (num_heads / num_kv_heads)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.kv_heads, self.head_size = config.kv_heads, config.head_size
        self.query_scalar, self.softcap = config.query_scalar or config.head_size, config.attention_softcap
        width, all_q, all_kv = config.d_model, config.num_heads * config.head_size, config.kv_heads * config.head_size
        self.query = _weight(rngs, (width, all_q), width**-0.5, ("embed", "heads"))
        self.key = _weight(rngs, (width, all_kv), width**-0.5, ("embed", "kv_heads"))
        self.value = _weight(rngs, (width, all_kv), width**-0.5, ("embed", "kv_heads"))
        self.out = _weight(rngs, (all_q, width), (all_q * 2 * config.num_layers) ** -0.5, ("heads", "embed"))
        self.query_bias = _bias(all_q, "heads", "qkv" in config.biases)
        self.key_bias = _bias(all_kv, "kv_heads", "qkv" in config.biases)
        self.value_bias = _bias(all_kv, "kv_heads", "qkv" in config.biases)
        self.out_bias = _bias(width, "embed", "out" in config.biases)
        norm = lambda: Norm(config, config.head_size, "head_dim") if config.qk_norm else None
        self.query_norm, self.key_norm = norm(), norm()

    def __call__(self, x, rotation, visible, start, cached):
        """`x [B, T, d]`; `visible [B, 1, 1, T, S]` bool; `cached` (keys, values) to write at slot `start`, or None."""
        b, t, _ = x.shape
        queries = _linear(x, self.query, self.query_bias).reshape(b, t, self.kv_heads, -1, self.head_size)
        keys = _linear(x, self.key, self.key_bias).reshape(b, t, self.kv_heads, 1, self.head_size)
        if self.query_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = _rotate(queries, rotation), _rotate(keys, rotation)[..., 0, :]
        values = _linear(x, self.value, self.value_bias).reshape(b, t, self.kv_heads, self.head_size)
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # [B, H, S, D]: the layout that decodes fastest
        if cached is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
            keys, values = write(cached[0], keys), write(cached[1], values)
        scores = jnp.einsum("bthgd,bhsd->bhgts", queries, keys, preferred_element_type=jnp.float32)
        scores = _softcap(scores * self.query_scalar**-0.5, self.softcap)
        weights = jax.nn.softmax(jnp.where(visible, scores, _HIDDEN), axis=-1)
        mixed = jnp.einsum("bhgts,bhsd->bthgd", weights.astype(x.dtype), values).reshape(b, t, -1)
        return _linear(mixed, self.out, self.out_bias), None if cached is None else (keys, values)


class Mlp(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or without the gate."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        d, f, gated, biased = config.d_model, config.d_ff, config.mlp == "gated", "mlp" in config.biases
        self.activation = config.activation
        self.gate = _weight(rngs, (d, f), d**-0.5, ("embed", "mlp")) if gated else None
        self.up = _weight(rngs, (d, f), d**-0.5, ("embed", "mlp"))
        self.down = _weight(rngs, (f, d), (f * 2 * config.num_layers) ** -0.5, ("mlp", "embed"))
        self.gate_bias, self.up_bias = _bias(f, "mlp", biased and gated), _bias(f, "mlp", biased)
        self.down_bias = _bias(d, "embed", biased)

    def __call__(self, x: jax.Array) -> jax.Array:
        act, up = _ACTIVATIONS[self.activation], _linear(x, self.up, self.up_bias)
        hidden = act(up) if self.gate is None else act(_linear(x, self.gate, self.gate_bias)) * up
        return _linear(hidden, self.down, self.down_bias)


class Block(nnx.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        norm = lambda wanted=True: Norm(config, config.d_model) if wanted else None
        self.attention_norm, self.attention = norm(), Attention(config, rngs)
        self.mlp_norm, self.mlp = norm(), Mlp(config, rngs)
        self.attention_post_norm, self.mlp_post_norm = norm(config.post_norms), norm(config.post_norms)
        self.parallel = config.parallel

    def __call__(self, x, rotation, visible, start, cached):
        mixed, cached = self.attention(self.attention_norm(x), rotation, visible, start, cached)
        mixed = mixed if self.attention_post_norm is None else self.attention_post_norm(mixed)
        after = x + mixed
        hidden = self.mlp(self.mlp_norm(x if self.parallel else after))
        return after + (hidden if self.mlp_post_norm is None else self.mlp_post_norm(hidden)), cached


class Ends(nnx.Module):
    """What stands around the blocks: the embedding below; the last norm and the head above.

    head_shape: `(vocab_size,)` for logits, `()` for a scalar, None to read logits with the embedding.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, head_shape: tuple[int, ...] | None, head_std: float):
        self.compute_dtype, width = config.compute_dtype, config.d_model
        self.embed_scale = width**0.5 if config.embed_scale else None
        self.softcap = None if head_shape == () else config.logit_softcap
        self.embed = _weight(rngs, (config.vocab_size, width), width**-0.5, ("vocab", "embed"))
        self.final_norm = Norm(config, width)
        axes = ("embed", "vocab")[: 1 + len(head_shape or ())]
        self.head = None if head_shape is None else _weight(rngs, (width, *head_shape), head_std, axes)
        rows = config.num_positions
        self.positions = None if rows is None else _weight(rngs, (rows, width), width**-0.5, ("positions", "embed"))

    def enter(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        # An id outside the vocabulary becomes NaN: an index would be clamped, or wrapped, in silence.
        table = constrain(self.embed[...], "vocab", None, what="the embedding")
        tokens = jnp.where(tokens >= 0, tokens, table.shape[0])
        x = jnp.take(table, tokens, axis=0, mode="fill").astype(self.compute_dtype)
        if self.embed_scale is not None:
            x = x * jnp.asarray(self.embed_scale, x.dtype)
        if self.positions is not None:
            table = constrain(self.positions[...], "positions", None, what="the table of positions")
            x = x + jnp.take(table, positions, axis=0, mode="fill").astype(x.dtype)
        return x

    def leave(self, x: jax.Array) -> jax.Array:
        head = self.embed[...].T if self.head is None else self.head[...]
        outputs = jnp.tensordot(self.final_norm(x), head.astype(x.dtype), 1, preferred_element_type=jnp.float32)
        return _softcap(outputs, self.softcap)


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
        check_params(params, shapes)
        num_tokens = tokens.shape[1]
        if cache is None:
            start, seen, keep = 0, 0, mask
            layers = None if config.scans else [None] * config.num_layers
        else:
            start, seen, layers = cache.length, jnp.sum(cache.mask, axis=1, keepdims=True), cache.layers
            keep = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
        positions, windowed = seen + jnp.cumsum(mask, axis=1) - mask, config.windowed
        views = {kind: _view(config, positions, keep, start, kind) for kind in set(windowed)}

        def block(x, block_params, cached, view):
            x, cached = nnx.merge(block_def, block_params)(x, *view, start, cached)
            return constrain(x, *_RESIDUAL, what="activations"), cached

        if config.remat:
            block = jax.checkpoint(block, prevent_cse=not config.scans)
        ends = nnx.merge(ends_def, {name: value for name, value in params.items() if name != "blocks"})
        x = ends.enter(jnp.where(mask, tokens, 0), jnp.where(mask, positions, 0))
        x = constrain(x, *_RESIDUAL, what="activations")
        if config.scans:
            select = lambda has: jax.tree.map(lambda *ab: jnp.where(has, *ab), views[True], views[False])
            view_of = select if len(views) == 2 else lambda has: views[windowed[0]]
            layered = (params["blocks"], layers, jnp.array(windowed))
            x, layers = jax.lax.scan(lambda x, layer: block(x, *layer[:2], view_of(layer[2])), x, layered)
        else:
            written = []
            for i, cached in enumerate(layers):
                here = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
                x, pair = block(x, here, cached, views[windowed[i]])
                written.append(pair)
            layers = written
        outputs = ends.leave(x if num_outputs is None else x[:, -num_outputs:])
        return outputs, None if cache is None else Cache(layers=layers, mask=keep, length=start + num_tokens)

    return Model(config=config, init=init, apply=apply, init_cache=init_cache, logical_axes=logical_axes)


def _view(config: TransformerConfig, positions, keep, start, windowed: bool) -> tuple[Any, jax.Array]:
    """How a layer, with the window or without, sees: rotary angles, and `visible [B, 1, 1, T, S]` bool.

    positions `[B, T]` of the tokens read now, which stand in slots `start, start + 1, ...` of `keep [B, S]`.
    """
    slots = jnp.arange(keep.shape[1])
    visible = (slots <= start + jnp.arange(positions.shape[1])[:, None]) & keep[:, None]
    if windowed:
        visible &= positions[:, :, None] - (jnp.cumsum(keep, axis=1) - keep)[:, None] < config.window
    return _rotation(config, positions, keep.shape[1], windowed), visible[:, None, None]


def _rotation(config: TransformerConfig, positions: jax.Array, length: int, windowed: bool):
    """cos and sin of the rotary angles at `positions [B, T] < length`: two `[B, T, 1, 1, rotary_dim / 2]` float32, or
    None where positions are learned.

    Read from a constant table: XLA would otherwise fuse, and so repeat, the sines in every use of them.
    """
    if config.num_positions is not None:
        return None
    half = config.rotary_size // 2
    if windowed and config.window_rope_theta is not None:
        frequencies = config.window_rope_theta ** (-np.arange(half) / half)
    else:
        frequencies = config.rope_theta ** (-np.arange(half) / half)
        kept = 0.0
        if config.rope_band is not None:
            low, high, span = config.rope_band
            kept = np.clip((span * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / config.rope_factor)
    angles = np.outer(np.arange(length), frequencies)
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


def check_params(params: Params, wanted: Params) -> None:
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

    check_params(warm, jax.eval_shape(scalar_model.init, key))
    return warm
