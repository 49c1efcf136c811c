"""What can go wrong in a lake; every message is one line with the remedy in it."""

from __future__ import annotations

from .. import LakebedError

__all__ = [
    "CorruptFile",
    "InputMismatch",
    "InvalidName",
    "LakeExists",
    "LakeNotFound",
    "LakebedError",
    "MissingData",
    "NewerFormat",
    "NoBucket",
    "NoCredentials",
    "QueryError",
    "SchemaMismatch",
    "StorageFull",
    "StorageRefused",
    "StoreUnreachable",
    "UnitExists",
    "UnknownName",
]


class LakeNotFound(LakebedError):
    """The path or URI holds no lake."""


class NoBucket(LakeNotFound):
    """The URI names a bucket that the store does not have."""


class LakeExists(LakebedError):
    """A lake, or something else, already stands where a new one was asked for."""


class NewerFormat(LakebedError):
    """The lake was written in a format this version does not know."""


class CorruptFile(LakebedError):
    """A file's length or checksum differs from its receipt, or it cannot be decoded."""


class InvalidName(LakebedError):
    """A run name that cannot be a folder everywhere."""


class UnknownName(LakebedError):
    """A run, table, parameter or quantity that the lake does not have; the message lists those it has."""


class MissingData(LakebedError):
    """A step or dataset that was not recorded or extracted; the message names the command that makes it."""


class InputMismatch(LakebedError):
    """A unit of this name exists but was made from other inputs (another checkpoint, config or code version)."""


class UnitExists(LakebedError):
    """Another process committed this unit first."""


class SchemaMismatch(LakebedError):
    """Rows that do not fit the declared columns of their table."""


class StorageFull(LakebedError):
    """The disk or bucket refused a write; nothing of the unit in flight is visible."""


class StorageRefused(LakebedError):
    """A path that cannot be written: no folder, read-only, or without permission."""


class NoCredentials(StorageRefused):
    """The store was given no credentials, or refuses those it was given."""


class StoreUnreachable(LakebedError):
    """The store does not answer."""


class QueryError(LakebedError):
    """SQL that DuckDB refused."""
