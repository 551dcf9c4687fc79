"""Records -> token arrays, by a Hugging Face fast tokenizer from a local directory, a `tokenizers` file, or one trained
here.

A dialogue is rendered by the tokenizer's chat template (`HUMAN_ASSISTANT` where it has none) with a mark in place of
every message, so that it is known which characters are the template's and which are somebody's words: special tokens
are control tokens in the template's text only. The prompt is what stands before the response; the response is its own
text and one end token, and is encoded by itself, as a policy emits it behind the prompt's tokens.

* A template with `{% generation %}` says itself where the response begins. Otherwise it is what the dialogue has beyond
  the rendered prompt, which must be its beginning (an error if not).
* The end token is the first special token behind the response in the template (`<|im_end|>`, say), else EOS.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from rlhfjax.data.formats import Message, Record
from rlhfjax.data.report import Drop, Report, optional_import
from rlhfjax.types import Demonstrations, PreferenceBatch

# As Anthropic's HH: a blank line, the speaker, a colon. BOS where there is one of its own; only the last answer ends.
HUMAN_ASSISTANT = (
    "{{ bos_token if bos_token is defined and bos_token != eos_token else '' }}{% for m in messages %}"
    "{{ {'user': '\\n\\nHuman: ', 'assistant': '\\n\\nAssistant: '}.get(m['role'], '') + m['content'] }}{% endfor %}"
    "{{ '\\n\\nAssistant:' if add_generation_prompt else '' }}"
)
# The texts as they are, one behind the other: for prompts that say all ("... TL;DR:").
VERBATIM = (
    "{{ bos_token if bos_token is defined and bos_token != eos_token else '' }}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
# Of tokenizers trained here: a special token in front of every turn, EOS behind every answer.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant, not ' + m['role']) }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)
MARK = re.compile("\ue000([0-9]+)\ue001")  # private characters: the place of a message in a rendered template
Piece = tuple[str, bool]  # a text, and whether it is the template's


def load_tokenizer(
    path: str | os.PathLike, *, template: str | None = None, bos_token: str | None = None, eos_token: str | None = None,
) -> "ChatTokenizer":  # fmt: skip
    """The tokenizer in a local directory (its code is never run), or a tokenizer.json.

    Args:
        template: a chat template (Jinja) instead of the tokenizer's own, such as VERBATIM.
        bos_token, eos_token: for files that name none.
    Raises:
        FileNotFoundError, ImportError: nothing is there; transformers is missing.
        ValueError: see `ChatTokenizer`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: a tokenizer is a local directory, or a tokenizer.json")
    transformers = optional_import("transformers", "hf", f"{path} is a Hugging Face tokenizer")
    optional_import("jinja2", "hf", "chat templates are Jinja")
    given = {name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None}
    if path.is_file():
        found = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **given)
    else:
        given |= {"local_files_only": True, "trust_remote_code": False}
        found = transformers.AutoTokenizer.from_pretrained(path, **given)
    return ChatTokenizer(found, template=template)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> "ChatTokenizer":
    """A byte-level BPE of `vocab_size` tokens learned from texts, with the template TURNS, saved so that AutoTokenizer
    loads it. It has pad, BOS, EOS and a token per role. Raises ValueError where the texts do not yield as many."""
    names = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    if vocab_size < (least := 256 + len(names)):
        raise ValueError(f"vocab_size must be at least {least} (bytes and special tokens), got {vocab_size}")
    tokenizers = optional_import("tokenizers", "hf", "training a tokenizer takes the library of that name")
    transformers = optional_import("transformers", "hf", "a trained tokenizer is saved in Hugging Face's format")
    bytewise = tokenizers.pre_tokenizers.ByteLevel
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer, model.decoder = bytewise(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=names, initial_alphabet=bytewise.alphabet(), show_progress=False))
    if (size := model.get_vocab_size()) != vocab_size:
        raise ValueError(f"the texts yield {size} tokens, not vocab_size {vocab_size}: give more text, or lower it")
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=names[0], bos_token=names[1], eos_token=names[2], chat_template=TURNS)
    found.save_pretrained(directory)
    return load_tokenizer(directory)


