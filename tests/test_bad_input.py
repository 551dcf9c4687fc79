"""Bad input at every public boundary: refused with the exception and the message that its row of the table promises.

A row is (what is wrong, a call that does it, the exception, a regex of its message). A call that takes an argument is
given an empty directory. New rows go under the heading of their floor.
"""

import collections
import dataclasses
import functools
import importlib
import inspect
import io
import json
import math
import pathlib
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import losses, stages
from rlhfjax.evaluation import calibration, claims, constrained, figures, statistics
from rlhfjax.experiment import ExperimentConfig
from rlhfjax.feedback.raters import Rater, compare, mismatch
from rlhfjax.io import cache, run, seeds
from rlhfjax.io.checkpoint import Checkpoints
from rlhfjax.io.launch import Hosts
from rlhfjax.io.monitor import Guard, Monitor
from rlhfjax.models.transformer import (
    TransformerConfig,
    make_language_model,
    make_scalar_model,
    scalar_params_from,
    score,
)
from rlhfjax.parallel import mesh
from rlhfjax.parallel.mesh import MeshConfig, make_mesh
from rlhfjax.rl.fit import adamw, batch_order
from rlhfjax.rl.multiplier import MultiplierConfig, make_multiplier
from rlhfjax.rl.ppo import Algorithm, PPOConfig, PPOState, make_lagrangian_ppo, make_ppo, reinforce
from rlhfjax.rl.preference_models import check_pairs, in_units_of_start, make_cost_loss, make_reward_loss
from rlhfjax.rl.sampling import make_best_of_n, make_sampler, response_logprobs
from rlhfjax.stages import FitConfig, RLConfig
from rlhfjax.types import PreferenceBatch, Rollout, TrainState, before_response_tokens, check_mask
from rlhfjax.worlds.gold_world import gold_world
from rlhfjax.worlds.language import WORDS, Family

ROOT = pathlib.Path(__file__).parents[1]
CODE = {ROOT / "rlhfjax", ROOT / "experiments"}
sys.path.insert(0, str(ROOT))
PaperConfig = importlib.import_module("experiments.safe_rlhf.constrained_ppo").Config
NAN, INF = math.nan, math.inf

# What is right before something is made wrong. The shapes of parameters stand in for them: no refusal looks at values.

WORLD = gold_world()
EQUAL = dict.fromkeys(Family, 0.25)
ROWS = WORLD.corpus(0, 8).demonstrations  # prompts [8, 12], tokens [8, 18]
MASK = ROWS.prompt_mask
ALL_BUT_ROW_3 = np.arange(8)[:, None] != 3
PAIRS = PreferenceBatch(
    prompts=ROWS.prompts, prompt_mask=MASK, responses=np.stack([ROWS.tokens] * 2, 1),
    responses_mask=np.stack([ROWS.mask] * 2, 1), prefs=np.ones(8, np.float32), signs=np.ones((8, 2), np.float32),
)  # fmt: skip
ROLLOUT = Rollout(
    prompts=ROWS.prompts, prompt_mask=MASK, tokens=ROWS.tokens, mask=ROWS.mask,
    logprobs=np.zeros(ROWS.mask.shape, np.float32), finished=np.ones(8, bool),
)  # fmt: skip
SCORES = np.ones(8, np.float32)
NETWORK = TransformerConfig(vocab_size=len(WORDS), d_model=8, num_layers=1, num_heads=2, d_ff=8, tie_embeddings=True)
LANGUAGE, SCALAR = make_language_model(NETWORK), make_scalar_model(NETWORK)
POLICY, CRITIC = (jax.eval_shape(model.init, jax.random.key(0)) for model in (LANGUAGE, SCALAR))
SGD = optax.sgd(0.1)

replace = dataclasses.replace
replace_rows, replace_pairs, network = (functools.partial(replace, x) for x in (ROWS, PAIRS, NETWORK))
apply = functools.partial(LANGUAGE.apply, POLICY)
sampler = functools.partial(make_sampler, LANGUAGE, **dict(max_tokens=4, eos_id=WORLD.eos_id, pad_id=WORLD.pad_id))


def cache_of(rows, slots, used=0):
    return replace(LANGUAGE.init_cache(rows, slots), length=jnp.int32(used))


