"""A stranger's network behind the pure face: it samples, and trains with the same PPO, on one device and on eight."""

import contextlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhfjax import stages
from rlhfjax.io.monitor import Monitor
from rlhfjax.models.wrap import wrap, wrap_module
from rlhfjax.parallel import mesh
from rlhfjax.rl.fit import adamw
from rlhfjax.rl.ppo import PPOConfig, make_ppo
from rlhfjax.rl.sampling import make_sampler, response_logprobs

ROOT = pathlib.Path(__file__).parents[1]
VOCAB, EOS, PAD, LIKED = 16, 1, 0, 5


class Averager(nnx.Module):
    """A stranger's network: the mean of all kept tokens so far, the token itself, and one hidden layer."""

    def __init__(self, rngs: nnx.Rngs, num_outputs: int | None = None):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, 8)), axes=("vocab", "embed"))
        self.hidden = nnx.Param(0.3 * jax.random.normal(rngs.params(), (16, 32)), axes=("embed", "mlp"))
        shape = (32,) if num_outputs is None else (32, num_outputs)
        self.head = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape), axes=("mlp", None)[: len(shape)])

    def __call__(self, tokens, mask):
        x = jnp.where(mask[..., None], self.embed[...][tokens], 0.0)
        mean = jnp.cumsum(x, 1) / jnp.maximum(jnp.cumsum(mask, 1), 1)[..., None]
        return jnp.tanh(jnp.concatenate([x, mean], -1) @ self.hidden[...]) @ self.head[...]


POLICY = wrap_module(lambda rngs: Averager(rngs, VOCAB), vocab_size=VOCAB)
CRITIC = wrap_module(Averager)


def prompts(num: int = 32):
    rng = np.random.default_rng(0)
    return rng.integers(2, VOCAB, (num, 5)).astype(np.int32), np.arange(5) >= rng.integers(0, 4, (num, 1))


def train(num_iterations: int):
    """PPO for how often one token is said: the last state."""
    algorithm = make_ppo(POLICY, CRITIC, adamw(3e-2), adamw(3e-2), PPOConfig(kl_coef=0.01, num_minibatches=2))
    liked = jax.jit(lambda r: jnp.mean((r.tokens == LIKED) & r.mask, -1))
    tokens, mask = prompts()
    log = []
    stages.run_rl(
        algorithm=algorithm, params=(start := placed(POLICY, 0), placed(CRITIC, 1)), ref_params=start,
        sample=make_sampler(POLICY, max_tokens=6, eos_id=EOS, pad_id=PAD),
        feedback=lambda rollout, key: (mesh.fetch(liked(rollout)),), prompts=tokens, prompt_mask=mask,
        num_iterations=num_iterations, batch_size=32, seed=0, label="wrapped",
        monitor=Monitor(log=lambda step, metrics: log.append(metrics)))  # fmt: skip
    return log


def placed(model, seed: int):
    return mesh.place(jax.tree.map(np.asarray, model.init(jax.random.key(seed))), model.logical_axes())


def test_a_module_trains_with_the_same_ppo():
    log = train(40)
    assert log[0]["score"] < 0.15 and log[-1]["score"] > 0.6
    assert max(metrics["sampler_mismatch"] for metrics in log) < 1e-5
    assert log[-1]["time/compilations"] == log[5]["time/compilations"]


def test_eight_devices_train_it_alike():
    alone = train(2)
    with jax.set_mesh(mesh.make_mesh(mesh.MeshConfig(data=2, fsdp=2, tensor=2))):
        together = train(2)
    for one, eight in zip(alone, together):
        for name in ("score", "kl", "policy_loss", "critic_loss"):
            np.testing.assert_allclose(one[name], eight[name], atol=2e-5, err_msg=name)


def test_its_sampler_reads_what_the_trainer_reads():
    params, (tokens, mask) = POLICY.init(jax.random.key(0)), prompts()
    rollout = make_sampler(POLICY, max_tokens=7, eos_id=EOS, pad_id=PAD)(params, tokens, mask, jax.random.key(1))
    again, _ = response_logprobs(POLICY, params, rollout, temperature=1.0)
    np.testing.assert_allclose(rollout.logprobs, again, atol=1e-6)


def test_a_pure_function_will_do():
    """A bigram table, by hand: the logits of a token are a row of it."""
    model = wrap(lambda key: {"table": jax.random.normal(key, (VOCAB, VOCAB))},
                 lambda params, tokens, mask: params["table"][tokens], vocab_size=VOCAB)  # fmt: skip
    params, tokens = model.init(jax.random.key(0)), jnp.array([[3, 4, 2]])
    mask = jnp.array([[True, True, False]])
    outputs, cache = model.apply(params, tokens, mask, num_outputs=2)
    np.testing.assert_array_equal(outputs[0], params["table"][jnp.array([4, 0])])  # a masked id is never read
    assert cache is None
    cache = model.init_cache(1, 4)
    for i in range(3):
        outputs, cache = model.apply(params, tokens[:, i : i + 1], mask[:, i : i + 1], cache=cache)
    np.testing.assert_array_equal(cache.mask[0], [True, True, False, False])
    assert int(cache.length) == 3 and outputs.shape == (1, 1, VOCAB)


def test_axis_names_are_read_from_the_parameters_or_given():
    assert POLICY.logical_axes()["embed"] == ("vocab", "embed")
    bare = lambda rngs: nnx.Linear(VOCAB, VOCAB, rngs=rngs)
    assert jax.tree.leaves(wrap_module(bare).logical_axes(), is_leaf=lambda x: isinstance(x, tuple)) == []
    given = {"kernel": (None, "mlp"), "bias": ("mlp",)}
    assert wrap_module(bare, logical_axes=given).logical_axes() == given


@pytest.mark.parametrize(
    "make, mesh_of, error, message",
    [
        (lambda: wrap_module(lambda rngs: nnx.BatchNorm(3, rngs=rngs)), None, ValueError,
         "the module holds 2 variables that are no nnx.Param .* build it without them"),
        (lambda: run(wrap_module(Averager, vocab_size=VOCAB)), None, ValueError,
         r"gives outputs \(32, 5\) for tokens \(32, 5\), where \(32, 5, 16\) are wanted"),
        (lambda: run(wrap_module(lambda rngs: Averager(rngs, 3))), None, ValueError,
         r"gives outputs \(32, 5, 3\) .* where \(32, 5\) are wanted: .* one number per token"),
        (lambda: placed(wrap_module(lambda rngs: Bare(rngs), vocab_size=VOCAB), 0), dict(fsdp=8), ValueError,
         r"head \(16, 16\) matches no parameter with logical axes, .* name its axes in the model's logical_axes"),
    ],
)  # fmt: skip
def test_bad_networks(make, mesh_of, error, message):
    ambient = jax.set_mesh(mesh.make_mesh(mesh.MeshConfig(**mesh_of))) if mesh_of else contextlib.nullcontext()
    with ambient, pytest.raises(error, match=message):
        make()


class Bare(nnx.Module):
    """A parameter without axis names."""

    def __init__(self, rngs):
        self.head = nnx.Param(jnp.zeros((VOCAB, VOCAB)))


def run(model):
    return model.apply(model.init(jax.random.key(0)), *map(jnp.asarray, prompts()))


def test_the_readmes_network_trains():
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    (block,) = (block for block in blocks if "wrap_module" in block)
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    assert names["state"].policy.step == 2 and np.isfinite(names["metrics"]["policy_loss"])
