"""The symbolic key-value task: a stream of writes and reads, where a read must recall the latest write.

`generate_benchmark` draws the six splits from one seed, and checks them. The tensors of a split are made by
`lakebed.engine.symbolic_kv.batches`, which alone needs torch.
"""

from __future__ import annotations

from .benchmark import Benchmark, benchmark_jsonl, generate_benchmark
from .checks import (
    BenchmarkError,
    DuplicateRecordError,
    ExhaustedError,
    HeldOutLeakError,
    HeuristicError,
    OracleError,
    SplitOverlapError,
)
from .records import Record
from .vocabulary import Vocabulary

__all__ = [
    "Benchmark",
    "BenchmarkError",
    "DuplicateRecordError",
    "ExhaustedError",
    "HeldOutLeakError",
    "HeuristicError",
    "OracleError",
    "Record",
    "SplitOverlapError",
    "Vocabulary",
    "benchmark_jsonl",
    "generate_benchmark",
]
