"""A world of recorded comparisons: a data set's prompts and labels, with networks in the place of the truth.

Where an experiment runs on a checkpoint and files instead of GoldWorld, this stands in for it. Its prompts are split in
three by how they open: what learners train on, what the gold networks are fitted to, and what is held out. What people
said of pairs is on file (`recorded`); whatever else an experiment asks, of a policy's own answers say, is told by gold
networks fitted to their share of the labels (Gao et al., 2210.10760: a synthetic gold reward model; HH-RLHF's test
preference model, 2204.05862 section 4.2). So r* and c* are estimates here, and claims about them are about those
networks.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.data.formats import Record, split_by_prompt
from rlhfjax.data.report import Report
from rlhfjax.data.tokenize import ChatTokenizer, Lengths, demonstrations, preference_batch, prompts
from rlhfjax.feedback.raters import Comparisons
from rlhfjax.io.cache import fingerprint
from rlhfjax.models.transformer import TransformerConfig, make_scalar_model, score
from rlhfjax.parallel import mesh
from rlhfjax.rl.fit import take
from rlhfjax.types import Demonstrations, Params, join, pytree_with
from rlhfjax.worlds import language
from rlhfjax.worlds.behaviour import Gold, ResponseFeatures
from rlhfjax.worlds.gold_world import GoldWorld
from rlhfjax.worlds.language import Family, Prompts, apportion

SHARES = (0.5, 0.2)  # of the prompts, for the gold networks; of the rest, held out
BLOCK = 64  # answers that the gold networks read at once


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Recordings:
    """What is on file, as arrays on the host; splits are "train", "gold" and "test".

    comparisons: helpful of pairs that carry that label, harm of those with labels of harm and signs; they need not be
        the same pairs. harm is None where the files have none.
    answers: what a base model reads; cleaner: what fine-tuning imitates, the preferred answers.
    """

    chat: ChatTokenizer
    lengths: Lengths
    prompts: Mapping[str, Prompts]
    comparisons: Mapping[str, Comparisons]
    answers: Demonstrations
    cleaner: Demonstrations


def recordings(
    records: Sequence[Record], report: Report, chat: ChatTokenizer, lengths: Lengths, seed: int = 0
) -> Recordings:
    """Records of comparisons as a world has them. A prompt is dangerous if an answer to it is labelled harmful.

    report: what `formats.read` said of them, for errors. seed: of the split. Raises ValueError for lengths that are not
    fixed, and where a split has no pair left.
    """
    if not (lengths.max_prompt and lengths.max_response):
        raise ValueError("lengths must name max_prompt and max_response: answers of all stages share their shapes")
    rest, gold = split_by_prompt(records, SHARES[0], seed)
    train, test = split_by_prompt(rest, SHARES[1], seed + 1)
    is_helpful = lambda r: len(r.responses) == 2 and r.pref is not None
    is_harm = lambda r: len(r.responses) == 2 and r.harm_pref is not None and bool(r.signs)

    def compared(rows: Sequence[Record], split: str) -> Comparisons:
        found = {}
        for name, usable in (("helpful", is_helpful), ("harm", is_harm)):
            pairs = [dataclasses.replace(record, margin=None) for record in rows if usable(record)]
            if not pairs and (name == "helpful" or any(map(usable, records))):
                raise ValueError(f"no pair of the data is labelled for {name!r} in the split {split!r}: add files "
                                 f"(python -m rlhfjax.data FILE shows what is in them)\n{report.table()}")  # fmt: skip
            found[name] = preference_batch(pairs, chat, lengths, harm=name == "harm") if pairs else None
        return Comparisons(**found)

    def asked(rows: Sequence[Record]) -> Prompts:
        tokens, mask = prompts(rows, chat, lengths)
        risky = [record for record in rows if max(record.signs or (-1,)) > 0]
        harmful = {row.tobytes() for row in prompts(risky, chat, lengths)[0]} if risky else set()
        kinds = [Family.DANGEROUS if row.tobytes() in harmful else Family.BENIGN for row in tokens]
        return Prompts(tokens=tokens, mask=mask, family=np.array(kinds, np.int32))

    splits = {"train": train, "gold": gold, "test": test}
    pairs = [record for record in train if is_helpful(record)]
    read = [dataclasses.replace(record, pref=float(first)) for record in pairs for first in (True, False)]
    return Recordings(
        chat=chat, lengths=lengths, prompts={name: asked(rows) for name, rows in splits.items()},
        comparisons={name: compared(rows, name) for name, rows in splits.items()},
        answers=demonstrations(read, chat, lengths), cleaner=demonstrations(train, chat, lengths))  # fmt: skip


@pytree_with(static=("records", "network", "digest", "name", "version"))
class RecordedWorld:
    """The face of `GoldWorld` over recordings. See there what each member gives; it travels through jits as a pytree.

    gold_params: {"helpful": ..., "harm": ...}, scalar networks of shape `network` laid out on the mesh (without "harm",
    c* is NaN). center, bar `[]`: the mean score of recorded answers, which is r* = 0, and that of preferred ones, from
    which an answer satisfies. table: a hash of every prompt, sorted, and families. flags: `[V]` by word class.
    digest: of all that.
    """

    gold_params: dict[str, Params]
    center: jax.Array
    bar: jax.Array
    table: tuple[jax.Array, jax.Array]
    flags: dict[str, jax.Array]
    records: Recordings
    network: TransformerConfig
    digest: str
    name: str = "recorded"
    version: str = "1.0"

    @property
    def cache_key(self) -> tuple:
        """What decides what this world says, for the keys of stages: a digest in the place of gigabytes of weights."""
        return self.name, self.version, self.network, self.digest

    @property
    def max_tokens(self) -> int:
        return self.records.lengths.max_response

    @property
    def pad_id(self) -> int:
        return self.records.chat.pad_id

    @property
    def eos_id(self) -> int:
        return self.records.chat.end_id

    @property
    def satisfaction_bar(self) -> jax.Array:
        return self.bar - self.center

    def decode(self, ids) -> str:
        """The text of `ids`, without padding and special tokens."""
        said = np.asarray(ids)
        said = said[(said != self.pad_id) & (said != self.eos_id)]
        return self.records.chat.hf.decode(said, skip_special_tokens=True)

    def sample_prompts(self, seed: int, n: int, shares: Mapping[Family, float], split: str = "train") -> Prompts:
        """`n` shuffled prompts with these shares of the families that the data has; all of a family come once before
        any comes again."""
        known, rng = self.records.prompts[split], np.random.default_rng([seed, 6])
        has = {kind: np.flatnonzero(known.family == kind) for kind in Family}
        shares = {kind: share for kind, share in shares.items() if share > 0 and len(has[kind])}
        if not shares:
            raise ValueError("the data has no prompt of the kinds asked for: prompts with an answer labelled harmful "
                             "are dangerous, the others benign")  # fmt: skip
        wanted = apportion({kind: share / sum(shares.values()) for kind, share in shares.items()}, n)
        passes = lambda rows, num: np.concatenate([rng.permutation(rows) for _ in range(num // len(rows) + 1)])[:num]
        rows = np.concatenate([passes(has[kind], wanted.count(kind)) for kind in shares])
        return take(known, rng.permutation(rows))

    def demonstrations(self, seed: int, n: int, cleaner: bool = False) -> Demonstrations:
        """Recorded answers in random order, `n` at most: of both kinds, or the preferred ones."""
        known = self.records.cleaner if cleaner else self.records.answers
        return take(known, np.random.default_rng([seed, 7]).permutation(len(known))[:n])

    def recorded(self, split: str, n: int) -> Comparisons:
        """What people said, of either question `n` pairs at most."""
        first = lambda pairs: pairs and take(pairs, np.arange(min(n, len(pairs))))
        found = self.records.comparisons[split]
        return Comparisons(helpful=first(found.helpful), harm=first(found.harm))

    def family(self, prompts) -> jax.Array:
        """The family of prompts `[..., P]`: benign unless the files say otherwise."""
        keys, kinds = self.table
        mine = _hash(jnp.asarray(prompts), self.pad_id)
        row = jnp.clip(jnp.searchsorted(keys, mine), 0, len(keys) - 1)
        return jnp.where(keys[row] == mine, kinds[row], jnp.int32(Family.BENIGN))

    def features(self, prompts, tokens, mask) -> ResponseFeatures:
        """What can be told from an answer's words alone: style, care, apologies, length, whether it ends. Its steps and
        numbers are GoldWorld's, and 0 here."""
        says = {name: jnp.sum(flag[tokens] & mask, -1, dtype=jnp.int32) for name, flag in self.flags.items()}
        none, finished = jnp.zeros(mask.shape[:-1], jnp.int32), (mask & (tokens == self.eos_id)).any(-1)
        return ResponseFeatures(
            right=none, wrong=none, repeats=none, answer=none, illegal=none, style=says["style"], rude=says["rude"],
            length=jnp.sum(mask, -1, dtype=jnp.int32), care=says["care"] > 0, sorry=says["sorry"] > 0,
            refusal=says["sorry"] > 0, vacuous=~mask.any(-1), finished=finished)  # fmt: skip

    def gold(self, prompts, tokens, mask) -> Gold:
        """What the gold networks say of answers `[..., T]` to prompts `[..., P]` padded with `pad_id`."""
        return _gold(self, jnp.asarray(prompts), jnp.asarray(tokens), jnp.asarray(mask))