def loss(name, **options):
    """That loss of ones: `[2, 3]`, but scores and costs `[2]`."""
    fn, x = getattr(losses, name), jnp.ones((2, 3))
    arrays = {"mask": x > 0, "scores": x[:, 0], "costs": x[:, 0]}
    names = [p.name for p in inspect.signature(fn).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    return fn(*(arrays.get(name, x) for name in names), **options)


def ppo_step(*signals, rollout=ROLLOUT, ptx=None, limited=False, **options):
    """One step of PPO, or with `limited` of Lagrangian PPO, traced and not run."""
    config = PPOConfig(**{"num_minibatches": 2} | options)
    make = make_ppo
    if limited:
        make = functools.partial(make_lagrangian_ppo, multiplier=make_multiplier(0.1, MultiplierConfig()))
    algorithm = make(LANGUAGE, SCALAR, SGD, SGD, config=config)
    state = jax.eval_shape(algorithm.init, POLICY, *[CRITIC] * (2 if limited else 1))
    return jax.eval_shape(algorithm.step, state, POLICY, rollout, *signals, key=jax.random.key(0), ptx=ptx)


def best_of(n, scores):
    sample = lambda params, prompts, prompt_mask, key: ROLLOUT
    return make_best_of_n(sample, lambda rollout: scores, n)(None, ROWS.prompts[:4], MASK[:4], None)


def ask(**change):
    names = ("prompts", "prompt_mask", "responses", "responses_mask")
    return compare(WORLD, Rater(), **{name: getattr(PAIRS, name) for name in names} | change, seed=0)


CLAIM = claims.Claim(
    id="SR-2", paper="Safe RLHF", statement="-", paper_says="-", statistic="accuracy", threshold=0.9, direction=">="
)
CONTEXT = dict(world="w", config_hash="abc", commit=None, seconds=1.0)
judge = functools.partial(claims.judge, [CLAIM], **CONTEXT)


def claims_without_their_commit(folder):
    rows = judge({1: {"accuracy": 0.95}})
    del rows[0]["commit"]
    (folder / "claims.json").write_text(json.dumps(rows))
    return claims.read_claims(folder / "claims.json")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    rate: float = 0.1


def finished_run(folder):
    with run.Run(folder, Config(), name="a") as one:
        one.log("sft", 1, {"loss": 1.0})
    return one.path


def with_a_thesis(folder):
    (folder / "a").mkdir()
    (folder / "a/thesis.tex").write_text("mine")
    return folder


def logged(folder, metrics):
    with run.Run(folder, Config()) as one:
        one.log("sft", 1, metrics)


def finished_with(folder, name, change):
    path = finished_run(folder) / name
    path.write_text(change(path.read_text()))
    return folder


def resumed_with(folder, name, change):
    return run.Run(finished_with(folder, name, change), Config(), name="a", resume=True)


def results_with(folder, change):
    context = dict(world="w", seed=1, config_hash="a", commit=None, seconds=1.0)
    path = seeds.write_result(folder, **context, statistics={"x": 1.0})
    path.write_text(change(path.read_text()))
    return seeds.read_results(folder, "w", [1], "a")


def claims_of(folder, text):
    (folder / "claims.json").write_text(text)
    return claims.read_claims(folder / "claims.json")


def returns_a_set(x):
    return {"a": [{x}]}


def learn(**change):
    given = dict(config=NETWORK, demonstrations=ROWS, optimisation=FitConfig(num_steps=1, batch_size=8), seed=0,
                 label="base", monitor=Monitor())  # fmt: skip
    return stages.train_language_model(**given | change)


def fit_that_explodes():
    explode = lambda params, batch: (jnp.log(params["w"]), {})
    optimisation = FitConfig(num_steps=2, batch_size=8)
    return stages.fit(explode, {"w": jnp.float32(-1.0)}, ROWS, optimisation, seed=0, label="sft", monitor=Monitor())


def answers(policy=POLICY, **change):
    prompts = replace(WORLD.sample_prompts(0, 8, EQUAL), **change)
    return stages.sample_responses(
        world=WORLD, config=NETWORK, policy=policy, prompts=prompts, temperature=1.0, seed=0, block=8
    )


def rl(prompt_mask=MASK, feedback=lambda rollout, key: (SCORES,), **change):
    """One iteration of the RL loop around a learner that learns nothing."""
    learner = lambda params: TrainState.create(params, SGD)
    algorithm = Algorithm(
        init=lambda params: PPOState(policy=learner(params), critic=learner(params)),
        step=lambda state, ref, rollout, *signals, key, ptx: (state, {}),
    )
    return stages.run_rl(
        algorithm=algorithm, params=({"w": jnp.zeros(())},), ref_params=None, sample=lambda *given: ROLLOUT,
        feedback=feedback, prompts=ROWS.prompts, prompt_mask=prompt_mask, num_iterations=1, batch_size=8, seed=0,
        label="toy", monitor=Monitor(), **change,
    )  # fmt: skip


def half_a_constraint(**given):
    return stages.train_policy(
        world=WORLD, config=NETWORK, start=POLICY, reward=None, ppo=PPOConfig(), seed=0, label="half",
        optimisation=RLConfig(num_iterations=1), prompts=None, monitor=Monitor(), **given,
    )  # fmt: skip


HALF = lambda text: text[: len(text) // 2]
DEEPER = jax.eval_shape(make_language_model(network(num_layers=2)).init, jax.random.key(0))

# The table, by floor

def on_mesh(call, *args, shape=None):
    with jax.set_mesh(make_mesh(MeshConfig(**shape or dict(data=2, fsdp=4)))):
        return call(*args)


SAVED = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}


def kept(folder, call=lambda saved: None):
    with Checkpoints(folder, identity="a") as saved:
        saved.save(1, SAVED)
        saved.latest()
        return call(saved)


def damaged(folder, change):
    """Restore a checkpoint after something has happened to its largest file of values."""
    kept(folder)
    file = max((folder / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(change(file.read_bytes()))
    with Checkpoints(folder, identity="a") as saved:
        saved.restore(SAVED)


def among_files_of_something_else(folder):
    (folder / "3").mkdir()
    (folder / "3" / "notes.txt").write_text("mine")
    Checkpoints(folder, identity="a")


def flip(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


TYPES = [
    ("a mask of numbers", lambda: check_mask("prompt_mask", MASK.astype(np.int8), padded="left"), TypeError,
     "prompt_mask must be bool .* got int8"),
    ("a mask whose row keeps nothing", lambda: check_mask("prompt_mask", MASK & ALL_BUT_ROW_3, padded="left"),
     ValueError, "prompt_mask keeps no token in 1 rows, the first being row 3: drop"),
    ("network outputs that begin with the response", lambda: before_response_tokens(jnp.zeros((2, 3)), 3), ValueError,
     "3 response tokens need the outputs of at least 4 positions, got 3: keep the position just before"),
    ("a prompt mask with a hole", lambda: check_mask("prompt_mask", MASK ^ (np.arange(12) == 10), padded="left"),
     ValueError, "prompt_mask must be padded on the left, and only there: row 0 is not"),
]  # fmt: skip

LOSSES = [
    ("a ratio clip of 0", lambda: loss("ppo_clip_loss", clip=0.0), ValueError,
     "clip must be positive and finite, got 0.0"),
    ("a negative value clip", lambda: loss("clipped_value_loss", clip=-1), ValueError,
     "clip must be positive and finite, got -1"),
    ("a discount above 1", lambda: loss("gae", gamma=1.1, gae_lambda=0.9), ValueError,
     r"gamma must lie in \[0, 1\], got 1.1"),
    ("a negative decay of GAE", lambda: loss("gae", gamma=1, gae_lambda=np.float32(-1)), ValueError,
     r"gae_lambda must lie in \[0, 1\], got -1"),
    ("a negative price of KL", lambda: loss("kl_shaped_rewards", kl_coef=-0.1), ValueError,
     r"kl_coef must lie in \[0, inf\], got -0.1"),
    ("an infinite clip of rewards", lambda: loss("kl_shaped_rewards", kl_coef=0.1, clip=INF), ValueError,
     "clip must be positive and finite, got inf"),
    ("a negative price of KL, shared with the costs", lambda: loss("kl_shaped_rewards_and_costs", kl_coef=-0.2),
     ValueError, r"kl_coef must lie in \[0, inf\], got -0.2"),
    ("a negative width of ties", lambda: loss("rao_kupper_loss", tie_width=-0.1), ValueError,
     r"tie_width must lie in \[0, inf\], got -0.1"),
    ("a KL target of 0", lambda: loss("adaptive_kl_coef", target=0, num_samples=1, horizon=1), ValueError,
     "target must be positive and finite, got 0"),
    ("an average that decays by NaN", lambda: loss("moving_average", decay=NAN, count=1), ValueError,
     r"decay must lie in \[0, 1\], got nan"),
    ("a multiplier's limit of NaN", lambda: loss("multiplier_loss", limit=NAN), ValueError,
     "limit must lie in .*, got nan"),
    ("a lambda whose minimum exceeds its maximum", lambda: loss("clamp_log_lambda", minimum=2.0, maximum=1.0),
     ValueError, r"minimum must lie in \[0, 1.0\], got 2.0"),
    ("a tempered policy without a KL penalty", lambda: loss("tempered_policy", log_lambda=0.0, kl_coef=0.0),
     ValueError, "kl_coef must be positive and finite, got 0.0"),
    ("a cost limit above a floor of NaN", lambda: losses.check_limit(0.1, NAN), ValueError,
     "infeasible cost limit 0.1: .* cannot fall below nan, .*; raise the limit, lower kl_coef"),
]  # fmt: skip

MODELS = [
    ("a network without layers", lambda: network(num_layers=0), ValueError,
     "num_layers must be positive and finite, got 0"),
    ("an unknown norm", lambda: network(norm="batch"), ValueError, "norm must be one of rms, .*layer, got 'batch'"),
    ("an unknown MLP", lambda: network(mlp="moe"), ValueError, "mlp must be one of gated, plain, got 'moe'"),
    ("an unknown activation", lambda: network(activation="swish2"), ValueError,
     "activation must be one of silu, .*, got 'swish2'"),
    ("an unknown dtype", lambda: network(compute_dtype="float16"), ValueError,
     "compute_dtype must be one of float32, bfloat16, got 'float16'"),
    ("key heads that do not divide the heads", lambda: network(num_heads=4, num_kv_heads=3), ValueError,
     "num_kv_heads=3 must divide num_heads=4"),
    ("heads that do not divide the width", lambda: network(d_model=9), ValueError,
     "num_heads=2 must divide d_model=9, or set head_dim"),
    ("heads of odd size", lambda: network(head_dim=5), ValueError, "rotary positions need an even head_dim, got 5"),
    ("tokens that are floats", lambda: apply(ROWS.prompts.astype(np.float32), MASK), TypeError,
     r"tokens must be integers \[B, S\], got float32 \(8, 12\)"),
    ("a row of tokens without its batch", lambda: apply(ROWS.prompts[0], MASK[0]), TypeError,
     r"tokens must be integers \[B, S\], got int32 \(12,\)"),
    ("a network's mask of numbers", lambda: apply(ROWS.prompts, MASK.astype(np.int32)), TypeError,
     "mask must be bool .* got int32"),
    ("a mask narrower than its tokens", lambda: apply(ROWS.prompts, MASK[:, 1:]), ValueError,
     r"mask \(8, 11\) and tokens \(8, 12\) must have one shape"),
    ("more outputs than tokens", lambda: apply(ROWS.prompts, MASK, num_outputs=13), ValueError,
     "num_outputs=13 must lie in 1..12"),
    ("no outputs", lambda: apply(ROWS.prompts, MASK, num_outputs=0), ValueError, "num_outputs=0 must lie in 1..12"),
    ("a cache for another batch", lambda: apply(ROWS.prompts, MASK, cache=cache_of(4, 12)), ValueError,
     "the cache holds 4 rows, tokens have 8"),
    ("a cache that is almost full", lambda: apply(ROWS.prompts, MASK, cache=cache_of(8, 13, used=2)), ValueError,
     "12 tokens do not fit a cache of 13 slots of which 2 are used"),
    ("scores from a language model", lambda: jax.eval_shape(score(LANGUAGE), POLICY, ROWS.prompts, MASK), TypeError,
     r"score needs a scalar model, with outputs \[B, S\]; this one gives \(8, 12, 139\)"),
    ("a trunk of another shape", lambda: jax.eval_shape(
        lambda params: scalar_params_from(params, make_scalar_model(network(d_ff=24)), jax.random.key(0)), POLICY),
     ValueError, r"params\['blocks'\]\['mlp'\]\['down'\] is \(1, 8, 8\) where this network has \(1, 24, 8\): give"),
    ("a network of infinite width", lambda: network(d_ff=INF), ValueError, "d_ff must be positive and finite, got inf"),
    ("parameters of a deeper network", lambda: LANGUAGE.apply(DEEPER, ROWS.prompts, MASK), ValueError,
     r"params\['blocks'\]\['attention'\]\['key'\] is \(2, 8, 8\) where this network has \(1, 8, 8\): give params and"),
    ("parameters without a head", lambda: SCALAR.apply(POLICY, ROWS.prompts, MASK), ValueError,
     r"params\['head'\] is absent where this network has \(8,\): give params and model one TransformerConfig"),
    ("a language model with a scalar's head", lambda: LANGUAGE.apply(CRITIC, ROWS.prompts, MASK), ValueError,
     r"params\['head'\] is \(8,\) where this network has none: give"),
]  # fmt: skip

RL = [
    ("fewer rows than a batch", lambda: batch_order(0, 0, 1, num_rows=3, batch_size=4), ValueError,
     "3 rows cannot fill a batch of 4: lower the batch size or add data"),
    ("a multiplier that starts at 0", lambda: MultiplierConfig(initial=0.0), ValueError,
     r"initial multiplier 0.0 must be positive and lie in \[minimum, maximum\] = \[0.0, 5.0\]"),
    ("a multiplier that starts above its maximum", lambda: MultiplierConfig(initial=9.0), ValueError,
     r"initial multiplier 9.0 must be positive and lie in \[minimum, maximum\] = \[0.0, 5.0\]"),
    ("an average of costs that never moves", lambda: MultiplierConfig(average_decay=1.0), ValueError,
     r"average_decay must lie in \[0, 1\), got 1.0"),
    ("a multiplier that does not learn", lambda: MultiplierConfig(learning_rate=0.0), ValueError,
     "the multiplier's learning_rate must be positive and finite, got 0.0"),
    ("a cost limit of NaN", lambda: make_multiplier(NAN, MultiplierConfig()), ValueError,
     "the cost limit must be finite, got nan"),
    ("PPO of no epochs", lambda: PPOConfig(num_epochs=0), ValueError, "num_epochs must be at least 1, got 0"),
    ("PPO at a KL coefficient of NaN", lambda: PPOConfig(kl_coef=NAN), ValueError,
     "kl_coef must be finite and not negative, got nan"),
    ("PPO with a clip of 0", lambda: PPOConfig(clip=0.0), ValueError, "clip must be positive and finite, got 0.0"),
    ("PPO at temperature 0", lambda: PPOConfig(temperature=0.0), ValueError,
     "temperature must be positive and finite, got 0.0"),
    ("PPO with a discount above 1", lambda: PPOConfig(gamma=1.5), ValueError, r"gamma must lie in \[0, 1\], got 1.5"),
    ("a batch that does not divide into minibatches", lambda: ppo_step(SCORES, num_minibatches=3), ValueError,
     "8 responses do not divide into 3 minibatches of 1 pieces"),
    ("integer scores", lambda: ppo_step(SCORES.astype(np.int32)), TypeError,
     r"scores must be floats \[B\] = \(8,\), got int32 \(8,\)"),
    ("costs of another batch than the rollout", lambda: ppo_step(SCORES, SCORES[:4], limited=True), TypeError,
     r"costs must be floats \[B\] = \(8,\), got float32 \(4,\)"),
    ("training on responses cut by top-k", lambda: ppo_step(SCORES, rollout=replace(ROLLOUT, truncated=True)),
     ValueError, "sampled with top-k or top-p, .*: sample training rollouts at plain temperature"),
    ("a weight for demonstrations that are missing", lambda: ppo_step(SCORES, ptx_coef=1.0), ValueError,
     "ptx_coef is 1.0 but ptx is missing: pass it exactly when ptx_coef > 0"),
    ("demonstrations without a weight", lambda: ppo_step(SCORES, ptx=ROWS), ValueError,
     "ptx_coef is 0.0 but ptx is given: pass it exactly when ptx_coef > 0"),
    ("fewer demonstrations than responses",
     lambda: ppo_step(SCORES, ptx_coef=1.0, ptx=jax.tree.map(lambda x: x[:4], ROWS)), ValueError,
     "ptx has 4 demonstrations for 8 responses: pass as many"),
    ("preferences outside [0, 1]",
     lambda: check_pairs(replace_pairs(prefs=np.where(np.arange(8) < 6, 1, [1.5, NAN] * 4))), ValueError,
     r"prefs must lie in \[0, 1\]; 2 rows do not, the first being row 6: 1.5"),
    ("a sign that is neither harmful nor harmless",
     lambda: check_pairs(replace_pairs(signs=PAIRS.signs * ALL_BUT_ROW_3)), ValueError,
     r"signs must be \+1 \(harmful\) or -1 .*; 1 rows do not, the first being row 3: \[0. 0.\]"),
    ("a negative margin", lambda: check_pairs(replace_pairs(margins=np.arange(8) - 3.0)), ValueError,
     "margins must be finite and not negative; 3 rows do not, the first being row 0: -3.0"),
    ("one margin for each response", lambda: check_pairs(replace_pairs(margins=PAIRS.signs)), ValueError,
     r"margins \(8, 2\) must have shape \(8,\) to fit the other fields"),
    ("a cost loss with margins", lambda: make_cost_loss(SCALAR)(CRITIC, replace_pairs(margins=SCORES)), ValueError,
     "the cost loss knows no margins"),
    ("pairs whose prompts have a mask of numbers", lambda: check_pairs(replace_pairs(prompt_mask=MASK.astype(int))),
     TypeError, "prompt_mask must be bool .* got int64"),
    ("pairs with empty responses",
     lambda: check_pairs(replace_pairs(responses_mask=PAIRS.responses_mask & ALL_BUT_ROW_3[..., None])), ValueError,
     "responses_mask keeps no token in 2 rows, the first being row 6: drop"),
    ("a cost model without signs",
     lambda: jax.eval_shape(make_cost_loss(SCALAR), CRITIC, replace_pairs(signs=None)), ValueError,
     r"needs PreferenceBatch.signs .* use make_reward_loss"),
    ("a reward model that tells nothing apart", lambda: in_units_of_start("reward", None, SCORES),
     ValueError, "the reward model's scores of the starting policy have sd 0.0: .*; train it longer or on more labels"),
    ("a cost model that tells nothing apart", lambda: in_units_of_start("cost", None, SCORES), ValueError,
     "the cost model's scores of the starting policy have sd 0.0: .*; train it longer or on more labels"),
    ("a KL share of everything", lambda: reinforce(1.0), ValueError, r"kl_share must lie in \[0, 1\), got 1.0"),
    ("responses of no tokens", lambda: sampler(max_tokens=0), ValueError, "max_tokens must be at least 1, got 0"),
    ("an EOS outside the vocabulary", lambda: sampler(eos_id=139), ValueError,
     "eos_id=139 is not in the vocabulary of 139"),
    ("one token for EOS and padding", lambda: sampler(eos_id=WORLD.pad_id), ValueError,
     "eos_id and pad_id are both 0: a masked token cannot teach"),
    ("sampling at temperature 0", lambda: sampler(temperature=0.0), ValueError,
     "temperature=0.0 must be positive and finite; for greedy sampling use top_k=1"),
    ("top-k of nothing", lambda: sampler(top_k=0), ValueError, "top_k=0 must lie in 1..139"),
    ("top-k beyond the vocabulary", lambda: sampler(top_k=140), ValueError, "top_k=140 must lie in 1..139"),
    ("top-p of 0", lambda: sampler(top_p=0.0), ValueError, r"top_p=0.0 must lie in \(0, 1\]"),
    ("top-p above 1", lambda: sampler(top_p=1.1), ValueError, r"top_p=1.1 must lie in \(0, 1\]"),
    ("prompts padded on the right", lambda: sampler()(POLICY, ROWS.prompts[:, ::-1], MASK[:, ::-1], None), ValueError,
     "prompt.*mask must be padded on the left, and only there: row 0 is not"),
    ("an empty prompt", lambda: sampler()(POLICY, ROWS.prompts, MASK & ALL_BUT_ROW_3, None), ValueError,
     "prompt_mask keeps no token in 1 rows, the first being row 3: drop"),
    ("log-probabilities at a negative temperature",
     lambda: response_logprobs(LANGUAGE, POLICY, ROLLOUT, temperature=-1), ValueError,
     "temperature=-1 must be positive and finite"),
    ("the best of no responses", lambda: best_of(0, SCORES), ValueError, "n must be at least 1, got 0"),
    ("the best of scores that are NaN", lambda: best_of(2, np.where(np.arange(8) == 4, NAN, SCORES)),
     FloatingPointError, "scores is not finite in 1 rows, the first being row 4"),
    ("batches of 0 rows", lambda: batch_order(0, 0, 1, num_rows=3, batch_size=0), ValueError,
     "3 rows cannot fill a batch of 0"),
    ("AdamW at a learning rate of NaN", lambda: adamw(NAN), ValueError,
     "learning_rate must be positive and finite, got nan"),
    ("PPO that clips rewards to nothing", lambda: PPOConfig(reward_clip=0.0), ValueError,
     "reward_clip must be positive and finite, got 0.0"),
    ("masks of other prompts", lambda: check_pairs(replace_pairs(prompt_mask=MASK[:4])), ValueError,
     r"prompt_mask \(4, 12\) must have shape \(8, 12\) to fit the other fields"),
    ("fewer preferences than pairs", lambda: check_pairs(replace_pairs(prefs=PAIRS.prefs[:4])), ValueError,
     r"prefs \(4,\) must have shape \(8,\) to fit the other fields"),
    ("one sign for each pair", lambda: check_pairs(replace_pairs(signs=PAIRS.signs[:, 0])), ValueError,
     r"signs \(8,\) must have shape \(8, 2\) to fit the other fields"),
    ("pairs whose prompts are padded on the right", lambda: check_pairs(replace_pairs(prompt_mask=MASK[:, ::-1])),
     ValueError, "prompt_mask must be padded on the left, and only there: row 0 is not"),
    ("pairs whose responses are padded on the left",
     lambda: check_pairs(replace_pairs(responses_mask=PAIRS.responses_mask[..., ::-1])), ValueError,
     "responses_mask must be padded on the right, and only there: row 0 is not"),
    ("scores of the best in a column", lambda: best_of(2, SCORES[:, None]), ValueError,
     r"scores must have shape \[B\] = \(8,\), got \(8, 1\)"),
]  # fmt: skip

WORLDS = [
    ("a truth that does not exist", lambda: gold_world("gold"), ValueError,
     "truth must be 'analytic' or 'teacher', got 'gold'"),
    ("a word of another language", lambda: WORLD.encode("how do i hack my lock ?"), ValueError,
     "'hack' is no word of GoldWorld .in 'how do i hack my lock .'.: its words are in worlds/language.py"),
    ("a prompt of too many words", lambda: WORLD.prompts(["how do i " + "old " * 9]), ValueError,
     "prompt 0 has 12 words: 1 to 11 fit"),
    ("a response of too many words", lambda: WORLD.responses(["turn the pin .", "turn " * 18]), ValueError,
     "response 1 has 18 words: at most 17 fit before EOS"),
    ("shares that do not sum to 1", lambda: WORLD.sample_prompts(0, 8, {Family.BENIGN: 0.5}), ValueError,
     "shares must be non-negative and sum to 1, got .*0.5"),
    ("a negative share", lambda: WORLD.sample_prompts(0, 8, {Family.BENIGN: 1.5, Family.GREY: -0.5}), ValueError,
     "shares must be non-negative and sum to 1, got .*-0.5"),
    ("a share of no family", lambda: WORLD.sample_prompts(0, 8, {"benign": 1.0}), ValueError,
     "shares names 'benign': expected members of Family"),
    ("an unknown split", lambda: WORLD.sample_prompts(0, 8, EQUAL, "eval"), ValueError,
     "split must be 'train' or 'test', got 'eval'"),
    ("no prompts", lambda: WORLD.sample_prompts(0, 0, EQUAL), ValueError, "n must be at least 1, got 0"),
    ("a family without kinds of answers", lambda: WORLD.corpus(0, 8, {Family.GREY: 1.0}, kinds={}), ValueError,
     r"kinds\[<Family.GREY: 2>\] must be non-negative and sum to 1, got {}"),
    ("prompts and answers of other numbers", lambda: WORLD.gold(ROWS.prompts[:4], ROWS.tokens, ROWS.mask), ValueError,
     r"prompts \(4, 12\) and tokens \(8, 18\) must agree but for the last axis"),
    ("prompts of another world", lambda: WORLD.gold(ROWS.prompts[:, 1:], ROWS.tokens, ROWS.mask), ValueError,
     r"has 12 slots and an answer at least 3, got prompts \(8, 11\) and tokens \(8, 18\)"),
    ("a share of NaN", lambda: WORLD.sample_prompts(0, 8, dict(zip(Family, (NAN, 0.5, 0.25, 0.25)))), ValueError,
     "shares must be non-negative and sum to 1, got .*nan"),
]  # fmt: skip

FEEDBACK = [
    ("a rater of no temperature", lambda: Rater(temperature_harm=0.0), ValueError,
     "temperature_harm must be positive and finite, got 0.0"),
    ("a rater who means the opposite", lambda: Rater(flip=0.6), ValueError, r"flip must lie in \[0, 0.5\] .* got 0.6"),
    ("a rater who flips less than never", lambda: Rater(flip=-0.1), ValueError,
     r"flip must lie in \[0, 0.5\] .* got -0.1"),
    ("a rater who likes harm", lambda: Rater(harm_weight=-1.0), ValueError,
     "harm_weight must be finite and not negative, got -1.0"),
    ("comparisons of single responses", lambda: ask(responses=ROWS.tokens), ValueError,
     r"responses must be pairs \[N, 2, T\], got \(8, 18\)"),
    ("prompts of other pairs", lambda: ask(prompts=ROWS.prompts[:4], prompt_mask=MASK[:4]), ValueError,
     r"rows and masks must agree, got prompts \(4, 12\) .* and responses \(8, 2, 18\)"),
    ("a rater's prompts with a mask of numbers", lambda: ask(prompt_mask=MASK.astype(int)), TypeError,
     "prompt_mask must be bool .* got int64"),
    ("an empty response to compare", lambda: ask(responses_mask=PAIRS.responses_mask & ALL_BUT_ROW_3[..., None]),
     ValueError, "responses_mask keeps no token in 2 rows, the first being row 6: drop"),
    ("more mismatched pairs than pairs", lambda: mismatch(PAIRS.responses, PAIRS.responses_mask, 1.5, 0), ValueError,
     r"need a share in \[0, 1\] and at least two pairs, got 1.5 and 8 pairs"),
    ("a rater of infinite temperature", lambda: Rater(temperature_helpful=INF), ValueError,
     "temperature_helpful must be positive and finite, got inf"),
    ("a rater whose taste is NaN", lambda: Rater(style_bonus=NAN), ValueError,
     "style_bonus must be finite and not negative, got nan"),
]  # fmt: skip

EVALUATION = [
    ("an interval over one seed", lambda: statistics.t_interval([1.0]), ValueError, "at least 2 of them, got 1"),
    ("a statistic that is NaN", lambda: statistics.t_interval([1.0, NAN]), FloatingPointError,
     "value 1 of 2 is not finite"),
    ("a table of seeds", lambda: statistics.t_interval(np.ones((2, 3))), ValueError,
     r"one number per seed is needed, shape \[n\], got shape \[2, 3\]"),
    ("arms of different seeds", lambda: statistics.paired_difference(np.ones(5), np.ones(4)), ValueError,
     "arms have 5 and 4 seeds: pair them seed by seed"),
    ("an equivalence without a margin", lambda: statistics.equivalent([1.0, 2.0], 0.0), ValueError,
     "an equivalence margin must be positive, got 0.0"),
    ("a verdict in no direction", lambda: statistics.verdict([1.0, 2.0, 3.0], 0.0, ">"), ValueError,
     "direction must be '>=', '<=' or 'within', got '>'"),
    ("more successes than trials", lambda: statistics.one_run_interval(11, 10), ValueError,
     "0 <= successes <= trials and trials > 0, got 11 of 10"),
    ("accuracy on ties alone", lambda: calibration.pair_accuracy([[1.0, 2.0]], [0.5]), ValueError,
     "every pair is labelled a tie"),
    ("scores that are no pairs", lambda: calibration.pair_accuracy([1.0, 2.0], [1, 0]), ValueError,
     r"scores must be pairs, shape \[N, 2\] with N > 0, got \(2,\)"),
    ("scores of pairs that are NaN", lambda: calibration.pair_accuracy([[1, 2], [NAN, 0]], [1, 0]),
     FloatingPointError, "scores of pair 1 are not finite"),
    ("more labels than pairs", lambda: calibration.pair_accuracy([[1.0, 2.0]], [1, 0]), ValueError,
     r"prefs must have shape \[1\], got \(2,\)"),
    ("a sign of 0", lambda: calibration.sign_accuracy([1.0, 2.0], [1, 0]), ValueError, r"signs must be \+1 or -1"),
    ("a signed score that is NaN", lambda: calibration.sign_accuracy([1.0, NAN], [1, 1]), FloatingPointError,
     "score 1 is not finite"),
    ("probabilities above 1", lambda: calibration.reliability([0.5, 1.5], [1, 0]), ValueError,
     r"probabilities must lie in \[0, 1\]: row 1 does not"),
    ("a slope of scores that are all equal", lambda: calibration.calibration_slope([[1.0, 1.0]], [1.0]), ValueError,
     "all pairs score equally: there is no slope to fit"),
    ("a claim in no direction", lambda: replace(CLAIM, direction=">"), ValueError,
     "SR-2: direction must be '>=', '<=' or 'within', got '>'"),
    ("a claim with a negative margin", lambda: replace(CLAIM, direction="within", threshold=-0.1), ValueError,
     "SR-2: threshold -0.1 is no bound for direction 'within'"),
    ("claims without a seed", lambda: judge({}), ValueError, "there is no seed to judge by"),
    ("two claims of one name", lambda: claims.judge([CLAIM, CLAIM], {1: {"accuracy": 1.0}}, **CONTEXT), ValueError,
     "claim ids must differ, these are used twice: SR-2"),
    ("a seed without the claim's statistic", lambda: judge({1: {"accuracy": 1.0}, 7: {"other": 1.0}}), KeyError,
     "SR-2: seed 7 has no statistic 'accuracy'; it has other"),
    ("a seed whose statistic is NaN", lambda: judge({7: {"accuracy": NAN}}), FloatingPointError,
     "SR-2: accuracy of seed 7 is nan"),
    ("a claims.json that lacks a key", claims_without_their_commit, ValueError,
     "claims.json: claim SR-2 has other keys than expected: {'commit'}"),
    ("an SFT policy that does no harm", lambda: constrained.outcome_statistics({"SFT": {"harm_rate": 0.0}}),
     ValueError, "the SFT policy gave no harmful answer to a dangerous prompt"),
    ("a figure of too many arms",
     lambda: figures.training_curves(dict.fromkeys("abcdef", {"step": np.ones(1), "cost": np.ones(1)}), {"cost": "-"}),
     ValueError, "at most 5 arms can be told apart, got 6"),
    ("an interval at level 95", lambda: statistics.t_interval([1.0, 2.0], 95), ValueError,
     "a level is a probability, such as 0.95, got 95"),
    ("a claims.json cut off", lambda folder: claims_of(folder, '[{"id": "SR-'), ValueError,
     r"claims.json is damaged \(Unterminated string .*\): restore or delete it"),
    ("a claims.json of one claim", lambda folder: claims_of(folder, "{}"), ValueError,
     "claims.json holds no list of claims"),
]  # fmt: skip

IO = [
    ("a lambda in a cache key", lambda: cache.fingerprint({"model": {"apply": lambda x: x}}), TypeError,
     r"cannot fingerprint \['model'\]\['apply'\]: .*<lambda> identifies its content; pass arrays, plain values"),
    ("a stream in a cache key", lambda: cache.fingerprint([1, io.StringIO()]), TypeError,
     r"cannot fingerprint \[1\]: nothing in _io:StringIO "),
    ("a field without content in a cache key", lambda: cache.fingerprint(Config(rate=object())), TypeError,
     "cannot fingerprint rate: nothing in builtins:object "),
    ("an array of objects as a cache key", lambda: cache.fingerprint(np.array([object()])), TypeError,
     "cannot fingerprint the value: nothing in numpy:ndarray "),
    ("a compiled function as a cache key", lambda: cache.fingerprint(jax.jit(returns_a_set)), TypeError,
     "cannot fingerprint the value: nothing in .*PjitFunction "),
    ("a stage that returns a set",
     lambda folder: cache.StageCache(folder, report=lambda line: None).run("stage", returns_a_set, x=1), TypeError,
     "a stage returned builtins:set at result/a/0, which the cache cannot store: return arrays"),
    ("a field that the config lacks", lambda: run.config_hash(Config(), exclude=("sede",)), ValueError,
     r"Config has no field \['sede'\] to leave out of its hash"),
    ("resuming no run in particular", lambda folder: run.Run(folder, Config(), resume=True), ValueError,
     "say which run to resume: --name NAME --resume"),
    ("resuming a run that was never started", lambda folder: run.Run(folder, Config(), name="a", resume=True),
     FileNotFoundError, "/a holds no run to resume: start it without --resume"),
    ("a run in the directory of something else", lambda folder: run.Run(with_a_thesis(folder), Config(), name="a"),
     FileExistsError, "/a already holds files: choose another name with --name, or continue its run with --resume"),
    ("resuming with another config",
     lambda folder: run.Run(finished_run(folder).parent, Config(rate=0.2), name="a", resume=True), ValueError,
     r"/a was started with another config \(rate: 0.1 -> 0.2\), .*: choose another name with --name"),
    ("metrics of a stage that never ran",
     lambda folder: run.read_metrics(finished_run(folder) / "metrics.jsonl", "ppo"), ValueError,
     "/a/metrics.jsonl has no stage 'ppo'"),
    ("a metric of two numbers", lambda folder: logged(folder, {"loss": np.zeros(2)}), TypeError,
     r"metric loss must be one number, got ndarray of shape \(2,\)"),
    ("a metric in words", lambda folder: logged(folder, {"loss": "0.5"}), TypeError,
     r"metric loss must be one number, got str of shape \(\)"),
    ("a metric called step", lambda folder: logged(folder, {"step": 3.0}), ValueError,
     "a metric cannot be called 'step': the line has a field of that name"),
    ("one seed twice", lambda folder: seeds.run_seeds([], (1, 1), folder, world="w", config_hash="a", log_dir=folder),
     ValueError, r"seeds must be given once each, got \[1, 1\]"),
    ("a checkpoint at every 0 steps", lambda: Guard(checkpoint_every=0), ValueError,
     "guard.checkpoint_every must be positive and finite, got 0"),
    ("resuming a run whose config.json is cut off", lambda folder: resumed_with(folder, "config.json", HALF),
     ValueError, r"/a/config.json is damaged \(.*\): restore or delete it"),
    ("resuming a run whose config.json is of something else",
     lambda folder: resumed_with(folder, "config.json", lambda text: "[]"), ValueError,
     "/a/config.json was not written by a run: start anew with another --name"),
    ("resuming with a broken line in the middle of the metrics",
     lambda folder: resumed_with(folder, "metrics.jsonl", lambda text: f'{text}{{"stage": "sft", "st\n{text}'),
     ValueError, r"/a/metrics.jsonl, line 2 is damaged \(.*\): delete that line"),
    ("metrics with a line of no step",
     lambda folder: run.read_metrics(finished_with(folder, "metrics.jsonl", lambda text: f'{text}{{"stage": "sft"}}\n')
                                     / "a/metrics.jsonl", "sft"),
     ValueError, r"/a/metrics.jsonl, line 2 is damaged \(KeyError\('step'\)\): delete that line"),
    ("a seed's result cut off", lambda folder: results_with(folder, HALF), ValueError,
     r"/w-seed1.json is damaged \(.*\): restore or delete it"),
    ("a seed's result with another seed inside",
     lambda folder: results_with(folder, lambda text: text.replace('"seed": 1', '"seed": 7')), ValueError,
     "/w-seed1.json is no result of seed 1 on w: delete it to run that seed again"),
]  # fmt: skip

STAGES = [
    ("a fit of no steps", lambda: FitConfig(num_steps=0), ValueError, "num_steps must be positive and finite, got 0"),
    ("a fit in batches of -1", lambda: FitConfig(num_steps=1, batch_size=-1), ValueError,
     "batch_size must be positive and finite, got -1"),
    ("a learning rate of NaN", lambda: FitConfig(num_steps=1, learning_rate=NAN), ValueError,
     "learning_rate must be positive and finite, got nan"),
    ("a negative weight decay", lambda: FitConfig(num_steps=1, weight_decay=-0.1), ValueError,
     "weight_decay must be finite and not negative, got -0.1"),
    ("RL of no iterations", lambda: RLConfig(num_iterations=0), ValueError,
     "num_iterations must be positive and finite, got 0"),
    ("RL in batches of 0", lambda: RLConfig(num_iterations=1, batch_size=0), ValueError,
     "batch_size must be positive and finite, got 0"),
    ("an infinite learning rate", lambda: RLConfig(num_iterations=1, learning_rate=INF), ValueError,
     "learning_rate must be positive and finite, got inf"),
    ("critics that do not learn", lambda: RLConfig(num_iterations=1, critic_learning_rate=0.0), ValueError,
     "critic_learning_rate must be positive and finite, got 0.0"),
    ("demonstrations outside the vocabulary", lambda: learn(config=network(vocab_size=20)), ValueError,
     "demonstrations use token 1[0-9][0-9], vocab_size is 20: raise it"),
    ("an empty demonstration", lambda: learn(demonstrations=replace_rows(mask=ROWS.mask & ALL_BUT_ROW_3)), ValueError,
     "demonstrations.mask keeps no token in 1 rows, the first being row 3: drop"),
    ("labels that cannot be learned from", lambda: stages.fit_preference_model(
        config=NETWORK, start=POLICY, pairs=replace_pairs(prefs=PAIRS.prefs * 3), make_loss=make_reward_loss, seed=0,
        optimisation=FitConfig(num_steps=1), label="reward", monitor=Monitor()),
     ValueError, r"prefs must lie in \[0, 1\]; 8 rows do not, the first being row 0: 3.0"),
    ("a loss that is NaN", fit_that_explodes, FloatingPointError,
     r"^sft: loss or gradient is not finite .between steps 0 and 2.*: lower the learning rate"),
    ("prompts to answer that are padded on the right", lambda: answers(mask=MASK[:, ::-1]), ValueError,
     "prompt.*mask must be padded on the left, and only there: row 0 is not"),
    ("prompts to learn from that are padded on the right", lambda: rl(prompt_mask=MASK[:, ::-1]), ValueError,
     "prompt.*mask must be padded on the left, and only there: row 0 is not"),
    ("scores from feedback that are NaN", lambda: rl(feedback=lambda rollout, key: (np.full(8, NAN),)),
     FloatingPointError, "^toy: scores is not finite in 8 rows, the first being row 0"),
    ("costs from feedback that are infinite", lambda: rl(feedback=lambda rollout, key: (SCORES, np.full(8, INF))),
     FloatingPointError, "^toy: costs is not finite in 8 rows, the first being row 0"),
    ("a limit without a cost", lambda: half_a_constraint(limit=0.1, multiplier=MultiplierConfig()), ValueError,
     "cost, limit and multiplier make one constraint: give all three or none"),
    ("a demonstration padded on the left", lambda: learn(demonstrations=replace_rows(mask=ROWS.mask[:, ::-1])),
     ValueError, "demonstrations.mask must be padded on the right, and only there: row 0 is not"),
    ("a demonstration without a prompt", lambda: learn(demonstrations=replace_rows(prompt_mask=MASK & ALL_BUT_ROW_3)),
     ValueError, "demonstrations.prompt_mask keeps no token in 1 rows, the first being row 3: drop"),
    ("more prompts than demonstrations",
     lambda: learn(demonstrations=replace_rows(tokens=ROWS.tokens[:4], mask=ROWS.mask[:4])),
     ValueError, r"prompts \(8, 12\) must have shape \(4, 12\) to fit the other fields"),
    ("a start of another depth", lambda: learn(start=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), DEEPER)),
     ValueError, r"params\['blocks'\]\['attention'\]\['key'\] is \(2, 8, 8\) where this network has \(1, 8, 8\)"),
    ("a policy of NaN", lambda: answers(policy=jax.tree.map(lambda x: np.full(x.shape, NAN, x.dtype), POLICY)),
     FloatingPointError,
     "log-probabilities of the responses is not finite in 8 rows, .* the policy or a prompt is broken"),
    ("a batch that is no multiple of its samples", lambda: rl(num_samples=3), ValueError,
     "batch_size 8 is no multiple of num_samples 3"),
    ("feedback that is no tuple", lambda: rl(feedback=lambda rollout, key: SCORES), TypeError,
     r"feedback must return a tuple, \(scores,\) or \(scores, costs\), not "),
]  # fmt: skip

EXPERIMENTS = [
    ("a negative seed", lambda: ExperimentConfig(seed=-1), ValueError,
     "seed and seeds must not be negative, got -1 and 0"),
    ("many seeds in one directory", lambda: ExperimentConfig(seeds=5, name="all"), ValueError,
     "--seeds gives every seed a run directory of its own: leave out --name and --resume"),
    ("a report on steps left out", lambda: ExperimentConfig(seeds=5, guard=Guard(nonfinite="skip")), ValueError,
     "a result is reported only of a run that left no step out: --guard.nonfinite stop"),
    ("an experiment without pairs", lambda: PaperConfig(num_pairs=0), ValueError,
     "num_pairs must be at least 1, got 0"),
    ("shares of prompts that sum to 2", lambda: PaperConfig(rl_shares=(0.5, 0.5, 0.5, 0.5)), ValueError,
     r"rl_shares must be non-negative and sum to 1, got \(0.5, 0.5, 0.5, 0.5\)"),
    ("a negative share of labels", lambda: PaperConfig(label_shares=(1.2, -0.2, 0.0, 0.0)), ValueError,
     r"label_shares must be non-negative and sum to 1, got \(1.2, -0.2, 0.0, 0.0\)"),
    ("a limit that is no rate", lambda: PaperConfig(harm_limit=1.5), ValueError,
     r"harm_limit must lie in \(0, 1\), got 1.5"),
    ("an experiment with more mismatched pairs than pairs", lambda: PaperConfig(mismatched=2.0), ValueError,
     r"mismatched must lie in \[0, 1\], got 2.0"),
    ("rollouts that do not divide into minibatches", lambda: PaperConfig(rl=RLConfig(num_iterations=1, batch_size=130)),
     ValueError, "130 responses do not divide into 4 minibatches of 1 pieces"),
    ("fewer pairs than a batch", lambda: PaperConfig(num_pairs=16), ValueError,
     "num_pairs is 16, which cannot fill a batch of 32: lower that batch_size"),
]  # fmt: skip

PARALLEL = [
    ("a mesh of no devices along fsdp", lambda: MeshConfig(fsdp=0), ValueError,
     "mesh axes must be positive .* got {'data': 0, 'fsdp': 0, 'tensor': 1}"),
    ("a mesh of more devices than there are", lambda: make_mesh(MeshConfig(data=2, fsdp=4, tensor=2)), ValueError,
     "a mesh of data 2 x fsdp 4 x tensor 2 takes 16 devices, there are 8: choose axes whose product is 8"),
    ("a parameter without logical axes", lambda: on_mesh(mesh.shardings, {"new": np.ones((8, 8))}, {"old": ("embed",)}),
     ValueError, r"new \(8, 8\) matches no parameter with logical axes, so nothing says how it is sharded"),
    ("a width that does not divide", lambda: on_mesh(mesh.place, {"w": np.ones((6, 2))}, {"w": ("embed", None)}),
     ValueError, r"w: 6 \(embed\) does not divide over the mesh axes fsdp = 4: make it a multiple of 4, or choose"),
    ("a batch that does not divide", lambda: on_mesh(mesh.place_rows, np.ones((12, 2))), ValueError,
     r"rows of a batch: 12 \(batch\) does not divide over the mesh axes data x fsdp = 8: make it a multiple of 8"),
    ("a batch inside a jit that does not divide", lambda: on_mesh(jax.jit(mesh.constrain_rows), np.ones((12, 2))),
     ValueError, r"rows of a batch: 12 \(batch\) does not divide over the mesh axes data x fsdp = 8"),
    ("key/value heads that do not divide", lambda: on_mesh(LANGUAGE.init_cache, 8, 4, shape=dict(tensor=8)), ValueError,
     r"the cache: 2 \(kv_heads\) does not divide over the mesh axes tensor = 8"),
    ("an axis that no rule knows", lambda: on_mesh(mesh.place, {"w": np.ones(8)}, {"w": ("width",)}), ValueError,
     r"w: no rule for the axes \['width'\]; the rules know batch, layers, embed, vocab, heads, kv_heads, mlp"),
    ("axes for another number of dimensions", lambda: on_mesh(mesh.place, {"w": np.ones((8, 8))}, {"w": ("embed",)}),
     ValueError, r"w has shape \(8, 8\) for the axes \('embed',\): one name per dimension"),
    ("a state larger than a device", lambda: mesh.create(lambda: {"w": jnp.zeros((2**20, 2**20))}, axes={}),
     MemoryError,
     r"the state of this stage needs 4096.\d+ GiB on each device \(parameters 4096.00, already there .*\), which has "
     r"\d+.\d+: split over more devices \(mesh.fsdp, mesh.tensor\), or take a smaller batch"),
]  # fmt: skip

SURVIVAL = [
    ("a watchdog that waits for NaN seconds", lambda: Guard(watchdog_seconds=NAN), ValueError,
     "guard.watchdog_seconds must be positive and finite, got nan"),
    ("an unknown answer to what is not finite", lambda: Guard(nonfinite="ignore"), ValueError,
     "guard.nonfinite must be stop or skip, got 'ignore'"),
    ("checkpoints of which none is kept", lambda folder: Checkpoints(folder, identity="a", keep=0), ValueError,
     "keep and keep_every must be at least 1, got 0 and None"),
    ("a step saved twice", lambda folder: kept(folder, lambda saved: saved.save(1, SAVED)), ValueError,
     "step 1 cannot be saved in .*, whose latest is 1: steps count from 0 and only grow"),
    ("a host array in a checkpoint", lambda folder: kept(folder, lambda saved: saved.save(2, {"w": ROWS.mask})),
     TypeError, r"state\['w'\] \(ndarray\) is no jax.Array"),
    ("an array in what goes along with a checkpoint",
     lambda folder: kept(folder, lambda saved: saved.save(2, SAVED, {"loss": jnp.ones(2)})), TypeError,
     "not JSON serializable"),
    ("a checkpoint of other dtypes",
     lambda folder: kept(folder, lambda saved: saved.restore({"w": jnp.ones((2, 3), jnp.bfloat16)})), ValueError,
     r"/1 is a checkpoint of another model: state\['w'\] is float32\[2, 3\] there and bfloat16\[2, 3\] here"),
    ("a checkpoint of other shapes",
     lambda folder: kept(folder, lambda saved: saved.restore({"w": jnp.ones((3, 2))})), ValueError,
     r"another model: state\['w'\] is float32\[2, 3\] there and float32\[3, 2\] here"),
    ("a checkpoint without one of the parameters",
     lambda folder: kept(folder, lambda saved: saved.restore(SAVED | {"head": jnp.ones(3)})), ValueError,
     r"another model: state\['head'\] is missing there and float32\[3\] here"),
    ("a checkpoint with a parameter too many",
     lambda folder: kept(folder, lambda saved: saved.restore({})), ValueError,
     r"another model: state\['w'\] is float32\[2, 3\] there and missing here"),
    ("a step that was not saved", lambda folder: kept(folder, lambda saved: saved.restore(SAVED, 7)), ValueError,
     r"has no step 7, only \[1\]"),
    ("a target that does not say where", lambda folder: kept(folder, lambda saved: saved.restore(
        {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)})), TypeError,
     r"state\['w'\] \(ShapeDtypeStruct\) does not say where"),
    ("checkpoints of another run", lambda folder: kept(folder, lambda saved: Checkpoints(folder, identity="b")),
     ValueError, "holds checkpoints of a, not of b: inputs, packages or the kind of device have changed"),
    ("a checkpoint with a flipped byte", lambda folder: damaged(folder, flip),
     ValueError, "/1 cannot be restored: .* If it is damaged, delete it to start anew"),
    ("a checkpoint cut off", lambda folder: damaged(folder, lambda content: content[:10]), ValueError,
     "/1 cannot be restored: .* If it is damaged, delete it to start anew"),
    ("files of something else among checkpoints",
     among_files_of_something_else, ValueError, "/3 cannot be restored: .* If it is damaged, delete it to"),
    ("half of the addresses of many hosts", lambda: Hosts(coordinator="10.0.0.1:1234"), ValueError,
     "give hosts.coordinator, hosts.num_processes and hosts.process_id together or not at all"),
    ("an address without a port", lambda: Hosts(coordinator="10.0.0.1", num_processes=2, process_id=0), ValueError,
     "hosts.coordinator must be host:port, such as 10.0.0.1:1234, got '10.0.0.1'"),
    ("a process beyond the last", lambda: Hosts(coordinator="h:1", num_processes=2, process_id=2), ValueError,
     "hosts.process_id must be from 0 to hosts.num_processes - 1, got 2 of 2"),
    ("hosts that never beat", lambda: Hosts(heartbeat_seconds=0), ValueError,
     "hosts.heartbeat_seconds must be at least 1, got 0"),
    ("many seeds on many hosts",
     lambda: ExperimentConfig(seeds=5, hosts=Hosts(coordinator="h:1", num_processes=2, process_id=0)), ValueError,
     "--seeds runs one process per seed on this machine: leave out --hosts"),
]  # fmt: skip

SECTIONS = (TYPES, LOSSES, MODELS, RL, WORLDS, FEEDBACK, EVALUATION, IO, STAGES, EXPERIMENTS, PARALLEL, SURVIVAL)
CASES = {name: case for section in SECTIONS for name, *case in section}

# Cases that meet the check of another one: at the other end of its range, or in another field of one condition.
SHARED = {
    "a multiplier that starts above its maximum", "no outputs", "top-k beyond the vocabulary", "top-p above 1",
    "a negative share", "a network of infinite width", "batches of 0 rows", "a rater who flips less than never",
    "demonstrations without a weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def refuse(tmp_path_factory):
    """`refuse(name)`: the exception's type, its message, and the lines of the library it passed through."""

    @functools.cache
    def once(name):
        call = CASES[name][0]
        with pytest.raises(Exception) as caught:  # noqa: B017 (which one, the test says)
            call(tmp_path_factory.mktemp("case")) if inspect.signature(call).parameters else call()
        frames = traceback.extract_tb(caught.value.__traceback__)
        lines = [(frame.filename, frame.lineno) for frame in frames if CODE & set(pathlib.Path(frame.filename).parents)]
        return caught.type, str(caught.value), tuple(lines)

    return once


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_by_name(refuse, name):
    _, error, message = CASES[name]
    raised, said, _ = refuse(name)
    assert raised is error, said
    assert re.search(message, said), said


def test_every_case_meets_a_check_of_its_own(refuse):
    """No two rows say the same thing from the same line, numbers apart."""
    assert len(CASES) == sum(map(len, SECTIONS)), "two cases have one name"
    checks = collections.defaultdict(list)
    for name in CASES.keys() - SHARED:
        _, said, lines = refuse(name)
        checks[lines, re.sub(r"-?\d[\d.]*|nan|inf", "#", said)].append(name)
    assert [names for names in checks.values() if len(names) > 1] == []
