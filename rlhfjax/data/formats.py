"""Preference data in the shapes that people have, read into one kind of record: `read(files) -> records, report`.

| shape | columns |
|---|---|
| `trl` | `chosen`, `rejected` [, `prompt`]: strings, Anthropic HH dialogues (`\\n\\nHuman:`, `\\n\\nAssistant:`) or lists of {role, content} |
| `pair` | `prompt, response_0, response_1` and any of `better_response_id`, `safer_response_id`, `is_response_0_safe`, `is_response_1_safe` (PKU-SafeRLHF), `pref`, `harm_pref` |
| `safe_unsafe` | `prompt, safe_response, unsafe_response` [, `votes`, `votes_against`, `label_conflict`] |
| `summaries` | `info` {post or article, title, subreddit}, `summaries` [{text}] x2, `choice` (OpenAI's comparisons) |
| `judged` | `query, postprocessed_response, reference_responses, preferred, shuffled_index`: TL;DR, judged by a model |
| `outputs` | `input, output_1, output_2, label` 1 or 2 (LLMBar) |
| `unpaired` | `prompt, completion` [, `label`]: a demonstration, or a response called good or bad |
| `messages` | `messages`: a demonstration, the last turn being the response |
| `prompts` | `prompt` |

A soft label is P(first better) under `pref` or `soft_label`; `margin`, or two ratings, tell by how much the winner wins.
The shape is that of the first row, and every row must have the same columns. A row that cannot be used is dropped and
reported with its reason; a *file* that cannot be read is an error. Files: .jsonl, .json (an array, or lines), .csv, each
also .gz; .parquet; a directory that Hugging Face's `save_to_disk` wrote.
"""  # noqa: E501

import csv
import dataclasses
import gzip
import hashlib
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rlhfjax.data.report import Drop, FileReport, Report, optional_import

Message = tuple[str, str]  # (role, content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A prompt, none to two responses, and what was said of them.

    prompt: messages (role, content), the oldest first.
    responses: none (a prompt for RL), one (a demonstration, or an unpaired label) or two (a comparison).
    pref: of two responses P(the first is better), of one P(it is good); None where nobody said.
    harm_pref: P(the first is **more harmful**) or None.
    signs: +1 = harmful, -1 = harmless for each response, or None. (PKU's files store *safe* flags; they are turned.)
    margin: by how much the better one is better, in the file's units, >= 0; or None.
    source: "file:row"; rows count from 1.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...] = ()
    pref: float | None = None
    harm_pref: float | None = None
    signs: tuple[float, ...] | None = None
    margin: float | None = None
    source: str = ""

    @property
    def row(self) -> int:
        return int(self.source.rpartition(":")[2])


def read(
    paths: Iterable[str | os.PathLike] | str | os.PathLike, *, shape: str | None = None, seed: int | None = 0,
    strict: bool = False,
) -> tuple[list[Record], Report]:  # fmt: skip
    """The usable records of some files, in order, and the report on all rows.

    Args:
        shape: a name from the table above; by default each file's columns tell.
        seed: decides which pairs are turned round (`in_random_order`); None keeps the file's order, in which "chosen"
            may always come first and teach a judge a position.
        strict: a dropped row is an error.
    Raises:
        FileNotFoundError, ValueError: a file is missing, of an unknown kind, damaged, or without a known shape.
        ImportError: a Parquet or Arrow file without pyarrow.
    """
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    records, report = [], Report()
    for path in map(pathlib.Path, paths):
        file = FileReport(file=str(path), shape=shape or "")
        columns = None
        for number, row in read_rows(path):
            file.read += 1
            try:
                if isinstance(row, Drop):
                    raise row
                if columns is None:
                    file.shape = shape or _shape_of(path, number, row)
                    columns = KNOWN & row.keys()
                    if unread := sorted(row.keys() - KNOWN):
                        report.notes.append(f"{path}: columns not read: {', '.join(unread)}")
                if different := columns ^ (KNOWN & row.keys()):
                    name = sorted(different)[0]
                    raise Drop("malformed", f"field {name!r} is missing" if name in columns else
                               f"field {name!r} is not in the first row: the rows of a file share their columns")
                record = dataclasses.replace(SHAPES[file.shape][1](row), source=f"{path}:{number}")
                _check(record)
            except Drop as drop:
                file.drop(drop, number)
                continue
            records.append(record if seed is None else in_random_order(record, seed))
        if not file.read:
            raise ValueError(f"{path} holds no rows")
        file.kept = file.read - file.num_dropped
        report.files.append(file)
    if strict:
        report.check()
    return records, report


