"""Prepared data sets hold what the raw files hold, and batches are a pure function of (seed, step)."""

import gzip
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from rlhfjax.data.builders import prepare, to_record
from rlhfjax.data.formats import read, split_by_prompt
from rlhfjax.data.loader import Batches
from rlhfjax.rl.fit import batch_order
from rlhfjax.types import Demonstrations

TALK = "\n\nHuman: {} \u2028?\n\nAssistant: {}"
SAFETY = {"is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1}
ROWS = {
    "hh_rlhf": [{"chosen": TALK.format(f"p{i // 2}", "a"), "rejected": TALK.format(f"p{i // 2}", f"b{i}")}
                for i in range(40)],
    "pku_safe_rlhf": [{"prompt": f"p{i}", "response_0": "a", "response_1": "bé", **SAFETY} for i in range(40)],
    "summarize_from_feedback": [
        {"info": {"post": f"p{i}", "title": "t", "subreddit": "s"}, "summaries": [{"text": " a"}, {"text": " b"}],
         "choice": i % 2, "extra": {"confidence": None}} for i in range(40)],
}  # fmt: skip


absent = [name for name in ("tensorflow_datasets", "array_record") if importlib.util.find_spec(name) is None]
needs_tfds = pytest.mark.skipif(bool(absent), reason=f"{' and '.join(absent)} not installed")


def download(folder, name, rows):
    """A download of two files, and a README that is none."""
    folder = folder / name
    (folder / "part").mkdir(parents=True)
    text = ["".join(json.dumps(row) + "\n" for row in half) for half in (rows[:25], rows[25:])]
    (folder / "a.jsonl").write_text(text[0])
    (folder / "part" / "b.jsonl.gz").write_bytes(gzip.compress(text[1].encode()))
    (folder / "README.md").write_text("read me")
    return folder, [folder / "a.jsonl", folder / "part" / "b.jsonl.gz"]


@needs_tfds
@pytest.mark.parametrize("name", ROWS)
def test_what_is_prepared_is_what_the_files_hold(tmp_path, name):
    import tensorflow_datasets as tfds

    folder, files = download(tmp_path, name, [*ROWS[name], ROWS[name][0] | {"choice": 7, "prompt": "", "chosen": ""}])
    builder = prepare(name, folder, data_dir=tmp_path / "prepared", held_out=0.25, seed=3)
    records, report = read(files, seed=3)
    again = tfds.builder_from_directory(builder.data_dir)  # without the download
    for split, expected in zip(("train", "test"), split_by_prompt(records, 0.25, 3)):
        rows = again.as_data_source(split=split)
        assert [to_record(row) for row in rows] == expected and len(expected) >= 3
        assert to_record(rows[2]) == expected[2]
    assert len({record.responses[0] for record in records}) > 1  # some are turned round
    assert len(records) == 40 and again.info.metadata == report.to_json()
    assert again.info.citation.startswith("@article") and again.info.redistribution_info.license
    half, num = again.as_data_source(split="train[:50%]"), builder.info.splits["train"].num_examples
    assert abs(len(half) - num / 2) <= 1 and to_record(half[0]) == split_by_prompt(records, 0.25, 3)[0][0]
    assert "tensorflow" not in sys.modules


@needs_tfds
def test_another_download_is_not_taken_for_the_one_prepared_before(tmp_path):
    folder, _ = download(tmp_path, "hh_rlhf", ROWS["hh_rlhf"])
    first = prepare("hh_rlhf", folder / "a.jsonl", data_dir=tmp_path / "prepared")
    other = prepare("hh_rlhf", folder / "part", data_dir=tmp_path / "prepared")
    assert (first.info.splits.total_num_examples, other.info.splits.total_num_examples) == (25, 15)
    assert first.data_dir == prepare("hh_rlhf", folder / "a.jsonl", data_dir=tmp_path / "prepared").data_dir
    reseeded = prepare("hh_rlhf", folder / "a.jsonl", data_dir=tmp_path / "prepared", seed=1)
    assert len({first.data_dir, other.data_dir, reseeded.data_dir}) == 3


@needs_tfds
def test_rows_without_a_label_are_dropped_and_reported_in_what_is_prepared(tmp_path):
    unhelped = [{name: row[name] for name in row if name != "better_response_id"} for row in ROWS["pku_safe_rlhf"]]
    folder, _ = download(tmp_path, "pku_safe_rlhf", unhelped[:26])
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["pku_safe_rlhf"][:20]))
    builder = prepare("pku_safe_rlhf", folder, data_dir=tmp_path / "prepared")  # a file without helpfulness
    assert builder.info.splits.total_num_examples == 20
    dropped = builder.info.metadata["files"][1]["dropped"]
    assert dropped == {"no label": {"count": 1, "rows": ["row 1: pref is not told"]}}


