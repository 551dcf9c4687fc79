"""Supervised fitting: the optimiser, the batch order and the one step that SFT and preference models share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax.models.lora import bind
from rlhfjax.models.transformer import Model
from rlhfjax.parallel.mesh import constrain_rows
from rlhfjax.types import Params, TrainState

LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (params, batch, *frozen) -> (loss, metrics)


def adamw(
    learning_rate: float,
    num_steps: int | None = None,
    *,
    warmup: float = 0.03,
    final: float = 0.1,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping; betas (0.9, 0.95) as in Safe RLHF's public code.

    With `num_steps` the rate warms up linearly over `warmup * num_steps` and falls by cosine to `final` of the peak;
    without it the rate is constant. Weight decay spares vectors and whatever is named scale or bias.
    """
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if num_steps is None:
        rate: Any = learning_rate
    else:
        warm = max(1, round(warmup * num_steps))
        rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm, max(num_steps, warm + 1),
                                                  final * learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=_matrices)
    )


def _matrices(params: Params) -> Params:
    """True where weights decay. Norms go by name, because stacked over layers their vectors have two axes too."""
    is_norm = lambda path: jax.tree_util.keystr(path[-1:], simple=True) in ("scale", "bias")
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and not is_norm(path), params)


def batch_order(seed: int, first: int, count: int, num_rows: int, batch_size: int) -> np.ndarray:
    """Rows of batches `first .. first + count - 1`: `[count, batch_size]` int32.

    Every epoch is a fresh permutation and drops its incomplete last batch. A pure function of (seed, step), so that a
    resumed run sees the same batches.
    """
    if not 0 < batch_size <= num_rows:
        raise ValueError(f"{num_rows} rows cannot fill a batch of {batch_size}: lower the batch size or add data")
    per_epoch = num_rows // batch_size
    epochs = {step // per_epoch for step in range(first, first + count)}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in epochs}
    rows = [
        orders[step // per_epoch][(step % per_epoch) * batch_size :][:batch_size]
        for step in range(first, first + count)
    ]
    return np.stack(rows).astype(np.int32)


def take(data: Any, rows: np.ndarray) -> Any:
    """Those rows of a pytree of host arrays: `[N, ...] -> [*rows.shape, ...]`."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], data)


def with_frozen(make_loss: Callable[[Model], LossFn], model: Model) -> LossFn:
    """`loss_fn(params, batch, frozen)` of an adapted network, from a factory of losses such as `make_reward_loss`."""
    return lambda params, batch, frozen: make_loss(bind(model, frozen))(params, batch)


def make_fit_step(loss_fn: LossFn, optimizer: optax.GradientTransformation):
    """`fit_step(state, batches, *frozen) -> (state, metrics)`: one optimiser step per batch, to be jitted
    (`parallel.jit_step`).

    `batches` is a pytree of arrays `[K, B, ...]`; frozen: what `loss_fn` takes besides (`with_frozen`). Metrics are
    means over the K steps, with the loss under "loss"; "skipped" counts the steps that were left out because their loss
    or gradient was not finite.
    """

    def update(state: TrainState, batch, *frozen) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = constrain_rows(batch)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, *frozen)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **metrics}
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
        return state.apply_gradients(grads, optimizer, where=finite), metrics | {"skipped": ~finite}

    def fit_step(state: TrainState, batches, *frozen) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = jax.lax.scan(lambda state, batch: update(state, batch, *frozen), state, batches)
        skipped = jnp.sum(metrics.pop("skipped"))
        return state, jax.tree.map(jnp.mean, metrics) | {"skipped": skipped}

    return fit_step
