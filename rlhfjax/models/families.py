"""What each Hugging Face architecture calls what our config and parameters say: one table, and configs both ways.

"Ours" is a TransformerConfig, "theirs" a configuration of transformers, which is imported inside functions only.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from rlhfjax.models.transformer import TransformerConfig

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu_exact",
                "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Where one architecture keeps what a TransformerConfig and its parameters say.

    causal, scalar: transformers' classes for a language model and for a scalar model.
    trunk: prefix of all tensors but the head's. modules: our parameter -> its module, "{}" standing for the layer;
        parameters with one module are fused, in this order, once per head (`fused_by_head`) or once in all.
    conv1d: linear maps are stored [in, out], not [out, in].
    fields: our config field -> theirs, where both say the same. fixed: our fields that the architecture decides.
    biases: our name -> their flag, or whether there is one.
    windows: "types", by `layer_types`; "all" layers have the sliding window; None: there is none.
    only: options of theirs that must have this value.
    """

    causal: str
    scalar: str
    trunk: str = "model."
    modules: Mapping[str, str]
    conv1d: bool = False
    fused_by_head: bool = False
    fields: Mapping[str, str]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    windows: Literal["types", "all"] | None = None
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _in_layers(layers: str, **modules: str) -> dict[str, str]:
    return {name: f"{layers}.{{}}.{module}" for name, module in modules.items()}


