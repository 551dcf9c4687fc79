"""Hugging Face checkpoints in, Hugging Face checkpoints out.

    config, params = load("checkpoints/llama", make_language_model)     # or make_scalar_model: a reward model
    save("runs/.../policy", config, params, source="checkpoints/llama", tokenizer=tokenizer, facts={"seed": 7})

A directory of safetensors is read tensor by tensor, each slice straight onto the devices that hold it under the ambient
mesh, and written back so that transformers loads it as a model of its own. `families.py` says where each architecture
keeps what our config and parameters say; the same table reads and writes. What is imported and exported in one dtype is
the same bit for bit.

Only `transformers` is needed, for configurations, and only inside these functions; never torch. Nothing is fetched,
unpickled, or run from a checkpoint. bfloat16 comes and goes as NumPy arrays of `ml_dtypes`, which JAX brings.
"""

import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhfjax.models.families import (
    FAMILIES,
    Family,
    check_family,
    compare,
    import_transformers,
    read_theirs,
    to_ours,
    to_theirs,
)
from rlhfjax.models.transformer import Model, TransformerConfig, check_params, make_language_model, make_scalar_model
from rlhfjax.parallel.memory import bytes_per_device, check_memory
from rlhfjax.parallel.mesh import fetch, shardings
from rlhfjax.types import Params

# Buffers that old files of GPT-2, GPT-NeoX and Llama hold beside their weights: constants that nothing needs.
_BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$")
_DTYPES = ("F32", "BF16", "F16", "F64")