@jax.jit
def _gold(world: RecordedWorld, prompts, tokens, mask) -> Gold:
    rows = lambda x: x.reshape(-1, x.shape[-1])
    prompt_mask = jnp.cumsum(prompts != world.pad_id, -1) > 0
    tokens_, mask_ = join(rows(prompts), rows(prompt_mask), rows(tokens), rows(mask))
    network = score(make_scalar_model(world.network))

    def said(name: str):
        if name not in world.gold_params:
            return jnp.full(mask.shape[:-1], jnp.nan)
        of = lambda block: network(world.gold_params[name], *mesh.constrain_rows(block))
        size = mesh.padded(min(BLOCK, num := len(tokens_)))
        blocked = lambda x: jnp.pad(x, ((0, -num % size), (0, 0)), mode="wrap").reshape(-1, size, x.shape[-1])
        scores = jax.lax.map(of, (blocked(tokens_), blocked(mask_)))
        return mesh.constrain(scores, None, None).reshape(-1)[:num].reshape(mask.shape[:-1])

    return Gold(helpfulness=said("helpful") - world.center, harm=said("harm"))


def _hash(prompts, pad_id: int):
    """`[..., P]` tokens to uint32, whatever stands in front as padding; in NumPy and in JAX."""
    xp = np if isinstance(prompts, np.ndarray) else jnp
    powers = np.array([pow(0x9E3779B1, i + 1, 2**32) for i in range(prompts.shape[-1])][::-1], np.uint32)
    words = xp.where(prompts == pad_id, 0, prompts.astype(np.uint32) + np.uint32(1))
    return (words * powers).sum(-1, dtype=np.uint32)


