"""A probe: fixed token records with query events, on which the steps of a run are compared. Knows no task.

A record comes from the symbolic-KV benchmark (`symbolic_probe`) or from a line of JSON (`read_probe_jsonl`):

    {"sample_id": "s0", "split": "all", "token_ids": [5, 9, 7], "tokens": ["a", "b", "c"],
     "events": [{"roles": {"prediction": 2, "subject": [0, 1]}, "answer": 9, "competitors": [7]}]}

`split` and `tokens` may be left out; positions count from 0.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .. import LakebedError
from .symbolic_kv import Record, Vocabulary, benchmark_jsonl
from .symbolic_kv.roles import event_partition, event_roles

PREDICTION = "prediction"
OTHER = "other"
RESERVED_ROLES = {
    "causal_prefix": "every position up to the prediction, which every event has",
    OTHER: "the positions that no role holds",
    "write": "what a head writes at the query position",
}


class ProbeFormatError(LakebedError):
    """A probe file that does not keep to the format; the message names the line."""


class VocabularyMismatch(LakebedError):
    """A probe whose tokens are not those of the model."""


@dataclass(frozen=True)
class ProbeEvent:
    """One question put to the model: the logits at the prediction position should favour `answer`."""

    roles: Mapping[str, tuple[int, ...]]
    """Role to positions, ascending; may lie after the prediction. `prediction` is always there, with one position."""
    partition: Mapping[int, str]
    """Each position from 0 to the prediction, ascending, to the part it belongs to."""
    answer: int
    competitors: tuple[int, ...]
    """Wrong tokens, ascending."""

    @property
    def prediction(self) -> int:
        """The position whose logits answer."""
        return self.roles[PREDICTION][0]


@dataclass(frozen=True)
class ProbeRecord:
    """One token sequence with its events; `source` is the task's own record, if it has one."""

    sample_id: str
    split: str
    token_ids: tuple[int, ...]
    events: tuple[ProbeEvent, ...]
    source: Record | None = None