def read_config(path: str | os.PathLike) -> TransformerConfig:
    """The configuration of the checkpoint in directory `path`, as its config.json has it.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it names an architecture or an option that this library has not, or code of its own.
    """
    return to_ours(read_theirs(path), pathlib.Path(path) / "config.json")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter, or one layer of it, lies in a checkpoint.

    name: of the tensor, "{}" standing for the layer. flip: it is [out, in], ours [in, out].
    part, parts, groups: its outputs are `groups` times `parts` equal pieces, and ours are piece `part` of every group.
    """

    name: str
    flip: bool
    part: int = 0
    parts: int = 1
    groups: int = 1

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        ours = (*ours, 1) if self.flip and len(ours) == 1 else ours  # a scalar head
        whole = (*ours[:-1], ours[-1] * self.parts)
        return whole[::-1] if self.flip else whole

    def read(self, tensor: Any, index: tuple[slice, ...], outputs: int) -> np.ndarray:
        """The part `index` of ours, which has that many outputs, from a tensor or a slice of a file."""
        *lead, out = (*index, slice(0, 1)) if self.flip and len(index) == 1 else index
        width = outputs // self.groups
        row = lambda i: (i // width * self.parts + self.part) * width + i % width
        rows = slice(row(out.start), row(out.stop - 1) + 1)
        piece = tensor[(rows, *lead)].T if self.flip else tensor[(*lead, rows)]
        piece = piece if self.parts == 1 else piece[..., row(np.arange(out.start, out.stop)) - rows.start]
        return piece[:, 0] if len(index) < piece.ndim else piece

    def join(self, pieces: list[np.ndarray]) -> np.ndarray:
        """The tensor, of all parts in order."""
        grouped = [piece.reshape(*piece.shape[:-1], self.groups, -1) for piece in pieces]
        whole = np.stack(grouped, -2).reshape(*pieces[0].shape[:-1], -1)
        whole = whole[:, None] if self.flip and whole.ndim == 1 else whole
        return np.ascontiguousarray(whole.T if self.flip else whole)  # safetensors writes the buffer as it lies


def _places(family: Family, config: TransformerConfig, shapes: Params, trunk: str) -> dict[str, _Place]:
    """The place of every parameter, by its path."""

    def place(path: str, shape: tuple[int, ...]) -> _Place:
        *above, last = path.split("/")
        owner = above[-1] if last in ("scale", "bias") else last.removesuffix("_bias")
        is_bias = last.endswith("bias")
        is_linear = not is_bias and last not in ("scale", "embed", "positions")
        flip = is_linear and (last == "head" or not family.conv1d)
        module = "score" if path == "head" and len(shape) == 1 else family.modules[owner]
        fused = [name for name, other in family.modules.items() if other == module] or [owner]
        groups = config.num_heads if family.fused_by_head and len(fused) > 1 else 1
        name = f"{'' if path == 'head' else trunk}{module}.{'bias' if is_bias else 'weight'}"
        return _Place(name, flip, fused.index(owner), len(fused), groups)

    return {path: place(path, leaf.shape) for path, leaf in _leaves(shapes)}


def _leaves(tree: Params) -> list[tuple[str, Any]]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in named]


class _Files:
    """The tensors of a directory of safetensors: shapes and files at once, contents slice by slice."""

    def __init__(self, path: pathlib.Path, stack: contextlib.ExitStack):
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.is_file():
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        elif single.is_file():
            files = [single]
        elif pickles := sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")):
            raise ValueError(f"{path} has pickled weights only ({', '.join(pickles[:3])}), which can run code: if you "
                             "trust them, load them with transformers and save_pretrained")  # fmt: skip
        else:
            raise FileNotFoundError(f"{path} has neither {single.name} nor {index.name}: copy the checkpoint again")
        self.tensors, self.files = {}, {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}, which {index.name} names, does not exist: copy the checkpoint again")
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}): copy the checkpoint again") from error
            names = list(handle.keys())
            self.tensors |= {name: handle.get_slice(name) for name in names}
            self.files |= dict.fromkeys(names, file)

    def check(self, path: pathlib.Path, wanted: Mapping[str, tuple[int, ...]], ignored: set[str]) -> None:
        """Raise ValueError, naming every tensor and its file, unless these are the tensors with these shapes."""
        wrong = [f"{name} {shape} is missing" for name, shape in wanted.items() if name not in self.tensors]
        for name, tensor in self.tensors.items():
            shape, where = tuple(tensor.get_shape()), self.files[name].name
            if name not in wanted:
                if name not in ignored and not _BUFFERS.search(name):
                    wrong.append(f"{name} {shape} in {where} belongs to no parameter")
            elif shape != wanted[name]:
                wrong.append(f"{name} {shape} in {where} should be {wanted[name]}")
            elif tensor.get_dtype() not in _DTYPES:
                wrong.append(f"{name} in {where} is {tensor.get_dtype()}: quantised weights are not supported")
        if wrong:
            raise ValueError(f"{path} is not what its config.json says ({len(wrong)} tensors): " + "; ".join(wrong[:20])
                             + "; ..." * (len(wrong) > 20))  # fmt: skip


def load(
    path: str | os.PathLike, make: Callable[[TransformerConfig], Model] = make_language_model, *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> tuple[TransformerConfig, Params]:  # fmt: skip
    """The configuration and the parameters of the checkpoint in directory `path`, laid out on the ambient mesh.

    Args:
        make: what the parameters are for: `make_language_model`, or `make_scalar_model` for a reward or cost model. Of
            a `*ForSequenceClassification` with one label a scalar model has the head, of a language model the trunk
            and a head of zeros.
        dtype: of the parameters, whatever the files have.
    Raises:
        FileNotFoundError, ValueError: see `read_config`; a file is absent, damaged or pickled; tensors are missing, of
            another shape, or belong to no parameter; a language model is asked of a scalar model's checkpoint.
    """
    path = pathlib.Path(path)
    theirs = read_theirs(path)
    config, family = to_ours(theirs, path / "config.json"), FAMILIES[theirs.model_type]
    model = make(config)
    shapes = jax.eval_shape(lambda key: jax.tree.map(lambda p: p.astype(dtype), model.init(key)), jax.random.key(0))
    layout = shardings(shapes, model.logical_axes())
    placed = shapes if layout is None else jax.tree.map(lambda x, s: x.update(sharding=s), shapes, layout)
    check_memory(f"the parameters of {path}", parameters=bytes_per_device(placed))
    with contextlib.ExitStack() as stack:
        files = _Files(path, stack)
        # A checkpoint of the bare trunk, as GPT-2's own, has no prefix.
        trunk = family.trunk if any(name.startswith(family.trunk) for name in files.tensors) else ""
        places = _places(family, config, shapes, trunk)
        head, scores = family.modules["head"] + ".weight", "score.weight" in files.tensors
        is_scalar = "head" in shapes and shapes["head"].ndim == 1
        if "head" not in shapes:
            _check_tied(files, head, places["embed"].name, path)
        elif scores and not is_scalar and head not in files.tensors:
            raise ValueError(f"{path} is a classifier (score.weight in {files.files['score.weight'].name}) without "
                             f"{head}: load it with make_scalar_model, or take a language model")  # fmt: skip
        wanted = {}
        for name, leaf in _leaves(shapes):
            stacked, place = name.startswith("blocks/"), places[name]
            if not (name == "head" and is_scalar and not scores):  # that one is made of zeros
                layers = range(leaf.shape[0]) if stacked else (0,)
                wanted |= {place.name.format(i): place.shape(leaf.shape[stacked:]) for i in layers}
        files.check(path, wanted, ignored={head, "score.weight"})
        arrays = [_read(files, places[name], leaf, name.startswith("blocks/")) for name, leaf in _leaves(placed)]
    return config, jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _check_tied(files: _Files, head: str, embed: str, path: pathlib.Path) -> None:
    if {head, embed} <= set(files.tensors):
        a, b = files.tensors[head], files.tensors[embed]
        rows, step = a.get_shape()[0], 4096
        pieces = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        if a.get_shape() != b.get_shape() or any((a[piece] != b[piece]).any() for piece in pieces):
            raise ValueError(f"{path / 'config.json'} says tie_word_embeddings, but {head} and {embed} in "
                             f"{files.files[head].name} differ: say false there")  # fmt: skip


def _read(files: _Files, place: _Place, leaf: jax.ShapeDtypeStruct, stacked: bool) -> jax.Array:
    """One parameter, each shard of it read once, on its devices; zeros if the files lack it."""
    known = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, leaf.shape))
        if (key := tuple((s.start, s.stop) for s in index)) not in known:
            known[key] = out = np.zeros([stop - start for start, stop in key], leaf.dtype)
            for i, layer in enumerate(range(*key[0]) if stacked else (0,)):
                if (tensor := files.tensors.get(place.name.format(layer))) is not None:
                    out[i if stacked else ...] = place.read(tensor, index[stacked:], leaf.shape[-1])
        return known[key]

    if leaf.sharding is None:
        return jnp.asarray(shard((slice(None),) * leaf.ndim))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


# ---- export


def save(
    path: str | os.PathLike, config: TransformerConfig, params: Params, *,
    source: str | os.PathLike | Any = None, model_type: str | None = None, options: Mapping[str, Any] | None = None,
    tokenizer: Any = None, chat_template: str | None = None, generation: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None, dtype: Literal["float32", "bfloat16"] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Write a language model, or a scalar model as a `*ForSequenceClassification`, as transformers loads it.

    config.json, safetensors (several files and their index above `max_shard_bytes`), generation_config.json for a
    language model, the tokenizer's files and chat template, and a README.md with the facts. All processes call it,
    process 0 writes; config.json comes last, so that a directory with one is whole.

    Args:
        source: the checkpoint directory, or transformers' configuration, that the model came from: all that this
            library has no field for (position limits, token ids) is kept. None: the configuration is made anew.
        model_type: the architecture where there is no source; None: the first that can say all of `config`.
        options: entries of config.json to set, by transformers' names: `max_position_embeddings`, `pad_token_id`, ...
        chat_template: Jinja text in place of the tokenizer's own.
        generation: entries of generation_config.json; None: those of the source.
        facts: rows of the model card; `license`, `base_model`, `datasets`, `language` also stand in its front matter.
        dtype: of the weights; None: as they are.
    Raises:
        FileExistsError: `path` exists and is not empty.
        ValueError: no architecture, or not this one, can say what `config` says (the fields are named); a scalar model
            without `pad_token_id`, or one that is the EOS, behind which transformers would not read the score; the
            tokenizer has more tokens than the model.
    """
    path, options = pathlib.Path(path), dict(options or {})
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another directory")
    scalar = "head" in params and params["head"].ndim == 1
    check_params(params, jax.eval_shape((make_scalar_model if scalar else make_language_model)(config).init,
                                        jax.random.key(0)))  # fmt: skip
    dtypes = {str(jnp.dtype(dtype or leaf.dtype)) for leaf in jax.tree.leaves(params)}
    if len(dtypes) > 1:
        raise ValueError(f"the parameters are {' and '.join(sorted(dtypes))}: say which dtype to write")
    theirs = _export_config(config, source, model_type, options, tokenizer)
    family = FAMILIES[theirs.model_type]
    theirs.architectures, theirs.dtype = [family.scalar if scalar else family.causal], *dtypes
    if scalar:
        theirs.num_labels = 1
        _check_pad(theirs)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}")
    writes = jax.process_index() == 0
    _barrier()  # nobody finds the directory begun
    if writes:
        path.mkdir(parents=True, exist_ok=True)
    files, total = _shards(_tensors(params, _places(family, config, params, family.trunk)), *dtypes, max_shard_bytes)
    weight_map = {}
    for i, group in enumerate(files):
        numbered = "" if len(files) == 1 else f"-{i + 1:05d}-of-{len(files):05d}"
        name = f"model{numbered}.safetensors"
        arrays = {tensor: np.asarray(get(), jnp.dtype(*dtypes)) for tensor, get, _ in group}
        if writes:
            save_file(arrays, path / name, {"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
    if writes:
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        if chat_template is not None:
            (path / "chat_template.jinja").write_text(chat_template)
        if not scalar:
            _generation_config(theirs, source, generation).save_pretrained(path)
        (path / "README.md").write_text(_card(path.name, theirs, scalar, facts or {}))
        theirs.save_pretrained(path)
    _barrier()


def _barrier() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("rlhfjax.models.huggingface.save")


def _export_config(config: TransformerConfig, source, model_type, options, tokenizer) -> Any:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    told = {name: getattr(tokenizer, name, None) for name in ids}
    if source is not None:
        found = read_theirs(source) if isinstance(source, str | os.PathLike) else copy.deepcopy(source)
        if found.pad_token_id is None:
            options = {"pad_token_id": told["pad_token_id"]} | options
        for name, value in options.items():
            setattr(found, name, value)
        candidates = {found.model_type: found}
    else:
        names, candidates = [model_type] if model_type else list(FAMILIES), {}
        check_family(names[0], "model_type")
        for name in names:
            try:
                candidates[name] = to_theirs(config, name, told | options)
            except Exception as error:  # d_model that num_heads does not divide, say
                refused = f"{name}: transformers refuses this network: {error}"
        if not candidates:
            raise ValueError(refused)
    differences = {name: compare(config, theirs) for name, theirs in candidates.items()}
    best = min(differences, key=lambda name: len(differences[name]))
    if differences[best]:
        raise ValueError(f"{best} cannot say what this network is{' (nor can another)' * (len(candidates) > 1)}: "
                         f"{', '.join(differences[best])}")  # fmt: skip
    return candidates[best]


def _check_pad(theirs: Any) -> None:
    pad, eos = theirs.pad_token_id, theirs.eos_token_id
    if pad is None:
        raise ValueError("a scalar model is read at its last token that is no pad: say which in options, pad_token_id")
    if pad in (eos if isinstance(eos, list) else [eos]):
        raise ValueError(f"pad_token_id={pad} is the EOS: transformers would read the score before it, this library at "
                         "it; choose another pad token in options")  # fmt: skip
    if not 0 <= pad < theirs.vocab_size:
        raise ValueError(f"pad_token_id={pad} must lie in 0..{theirs.vocab_size - 1}")


def _tensors(params: Params, places: Mapping[str, _Place]) -> Iterator[tuple[str, Callable[[], np.ndarray], int]]:
    """Every tensor's name, how to gather it (a step of all processes), and its number of elements."""
    leaves, parts = dict(_leaves(params)), {}
    for path, place in places.items():
        parts.setdefault(place.name, {})[place.part] = path
    for name, by_part in parts.items():
        paths = [by_part[part] for part in sorted(by_part)]
        stacked, shape = paths[0].startswith("blocks/"), leaves[paths[0]].shape
        for i in range(shape[0]) if stacked else (None,):
            pieces = lambda paths=paths, i=i: [fetch(leaves[p] if i is None else leaves[p][i]) for p in paths]
            join = places[paths[0]].join
            elements = sum(int(np.prod(leaves[p].shape[stacked:])) for p in paths)
            yield name.format(i), lambda join=join, pieces=pieces: join(pieces()), elements


def _shards(tensors, dtype: str, max_bytes: int) -> tuple[list[list], int]:
    """Tensors in groups of at most so many bytes, one at least in each; and the bytes of all."""
    groups, room, total = [], 0, 0
    for tensor in tensors:
        size = tensor[2] * jnp.dtype(dtype).itemsize
        if size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room, total = room - size, total + size
    return groups, total


def _generation_config(theirs: Any, source: Any, generation: Mapping[str, Any] | None) -> Any:
    made = import_transformers().GenerationConfig
    if generation is not None:
        return made(**generation)
    if isinstance(source, str | os.PathLike) and (pathlib.Path(source) / "generation_config.json").is_file():
        return made.from_pretrained(source)
    ids = {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return made(**{name: value for name, value in ids.items() if value is not None})


def _card(name: str, theirs: Any, scalar: bool, facts: Mapping[str, Any]) -> str:
    front = {"library_name": "transformers", "tags": ["rlhfjax"],
             "pipeline_tag": "text-classification" if scalar else "text-generation"}  # fmt: skip
    front |= {key: facts[key] for key in ("license", "base_model", "datasets", "language") if key in facts}
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    what = ("A scalar model (reward or cost): the label's logit at the last token that is no pad is the score."
            if scalar else "A language model.")  # fmt: skip
    rows = {"architecture": theirs.architectures[0], "dtype": theirs.dtype} | dict(facts)
    return "\n".join([
        "---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {name}", "",
        f"{what} Trained and exported with rlhfjax.", "", "| fact | value |", "|---|---|",
        *(f"| {cell(key)} | {cell(value)} |" for key, value in rows.items()), "",
    ])  # fmt: skip
