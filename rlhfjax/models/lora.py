"""LoRA: networks that learn a low-rank change of frozen weights, which all of them may share.

    y = x W + (alpha / rank) (x A) B        A [d_in, rank] random, B [rank, d_out] zero: at first nothing has changed

`adapt(model, config)` is the learner's side: a Model whose parameters are the As and Bs alone (and a scalar model's
head, which is trained in full). `bind(model, frozen)` puts frozen weights beneath it, inside the step that is given
them. So a policy, its reward and cost models and its critics hold one copy of a language model together; the reference
policy *is* that copy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.models.transformer import LowRank, Model, TransformerConfig
from rlhfjax.types import Params

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices of every block change, and how much they may."""

    rank: int = 0
    """Of the change of each matrix; 0: no LoRA, the network is trained in full."""
    alpha: float = 32.0
    """The change is scaled by alpha / rank, so that the learning rate need not follow the rank."""
    targets: tuple[str, ...] = TARGETS
    """Names of the matrices; one that a network lacks (the gate of a plain MLP) is passed over."""

    def __post_init__(self):
        if self.rank < 0 or not 0 < self.alpha < float("inf"):
            raise ValueError(f"rank must not be negative and alpha positive, got {self.rank} and {self.alpha}")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {', '.join(self.targets) or 'none'}")


IN_FULL = LoraConfig()


def adapt(model: Model, config: LoraConfig) -> Model:
    """`model` as a learner of low-rank changes: its parameters are

        {"blocks": {"attention": {"query": {"a" [L, d_in, rank], "b" [L, rank, d_out]}, ...}, ...}, "head" [d]}

    and it reads tokens only once `bind` has put frozen weights beneath. At rank 0 it is `model` itself.
    Source: Hu et al. (2106.09685).
    """
    if config.rank == 0:
        return model
    if not isinstance(model.config, TransformerConfig):
        raise TypeError("only the library's own transformer can be adapted: train a wrapped network in full")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    is_scalar = jnp.ndim(shapes.get("head", 0)) == 1 and "head" in shapes

    def blocks(make: Callable[[str, Any], Any], tree: Params) -> Params:
        """`make(name, leaf)` of every target, under its path."""
        below = {name: blocks(make, sub) if isinstance(sub, dict) else make(name, sub)
                 for name, sub in tree.items() if isinstance(sub, dict) or name in config.targets}  # fmt: skip
        return {name: sub for name, sub in below.items() if sub}

    def init(key: jax.Array) -> Params:
        head_key, key = jax.random.split(key)
        count = iter(range(10_000))

        def pair(name, weight):
            layers, width, out = weight.shape
            a = jax.random.normal(jax.random.fold_in(key, next(count)), (layers, width, config.rank))
            return {"a": a * width**-0.5, "b": jnp.zeros((layers, config.rank, out))}

        head = {"head": model.init(head_key)["head"]} if is_scalar else {}
        return {"blocks": blocks(pair, shapes["blocks"])} | head

    def logical_axes() -> Any:
        axes = model.logical_axes()
        pair = lambda name, a: {"a": (*a[:-1], None), "b": (a[0], None, a[-1])}
        return {"blocks": blocks(pair, axes["blocks"])} | ({"head": axes["head"]} if is_scalar else {})

    def apply(*args, **kwargs):
        raise TypeError("these parameters are changes of frozen ones: bind(model, frozen) first")

    return dataclasses.replace(model, init=jax.jit(init), logical_axes=logical_axes, apply=apply, base=model,
                               scale=config.alpha / config.rank)  # fmt: skip


def bind(model: Model, frozen: Params) -> Model:
    """`model` with `frozen` weights beneath it: those of a language model will do for a scalar one. A model that was
    not adapted has nothing beneath it, and comes back as it is."""
    if model.base is None:
        return model
    apply = lambda params, *args, **kwargs: model.base.apply(combine(model, frozen, params), *args, **kwargs)
    return dataclasses.replace(model, apply=apply, base=None)


def combine(model: Model, frozen: Params, params: Params) -> Params:
    """What `model.base` reads: the frozen weights, each target with its change beside it. Copies no weight.

    Of logical axes it makes those of that tree.
    """
    if model.base is None:
        return params

    def beside(weights: Params, changes: Params) -> Params:
        if not isinstance(changes, dict):
            return changes  # a head
        if set(changes) == {"a", "b"}:
            return LowRank(weights, changes["a"], changes["b"], model.scale)
        return weights | {name: beside(weights.get(name), change) for name, change in changes.items()}

    return beside(frozen, params)


def merge(model: Model, frozen: Params, params: Params) -> Params:
    """The weights that do the same in `model.base` without low rank: for export, or to start anew from."""
    is_pair = lambda x: isinstance(x, LowRank)
    whole = lambda x: (x.weight + x.scale * (x.a @ x.b)).astype(x.weight.dtype) if is_pair(x) else x
    return jax.tree.map(whole, combine(model, frozen, params), is_leaf=is_pair)