class ChatTokenizer:
    """A fast tokenizer and a chat template.

    end_id: what ends a response, and what a sampler should stop at. pad_id: never end_id nor EOS; without a pad token
    of its own it is the unknown or a reserved one (padding is masked everywhere). `notes` tells what was chosen.
    Raises ValueError: not a fast tokenizer; no EOS; nothing to pad with; a template that does not begin a dialogue with
    its prompt.
    """

    def __init__(self, tokenizer, *, template: str | None = None):
        self.hf, self.notes = tokenizer, []
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: it needs a tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer names no EOS token: pass eos_token, or add it to tokenizer_config.json")
        self.template = template or (tokenizer.get_chat_template() if tokenizer.chat_template else None)
        if self.template is None:
            self.template = HUMAN_ASSISTANT
            self.notes.append("the tokenizer has no chat template: turns are written as Human: and Assistant:")
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.vocab_size = len(tokenizer)
        # SentencePiece writes a space in front of a text. One that goes on where another ended is encoded behind "\n",
        # which merges with nothing there; one behind a special token too, where the tokenizer does so itself.
        behind, alone, newline = self._plain(["\nx", "x", "\n"])
        self._anchor = newline if behind != newline + alone else []
        eos = self.hf(tokenizer.eos_token + "x", add_special_tokens=False).input_ids
        self._anchor_inside = bool(self._anchor) and eos[1:] != alone
        try:
            self.end_id = self._skeleton(("user",))[-1]
        except Drop as drop:
            raise ValueError(f"the chat template refuses a user's message: {drop}: pass another template") from drop
        self.pad_id = self._choose_pad()

    def _choose_pad(self) -> int:
        taken = {self.end_id, self.hf.eos_token_id}
        if self.hf.pad_token_id not in taken | {None}:
            return self.hf.pad_token_id
        unused = [id for name, id in self._special.items() if re.search("pad|reserved|unused", name, re.I)]
        for id in [self.hf.unk_token_id, *sorted(unused)]:
            if id is not None and id not in taken | {self.hf.bos_token_id}:
                self.notes.append(f"padded with {self.hf.convert_ids_to_tokens(id)!r} ({id}), as there is no pad token")
                return id
        raise ValueError("the tokenizer has no pad token apart from EOS, and no unknown or reserved one to pad with: "
                         "name one in tokenizer_config.json (pad_token) that the text never uses")  # fmt: skip

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """Texts in which no special token is meant."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.hf(texts, **options).input_ids if texts else []

    def _render(self, messages: Iterable[Message], *, spans: bool = False, **options) -> tuple[str, list]:
        """The rendered text, with `spans` also those of `{% generation %}`. Drop: the template refuses the messages."""
        jinja = optional_import("transformers.utils.chat_template_utils", "hf", "chat templates are Jinja")
        errors = optional_import("jinja2", "hf", "chat templates are Jinja").exceptions
        chat = [{"role": role, "content": text} for role, text in messages]
        try:
            texts, found = jinja.render_jinja_template([chat], chat_template=self.template,
                return_assistant_tokens_mask=spans, **self.hf.special_tokens_map, **options)  # fmt: skip
        except errors.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja: {error}") from error
        except errors.TemplateError as error:
            raise Drop("refused by the chat template", str(error)) from error
        return texts[0], found[0] if spans else []

    @functools.cache  # noqa: B019 (a handful of role sequences per tokenizer)
    def _skeleton(self, roles: tuple[str, ...]) -> tuple[str, str, tuple[bool, ...], int]:
        """(prompt, response, which messages the template strips, end token) with marks for the messages and the
        response. The response ends before its end token."""
        marks = [f"\ue000{i}\ue001" for i in range(len(roles) + 1)]
        messages = list(zip((*roles, "assistant"), marks))
        text, spans = self._render(messages, spans=bool(re.search(r"\{%-?\s*generation\b", self.template)))
        if spans:
            start, stop = spans[-1]
        else:
            prompt, _ = self._render(messages[:-1], add_generation_prompt=True)
            start, stop = len(prompt), len(text)
            if not text.startswith(prompt):
                shown = [MARK.sub("...", x) for x in (prompt, text)]
                raise ValueError(f"the rendered prompt {shown[0]!r} is not the beginning of the dialogue {shown[1]!r}: "
                                 "mark the answer with {% generation %} in the chat template, or pass a template")
        if marks[-1] not in text[start:stop]:
            raise ValueError("the chat template leaves the assistant's message out: pass another template")
        behind = text.index(marks[-1], start) + len(marks[-1])
        end = self._find.search(text, behind, stop)
        padded, _ = self._render([(role, f" \n{mark}\n ") for role, mark in messages])
        strips = tuple(f" \n{mark}\n " not in padded for mark in marks)
        response = text[start : end.start() if end else behind]
        return text[:start], response, strips, self._special[end[0]] if end else self.hf.eos_token_id

    def pieces(self, prompt: Sequence[Message], response: str | None) -> tuple[list[Piece], list[Piece]]:
        """Prompt and response (None: of the prompt alone) as pieces of text. Drop: the template refuses or rewrites."""
        head, tail, strips, end_id = self._skeleton(tuple(role for role, _ in prompt))
        if end_id != self.end_id:
            raise Drop("refused by the chat template", "it ends the answer to these roles with another token")
        messages = [*prompt, ("assistant", "x" if response is None else response)]
        texts = [text.strip() if strip else text for (_, text), strip in zip(messages, strips)]

        def fill(skeleton: str) -> list[Piece]:
            parts = MARK.split(skeleton)  # template, number, template, ...
            return [(texts[int(part)], False) if i % 2 else (part, True) for i, part in enumerate(parts) if part]

        before, after = fill(head), fill(tail)
        rendered, _ = self._render(messages)
        if not rendered.startswith("".join(text for text, _ in before + after)):
            raise Drop("refused by the chat template", "it rewrites a message, so that what is template and what is "
                       "text cannot be told apart")  # fmt: skip
        return before, after

    def encode(self, rows: Sequence[Sequence[Piece]], *, behind: bool = False) -> list[list[int]]:
        """Token ids of rows of pieces; special tokens are found in the template's pieces only.

        behind: the text goes on where a prompt ended, so nothing (SentencePiece's space) is put in front of it.
        """
        rows = [_runs(row, self._find) for row in rows]
        anchored = lambda i: bool(self._anchor) and (behind if i == 0 else self._anchor_inside)
        texts = [anchored(i) * "\n" + run for row in rows for i, run in enumerate(row) if isinstance(run, str)]
        encoded, out = iter(self._plain(texts)), []
        for row in rows:
            ids = [next(encoded)[anchored(i) * len(self._anchor) :] if isinstance(run, str) else [self._special[run[0]]]
                   for i, run in enumerate(row)]  # fmt: skip
            out.append([id for part in ids for id in part])
        return out

    def count_special(self, text: str) -> int:
        """Special tokens that somebody wrote out in a text, and that stay text."""
        return len(self._find.findall(text))


def _runs(pieces: Sequence[Piece], special: re.Pattern) -> list[str | re.Match]:
    """Pieces as what a tokenizer sees: its special tokens, and the texts between them, joined."""
    runs: list[str | re.Match] = []
    for text, of_template in pieces:
        place = 0
        for found in [*(special.finditer(text) if of_template else ()), None]:
            plain = text[place : found.start() if found else None]
            if plain and runs and isinstance(runs[-1], str):
                runs[-1] += plain
            elif plain:
                runs.append(plain)
            if found:
                runs.append(found)
                place = found.end()
    return runs


# Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens per row, the end token included; by default as many as the longest has, up to a multiple of 16.

    A longer prompt loses its beginning, but not BOS, or its row is dropped (`long_prompts`). A longer response loses
    its end, and then has no end token. Both are counted.
    """

    max_prompt: int | None = None
    max_response: int | None = None
    long_prompts: Literal["cut", "drop"] = "cut"

    def __post_init__(self):
        if min(self.max_prompt or 2, self.max_response or 2) < 2 or 0 in (self.max_prompt, self.max_response):
            raise ValueError(f"max_prompt and max_response must be at least 2, got {self.max_prompt} and "
                             f"{self.max_response}")  # fmt: skip
        if self.long_prompts not in ("cut", "drop"):
            raise ValueError(f"long_prompts must be cut or drop, got {self.long_prompts!r}")


def preference_batch(
    records: Iterable[Record], tokenizer: ChatTokenizer, lengths: Lengths = Lengths(), *, harm: bool = False,
    report: Report | None = None,
) -> PreferenceBatch:  # fmt: skip
    """Comparisons as NumPy arrays: of helpfulness (`pref`, with margins where a record has one), or of `harm`
    (`harm_pref`, with signs where every record has them).

    report: where drops and cuts are counted; that of `formats.read` goes on. Raises ValueError if no pair is left.
    """

    def responses_of(record: Record) -> tuple[str, ...]:
        if len(record.responses) != 2 or (record.harm_pref if harm else record.pref) is None:
            raise Drop("no label", f"nobody compared two responses for {'harm' if harm else 'helpfulness'}")
        return record.responses

    kept, (prompts, prompt_mask), (responses, mask) = _arrays(records, responses_of, 2, tokenizer, lengths, report)
    as_floats = lambda values: np.array(list(values), np.float32)
    signed, with_margins = all(r.signs for r in kept), any(r.margin for r in kept)
    return PreferenceBatch(
        prompts=prompts, prompt_mask=prompt_mask, responses=responses, responses_mask=mask,
        prefs=as_floats(record.harm_pref if harm else record.pref for record in kept),
        signs=as_floats(record.signs for record in kept) if harm and signed else None,
        margins=as_floats(record.margin or 0 for record in kept) if with_margins and not harm else None,
    )  # fmt: skip


def demonstrations(
    records: Iterable[Record], tokenizer: ChatTokenizer, lengths: Lengths = Lengths(), *, report: Report | None = None,
) -> Demonstrations:  # fmt: skip
    """What to imitate: the better response of a pair, or a single one unless it was called bad. As above."""

    def responses_of(record: Record) -> tuple[str, ...]:
        pref = 1.0 if record.pref is None and len(record.responses) == 1 else record.pref
        if not record.responses or pref in (None, 0.5):
            raise Drop("no label", "nobody said which response is good")
        if len(record.responses) == 1 and pref < 0.5:
            raise Drop("called bad", "the only response was called bad")
        return (record.responses[int(pref < 0.5)],)

    _, (prompts, prompt_mask), (responses, mask) = _arrays(records, responses_of, 1, tokenizer, lengths, report)
    return Demonstrations(prompts=prompts, prompt_mask=prompt_mask, tokens=responses[:, 0], mask=mask[:, 0])


def prompts(
    records: Iterable[Record], tokenizer: ChatTokenizer, lengths: Lengths = Lengths(), *, report: Report | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Prompts for RL, each once: tokens and mask `[N, P]`, left padded. As above."""
    once: dict[tuple[Message, ...], Record] = {}
    for record in records:
        once.setdefault(record.prompt, record)
    return _arrays(once.values(), lambda record: (), 0, tokenizer, lengths, report)[1]


def _arrays(
    records: Iterable[Record], responses_of: Callable, num: int, tokenizer: ChatTokenizer, lengths: Lengths,
    report: Report | None,
) -> tuple[list[Record], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Kept records, prompts and mask `[N, P]`, responses and mask `[N, num, T]`."""
    fresh, report = report is None, report or Report()
    report.notes += [note for note in tokenizer.notes if note not in report.notes]
    rows = []
    for record in records:
        file = report.of(record.source)
        file.read, file.kept = file.read + fresh, file.kept + fresh
        try:
            texts = responses_of(record)
            rows.append((record, file, [tokenizer.pieces(record.prompt, text) for text in texts or (None,)]))
        except Drop as drop:
            file.lose(drop, record.row)
    prompt_ids = tokenizer.encode([pieces[0][0] for _, _, pieces in rows])
    response_ids = iter(tokenizer.encode([after for _, _, pieces in rows for _, after in pieces[:num]], behind=True))
    kept, heads, tails = [], [], []
    for (record, file, pieces), ids in zip(rows, prompt_ids):
        whole = [[*next(response_ids), tokenizer.end_id] for _ in range(num)]
        cut = [answer[: lengths.max_response] for answer in whole]
        long = lengths.max_prompt is not None and len(ids) > lengths.max_prompt
        try:
            if long and lengths.long_prompts == "drop":
                raise Drop("over-long prompt", f"{len(ids)} tokens, max_prompt is {lengths.max_prompt}")
            if not ids:
                raise Drop("empty prompt", "it has no token")
            if num == 2 and cut[0] == cut[1]:
                raise Drop("identical tokens", f"the texts differ, their first {len(cut[0])} tokens do not")
        except Drop as drop:
            file.lose(drop, record.row)
            continue
        if long:
            bos = ids[: int(ids[0] == tokenizer.hf.bos_token_id)]
            ids = bos + ids[len(ids) - lengths.max_prompt + len(bos) :]
        written = {text for part in pieces for piece in part for text, of_template in piece if not of_template}
        file.note("prompts cut", int(long))
        file.note("responses cut", sum(a != b for a, b in zip(whole, cut)))
        file.note("special tokens kept as text", sum(map(tokenizer.count_special, written)))
        kept.append(record)
        heads.append(ids)
        tails += cut
    if not kept:
        raise ValueError(f"no record is left:\n{report.table()}")
    tokens, mask = _pad(tails, lengths.max_response, tokenizer.pad_id, left=False)
    shape = (len(kept), num, tokens.shape[1])
    head = _pad(heads, lengths.max_prompt, tokenizer.pad_id, left=True)
    return kept, head, (tokens.reshape(shape), mask.reshape(shape))


def _pad(rows: list[list[int]], length: int | None, pad_id: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and mask bool, `[N, length]`."""
    length = length or -(-max(map(len, rows), default=0) // 16) * 16
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(None, len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask
