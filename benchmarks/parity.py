"""Every Hugging Face family against torch: largest absolute differences, with tiny networks of random weights.

python benchmarks/parity.py                needs transformers and torch; nothing is fetched

logits: of whole left-padded rows, longer than the sliding window and than the length that rope scaling starts from;
decode: the same, token by token through the KV cache; score: of a `*ForSequenceClassification`; export, exported score:
what transformers computes from our export of both; round trip: tensors whose bits an import and an export changed.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from rlhfjax.models.huggingface import load, save
from rlhfjax.models.transformer import make_language_model, make_scalar_model, score

VOCAB, LENGTH, PAD, EOS = 64, 40, 0, 1
_SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=64, pad_token_id=PAD, bos_token_id=2, eos_token_id=EOS)  # fmt: skip
_GQA = _SMALL | dict(num_key_value_heads=2, head_dim=8)
_LLAMA3 = dict(rope_type="llama3", rope_theta=10_000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)  # fmt: skip
_GEMMA = _GQA | dict(num_hidden_layers=4, sliding_window=6, query_pre_attn_scalar=12, final_logit_softcapping=3.0)
_GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=PAD, eos_token_id=EOS)

# name: (model_type, transformers' options, whether our stack is scanned)
NETWORKS = {
    "llama": ("llama", _GQA, False),
    "llama, llama3 rope, tied": ("llama", _GQA | dict(rope_parameters=_LLAMA3, tie_word_embeddings=True), True),
    "llama, linear rope, biases": ("llama", _GQA | dict(
        rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0), attention_bias=True, mlp_bias=True,
        head_dim=12), True),
    "mistral": ("mistral", _GQA | dict(sliding_window=7), True),
    "qwen2": ("qwen2", _GQA | dict(tie_word_embeddings=True), True),
    "qwen2, sliding": ("qwen2", _GQA | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), False),
    "qwen3": ("qwen3", _GQA | dict(head_dim=10), True),
    "gemma2": ("gemma2", _GEMMA | dict(attn_logit_softcapping=2.0), True),
    "gemma3_text": ("gemma3_text", _GEMMA | dict(
        sliding_window_pattern=3, rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
            full_attention=dict(rope_type="linear", rope_theta=10_000.0, factor=8.0))), True),
    "gpt2": ("gpt2", _GPT2, True),
    "gpt2, n_inner, untied": ("gpt2", _GPT2 | dict(n_inner=40, tie_word_embeddings=False), True),
    "gpt_neox": ("gpt_neox", _SMALL | dict(rotary_pct=0.5), True),
    "gpt_neox, not parallel": ("gpt_neox", _SMALL | dict(use_parallel_residual=False, attention_bias=False), True),
}  # fmt: skip


def torch_model(name: str, scalar: bool) -> Any:
    """The network of this name in torch: every weight random, every norm off its initial value."""
    import torch
    import transformers

    model_type, options, _ = NETWORKS[name]
    config = transformers.AutoConfig.for_model(model_type, **options)
    config.num_labels = 1
    kind = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()  # sdpa knows no softcap
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
    return model


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of three rows, two of them left padded; neither pad nor EOS stands among the kept."""
    mask = np.arange(LENGTH) >= np.array([[0], [3], [17]])
    return np.where(mask, np.random.default_rng(0).integers(3, VOCAB, mask.shape), PAD), mask


def torch_outputs(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits `[B, S, V]`, or scores `[B, 1]`, of the torch model; positions count kept tokens."""
    import torch

    positions = np.maximum(mask.cumsum(1) - 1, 0)
    inputs = [torch.from_numpy(x) for x in (tokens, mask.astype(np.int64), positions)]
    with torch.no_grad():
        names = ("input_ids", "attention_mask", "position_ids")
        return model(**dict(zip(names, inputs)), use_cache=False).logits.numpy()


def reload(folder: pathlib.Path, scalar: bool) -> Any:
    """The torch model in `folder`; raises if transformers misses a tensor or finds one too many."""
    import transformers

    kind = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    if any(info.values()):
        raise AssertionError(f"transformers loads {folder.name} with {info}")
    return model.eval()


def parity(name: str, folder: pathlib.Path) -> dict[str, float]:
    """One row of the table. Checkpoints stay in `folder`: causal and scalar, causal-out and scalar-out as exported."""
    (tokens, mask), scans, row, changed = rows(), NETWORKS[name][2], {}, 0
    largest = lambda a, b: float(np.abs(np.asarray(a) - b).max())
    for scalar, kind in enumerate(("causal", "scalar")):
        model = torch_model(name, bool(scalar))
        model.save_pretrained(folder / kind)
        truth = torch_outputs(model, tokens, mask)
        make = make_scalar_model if scalar else make_language_model
        config, params = load(folder / kind, make)
        ours = make(dataclasses.replace(config, scan_layers=scans))
        if scalar:
            row["score"] = largest(jax.jit(score(ours))(params, tokens, mask), truth[:, 0])
        else:
            row["logits"] = largest(jax.jit(ours.apply)(params, tokens, mask)[0][mask], truth[mask])
            step, cache, outputs = jax.jit(ours.apply), ours.init_cache(len(tokens), LENGTH), []
            for t in range(LENGTH):
                now, cache = step(params, tokens[:, t : t + 1], mask[:, t : t + 1], cache=cache)
                outputs.append(np.asarray(now))
            row["decode"] = largest(np.concatenate(outputs, 1)[mask], truth[mask])
        out = folder / f"{kind}-out"
        save(out, config, params, source=folder / kind)
        exported = torch_outputs(reload(out, bool(scalar)), tokens, mask)
        keep = slice(None) if scalar else mask
        row["exported score" if scalar else "export"] = largest(exported[keep], truth[keep])
        before, after = (load_file(path / "model.safetensors") for path in (folder / kind, out))
        same = lambda a, b: a is not None and b is not None and a.shape == b.shape and a.tobytes() == b.tobytes()
        changed += sum(not same(before.get(tensor), after.get(tensor)) for tensor in before | after)
    return row | {"round trip": changed}


def main() -> None:
    columns = ("logits", "decode", "score", "export", "exported score", "round trip")
    print(f"| network | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            row = parity(name, pathlib.Path(folder))
        print(f"| {name} | {' | '.join(f'{row[column]:.1g}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()