def in_random_order(record: Record, seed: int) -> Record:
    """A pair with its sides turned round, or not, by a coin that is a pure function of (seed, row)."""
    coin = hashlib.blake2b(f"{seed}:{record.row}".encode(), digest_size=1).digest()[0] & 1
    return turned(record) if coin and len(record.responses) == 2 else record


def turned(record: Record) -> Record:
    """The same comparison, told from the other side."""
    other = lambda p: None if p is None else 1 - p
    return dataclasses.replace(
        record, responses=record.responses[::-1], pref=other(record.pref), harm_pref=other(record.harm_pref),
        signs=record.signs and record.signs[::-1],
    )  # fmt: skip


def split_by_prompt(records: Iterable[Record], share: float, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(the rest, about `share` of the records): a record's side is a hash of the seed and of how its dialogue opens, up
    to the first user's turn. So no prompt is on both sides, nor the beginning of one, and no row moves another."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    sides: tuple[list[Record], list[Record]] = [], []
    for record in records:
        first_user = next((i for i, (role, _) in enumerate(record.prompt) if role == "user"), len(record.prompt))
        opening = json.dumps([seed, *([role, text.strip()] for role, text in record.prompt[: first_user + 1])])
        place = int.from_bytes(hashlib.blake2b(opening.encode(), digest_size=8).digest()) / 2**64
        sides[place < share].append(record)
    return sides


# Files: row number (from 1) and row, or why that row is none


def read_rows(path: str | os.PathLike) -> Iterator[tuple[int, Mapping[str, Any] | Drop]]:
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    kind = "directory" if path.is_dir() else path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in READERS:
        raise ValueError(f"{path}: rows are read from {', '.join(READERS)}, not from .{kind}: convert it, or rename it")
    try:
        yield from enumerate(READERS[kind](path), 1)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): fetch it again") from error


def _open(path: pathlib.Path):
    """A binary file, unpacked. A BOM is refused: it would stick to the first column's name, or break JSON."""
    file = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    start = file.read(3)
    if start == b"\xef\xbb\xbf":
        raise ValueError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16: save it as UTF-8")
    file.seek(0)
    return file


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name comes twice: Python would keep the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Drop("malformed", f"field {twice!r} comes twice")
    return found


def _no_constant(name: str):
    raise Drop("non-finite score", f"{name} is no JSON number")


