"""What the builders share. Importing this module needs tensorflow_datasets; `builders.prepare` says so in words."""

import hashlib
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from rlhfjax.data.formats import READERS, Record, read, split_by_prompt
from rlhfjax.data.report import Drop, Report


class Comparisons(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Comparisons from local files, in their order: splits "train" and "test" by prompt, whatever the files are called.

    Args:
        data_path: a file of `formats.read`, or a directory, of which every such file is read.
        held_out: share of the prompts in "test".
        seed: of the split, and of which responses are turned round.
    The data set's config is named by the content of the files and these numbers, so that another download is never
    taken for this one. `builder.info.metadata` holds the report on the rows.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look beside the code for checksums, by importlib_resources, which it does not install
    SHAPE: str
    LABELS: tuple[str, ...]
    DESCRIPTION: str
    HOMEPAGE: str
    CITATION: str
    LICENSE: str

    def __init__(self, *, data_path: str | os.PathLike, held_out: float = 0.1, seed: int = 0, **options):
        self._root, self._held_out, self._seed = pathlib.Path(data_path), held_out, seed
        if not self._root.exists():
            raise FileNotFoundError(f"{self._root} does not exist: download {self.HOMEPAGE} and give its path")
        one = self._root.is_file() or (self._root / "state.json").exists()
        kind = lambda path: path.name.removesuffix(".gz").rpartition(".")[2]
        self._paths = [self._root] if one else sorted(p for p in self._root.rglob("*") if kind(p) in READERS)
        if not self._paths:
            raise ValueError(f"{self._root} holds none of {', '.join(READERS)}: download {self.HOMEPAGE}")
        content = hashlib.sha256(repr((held_out, seed)).encode())
        for path in self._paths:
            for file in sorted(path.rglob("*.arrow")) if path.is_dir() else [path]:
                with open(file, "rb") as opened:
                    content.update(hashlib.file_digest(opened, "sha256").digest())
        config = tfds.core.BuilderConfig(name=f"from_{content.hexdigest()[:12]}", version=self.VERSION)
        super().__init__(config=config, **{"file_format": "array_record"} | options)

    def _info(self) -> tfds.core.DatasetInfo:
        text, number = tfds.features.Text, lambda: tfds.features.Scalar(np.float32)
        features = {
            "prompt": tfds.features.Sequence({"role": text(), "content": text()}), "response_0": text(),
            "response_1": text(), "source": text(), **{label: number() for label in self.LABELS},
        }  # fmt: skip
        return tfds.core.DatasetInfo(
            builder=self, description=self.DESCRIPTION, features=tfds.features.FeaturesDict(features),
            homepage=self.HOMEPAGE, citation=self.CITATION, license=self.LICENSE, disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        records, report = read(self._paths, shape=self.SHAPE, seed=self._seed)
        train, test = split_by_prompt(records, self._held_out, self._seed)
        splits = {name: list(self._rows(rows, report)) for name, rows in (("train", train), ("test", test))}
        if not any(splits.values()):
            raise ValueError(f"no comparison is left\n{report.table()}")
        self.info.metadata.update(report.to_json())
        return {name: iter(rows) for name, rows in splits.items() if rows}  # TFDS cannot write an empty split

    def _rows(self, records: list[Record], report: Report):
        for key, record in enumerate(records):
            signs = record.signs or (None, None)
            labels = {"pref": record.pref, "harm_pref": record.harm_pref, "sign_0": signs[0], "sign_1": signs[1]}
            labels = {name: labels[name] for name in self.LABELS}
            if missing := [name for name, value in labels.items() if value is None]:
                report.of(record.source).lose(Drop("no label", f"{missing[0]} is not told"), record.row)
                continue
            yield key, {
                "prompt": [{"role": role, "content": text} for role, text in record.prompt], "source": record.source,
                "response_0": record.responses[0], "response_1": record.responses[1], **labels,
            }  # fmt: skip

    def _generate_examples(self, rows):
        yield from rows
