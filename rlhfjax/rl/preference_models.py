"""Reward and cost models: losses over `PreferenceBatch` for `make_fit_step`, and scoring."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import losses
from rlhfjax.masked import masked_mean
from rlhfjax.models.transformer import Model, score
from rlhfjax.types import Params, PreferenceBatch, check_mask, check_shapes, join, pytree, sequences


def check_pairs(batch: PreferenceBatch) -> None:
    """Raise for pairs that cannot be learned from: empty prompts or responses, prefs outside [0, 1], signs not +-1,
    margins below 0 or infinite."""
    num, num_tokens = len(batch.prompts), np.shape(batch.responses)[-1]
    check_shapes(batch, prompt_mask=np.shape(batch.prompts), responses=(num, 2, num_tokens),
                 responses_mask=(num, 2, num_tokens), prefs=(num,))  # fmt: skip
    check_mask("prompt_mask", batch.prompt_mask, padded="left")
    check_mask("responses_mask", batch.responses_mask, padded="right")
    checks = [("prefs", batch.prefs, (batch.prefs >= 0) & (batch.prefs <= 1), "lie in [0, 1]")]
    if batch.signs is not None:
        check_shapes(batch, signs=(num, 2))
        checks.append(("signs", batch.signs, abs(batch.signs) == 1, "be +1 (harmful) or -1 (harmless)"))
    if batch.margins is not None:
        check_shapes(batch, margins=(num,))
        good = (batch.margins >= 0) & (batch.margins < float("inf"))
        checks.append(("margins", batch.margins, good, "be finite and not negative"))
    for name, values, good, rule in checks:
        bad = np.flatnonzero(~np.asarray(good).reshape(len(batch), -1).all(-1))
        if bad.size:
            raise ValueError(f"{name} must {rule}; {bad.size} rows do not, the first being row {bad[0]}: "
                             f"{np.asarray(values)[bad[0]]}")  # fmt: skip


def pair_scores(model: Model, params: Params, batch: PreferenceBatch) -> jax.Array:
    """Scores of both responses of every pair, `[N, 2]`, from one forward pass of `2 N` rows."""
    beside = lambda x: jnp.repeat(x[:, None], 2, axis=1)
    tokens, mask = join(beside(batch.prompts), beside(batch.prompt_mask), batch.responses, batch.responses_mask)
    flat = score(model)(params, tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
    return flat.reshape(tokens.shape[:2])


def _accuracy(scores: jax.Array, prefs: jax.Array) -> jax.Array:
    """Share of pairs ranked as labelled, ties in the labels left out."""
    agree = (scores[:, 0] > scores[:, 1]) == (prefs > 0.5)
    return masked_mean(agree.astype(jnp.float32), prefs != 0.5)


def make_reward_loss(model: Model, *, regularization_coef: float = 1e-3):
    """`loss_fn(params, batch)`: Bradley-Terry on `prefs` plus `regularization_coef` x mean squared score.

    Safe RLHF's reward model (2310.12773; the regulariser and its 1e-3 are the public code's). Trained on harm
    comparisons it is the *pairwise-only* cost model, whose zero means nothing.

    With `batch.margins` m the gap is shifted towards the preferred answer, `d = first - second - m (2 prefs - 1)`: a
    hard label gives `bradley_terry_loss` with that margin, a tie no shift, a soft label its expectation of the shift.
    """

    def loss_fn(params: Params, batch: PreferenceBatch):
        scores = pair_scores(model, params, batch)
        shift = 0.0 if batch.margins is None else batch.margins * (2 * batch.prefs - 1)
        loss = losses.soft_bradley_terry_loss(scores[:, 0] - shift, scores[:, 1], batch.prefs)
        total = jnp.mean(loss) + regularization_coef * jnp.mean(losses.score_regularization(scores))
        return total, {"accuracy": _accuracy(scores, batch.prefs)}

    return loss_fn


def make_cost_loss(model: Model, *, regularization_coef: float = 1e-3):
    """`loss_fn(params, batch)`: Safe RLHF's cost loss (ranking and sign terms) plus the score regulariser.

    Needs `batch.signs` (+1 = harmful). `prefs` is P(first more harmful), so a higher score is a higher cost.
    """

    def loss_fn(params: Params, batch: PreferenceBatch):
        if batch.signs is None:
            raise ValueError("the cost loss needs PreferenceBatch.signs (+1 harmful, -1 harmless); "
                             "without them use make_reward_loss, whose zero carries no meaning")
        if batch.margins is not None:
            raise ValueError("the cost loss knows no margins: leave PreferenceBatch.margins out")
        scores = pair_scores(model, params, batch)
        loss = losses.cost_loss(scores[:, 0], scores[:, 1], batch.prefs, batch.signs)
        metrics = {
            "accuracy": _accuracy(scores, batch.prefs),
            "sign_accuracy": jnp.mean((scores > 0) == (batch.signs > 0)),
        }
        total = jnp.mean(loss) + regularization_coef * jnp.mean(losses.score_regularization(scores))
        return total, metrics

    return loss_fn


@pytree
class ScoreModel:
    """A fitted preference model as RL uses it: params, and the shift and scale `[]` measured on the starting policy."""

    params: Params
    shift: jax.Array
    scale: jax.Array


def in_units_of_start(name: str, params: Params, scores) -> ScoreModel:
    """A fitted preference model whose `make_reward`, or `make_cost`, has sd 1 on the starting policy's responses.

    name: "cost" for a cost model. scores: what the model (unscaled) says of those responses, `[B]`. A reward is also
    centred there; a cost is not: P(harmful) = 0 stays 0. Raises ValueError for a model that scores all of them alike.
    """
    values = jax.nn.sigmoid(scores) if name == "cost" else jnp.asarray(scores)
    spread = np.asarray(jnp.std(values) * (jnp.ptp(scores) > 0))  # equals have no spread
    if not 0 < float(spread) < float("inf"):
        raise ValueError(f"the {name} model's scores of the starting policy have sd {float(spread)}: it tells nothing "
                         "apart; train it longer or on more labels")  # fmt: skip
    shift = np.zeros((), np.float32) if name == "cost" else np.asarray(jnp.mean(values))
    return ScoreModel(params=params, shift=shift, scale=spread)


def make_score(model: Model):
    """`score(params, rollout) -> [B]`: what a preference model says of responses, as it was fitted."""
    raw = score(model)
    return lambda params, rollout: raw(params, *sequences(rollout))


def make_reward(model: Model):
    """`reward(score_model, rollout) -> [B]`: `(score - shift) / scale`. Preferences leave both free."""
    raw = make_score(model)
    return lambda fitted, rollout: (raw(fitted.params, rollout) - fitted.shift) / fitted.scale


def make_cost(model: Model):
    """`cost(score_model, rollout) -> [B]`: `P(harmful) / scale` with `P(harmful) = sigmoid(C)`, in [0, 1 / scale].

    The sign terms of the cost loss are a logistic regression of harm, so the sigmoid of C is a probability and a limit
    on the mean cost is a limit on a *rate* of harm. Safe RLHF constrains the mean of C itself, where very safe answers
    pay for harmful ones: two refusals at C = -5 allow an answer at C = +10.
    """
    raw = make_score(model)
    return lambda fitted, rollout: jax.nn.sigmoid(raw(fitted.params, rollout)) / fitted.scale


def make_shaped(model: Model):
    """`reward - weight x cost`: reward shaping, a constraint's rival with a fixed weight (Safe RLHF: R - nu C).

    fitted: `{"reward": ScoreModel, "cost": ScoreModel, "weight": float}`. The models have one shape.
    """
    reward, cost = make_reward(model), make_cost(model)
    return lambda fitted, rollout: reward(fitted["reward"], rollout) - fitted["weight"] * cost(fitted["cost"], rollout)
