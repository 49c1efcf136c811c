"""Interventions on the forward pass, many at once: what is changed (`spec`), and what comes of it (`run`, `answers`)."""

from .answers import Answers, read_answers
from .edits import Bases
from .run import Engine, Runs, part_names
from .spec import CLEAN, Intervention, InterventionError, StageEdit, read_interventions, zero_each

__all__ = [
    "CLEAN",
    "Answers",
    "Bases",
    "Engine",
    "Intervention",
    "InterventionError",
    "Runs",
    "StageEdit",
    "part_names",
    "read_answers",
    "read_interventions",
    "zero_each",
]
