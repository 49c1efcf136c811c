"""Records as an extractor makes them, from the events of `tests.queries.float64_decoder.load_events` alone."""

import math

import torch
from lakebed.engine.readout import Choices
from lakebed.engine.scalars import Pairs, Records
from lakebed.engine.scalars.measure import PairBatch


def records_of(events):
    """Records as an extractor makes them, from events alone."""
    examples = list(dict.fromkeys(event.example for event in events))
    longest = max(len(event.tokens) for event in events)
    tokens = {event.example: event.tokens + [0] * (longest - len(event.tokens)) for event in events}
    candidates = sorted(events[0].competitors)
    wrong = torch.zeros(len(events), len(candidates))
    answer = torch.tensor([candidates.index(event.answer) for event in events])
    wrong[torch.arange(len(events)), answer] = -math.inf
    roles = {}
    for role in events[0].roles:
        roles[role] = torch.zeros(len(events), longest, dtype=torch.bool)
        for at, event in enumerate(events):
            roles[role][at, event.roles[role]] = True
    row = torch.tensor([examples.index(event.example) for event in events])
    distinct = torch.tensor([tokens[example] for example in examples])
    return Records(
        tokens=distinct[row],
        distinct=distinct,
        row=row,
        length=torch.tensor([len(event.tokens) for event in events]),
        prediction=torch.tensor([event.prediction for event in events]),
        choices=Choices(torch.tensor(candidates), answer, wrong),
        roles=roles,
    )


def batch_of(events):
    pairs = Pairs({"clean": records_of(events)}, torch.zeros(len(events), 2, dtype=torch.long))
    return PairBatch(pairs, 0)
