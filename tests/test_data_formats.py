"""Preference files in every shape that is read, against records written by hand, and everything that is refused."""

import dataclasses
import gzip
import json
import re
import subprocess
import sys

import pytest

from rlhfjax.data.formats import KNOWN, SHAPES, Record, in_random_order, read, split_by_prompt, turned

SAFE = Record(prompt=(("user", "hi"),), responses=("a", "b"))
replace = dataclasses.replace
user, assistant = ((lambda text, role=role: {"role": role, "content": text}) for role in ("user", "assistant"))
TALK = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: "
TALKED = (("user", "one"), ("assistant", "two"), ("user", "three"))
PAIR = {"prompt": "hi", "response_0": "a", "response_1": "b"}
SAFETY = {"is_response_0_safe": False, "is_response_1_safe": True}
PKU = PAIR | SAFETY | {"better_response_id": 0, "safer_response_id": 1}
PKU_RECORD = replace(SAFE, pref=1.0, harm_pref=1.0, signs=(1.0, -1.0))  # the first helps more, and harms more
TRL = {"prompt": "hi", "chosen": "a", "rejected": "b"}
RATED = TRL | {"chosen_rating": 4, "rejected_rating": 1.5}
SUMMARY = {
    "info": {"post": "long", "title": "T", "subreddit": "s"}, "summaries": [{"text": " a"}, {"text": " b"}],
    "choice": 1, "extra": {"confidence": 9},
}  # fmt: skip
JUDGED = {"query": "P TL;DR:", "postprocessed_response": "ours", "reference_responses": "theirs", "preferred": "ours",
          "shuffled_index": "0"}  # fmt: skip
VOTED = {"prompt": "hi", "safe_response": "a", "unsafe_response": "b"}