@needs_tfds
def test_what_cannot_be_prepared(tmp_path):
    for name, path, error, said in (
        ("hh", tmp_path, ValueError, "builders are hh_rlhf, pku_safe_rlhf, summarize_from_feedback, not 'hh'"),
        ("hh_rlhf", tmp_path, ValueError, "holds none of jsonl, .*: download https://github.com/anthropics/hh-rlhf"),
        ("hh_rlhf", tmp_path / "none", FileNotFoundError, "none does not exist: download https://"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            prepare(name, path, data_dir=tmp_path / "prepared")
    (tmp_path / "a.jsonl").write_text('{"prompt": "hi", "chosen": "a", "rejected": "a"}\n')
    with pytest.raises(ValueError, match=r"no comparison is left(.|\n)*row 1: both responses are the same"):
        prepare("hh_rlhf", tmp_path, data_dir=tmp_path / "prepared")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"needs tensorflow_datasets: pip install 'rlhfjax\[data\]'"):
        prepare("hh_rlhf", tmp_path, data_dir=tmp_path)


def test_nothing_heavy_is_loaded_before_it_is_needed():
    heavy = {"tensorflow_datasets", "transformers", "tokenizers", "grain", "pyarrow", "datasets", "tensorflow"}
    code = ("import sys, rlhfjax.data.builders, rlhfjax.data.loader, rlhfjax.data.tokenize, rlhfjax.data.formats; "
            f"print(*sorted({heavy} & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Batches

NUM = np.arange(23)
DATA = Demonstrations(prompts=NUM[:, None], prompt_mask=NUM[:, None] >= 0, tokens=2 * NUM[:, None],
                      mask=NUM[:, None] >= 0)  # fmt: skip
rows_of = lambda batch: batch.prompts[:, 0]




def test_batches_are_a_pure_function_of_seed_and_step():
    batches = Batches(DATA, 4, 20, seed=7)
    order = batch_order(7, 0, 20, 23, 4)
    assert len(batches) == 20
    for step in (19, 3, 0, 3, 11):
        batch = batches[step]
        np.testing.assert_array_equal(rows_of(batch), order[step])
        np.testing.assert_array_equal(batch.tokens, 2 * order[step][:, None])
    assert len(set(np.concatenate([rows_of(batches[step]) for step in range(5)]))) == 20  # no row twice in an epoch
    assert (rows_of(Batches(DATA, 4, 20, seed=8)[0]) != order[0]).any()
    with pytest.raises(IndexError, match="step 20 is not among the 20 steps"):
        batches[20]


def test_any_number_of_hosts_reads_the_same_batch_in_pieces():
    whole = Batches(DATA, 12, 9, seed=1)
    for hosts in (2, 3, 4):
        parts = [Batches(DATA, 12, 9, seed=1, process_index=i, process_count=hosts) for i in range(hosts)]
        for step in (8, 0):
            pieces = [rows_of(part[step]) for part in parts]
            np.testing.assert_array_equal(np.concatenate(pieces), rows_of(whole[step]))
    with pytest.raises(ValueError, match="a batch of 12 does not divide among 5 hosts"):
        Batches(DATA, 12, 9, seed=1, process_count=5)
    with pytest.raises(ValueError, match="process_index must be from 0 to 1, got 2"):
        Batches(DATA, 12, 9, seed=1, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="23 rows cannot fill a batch of 24"):
        Batches(DATA, 24, 9, seed=1)


def test_grain_reads_batches_and_resumes_at_any_step():
    grain = pytest.importorskip("grain", reason="grain is not installed")
    records = [{"row": row} for row in range(23)]
    dataset = grain.MapDataset.source(Batches(records, 4, 9, seed=5)).map(lambda rows: [row["row"] for row in rows])
    order = batch_order(5, 0, 9, 23, 4).tolist()
    assert list(dataset.to_iter_dataset()) == order == [dataset[step] for step in range(9)]
    for first in (0, 1, 6, 8):
        assert list(dataset[first:].to_iter_dataset()) == order[first:]
    iterator = iter(dataset.to_iter_dataset())
    [next(iterator) for _ in range(4)]
    resumed = iter(dataset.to_iter_dataset())
    resumed.set_state(iterator.get_state())
    assert list(resumed) == order[4:]


@needs_tfds
def test_batches_of_what_is_prepared_are_those_of_the_raw_file(tmp_path):
    folder, files = download(tmp_path, "pku_safe_rlhf", ROWS["pku_safe_rlhf"])
    rows = prepare("pku_safe_rlhf", folder, data_dir=tmp_path / "prepared").as_data_source(split="train")
    train, _ = split_by_prompt(read(files)[0], 0.1)
    batches = Batches(rows, 8, 12, seed=2)
    for step in (11, 0, 5):
        assert [to_record(row) for row in batches[step]] == Batches(train, 8, 12, seed=2)[step]
