"""RL on a pretrained checkpoint: PPO for what a plain function says of the text, exported for transformers.

Command   python experiments/real_data/stories.py --checkpoint DIR     (a TinyStories model, Llama's architecture, say)
Measured  What the function says before and after, KL to the original, stories before and after; README.md has the
          figures of stories260K. The trained model is in the run's directory, as transformers loads it.
"""

import dataclasses
import itertools
import pathlib
import re

import numpy as np

from rlhfjax import stages
from rlhfjax.data.formats import Record
from rlhfjax.data.tokenize import ChatTokenizer, Lengths, load_tokenizer, prompts
from rlhfjax.evaluation.statistics import t_interval
from rlhfjax.experiment import ExperimentConfig, main, stream
from rlhfjax.models import huggingface
from rlhfjax.models.lora import IN_FULL, LoraConfig
from rlhfjax.models.transformer import make_language_model
from rlhfjax.parallel.mesh import fetch
from rlhfjax.rl.ppo import PPOConfig
from rlhfjax.stages import RLConfig
from rlhfjax.types import Rollout, sequences

HAPPY = re.compile(r"\b(happy|smiled?|laughed|loved?|friends?|fun|hugged|together|excited|proud)\b", re.I)
ENDS = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ bos_token if m['role'] == 'assistant' }}{% endfor %}"
NAMES, WHO = ("Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Sam", "Anna"), ("girl", "boy", "dog", "cat", "bird", "bear")
WHAT = ("went to the park", "found a box", "lost a toy", "saw a big tree", "made a cake", "heard a noise")


def happiness(text: str, ended: bool) -> float:
    """Different happy words in a story, at most four of them; one that does not end is worth one less."""
    return min(len({word.lower() for word in HAPPY.findall(text)}), 4) - float(not ended)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """PPO from a checkpoint, held to it by a KL penalty."""

    checkpoint: pathlib.Path | None = None
    """A Hugging Face directory: weights, config and tokenizer."""
    template: str = ENDS
    """Chat template (Jinja) that writes a story and what ends it: this model ends its stories with BOS."""
    lora: LoraConfig = IN_FULL
    """Whether the policy learns low-rank changes of the checkpoint."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.05, num_minibatches=2, num_epochs=2)
    """One update."""
    rl: RLConfig = RLConfig(num_iterations=60, batch_size=64, learning_rate=1e-4, critic_learning_rate=3e-4)
    """The critic starts from the checkpoint, with a head of zeros."""
    num_tokens: int = 96
    """Budget of a story."""
    num_evaluated: int = 256
    """Held-out beginnings, of which a story is written before and after."""

    @property
    def label(self) -> str:
        return "real data"


SCALES = {"smoke": Config(scale="smoke", num_tokens=12, num_evaluated=16, rl=RLConfig(num_iterations=2, batch_size=8)),
          "cpu": Config()}  # fmt: skip


def beginnings() -> list[Record]:
    """Beginnings of stories, in a fixed random order."""
    told = [f"Once upon a time, there was a {who} named {name}. One day, {name} {what}" for name, who, what in
            itertools.product(NAMES, WHO, WHAT)]  # fmt: skip
    return [Record(prompt=(("user", told[i]),)) for i in np.random.default_rng(0).permutation(len(told))]


def read(chat: ChatTokenizer, rollout: Rollout) -> list[str]:
    ids = [row[keep & (row != chat.end_id)] for row, keep in zip(fetch(rollout.tokens), fetch(rollout.mask))]
    return chat.hf.batch_decode(ids, skip_special_tokens=True)


def experiment(config: Config, run, cache) -> dict[str, float]:
    if config.checkpoint is None:
        raise SystemExit("name a checkpoint: --checkpoint DIR")
    network, original = huggingface.load(config.checkpoint)
    original, chat = fetch(original), load_tokenizer(config.checkpoint, template=config.template)
    tokens, mask = prompts(beginnings(), chat, Lengths())
    num_held_out = min(config.num_evaluated, len(tokens) // 2)
    decoding = stages.Decoding(max_tokens=config.num_tokens, eos_id=chat.end_id, pad_id=chat.pad_id,
                               temperature=config.ppo.temperature)  # fmt: skip

    def judge(rollout: Rollout) -> np.ndarray:
        texts = zip(read(chat, rollout), fetch(rollout.finished))
        return np.array([happiness(*story) for story in texts], np.float32)

    policy = stages.train_on_text(
        config=network, start=original, judge=judge, decoding=decoding, lora=config.lora, ppo=config.ppo,
        optimisation=config.rl, prompts=tokens[num_held_out:], prompt_mask=mask[num_held_out:],
        seed=stream(config.seed, "rl"), label="policy", monitor=run.monitor("policy"))
    told = {arm: stages.sample(config=network, policy=params, prompts=tokens[:num_held_out], decoding=decoding,
                               prompt_mask=mask[:num_held_out], seed=stream(config.seed, "test"))
            for arm, params in (("before", original), ("after", policy))}  # fmt: skip
    scores = {arm: judge(rollout) for arm, rollout in told.items()}
    kl = stages.kl_per_response(config=network, policy=policy, reference=original, rollout=told["after"],
                                temperature=config.ppo.temperature)  # fmt: skip
    texts = {arm: read(chat, rollout) for arm, rollout in told.items()}
    begun = chat.hf.batch_decode(tokens[:num_held_out], skip_special_tokens=True)
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(begun, *texts.values())]
    run.write_json("samples.json", rows)
    for row in rows[:3]:
        print("\n".join(f"{name}: {text}" for name, text in row.items()), end="\n\n")
    huggingface.save(run.path / "model", network, policy, source=config.checkpoint, tokenizer=chat.hf, facts={
        "algorithm": "PPO", "reward": happiness.__doc__, "iterations": config.rl.num_iterations, "seed": config.seed,
        "KL to the original (nats per story)": f"{kl.mean():.2f}"})  # fmt: skip
    compared(run.path / "model", network, policy, told["after"])
    gain = t_interval(scores["after"] - scores["before"])
    return {"before": scores["before"].mean(), "after": scores["after"].mean(), "gain_low": gain.low,
            "gain_high": gain.high, "kl": kl.mean(), "ended_before": fetch(told["before"].finished).mean(),
            "ended_after": fetch(told["after"].finished).mean()}  # fmt: skip


def compared(path: pathlib.Path, network, policy, rollout) -> None:
    """The exported model, read by transformers, beside the one that was trained."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        print(f"exported to {path}; with torch installed it is read again here and compared")
        return
    tokens, mask = (x[:1] for x in sequences(rollout))
    tokens, mask = tokens[mask][None], mask[mask][None]
    theirs = AutoModelForCausalLM.from_pretrained(path)(torch.tensor(np.asarray(tokens), dtype=torch.int64)).logits
    ours, _ = make_language_model(network).apply(policy, tokens, mask)
    apart = np.abs(theirs.detach().numpy() - ours).max()
    print(f"exported to {path}; read by transformers its logits differ by {apart:.1e}")


if __name__ == "__main__":
    main(__file__, SCALES, experiment, claims=())
