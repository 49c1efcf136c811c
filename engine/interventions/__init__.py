"""Interventions on the forward pass, many at once: what is changed (`spec`), and what comes of it (`run`, `answers`)."""

from .answers import Answers, read_answers
from .run import Engine, Runs, part_names
from .spec import CLEAN, Intervention, InterventionError, read_interventions, zero_each

__all__ = [
    "CLEAN",
    "Answers",
    "Engine",
    "Intervention",
    "InterventionError",
    "Runs",
    "part_names",
    "read_answers",
    "read_interventions",
    "zero_each",
]