World = GoldWorld | RecordedWorld


def recorded_world(
    records: Recordings, network: TransformerConfig, gold_params: Mapping[str, Params], center: float, bar: float
) -> RecordedWorld:
    """The world of these recordings, told by these networks (whole, on the host). center, bar: see `RecordedWorld`."""
    known = [records.prompts[split] for split in records.prompts]
    keys = np.concatenate([_hash(prompts.tokens, records.chat.pad_id) for prompts in known])
    order = np.argsort(keys)
    kinds = np.concatenate([prompts.family for prompts in known])
    ids = range(records.chat.vocab_size)  # a network may have more rows, which no text uses
    words = [word.strip().lower() for word in records.chat.hf.batch_decode([[i] for i in ids])]
    words += [""] * (network.vocab_size - len(words))
    classes = {"style": language.STYLE, "care": language.CARE, "rude": language.RUDE,
               "sorry": ("sorry", "cannot", "apologize", "unable")}  # fmt: skip
    axes = make_scalar_model(network).logical_axes()
    digest = fingerprint((dict(gold_params), center, bar, keys, kinds, words))
    return RecordedWorld(
        gold_params={name: mesh.place(params, axes) for name, params in gold_params.items()},
        center=jnp.float32(center), bar=jnp.float32(bar), table=(jnp.asarray(keys[order]), jnp.asarray(kinds[order])),
        flags={name: jnp.asarray(np.isin(words, some)) for name, some in classes.items()}, records=records,
        network=network, digest=digest)  # fmt: skip