ROWS = [  # what it is, its shape, a row, its record
    ("strings", "trl", TRL, replace(SAFE, pref=1.0)),
    ("strings with half a prompt in common", "trl", {"chosen": "The sky is blue.", "rejected": "The sky is black."},
     Record(prompt=(("user", "The sky is"),), responses=(" blue.", " black."), pref=1.0)),
    ("strings whose prompt ends in a space", "trl", {"chosen": "Q: why? because", "rejected": "Q: why? never"},
     Record(prompt=(("user", "Q: why?"),), responses=(" because", " never"), pref=1.0)),
    ("messages with a prompt", "trl",
     {"prompt": [{"role": "system", "content": "be kind"}, user("hi")], "chosen": [assistant("a")],
      "rejected": [assistant("b")]},
     Record(prompt=(("system", "be kind"), ("user", "hi")), responses=("a", "b"), pref=1.0)),
    ("messages without", "trl", {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
     replace(SAFE, pref=1.0)),
    ("a prompt beside whole dialogues", "trl",
     {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
     replace(SAFE, pref=1.0)),
    ("messages that go on behind the prompt", "trl",
     {"prompt": [user("one")], "chosen": [assistant("two"), user("three"), assistant("a")],
      "rejected": [assistant("two"), user("three"), assistant("b")]},
     Record(prompt=TALKED, responses=("a", "b"), pref=1.0)),
    ("a dialogue of Human and Assistant", "trl", {"chosen": TALK + "a", "rejected": TALK + "b"},
     Record(prompt=TALKED, responses=("a", "b"), pref=1.0)),
    ("a prompt of Human and Assistant", "trl", {"prompt": TALK, "chosen": " a", "rejected": " b"},
     Record(prompt=TALKED, responses=(" a", " b"), pref=1.0)),
    ("a prompt of Human alone", "trl", {"prompt": "\n\nHuman: hi", "chosen": "a", "rejected": "b"},
     replace(SAFE, pref=1.0)),
    ("a soft label", "trl", TRL | {"soft_label": 0.25}, replace(SAFE, pref=0.25)),
    ("a margin", "trl", TRL | {"margin": 2}, replace(SAFE, pref=1.0, margin=2.0)),
    ("two ratings", "trl", RATED, replace(SAFE, pref=1.0, margin=2.5)),
    ("ratings beside a label for the second", "trl", TRL | {"pref": 0, "score_chosen": -1, "score_rejected": 1},
     replace(SAFE, pref=0.0, margin=2.0)),
    ("PKU's columns", "pair", PKU, PKU_RECORD),
    ("PKU's columns from the other side", "pair",
     PKU | {"is_response_0_safe": True, "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0},
     replace(SAFE, pref=0.0, harm_pref=0.0, signs=(-1.0, 1.0))),
    ("two harmless ones, the second safer", "pair", PKU | {"is_response_0_safe": True},
     replace(SAFE, pref=1.0, harm_pref=1.0, signs=(-1.0, -1.0))),
    ("soft labels of both kinds", "pair", PAIR | {"pref": 0.75, "harm_pref": 0.1},
     replace(SAFE, pref=0.75, harm_pref=0.1)),
    ("one safe and one unsafe", "safe_unsafe", VOTED, replace(SAFE, harm_pref=0.0, signs=(-1.0, 1.0))),
    ("votes", "safe_unsafe", VOTED | {"votes": 3, "votes_against": 1, "label_conflict": False},
     replace(SAFE, harm_pref=0.25, signs=(-1.0, 1.0))),
    ("summaries", "summaries", SUMMARY,
     Record(prompt=(("user", "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: long\n\nTL;DR:"),), responses=(" a", " b"),
            pref=0.0)),
    ("summaries of an article", "summaries", SUMMARY | {"info": {"article": "long", "title": None}, "choice": 0},
     Record(prompt=(("user", "POST: long\n\nTL;DR:"),), responses=(" a", " b"), pref=1.0)),
    ("judged, ours shown first", "judged", JUDGED,
     Record(prompt=(("user", "P TL;DR:"),), responses=("ours", "theirs"), pref=1.0)),
    ("judged, ours shown second", "judged", JUDGED | {"shuffled_index": "1"},
     Record(prompt=(("user", "P TL;DR:"),), responses=("theirs", "ours"), pref=0.0)),
    ("outputs", "outputs", {"input": "hi", "output_1": "a", "output_2": "b", "label": 2}, replace(SAFE, pref=0.0)),
    ("a response called bad", "unpaired", {"prompt": "hi", "completion": "a", "label": False},
     replace(SAFE, responses=("a",), pref=0.0)),
    ("a response of messages called good", "unpaired",
     {"prompt": [user("hi")], "completion": [assistant("a")], "label": True},
     replace(SAFE, responses=("a",), pref=1.0)),
    ("a demonstration", "unpaired", {"prompt": "hi", "completion": "a"}, replace(SAFE, responses=("a",))),
    ("a demonstration of messages", "messages", {"messages": [user("hi"), assistant("a")]},
     replace(SAFE, responses=("a",))),
    ("a prompt", "prompts", {"prompt": "hi", "id": 7}, replace(SAFE, responses=())),
    ("a prompt that breaks a line in Unicode", "prompts", {"prompt": "h\u2028\x85i"},
     Record(prompt=(("user", "h\u2028\x85i"),))),
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="\n")
    return path


@pytest.mark.parametrize("shape, row, record", [case[1:] for case in ROWS], ids=[case[0] for case in ROWS])
def test_a_row_of_every_shape(tmp_path, shape, row, record):
    path = write(tmp_path / "rows.jsonl", [row])
    records, report = read(path, seed=None)
    assert records == [replace(record, source=f"{path}:1")]
    assert [(file.shape, file.read, file.kept, file.dropped) for file in report.files] == [(shape, 1, 1, {})]


def test_every_shape_has_a_row():
    assert {case[1] for case in ROWS} == set(SHAPES) and KNOWN >= set(PKU) | set(RATED)


# Files

COLUMNS = [PKU | {"prompt": f"p{i}, \"quoted\"\nsecond line"} for i in range(3)]
EXPECTED = [replace(PKU_RECORD, prompt=(("user", row["prompt"]),)) for row in COLUMNS]


def as_csv(path):
    quote = lambda value: '"' + str(value).replace('"', '""') + '"'
    rows = [list(PKU), *([row[name] for name in PKU] for row in COLUMNS)]
    path.write_text("".join(",".join(map(quote, row)) + "\r\n" for row in rows), newline="")


def as_parquet(path):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    __import__("pyarrow.parquet").parquet.write_table(arrow.Table.from_pylist(COLUMNS), path)


def as_saved(path):
    datasets = pytest.importorskip("datasets", reason="only `datasets` writes what save_to_disk writes")
    datasets.Dataset.from_list(COLUMNS).save_to_disk(path)


def packed(write):
    def pack(path):
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return pack


as_lines, as_array = lambda path: write(path, COLUMNS), lambda path: path.write_text(json.dumps(COLUMNS, indent=1))
FILES = {"a.jsonl": as_lines, "a.jsonl.gz": packed(as_lines), "a.json": as_array, "lines.json": as_lines,
         "a.csv": as_csv, "a.csv.gz": packed(as_csv), "a.parquet": as_parquet, "saved": as_saved}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_hold_the_same_records(tmp_path, name):
    FILES[name](tmp_path / name)
    records, _ = read(tmp_path / name, seed=None)
    assert [replace(record, source="") for record in records] == EXPECTED
    assert [record.row for record in records] == [1, 2, 3]


def test_messages_come_back_from_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    row = {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")], "margin": float("nan")}
    table = arrow.Table.from_pylist([row | {"margin": 1.0}, row, row | {"margin": None}])
    __import__("pyarrow.parquet").parquet.write_table(table, tmp_path / "a.parquet")
    records, report = read(tmp_path / "a.parquet", seed=None)
    assert [(record.prompt, record.responses, record.margin) for record in records] == [
        ((("user", "hi"),), ("a", "b"), 1.0), ((("user", "hi"),), ("a", "b"), None)]  # fmt: skip
    assert report.files[0].dropped == {"non-finite score": ["row 2: field 'margin' is nan"]}


# What is refused: a second row behind a good one (as text, or as an object), the reason and what is said of it

BAD_ROWS = [
    ("no JSON", TRL, '{"prompt": "hi", "chosen"', "malformed", "not JSON: Expecting ':' delimiter at character"),
    ("a list", TRL, [1, 2], "malformed", "a row is an object, not a list"),
    ("nothing", TRL, None, "malformed", "a row is an object, not nothing"),
    ("an empty line", TRL, "", "malformed", "an empty line"),
    ("NaN", RATED, RATED | {"chosen_rating": float("nan")}, "non-finite score", "NaN is no JSON number"),
    ("Infinity", RATED, RATED | {"chosen_rating": float("inf")}, "non-finite score", "Infinity is no JSON number"),
    ("a number beyond floats", RATED, json.dumps(RATED).replace("1.5", "1e999"), "non-finite score",
     "field 'rejected_rating' is inf"),
    ("a key twice", TRL, '{"prompt": "hi", "chosen": "a", "rejected": "b", "chosen": "c"}', "malformed",
     "field 'chosen' comes twice"),
    ("half a surrogate pair", TRL, '{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "malformed",
     "field 'prompt' holds half of a surrogate pair, which no text can"),
    ("Latin-1", TRL, b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}', "malformed", "not UTF-8 at byte 15"),
    ("brackets without end", TRL, "[" * 200_000, "malformed", "not readable as JSON: maximum recursion depth"),
    ("a column missing", TRL, {"prompt": "hi", "chosen": "a"}, "malformed", "field 'rejected' is missing"),
    ("a column too many", TRL, TRL | {"margin": 1}, "malformed",
     "field 'margin' is not in the first row: the rows of a file share their columns"),
    ("null", TRL, TRL | {"chosen": None}, "malformed", "field 'chosen' is missing"),
    ("a number for a text", VOTED, VOTED | {"safe_response": 7}, "malformed",
     r"field 'safe_response' must be text, got a number \(7\)"),
    ("a number for a dialogue", TRL, TRL | {"rejected": 7}, "malformed",
     r"field 'rejected' must be text or a list of messages, got a number \(7\)"),
    ("no messages", TRL, TRL | {"prompt": []}, "malformed",
     "field 'prompt' must be text or a list of messages, got an empty one"),
    ("a message of other names", TRL, TRL | {"prompt": [{"from": "human", "value": "hi"}]}, "malformed",
     r"field 'prompt': a message is \{role, content\}, got \{from, value\}"),
    ("a message that is text", TRL, TRL | {"prompt": ["hi"]}, "malformed",
     r"field 'prompt': a message is \{role, content\}, got text"),
    ("a message with parts", TRL, TRL | {"prompt": [user([{"type": "text", "text": "hi"}])]}, "malformed",
     "field 'prompt.content' must be text, got a list"),
    ("an answer by the user", TRL, TRL | {"chosen": [user("a")]}, "malformed",
     "field 'chosen' must end with a turn of the assistant, not of 'user'"),
    ("dialogues that part early", {"chosen": TALK + "a", "rejected": TALK + "b"},
     {"chosen": TALK + "a", "rejected": TALK.replace("two", "2") + "b"}, "different prompts",
     "chosen and rejected part before their last turn"),
    ("a dialogue that Human ends", {"chosen": TALK + "a", "rejected": TALK + "b"},
     {"chosen": TALK + "a\n\nHuman: x", "rejected": TALK + "b"}, "malformed",
     "field 'chosen' must end with a turn of the assistant, not of 'user'"),
    ("a label above 1", TRL | {"pref": 1}, TRL | {"pref": 1.5}, "malformed",
     r"field 'pref' must lie in \[0, 1\], got 1.5"),
    ("a label that is a flag", TRL | {"pref": 1}, TRL | {"pref": True}, "malformed",
     "field 'pref' must be a number, got a flag"),
    ("a label that is text", TRL | {"soft_label": 1}, TRL | {"soft_label": "first"}, "malformed",
     "field 'soft_label' must be a number, got text"),
    ("a loser rated higher", RATED, RATED | {"rejected_rating": 5}, "rating against the label",
     "chosen_rating - rejected_rating is -1, so the loser is rated higher"),
    ("a negative margin", TRL | {"margin": 1}, TRL | {"margin": -1}, "rating against the label",
     "margin is -1, so the loser is rated higher"),
    ("a response 2 of 0 and 1", PKU, PKU | {"better_response_id": 2}, "malformed",
     "field 'better_response_id' must be one of 0, 1, got '2'"),
    ("safety in words", PKU, PKU | {"is_response_1_safe": "yes"}, "malformed",
     "field 'is_response_1_safe' must be one of true, false, 1, 0, got 'yes'"),
    ("the unsafe one called safer", PKU, PKU | {"safer_response_id": 0}, "labels contradict",
     "the safer response is marked unsafe, and the other one safe"),
    ("a conflict of labels", VOTED | {"label_conflict": False}, VOTED | {"label_conflict": True}, "labels contradict",
     "label_conflict: one of the responses is called both safe and unsafe"),
    ("no votes", VOTED | {"votes": 1, "votes_against": 0}, VOTED | {"votes": 0, "votes_against": 0}, "no label",
     "votes and votes_against are both 0"),
    ("a negative number of votes", VOTED | {"votes": 1}, VOTED | {"votes": -1}, "malformed",
     r"field 'votes' must lie in \[0, inf\], got -1.0"),
    ("three summaries", SUMMARY, SUMMARY | {"summaries": [{"text": "a"}] * 3}, "malformed",
     "field 'info' must be an object and 'summaries' a list of two"),
    ("summaries that are texts", SUMMARY, SUMMARY | {"summaries": ["a", "b"]}, "malformed",
     "field 'summaries' must hold objects with a text"),
    ("no verdict", JUDGED, JUDGED | {"preferred": ""}, "no label", "field 'preferred' is empty"),
    ("messages that are text", {"messages": [user("hi"), assistant("a")]}, {"messages": "hi"}, "malformed",
     "field 'messages' must be text or a list of messages, got text"),
    ("the same twice", TRL, TRL | {"rejected": "a"}, "identical pair", "both responses are the same"),
    ("the same twice without a prompt", {"chosen": "x a", "rejected": "x b"}, {"chosen": "x", "rejected": "x"},
     "identical pair", "both responses are the same"),
    ("no answer", TRL, TRL | {"rejected": " \n"}, "empty response", "a response has no text"),
    ("no question", TRL, TRL | {"prompt": ""}, "empty prompt", "nothing is asked"),
    ("nothing in common", {"chosen": "x a", "rejected": "x b"}, {"chosen": "a", "rejected": "b"}, "empty prompt",
     "nothing is asked"),
]  # fmt: skip


@pytest.mark.parametrize("good, bad, reason, said", [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_a_bad_row_is_dropped_with_its_reason(tmp_path, good, bad, reason, said):
    path, good = tmp_path / "rows.jsonl", json.dumps(good).encode()
    bad = bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    path.write_bytes(b"\n".join([good, bad, good, b""]))
    records, report = read(path)
    ((why, (row,)),) = report.files[0].dropped.items()
    assert why == reason and re.match(f"row 2: {said}", row)
    assert [record.row for record in records] == [1, 3] and report.files[0].kept == 2
    with pytest.raises(ValueError, match=f"rows.jsonl: 1 rows dropped, {reason}: row 2: .*Mend them, or leave out"):
        read(path, strict=True)


def test_bad_rows_meet_different_checks():
    said = [said for *_, said in BAD_ROWS]
    assert {again: said.count(again) for again in said if said.count(again) > 1} == {
        "field 'chosen' must end with a turn of the assistant, not of 'user'": 2,  # as messages and as a dialogue
        "both responses are the same": 2, "nothing is asked": 2,  # with a prompt and without
    }  # fmt: skip


def test_pairs_that_nobody_judged_are_no_labels(tmp_path):
    records, report = read(write(tmp_path / "a.jsonl", [PAIR]))
    assert records == [] and report.files[0].dropped == {"no label": [
        "row 1: a pair needs better_response_id, safer_response_id, is_response_0_safe or pref"]}  # fmt: skip


def file_of(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def dict_of_splits(folder):
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


LINE = json.dumps(TRL).encode() + b"\n"
BAD_FILES = [
    ("none", lambda folder: folder / "none.jsonl", FileNotFoundError, "none.jsonl does not exist"),
    ("a kind that is not read", file_of("a.txt", LINE), ValueError, "rows are read from jsonl, json, csv, parquet, "),
    ("a file of nothing", file_of("a.jsonl", b""), ValueError, "a.jsonl holds no rows"),
    ("a BOM", file_of("a.jsonl", b"\xef\xbb\xbf" + LINE), ValueError, "begins with a byte order mark: save it"),
    ("UTF-16", file_of("a.csv", "prompt\nhi\n".encode("utf-16")), ValueError, "a.csv is UTF-16: save it as UTF-8"),
    ("an array cut off", file_of("a.json", b"[" + LINE), ValueError,
     "is no JSON array that can be read: not JSON: Expecting ',' delimiter"),
    ("an archive cut off", file_of("a.jsonl.gz", gzip.compress(LINE * 99)[:-20]), ValueError,
     "a.jsonl.gz is damaged or cut off .*: fetch it again"),
    ("an archive that is none", file_of("a.jsonl.gz", LINE), ValueError, "a.jsonl.gz is damaged or cut off"),
    ("unknown columns", file_of("a.jsonl", b'{"question": "hi", "answer": "a"}\n'), ValueError,
     r"a.jsonl, row 1: no shape has the columns answer, question; known are trl .chosen, rejected.; .*: rename"),
    ("a quote without end", file_of("a.csv", b'prompt\n"hi\n'), ValueError, "is no CSV that can be read: unexpected"),
    ("two columns of one name", file_of("a.csv", b"prompt,prompt\na,b\n"), ValueError, "two columns called 'prompt'"),
    ("no Parquet", file_of("a.parquet", LINE), ValueError, "a.parquet is no Parquet file that can be read"),
    ("a directory of anything", lambda folder: folder, ValueError, "is a directory that save_to_disk did not write"),
    ("a directory of splits", dict_of_splits, ValueError, "holds the splits train, test: name one, such as .*/train"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, said", [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
def test_a_bad_file_is_refused_by_name(tmp_path, make, error, said):
    with pytest.raises(error, match=said):
        read(make(tmp_path))


def test_a_row_of_csv_that_has_other_cells_is_dropped(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,label\nhi,a,1.0\nhi,a\nhi,a,0,9\nhi,b,maybe\n")
    records, report = read(tmp_path / "a.csv")
    assert [record.pref for record in records] == [1.0]
    assert report.files[0].dropped == {"malformed": [
        "row 2: 2 cells for 3 columns", "row 3: 4 cells for 3 columns",
        "row 4: field 'label' must be one of true, false, 1, 0, got 'maybe'"]}  # fmt: skip


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"Parquet file, which needs pyarrow.parquet: pip install 'rlhfjax\[data\]'"):
        read(tmp_path / "a.parquet")


def test_a_shape_can_be_forced_and_an_unknown_one_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [TRL])
    assert read(path, shape="prompts")[0][0].responses == ()
    with pytest.raises(ValueError, match="shape must be one of trl, pair, .* got 'dpo'"):
        read(path, shape="dpo")


# Order and sides


def test_the_first_is_not_always_the_chosen_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [TRL | {"prompt": f"p{i}"} for i in range(400)])
    records, _ = read(path, seed=3)
    firsts = [record.responses[0] == "a" for record in records]
    assert 160 < sum(firsts) < 240
    assert all(record.pref == first for record, first in zip(records, firsts))  # the label has turned with them
    assert records == read(path, seed=3)[0] != read(path, seed=4)[0]
    alone = replace(SAFE, pref=1.0, source="elsewhere/b.jsonl:7")  # the coin is the row's, not the file's
    assert in_random_order(alone, 3).pref == records[6].pref


def test_a_turned_pair_is_told_from_the_other_side():
    record = replace(SAFE, pref=0.75, harm_pref=1.0, signs=(1.0, -1.0), margin=2.0)
    assert turned(record) == replace(
        record, responses=("b", "a"), pref=0.25, harm_pref=0.0, signs=(-1.0, 1.0))  # fmt: skip
    assert turned(turned(record)) == record


def test_no_prompt_is_on_both_sides_and_no_row_moves_another():
    records = [replace(SAFE, prompt=(("system", "s"), ("user", f"p{i % 300}"), *more), source=f"a:{i}")
               for i in range(600) for more in ((), (("assistant", "x"), ("user", "y")))]  # fmt: skip
    rest, held_out = split_by_prompt(records, 0.25, seed=1)
    opening = lambda rows: {record.prompt[:2] for record in rows}
    assert not opening(rest) & opening(held_out) and len(rest) + len(held_out) == 1200
    assert 0.18 < len(held_out) / 1200 < 0.32
    assert split_by_prompt(records[::-3], 0.25, seed=1)[1] == [r for r in records[::-3] if r in held_out]
    assert split_by_prompt(records, 0.25, seed=2)[1] != held_out
    assert split_by_prompt(records, 0, seed=1)[1] == [] == split_by_prompt(records, 1, seed=1)[0]
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        split_by_prompt(records, 1.5)


# The report


def test_the_report_is_a_table_and_json(tmp_path):
    paths = [write(tmp_path / "a.jsonl", [TRL, TRL | {"rejected": "a"}, *[TRL | {"chosen": ""}] * 4]),
             write(tmp_path / "b.jsonl", [PKU])]  # fmt: skip
    _, report = read(paths)
    said = report.table()
    assert f"| {paths[0]} | trl | 6 | 1 | 1 identical pair, 4 empty response | - |" in said
    assert "| all | | 7 | 2 | 5 | |" in said and "not read" not in said
    noted = read(write(tmp_path / "c.jsonl", [TRL | {"winner": "model_a", "id": 3}]))[1]
    assert "c.jsonl: columns not read: id, winner" in noted.table()
    assert "empty response: row 3: a response has no text; row 4: a response has no text; row 5" in said
    assert "(and 1 more)" in said
    first = json.loads(json.dumps(report.to_json(examples=2)))["files"][0]
    assert first["dropped"]["empty response"] == {"count": 4, "rows": ["row 3: a response has no text",
                                                                       "row 4: a response has no text"]}  # fmt: skip


def test_the_command_prints_the_report(tmp_path):
    path = write(tmp_path / "a.jsonl", [TRL, TRL | {"rejected": "a"}])
    command = [sys.executable, "-m", "rlhfjax.data", path, "--out", tmp_path / "report.json"]
    done = subprocess.run([*command, "--strict"], capture_output=True, text=True)
    assert done.returncode == 1 and "| trl | 2 | 1 | 1 identical pair | - |" in done.stdout
    assert done.stderr.strip() == (
        f"{path}: 1 rows dropped, identical pair: row 2: both responses are the same. Mend them, or leave out strict")
    assert json.loads((tmp_path / "report.json").read_text())["files"][0]["kept"] == 1