@dataclass(frozen=True)
class Probe:
    """Records of a probe, the texts of its tokens as far as they are known, and the hash that identifies it."""

    records: tuple[ProbeRecord, ...]
    sha256: str
    vocabulary: tuple[str | None, ...] | None
    """Text by token id; None where or while unknown."""
    key_tokens: tuple[int, ...] | None = None
    value_tokens: tuple[int, ...] | None = None

    @property
    def num_events(self) -> int:
        """Events of all records."""
        return sum(len(record.events) for record in self.records)

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits in record order."""
        return tuple(dict.fromkeys(record.split for record in self.records))

    def text(self, token: int) -> str | None:
        """The text of a token, or None when it is not known."""
        if self.vocabulary is None or token >= len(self.vocabulary):
            return None
        return self.vocabulary[token]

    def require_vocabulary(self, size: int, texts: Sequence[str] | None = None) -> None:
        """Raises VocabularyMismatch, naming a record, for a token the model has not or knows by another text."""
        for record in self.records:
            used = {*record.token_ids, *(token for event in record.events for token in _answers(event))}
            beyond = max(used)
            if beyond >= size:
                raise VocabularyMismatch(
                    f"record {record.sample_id!r} has token {beyond}, and the model's vocabulary ends at {size - 1}: the "
                    "probe was made for another vocabulary"
                )
            for token in sorted(used) if texts is not None else ():
                text = self.text(token)
                if texts is not None and text is not None and text != texts[token]:
                    raise VocabularyMismatch(
                        f"record {record.sample_id!r} calls token {token} {text!r}, and the run calls it "
                        f"{texts[token]!r}: the probe was made for another vocabulary"
                    )

    def require_length(self, longest: int) -> None:
        """Raises ProbeFormatError, naming a record longer than the model can read."""
        for record in self.records:
            if len(record.token_ids) > longest:
                raise ProbeFormatError(
                    f"record {record.sample_id!r} has {len(record.token_ids)} tokens, and the model reads at most {longest}"
                )


def _answers(event: ProbeEvent) -> tuple[int, ...]:
    return (event.answer, *event.competitors)


def symbolic_probe(records: Sequence[Record], vocabulary: Vocabulary) -> Probe:
    """The probe of symbolic-KV records; competitors are all value tokens but the answer, in vocabulary order.

    Its hash is that of the records as JSON lines, the text of a probe file.
    """
    return Probe(
        records=tuple(_symbolic_record(record, vocabulary) for record in records),
        sha256=hashlib.sha256(benchmark_jsonl(records).encode()).hexdigest(),
        vocabulary=vocabulary.tokens,
        key_tokens=tuple(vocabulary.key_ids),
        value_tokens=tuple(vocabulary.value_ids),
    )


def _symbolic_record(record: Record, vocabulary: Vocabulary) -> ProbeRecord:
    values = tuple(vocabulary.value_ids)
    events = []
    for event in record["query_events"]:
        answer = vocabulary.ids[event["answer_value"]]
        at = answer - values[0]
        competitors = values[:at] + values[at + 1 :]
        roles = event_roles(record, event)
        events.append(ProbeEvent(roles, event_partition(record, event), answer, competitors))
    return ProbeRecord(
        record["sample_id"], record["split"], tuple(record["token_ids"]), tuple(events), record
    )


# -- JSON lines ----------------------------------------------------------------------------------------------


def _as_positions(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [value]
    if any(type(position) is not int for position in found):
        raise ValueError("must be a position or a list of positions")
    if not found:
        raise ValueError("is empty; leave the role out of an event that lacks it")
    return sorted(set(found))


Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Positions = Annotated[list[int], BeforeValidator(_as_positions)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _EventLine(_Strict):
    roles: dict[Text, Positions]
    answer: Token
    competitors: Annotated[list[Token], Field(min_length=1)]


class _RecordLine(_Strict):
    sample_id: Text
    split: Text = "all"
    token_ids: Annotated[list[Token], Field(min_length=1)]
    tokens: list[str] | None = None
    events: Annotated[list[_EventLine], Field(min_length=1)]


def read_probe_jsonl(path: str | os.PathLike[str]) -> Probe:
    """Reads and validates a probe file, one record per line; raises ProbeFormatError naming the first bad line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ProbeFormatError(f"cannot read probe file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ProbeFormatError(f"probe file {path} is not UTF-8 text ({error.reason})") from error
    return parse_probe_jsonl(text, str(path))


def parse_probe_jsonl(text: str, source: str) -> Probe:
    """As `read_probe_jsonl`, from text; `source` names it in errors."""
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise ProbeFormatError(f"{source} is empty: a probe has one JSON record per line")
    records: list[ProbeRecord] = []
    texts: dict[int, str] = {}
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        where = f"{source}, line {number}"
        parsed = _parse_line(line, where)
        if parsed.sample_id in first_line:
            raise ProbeFormatError(
                f"{where}: sample_id {parsed.sample_id!r} stands in line {first_line[parsed.sample_id]} already"
            )
        first_line[parsed.sample_id] = number
        records.append(_record(parsed, where))
        _gather_texts(parsed, texts, where)
    vocabulary = tuple(texts.get(token) for token in range(max(texts) + 1)) if texts else None
    return Probe(tuple(records), _content_hash(records, texts), vocabulary)


def _parse_line(line: str, where: str) -> _RecordLine:
    if not line.strip():
        raise ProbeFormatError(f"{where} is blank: every line must be a JSON record")
    try:
        document = json.loads(line, object_pairs_hook=_distinct)
    except ValueError as error:
        raise ProbeFormatError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ProbeFormatError(f"{where} is no JSON object but a {type(document).__name__}")
    try:
        return _RecordLine.model_validate(document)
    except ValidationError as error:
        raise ProbeFormatError(f"{where}: {_first_error(error)}") from error


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {name!r} stands twice in one object")
        found[name] = value
    return found


def _first_error(error: ValidationError) -> str:
    found = error.errors()[0]
    name = ""
    for part in found["loc"]:
        if part != "[key]":
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    if found["type"] == "missing":
        return f"{name} is missing"
    if found["type"] == "extra_forbidden":
        model = _EventLine if name.startswith("events[") else _RecordLine
        return f"unknown field {name}; there are {', '.join(model.model_fields)}"
    if found["type"] == "value_error":
        return f"{name} {found['ctx']['error']}"
    return f"{name}: {found['msg']}, not {str(found['input'])[:60]}"


def _record(parsed: _RecordLine, where: str) -> ProbeRecord:
    length = len(parsed.token_ids)
    if parsed.tokens is not None and len(parsed.tokens) != length:
        raise ProbeFormatError(f"{where}: tokens has {len(parsed.tokens)} texts for {length} token_ids")
    events = tuple(
        _event(event, length, f"{where}: events[{index}]") for index, event in enumerate(parsed.events)
    )
    return ProbeRecord(parsed.sample_id, parsed.split, tuple(parsed.token_ids), events)


def _event(parsed: _EventLine, length: int, where: str) -> ProbeEvent:
    if PREDICTION not in parsed.roles:
        raise ProbeFormatError(f"{where} has no role {PREDICTION}: the position whose logits answer")
    if len(parsed.roles[PREDICTION]) != 1:
        raise ProbeFormatError(
            f"{where}: role {PREDICTION} must be one position, not {parsed.roles[PREDICTION]}"
        )
    for role, positions in parsed.roles.items():
        if role in RESERVED_ROLES:
            raise ProbeFormatError(f"{where}: role {role!r} is reserved for {RESERVED_ROLES[role]}")
        outside = [position for position in positions if not 0 <= position < length]
        if outside:
            raise ProbeFormatError(
                f"{where}: role {role!r} names position {outside[0]}; the record has positions 0 to {length - 1}"
            )
    if parsed.answer in parsed.competitors:
        raise ProbeFormatError(f"{where}: answer {parsed.answer} is among its competitors")
    roles = {role: tuple(positions) for role, positions in parsed.roles.items()}
    competitors = tuple(sorted(set(parsed.competitors)))
    return ProbeEvent(roles, _partition(roles), parsed.answer, competitors)


def _partition(roles: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Each position up to the prediction to the first role that holds it."""
    holder: dict[int, str] = {}
    for role, positions in roles.items():
        for position in positions:
            holder.setdefault(position, role)
    return {position: holder.get(position, OTHER) for position in range(roles[PREDICTION][0] + 1)}


def _gather_texts(parsed: _RecordLine, texts: dict[int, str], where: str) -> None:
    for token, text in zip(parsed.token_ids, parsed.tokens or (), strict=False):
        if texts.setdefault(token, text) != text:
            raise ProbeFormatError(
                f"{where}: token {token} is {text!r} here and {texts[token]!r} before; an id has one text"
            )


def _content_hash(records: Sequence[ProbeRecord], texts: Mapping[int, str]) -> str:
    digest = hashlib.sha256()
    for document in (*_documents(records), sorted(texts.items())):
        digest.update(json.dumps(document).encode())
    return digest.hexdigest()


def _documents(records: Iterable[ProbeRecord]) -> Iterator[Any]:
    for record in records:
        # The order of roles decides the partition, so it is content.
        events = [[list(event.roles.items()), event.answer, event.competitors] for event in record.events]
        yield [record.sample_id, record.split, record.token_ids, events]
