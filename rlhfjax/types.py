"""The nouns that travel between stages, and the one index convention.

**Index convention.** `B` rows, `P` prompt slots, `T` response slots. Prompts are left padded, responses right padded.

* `tokens[b, t]` is a *response* token; prompts are kept apart.
* `logprobs[b, t] = log pi(tokens[b, t] | prompt[b], tokens[b, :t])`.
* `values[b, t]` is the value of the state *before* `tokens[b, t]` is emitted.
* `mask[b, t]` is True for every token that counts, the EOS included, and False behind it.
* a response's score belongs to its EOS position; an unfinished response is scored at its last token.

A network reads `[prompt, response]` (`P + T` positions) and its output at position `i` speaks of token `i + 1`.
`before_response_tokens` is the only place in the library where that shift is written.

Masks are bool and named for what they keep.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

Params = Any  # a plain nested dict of arrays


def pytree_with(static: tuple[str, ...] = ()):
    """A frozen dataclass registered as a pytree; `static` fields are compile-time constants."""

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        fields = [f.name for f in dataclasses.fields(cls)]
        return jax.tree_util.register_dataclass(
            cls, data_fields=[f for f in fields if f not in static], meta_fields=list(static)
        )

    return wrap


pytree = pytree_with()


def added(default: Any) -> Any:
    """A config field that came after results were stored: at its default it is no part of a config's fingerprint.

    The hash that names a stored result feeds every field of its config, so a plain new one would orphan them all,
    although at its default nothing computes differently.
    """
    return dataclasses.field(default=default, metadata={"added": True})


def telling_fields(config: Any) -> list[dataclasses.Field]:
    """The fields of a dataclass that its fingerprint is made of: all but those `added` ones that hold their default."""
    silent = lambda f: f.metadata.get("added", False) and getattr(config, f.name) == f.default
    return [field for field in dataclasses.fields(config) if not silent(field)]


@pytree_with(static=("truncated",))
class Rollout:
    """Prompts and the responses that a policy sampled for them.

    prompts `[B, P]` int32, left padded; prompt_mask `[B, P]` bool.
    tokens `[B, T]` int32, right padded; mask `[B, T]` bool, True up to and including EOS.
    logprobs `[B, T]` float32: the sampler's own log-probabilities, at its temperature; 0 where masked out.
    finished `[B]` bool: the response ended with EOS inside the budget.
    truncated: the sampling distribution was cut by top-k / top-p, so `logprobs` are not those of the distribution
    that was sampled: such a rollout is for evaluation and training refuses it.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    finished: jax.Array
    truncated: bool = False


@pytree
class Demonstrations:
    """Responses to imitate: prompts, prompt_mask `[N, P]` left padded; tokens, mask `[N, T]` right padded, EOS kept."""

    prompts: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array

    def __len__(self) -> int:
        return self.tokens.shape[0]


@pytree
class PreferenceBatch:
    """Pairs of responses to one prompt and what a rater said of them. Labels only: never gold.

    prompts `[N, P]`, prompt_mask `[N, P]`: left padded.
    responses `[N, 2, T]`, responses_mask `[N, 2, T]`: right padded, EOS included.
    prefs `[N]` float32: P(the first has *more of the quality in question*): 1, 0, or a soft label. For helpfulness
    "more" is more helpful; for harm it is **more harmful** (Safe RLHF's convention: the winner of a cost comparison
    is the worse answer).
    signs `[N, 2]` float32 or None: absolute labels per response, +1 = harmful, -1 = harmless.
    margins `[N]` float32 or None: by how much the one with more of it should win, in units of the score, >= 0.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    responses: jax.Array
    responses_mask: jax.Array
    prefs: jax.Array
    signs: jax.Array | None = None
    margins: jax.Array | None = None

    def __len__(self) -> int:
        return self.prefs.shape[0]


@pytree
class TrainState:
    """What a learner carries from step to step: no functions inside, so nothing can retrace.

    step `[]` int32; params a plain nested dict; opt_state the optax state of those params.
    """

    step: jax.Array
    params: Params
    opt_state: Any

    @classmethod
    def create(cls, params: Params, optimizer) -> "TrainState":
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    def apply_gradients(self, grads: Params, optimizer, *, where: jax.Array | bool = True) -> "TrainState":
        """One optimiser step; nothing at all changes unless `where` (bool `[]`: loss and gradients are finite, say)."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), self.params, updates)
        new = TrainState(step=self.step + 1, params=params, opt_state=opt_state)
        return jax.tree.map(lambda new, old: jnp.where(where, new, old), new, self)


def join(prompts, prompt_mask, tokens, mask) -> tuple[jax.Array, jax.Array]:
    """`[prompt, response]` as a network reads them: tokens `[..., P + T]` and their mask."""
    return jnp.concatenate([prompts, tokens], -1), jnp.concatenate([prompt_mask, mask], -1)


def sequences(rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """A rollout's `[prompt, response]` rows: tokens and mask `[B, P + T]`."""
    return join(rollout.prompts, rollout.prompt_mask, rollout.tokens, rollout.mask)


def before_response_tokens(outputs: jax.Array, num_tokens: int) -> jax.Array:
    """Network outputs of the states *before* each response token: `[B, S, ...] -> [B, T, ...]`.

    `outputs` are those of `[prompt, response]`, or only its last `S >= T + 1` positions. The output at position `i`
    predicts token `i + 1`, so the response tokens at the last `T` positions belong to outputs `-T-1 .. -2`.
    """
    chex.assert_scalar_positive(num_tokens)
    if outputs.shape[1] < num_tokens + 1:
        raise ValueError(
            f"{num_tokens} response tokens need the outputs of at least {num_tokens + 1} positions, "
            f"got {outputs.shape[1]}: keep the position just before the response"
        )
    return outputs[:, -num_tokens - 1 : -1]


def check_mask(name: str, mask, *, padded: str) -> None:
    """Raise if a host-side mask is not bool, keeps nothing in a row, or leaves out more than padding on that side.

    padded: "left" (prompts) or "right" (responses).
    """
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{name} must be bool (True = kept), got {mask.dtype}")
    empty = np.flatnonzero(~mask.any(-1))
    if empty.size:
        raise ValueError(f"{name} keeps no token in {empty.size} rows, the first being row {empty[0]}: drop those rows")
    ordered = mask[..., ::-1] if padded == "left" else mask
    holes = np.flatnonzero((ordered[..., 1:] > ordered[..., :-1]).any(-1))
    if holes.size:
        raise ValueError(f"{name} must be padded on the {padded}, and only there: row {holes[0]} is not")


def check_shapes(batch: Any, **shapes: tuple[int, ...]) -> None:
    """Raise unless these fields of `batch` have these shapes."""
    for name, shape in shapes.items():
        if np.shape(getattr(batch, name)) != shape:
            raise ValueError(f"{name} {np.shape(getattr(batch, name))} must have shape {shape} to fit the other fields")


def check_finite(name: str, values, where: str = "") -> None:
    """Raise if a host-side array has a NaN or an infinity, naming the first offending row."""
    values = np.asarray(values)
    bad = np.flatnonzero(~np.isfinite(values).reshape(values.shape[0] if values.ndim else 1, -1).all(-1))
    if bad.size:
        raise FloatingPointError(f"{name} is not finite in {bad.size} rows, the first being row {bad[0]}{where}")