_LLAMA = {"embed": "embed_tokens", "final_norm": "norm", "head": "lm_head"} | _in_layers(
    "layers", attention_norm="input_layernorm", query="self_attn.q_proj", key="self_attn.k_proj",
    value="self_attn.v_proj", out="self_attn.o_proj", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
    mlp_norm="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip
_GEMMA = _LLAMA | _in_layers(
    "layers", attention_post_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)  # fmt: skip
_ANY_FIELDS = dict(vocab_size="vocab_size", d_model="hidden_size", num_layers="num_hidden_layers",
                   num_heads="num_attention_heads", tie_embeddings="tie_word_embeddings")  # fmt: skip
_LLAMA_FIELDS = _ANY_FIELDS | dict(d_ff="intermediate_size", num_kv_heads="num_key_value_heads", head_dim="head_dim",
                                   norm_eps="rms_norm_eps", activation="hidden_act")  # fmt: skip
_GEMMA_FIELDS = _LLAMA_FIELDS | dict(activation="hidden_activation", query_scalar="query_pre_attn_scalar",
                                     logit_softcap="final_logit_softcapping")  # fmt: skip
_GEMMA_FIXED = dict(norm="rms_plus_one", post_norms=True, embed_scale=True)
_ATTENTION_BIAS = dict(qkv="attention_bias", out="attention_bias")
_GPT_FIXED = dict(norm="layer", mlp="plain")

FAMILIES = {
    "llama": Family(
        causal="LlamaForCausalLM", scalar="LlamaForSequenceClassification", modules=_LLAMA, fields=_LLAMA_FIELDS,
        biases=_ATTENTION_BIAS | {"mlp": "mlp_bias"},
    ),
    "mistral": Family(
        causal="MistralForCausalLM", scalar="MistralForSequenceClassification", modules=_LLAMA, fields=_LLAMA_FIELDS,
        windows="all",
    ),
    "qwen2": Family(
        causal="Qwen2ForCausalLM", scalar="Qwen2ForSequenceClassification", modules=_LLAMA, fields=_LLAMA_FIELDS,
        biases={"qkv": True}, windows="types",
    ),
    "qwen3": Family(
        causal="Qwen3ForCausalLM", scalar="Qwen3ForSequenceClassification", modules=_LLAMA, fields=_LLAMA_FIELDS,
        fixed={"qk_norm": True}, biases=_ATTENTION_BIAS, windows="types",
    ),
    "gemma2": Family(
        causal="Gemma2ForCausalLM", scalar="Gemma2ForSequenceClassification", modules=_GEMMA, fixed=_GEMMA_FIXED,
        fields=_GEMMA_FIELDS | {"attention_softcap": "attn_logit_softcapping"}, biases=_ATTENTION_BIAS, windows="types",
        only={"use_bidirectional_attention": None},
    ),
    "gemma3_text": Family(
        causal="Gemma3ForCausalLM", scalar="Gemma3TextForSequenceClassification", modules=_GEMMA, fields=_GEMMA_FIELDS,
        fixed=_GEMMA_FIXED | {"qk_norm": True}, biases=_ATTENTION_BIAS, windows="types",
        only={"use_bidirectional_attention": None, "attn_logit_softcapping": None},  # transformers does not read it
    ),
    "gpt2": Family(
        causal="GPT2LMHeadModel", scalar="GPT2ForSequenceClassification", trunk="transformer.", conv1d=True,
        modules={"embed": "wte", "positions": "wpe", "final_norm": "ln_f", "head": "lm_head"} | _in_layers(
            "h", attention_norm="ln_1", query="attn.c_attn", key="attn.c_attn", value="attn.c_attn", out="attn.c_proj",
            mlp_norm="ln_2", up="mlp.c_fc", down="mlp.c_proj"),
        fields=_ANY_FIELDS | dict(d_ff="n_inner", num_positions="n_positions", norm_eps="layer_norm_epsilon",
                                  activation="activation_function"),
        fixed=_GPT_FIXED, biases=dict(qkv=True, out=True, mlp=True),
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    "gpt_neox": Family(
        causal="GPTNeoXForCausalLM", scalar="GPTNeoXForSequenceClassification", trunk="gpt_neox.", fused_by_head=True,
        modules={"embed": "embed_in", "final_norm": "final_layer_norm", "head": "embed_out"} | _in_layers(
            "layers", attention_norm="input_layernorm", query="attention.query_key_value",
            key="attention.query_key_value", value="attention.query_key_value", out="attention.dense",
            mlp_norm="post_attention_layernorm", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
        fields=_ANY_FIELDS | dict(d_ff="intermediate_size", norm_eps="layer_norm_eps", activation="hidden_act",
                                  parallel="use_parallel_residual"),
        fixed=_GPT_FIXED, biases=_ATTENTION_BIAS | {"mlp": True},
    ),
}  # fmt: skip


def import_transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Hugging Face checkpoints need transformers: pip install 'rlhfjax[hf]'") from error
    return transformers


def read_theirs(path: str | os.PathLike) -> Any:
    """Their configuration, from config.json in directory `path`; errors as those of `huggingface.read_config`."""
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: name a checkpoint's directory on disk, nothing is fetched")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): copy the checkpoint again") from error
    if "auto_map" in raw:
        raise ValueError(f"{file} asks to run code of its own (auto_map), which is never done: take one with an "
                         "architecture that transformers has")  # fmt: skip
    check_family(raw.get("model_type"), file)  # before transformers, which would say less
    auto = import_transformers().AutoConfig
    try:
        return auto.from_pretrained(file.parent, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of many kinds, some of them huggingface_hub's own
        raise ValueError(f"{file}: transformers refuses it: {error}") from error


def check_family(model_type: str | None, what: object) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"{what}: no architecture {model_type!r} here: take one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def to_ours(theirs: Any, what: object) -> TransformerConfig:
    """Their configuration as ours; `what` names it in errors."""
    family, get = check_family(theirs.model_type, what), lambda name: getattr(theirs, name, None)
    for option, value in {"quantization_config": None, **family.only}.items():
        if (get(option) or None) != (value or None):
            raise ValueError(f"{what}: {option}={get(option)!r} is not supported, only {value!r}: take a checkpoint "
                             "without it")  # fmt: skip
    values = {ours: get(name) for ours, name in family.fields.items()}
    if values["activation"] not in _ACTIVATIONS:
        raise ValueError(f"{what}: no activation {values['activation']!r} here, only {', '.join(_ACTIVATIONS)}")
    values["activation"] = _ACTIVATIONS[values["activation"]]
    values["d_ff"] = values["d_ff"] or 4 * values["d_model"]  # GPT-2's n_inner
    has = {part: get(flag) if isinstance(flag, str) else flag for part, flag in family.biases.items()}
    values["biases"] = tuple(part for part, flag in has.items() if flag)
    if family.windows and get("sliding_window") is not None:
        kinds = get("layer_types") if family.windows == "types" else ["sliding_attention"] * values["num_layers"]
        if other := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"{what}: no layers of {', '.join(sorted(other))} here, only full and sliding attention")
        if "sliding_attention" in kinds:
            full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
            values |= {"window": get("sliding_window"), "full_layers": full}
    if "num_positions" not in family.fields:
        head_size = values.get("head_dim") or values["d_model"] // values["num_heads"]
        values |= _our_rope(theirs.rope_parameters, head_size, what)
    return TransformerConfig(**values | family.fixed)


_BAND = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _our_rope(rope: Mapping[str, Any], head_size: int, what: object) -> dict[str, Any]:
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    kinds = {"default": (), "linear": ("factor",), "llama3": ("factor", *_BAND)}
    kind, known = rope.get("rope_type", "default"), ", ".join(kinds)
    if kind not in kinds:
        raise ValueError(f"{what}: no rope_type {kind!r} here, only {known}: take a checkpoint without that scaling")
    factor, *band = [rope[name] for name in kinds[kind]] or [1.0]
    values = {"rope_theta": rope["rope_theta"], "rope_factor": factor, "rope_band": tuple(band) or None}
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        values["rotary_dim"] = int(head_size * part)
    if local is not None and local != rope:
        if (kind := local.get("rope_type", "default")) != "default":
            raise ValueError(f"{what}: rope_type {kind!r} of the layers with a window is not supported, only default")
        values["window_rope_theta"] = local["rope_theta"]
    return values


def to_theirs(config: TransformerConfig, model_type: str, options: Mapping[str, Any]) -> Any:
    """Our configuration as theirs, as far as this architecture can say it."""
    family, ours = FAMILIES[model_type], _plain(config)
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    values = {theirs: ours[name] for name, theirs in family.fields.items()}
    if config.num_positions is None:  # GPT-2 takes no None, and cannot say it
        values.pop(family.fields.get("num_positions"), None)
    values[family.fields["activation"]] = activations[config.activation]
    values |= {flag: part in config.biases for part, flag in family.biases.items() if isinstance(flag, str)}
    if "query_scalar" in family.fields and ours["query_scalar"] % 1 == 0:
        values[family.fields["query_scalar"]] = int(ours["query_scalar"])  # they want an integer
    if family.windows:
        values["sliding_window"] = config.window
    if family.windows == "types":
        values["layer_types"] = ["sliding_attention" if has else "full_attention" for has in config.windowed]
        values["use_sliding_window"] = config.window is not None
    if "num_positions" not in family.fields:
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_band is not None:
            rope |= {"rope_type": "llama3", "factor": config.rope_factor, **dict(zip(_BAND, config.rope_band))}
        elif config.rope_factor != 1:
            rope |= {"rope_type": "linear", "factor": config.rope_factor}
        if config.rotary_size != config.head_size or model_type == "gpt_neox":
            rope["partial_rotary_factor"] = config.rotary_size / config.head_size
        local = {"rope_type": "default", "rope_theta": config.window_rope_theta}
        local = rope if config.window_rope_theta is None else local
        nested = {"full_attention": rope, "sliding_attention": local}
        values["rope_parameters"] = nested if model_type == "gemma3_text" else rope
    return import_transformers().AutoConfig.for_model(model_type, **values | dict(options))


def _plain(config: TransformerConfig) -> dict[str, Any]:
    """What a config says of the network, defaults spelt out; not how it is computed."""
    values = dataclasses.asdict(config)
    for name in ("scan_layers", "remat", "compute_dtype"):
        del values[name]
    values |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_size, "biases": sorted(config.biases)}
    values["query_scalar"] = config.query_scalar or config.head_size
    values["full_layers"] = sorted(config.full_layers) if any(config.windowed) else []
    if not any(config.windowed):
        values["window"] = values["window_rope_theta"] = None
    if config.num_positions is None:
        return values | {"rotary_dim": config.rotary_size}
    return {name: value for name, value in values.items() if not name.startswith(("rope", "rotary", "window_rope"))}


def compare(config: TransformerConfig, theirs: Any) -> list[str]:
    """Where their configuration says something else than ours, as text."""
    ours, said = _plain(config), _plain(to_ours(theirs, theirs.model_type))
    return [f"{name}={ours.get(name)!r} ({said.get(name)!r} there)" for name in sorted(ours | said)
            if ours.get(name) != said.get(name)]  # fmt: skip