def _parse(text: str | bytes) -> Any:
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Drop("malformed", f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise Drop("malformed", f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise Drop("malformed", f"not readable as JSON: {error}") from error


def _as_row(value: Any) -> Mapping[str, Any] | Drop:
    return value if isinstance(value, dict) else Drop("malformed", f"a row is an object, not {_kind(value)}")


def _lines(path: pathlib.Path) -> Iterator[Mapping[str, Any] | Drop]:
    """JSON lines. A binary file breaks at "\\n" only; text holds U+2028 and the like, where `str.splitlines` breaks."""
    with _open(path) as file:
        for line in file:
            try:
                yield _as_row(_parse(line)) if line.strip() else Drop("malformed", "an empty line")
            except Drop as drop:
                yield drop


def _json(path: pathlib.Path) -> Iterator[Mapping[str, Any] | Drop]:
    """A JSON array; a file that does not open with a bracket is taken for lines."""
    with _open(path) as file:
        text = file.read()
    if text.lstrip()[:1] != b"[":
        yield from _lines(path)
        return
    try:
        rows = _parse(text)
    except Drop as drop:  # one array: nothing tells where the next row begins
        raise ValueError(f"{path} is no JSON array that can be read: {drop}") from drop
    yield from map(_as_row, rows)


def _csv(path: pathlib.Path) -> Iterator[Mapping[str, Any] | Drop]:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as file:
        try:
            text = (line.decode("utf-8") for line in file)  # fields in quotes may hold line ends; csv joins them
            names = next(reader := csv.reader(text, strict=True), [])
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{path} has two columns called {sorted(twice)[0]!r}: rename one")
            for cells in reader:
                bad = f"{len(cells)} cells for {len(names)} columns"
                yield dict(zip(names, cells)) if len(cells) == len(names) else Drop("malformed", bad)
        except (csv.Error, UnicodeDecodeError) as error:  # behind an open quote nothing tells where a row begins
            raise ValueError(f"{path} is no CSV that can be read: {error}") from error


def _parquet(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    parquet = optional_import("pyarrow.parquet", "data", f"{path} is a Parquet file")
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error


def _saved_to_disk(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    """A data set as `datasets.Dataset.save_to_disk` leaves it; its Arrow files are read without `datasets`."""
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path} holds the splits {', '.join(splits)}: name one, such as {path / splits[0]}")
    if not (path / "state.json").exists():
        raise ValueError(f"{path} is a directory that save_to_disk did not write: name the files in it")
    arrow = optional_import("pyarrow", "data", f"{path} holds Arrow files")
    state = json.loads((path / "state.json").read_text())
    if state.get("_indices_data_files"):
        raise ValueError(f"{path} was saved with a selection of rows: call flatten_indices() before save_to_disk")
    for file in state["_data_files"]:
        with arrow.memory_map(str(path / file["filename"])) as source:
            for batch in arrow.ipc.open_stream(source):
                yield from batch.to_pylist()


READERS = {"jsonl": _lines, "json": _json, "csv": _csv, "parquet": _parquet, "directory": _saved_to_disk}


# Fields: each names itself when it refuses

SURROGATE = re.compile("[\ud800-\udfff]")
MARKER, ROLES = re.compile(r"\n\n(Human|Assistant):"), {"Human": "user", "Assistant": "assistant"}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a flag", type(None): "nothing"}
    return names.get(type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__)


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise Drop("malformed", f"field {name!r} is missing")
    return row[name]


def _as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Drop("malformed", f"field {name!r} must be text, got {_kind(value)}")
    if SURROGATE.search(value):
        raise Drop("malformed", f"field {name!r} holds half of a surrogate pair, which no text can")
    return value


def _text(row: Mapping[str, Any], name: str) -> str:
    return _as_text(_field(row, name), name)


def _number(row: Mapping[str, Any], name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A number; text that reads as one will do, since CSV has nothing else."""
    value = _field(row, name)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Drop("malformed", f"field {name!r} must be a number, got {_kind(value)}") from None
    if not math.isfinite(number):
        raise Drop("non-finite score", f"field {name!r} is {number}")
    if not low <= number <= high:
        raise Drop("malformed", f"field {name!r} must lie in [{low}, {high}], got {number}")
    return number


def _one_of(row: Mapping[str, Any], name: str, values: Mapping[Any, Any]) -> Any:
    """What `values` has for a field; text that reads as a key will do (CSV)."""
    value = _field(row, name)
    if value == "":
        raise Drop("no label", f"field {name!r} is empty")
    by_name = {str(key): found for key, found in values.items()}
    key = str(value).lower().removesuffix(".0")  # an integer column with gaps becomes one of floats
    if key not in by_name:
        raise Drop("malformed", f"field {name!r} must be one of {', '.join(by_name)}, got {str(value)[:40]!r}")
    return by_name[key]


FLAG = {"true": True, "false": False, 1: True, 0: False}


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        got = "an empty one" if value == [] else _kind(value)
        raise Drop("malformed", f"field {name!r} must be text or a list of messages, got {got}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            got = f"{{{', '.join(sorted(message))}}}" if isinstance(message, dict) else _kind(message)
            raise Drop("malformed", f"field {name!r}: a message is {{role, content}}, got {got}")
    return tuple((_as_text(m["role"], f"{name}.role"), _as_text(m["content"], f"{name}.content")) for m in value)


def _dialogue(value: Any, name: str) -> tuple[Message, ...]:
    """Messages, as they are or written as Human and Assistant; () for a text of no such form."""
    if not isinstance(value, str):
        return _messages(value, name)
    if not MARKER.match(_as_text(value, name)):
        return ()
    _, *parts = MARKER.split(value)
    return tuple((ROLES[role], text.strip()) for role, text in zip(parts[::2], parts[1::2]))


def _prompt(row: Mapping[str, Any], name: str = "prompt") -> tuple[Message, ...]:
    """A dialogue, without the turn that waits for an answer ("Assistant:"); or a text, which counts as the user's."""
    messages = _dialogue(_field(row, name), name)
    return messages[: -1 if messages[-1:] == (("assistant", ""),) else None] or (("user", _text(row, name)),)


def _turns(value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    """(what came before, the response): a dialogue that ends with a response, or a text with nothing before it."""
    messages = _dialogue(value, name)
    if not messages:
        return (), value
    if messages[-1][0] != "assistant":
        raise Drop("malformed", f"field {name!r} must end with a turn of the assistant, not of {messages[-1][0]!r}")
    return messages[:-1], messages[-1][1]


# Shapes: a row -> a Record, or a Drop


def _trl(row: Mapping[str, Any]) -> Record:
    (before, chosen), (other, rejected) = (_turns(_field(row, name), name) for name in ("chosen", "rejected"))
    if before != other:
        raise Drop("different prompts", "chosen and rejected part before their last turn")
    prompt = _prompt(row) if "prompt" in row else ()
    if before:  # a prompt beside whole dialogues is a part of them, or what came before
        prompt = before if all(message in before for message in prompt) else prompt + before
    elif "prompt" not in row and chosen != rejected:
        text = re.match(r"(?s:.*\s)?", os.path.commonprefix([chosen, rejected]))[0].rstrip()  # words stay whole
        prompt, chosen, rejected = (("user", text),), chosen[len(text) :], rejected[len(text) :]
    pref = _soft(row, 1.0)
    return Record(prompt=prompt, responses=(chosen, rejected), pref=pref, margin=_margin(row, pref))


def _soft(row: Mapping[str, Any], default: float | None) -> float | None:
    name = next((name for name in ("pref", "soft_label") if name in row), None)
    return default if name is None else _number(row, name, 0, 1)


RATINGS = (("chosen_rating", "rejected_rating"), ("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))


def _margin(row: Mapping[str, Any], pref: float) -> float | None:
    names = next((names for names in (("margin",), *RATINGS) if all(row.get(name) is not None for name in names)), None)
    if names is None:
        return None
    margin = _number(row, names[0]) - (_number(row, names[1]) if len(names) > 1 else 0)
    if margin * (2 * pref - 1 if len(names) > 1 else 1) < 0:
        raise Drop("rating against the label", f"{' - '.join(names)} is {margin:g}, so the loser is rated higher")
    return abs(margin)


def _pair(row: Mapping[str, Any]) -> Record:
    pref, harm, signs = _soft(row, None), None, None
    if "better_response_id" in row and pref is None:
        pref = _one_of(row, "better_response_id", {0: 1.0, 1: 0.0})
    if "safer_response_id" in row or "harm_pref" in row:  # the safer one is the *less* harmful
        harm = (_number(row, "harm_pref", 0, 1) if "harm_pref" in row else
                _one_of(row, "safer_response_id", {0: 0.0, 1: 1.0}))  # fmt: skip
    safe = ("is_response_0_safe", "is_response_1_safe")
    if any(name in row for name in safe):
        signs = tuple(-1.0 if _one_of(row, name, FLAG) else 1.0 for name in safe)
        if harm is not None and (signs[0] - signs[1]) * (harm - 0.5) < 0:
            raise Drop("labels contradict", "the safer response is marked unsafe, and the other one safe")
    if (pref, harm, signs) == (None, None, None):
        raise Drop("no label", "a pair needs better_response_id, safer_response_id, is_response_0_safe or pref")
    responses = (_text(row, "response_0"), _text(row, "response_1"))
    return Record(prompt=_prompt(row), responses=responses, pref=pref, harm_pref=harm, signs=signs)


def _safe_unsafe(row: Mapping[str, Any]) -> Record:
    if "label_conflict" in row and _one_of(row, "label_conflict", FLAG):
        raise Drop("labels contradict", "label_conflict: one of the responses is called both safe and unsafe")
    votes, against = (_number(row, name, 0) if name in row else 1.0 - i for i, name in
                      enumerate(("votes", "votes_against")))  # fmt: skip
    if votes + against == 0:
        raise Drop("no label", "votes and votes_against are both 0")
    return Record(
        prompt=_prompt(row), responses=(_text(row, "safe_response"), _text(row, "unsafe_response")),
        harm_pref=against / (votes + against), signs=(-1.0, 1.0),
    )  # fmt: skip


def _summaries(row: Mapping[str, Any]) -> Record:
    """The prompt is OpenAI's: subreddit, title, post, and "TL;DR:". `extra.confidence` is on a scale of the raters'
    own, which says nothing of probability, and stays where it is."""
    info, summaries = _field(row, "info"), _field(row, "summaries")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Drop("malformed", "field 'info' must be an object and 'summaries' a list of two")
    if not all(isinstance(summary, dict) for summary in summaries):
        raise Drop("malformed", "field 'summaries' must hold objects with a text")
    body = "post" if info.get("post") is not None else "article"
    parts = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", body)]
    text = [head + _text(info, name) for head, name in parts if name == body or info.get(name) is not None]
    return Record(
        prompt=(("user", "\n\n".join([*text, "TL;DR:"])),), responses=tuple(_text(s, "text") for s in summaries),
        pref=_one_of(row, "choice", {0: 1.0, 1: 0.0}),
    )  # fmt: skip


def _judged(row: Mapping[str, Any]) -> Record:
    """In the order that the judge was shown: the model's summary first where `shuffled_index` is 0."""
    pref = _one_of(row, "preferred", {"ours": 1.0, "reference": 0.0})
    responses = (_text(row, "postprocessed_response"), _text(row, "reference_responses"))
    record = Record(prompt=_prompt(row, "query"), responses=responses, pref=pref)
    return _one_of(row, "shuffled_index", {0: record, 1: turned(record)})


def _outputs(row: Mapping[str, Any]) -> Record:
    responses = (_text(row, "output_1"), _text(row, "output_2"))
    return Record(prompt=_prompt(row, "input"), responses=responses, pref=_one_of(row, "label", {1: 1.0, 2: 0.0}))


def _unpaired(row: Mapping[str, Any]) -> Record:
    before, response = _turns(_field(row, "completion"), "completion")
    pref = _soft(row, float(_one_of(row, "label", FLAG)) if "label" in row else None)
    return Record(prompt=_prompt(row) + before, responses=(response,), pref=pref)


def _demonstration(row: Mapping[str, Any]) -> Record:
    _messages(_field(row, "messages"), "messages")  # a text will not do here
    before, response = _turns(row["messages"], "messages")
    return Record(prompt=before, responses=(response,))


SHAPES: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Record]]] = {  # the columns it takes, and its reader
    "trl": ({"chosen", "rejected"}, _trl),
    "pair": ({"prompt", "response_0", "response_1"}, _pair),
    "safe_unsafe": ({"prompt", "safe_response", "unsafe_response"}, _safe_unsafe),
    "summaries": ({"info", "summaries", "choice"}, _summaries),
    "judged": ({"query", "postprocessed_response", "reference_responses", "preferred", "shuffled_index"}, _judged),
    "outputs": ({"input", "output_1", "output_2", "label"}, _outputs),
    "unpaired": ({"prompt", "completion"}, _unpaired),
    "messages": ({"messages"}, _demonstration),
    "prompts": ({"prompt"}, lambda row: Record(prompt=_prompt(row))),
}
OPTIONAL = {
    "pref", "soft_label", "harm_pref", "margin", "label", "votes", "votes_against", "label_conflict",
    "better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe", *sum(RATINGS, ()),
}  # fmt: skip
KNOWN = OPTIONAL.union(*(columns for columns, _ in SHAPES.values()))


def _shape_of(path: pathlib.Path, number: int, row: Mapping[str, Any]) -> str:
    for name, (columns, _) in SHAPES.items():
        if columns <= row.keys():
            return name
    raise ValueError(f"{path}, row {number}: no shape has the columns {', '.join(sorted(map(str, row)))}; known are " +
                     "; ".join(f"{name} ({', '.join(sorted(columns))})" for name, (columns, _) in SHAPES.items()) +
                     ": rename columns")  # fmt: skip


def _check(record: Record) -> None:
    """Refuse what can be read and not learned from."""
    if len(record.responses) == 2 and record.responses[0] == record.responses[1]:
        raise Drop("identical pair", "both responses are the same")
    if not any(text.strip() for _, text in record.prompt):
        raise Drop("empty prompt", "nothing is asked")
    if not all(text.strip() for text in record.responses):
        raise Drop("empty response", "a response has no text")
