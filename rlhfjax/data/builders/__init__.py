"""TFDS builders for preference data: a local download -> array_record files, without TensorFlow.

    builder = prepare("hh_rlhf", "downloads/hh-rlhf", data_dir="prepared")
    rows = builder.as_data_source(split="train")         # random access; `to_record(rows[0])` is a formats.Record

Later, without the download: `tfds.builder_from_directory(builder.data_dir)`.
"""

import importlib
import os
from collections.abc import Mapping
from typing import Any

from rlhfjax.data.formats import Record
from rlhfjax.data.report import optional_import

NAMES = {"hh_rlhf": "HhRlhf", "pku_safe_rlhf": "PkuSafeRlhf", "summarize_from_feedback": "SummarizeFromFeedback"}


def prepare(name: str, data_path: str | os.PathLike, *, data_dir: str | os.PathLike, **options):
    """A prepared builder of that data set; what has been prepared from the same files is not prepared again.

    options: see `comparisons.Comparisons`. Raises ValueError, FileNotFoundError, and ImportError without TFDS.
    """
    if name not in NAMES:
        raise ValueError(f"builders are {', '.join(NAMES)}, not {name!r}")
    for module in ("tensorflow_datasets", "array_record.python.array_record_module"):
        optional_import(module, "data", "builders are TensorFlow Datasets'")
    builder_class = getattr(importlib.import_module(f"{__name__}.{name}"), NAMES[name])
    builder = builder_class(data_path=data_path, data_dir=os.fspath(data_dir), **options)
    builder.download_and_prepare()
    return builder


def to_record(row: Mapping[str, Any]) -> Record:
    """A row of a data source as `formats.read` would give it."""
    text = lambda value: value.decode() if isinstance(value, bytes) else value
    number = lambda name: float(row[name]) if name in row else None
    turns = zip(row["prompt"]["role"], row["prompt"]["content"])
    return Record(
        prompt=tuple((text(role), text(content)) for role, content in turns),
        responses=(text(row["response_0"]), text(row["response_1"])), pref=number("pref"),
        harm_pref=number("harm_pref"), source=text(row["source"]),
        signs=(number("sign_0"), number("sign_1")) if "sign_0" in row else None,
    )  # fmt: skip
