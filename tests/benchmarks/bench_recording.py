"""What recording costs: time and bytes per step at the formation config, and memory over a long run.

Bare and recorded steps alternate in one process, so that a noisy machine slows both alike; the ratio is that of the
sums over the pairs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from lakebed.engine.config import load_config
from lakebed.engine.symbolic_kv import generate_benchmark
from lakebed.engine.training import TrainingLoop
from lakebed.extractors import Recorder
from lakebed.lake import Lake

# Long enough that waiting for the last steps of a block to be written, which training would overlap, is a small part.
BLOCK = 16

MEMORY = """
import json, sys, tempfile
import torch
torch.set_num_threads(2)
from lakebed.engine.config import load_config
from lakebed.extractors.training import train
from lakebed.lake import Lake
steps = int(sys.argv[1])
with tempfile.TemporaryDirectory() as folder, Lake.create(folder + "/m.lake") as lake:
    config = load_config("demo", num_steps=2000, eval_every_steps=2000)
    train(lake, "r", config, num_steps=steps)
# Not getrusage: its maximum survives exec, and so would be this benchmark's own.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(int(peak.split()[1]) * 1024))
"""


def run(pairs: int = 10) -> dict[str, float | str]:
    """Ratios recorded/bare of time, bytes and memory."""
    torch.set_num_threads(2)
    config = load_config("formation")
    benchmark = generate_benchmark(config.benchmark)
    bare, recorded = TrainingLoop(config, benchmark), TrainingLoop(config, benchmark)
    seconds: dict[str, list[float]] = {"bare": [], "recorded": []}
    with tempfile.TemporaryDirectory() as folder, Lake.create(f"{folder}/b.lake") as lake:
        recorder = Recorder(lake, "r", recorded.model, recorded.optimizer)
        for pair in range(pairs + 1):
            for name, loop in (("bare", bare), ("recorded", recorded)):
                started = time.perf_counter()
                for _ in range(BLOCK):
                    metrics = loop.train_step()
                    if loop is recorded:
                        recorder.annotate(
                            loss=metrics.loss,
                            split="train",
                            sample_ids=metrics.sample_ids,
                            loop_state=loop.loop_state(),
                        )
                while loop is recorded and recorder.backlog:
                    # What waits in the queue is not free: it counts where it was caused, not in the next bare block.
                    time.sleep(0.001)
                if pair:
                    seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        recorder.close()
        closing = time.perf_counter() - started
        steps = pairs * BLOCK
        receipts = [receipt for receipt in lake.receipts.all("r") if receipt.dataset == "trace"]
        per_step = sum(receipt.bytes for receipt in receipts) / sum(
            len(receipt.steps) for receipt in receipts
        )
    checkpoint = _checkpoint_bytes(recorded)
    ratio = (sum(seconds["recorded"]) + closing) / sum(seconds["bare"])
    found: dict[str, float | str] = {
        "recorded step / bare step (<= 1.10)": ratio,
        "median of pairs": statistics.median(
            r / b for r, b in zip(seconds["recorded"], seconds["bare"], strict=True)
        ),
        "bare step, s": sum(seconds["bare"]) / steps,
        "bytes per recorded step / torch.save of weights and optimizer (<= 0.34)": per_step / checkpoint,
        "bytes per recorded step": per_step,
    }
    return found | memory()


def _checkpoint_bytes(loop: TrainingLoop) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        torch.save(
            {"model_state": loop.model.state_dict(), "optimizer_state": loop.optimizer.state_dict()}, path
        )
        return path.stat().st_size


def memory() -> dict[str, float | str]:
    """Peak resident memory of a recorded run of 200 and of 2,000 steps."""
    peaks = {}
    for steps in (200, 2000):
        command = [sys.executable, "-c", MEMORY, str(steps)]
        peaks[steps] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "peak memory, 2,000 steps / 200 steps (<= 1.05)": peaks[2000] / peaks[200],
        "peak memory of 2,000 steps, MB": peaks[2000] / 1e6,
    }


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name}: {value if isinstance(value, str) else round(value, 4)}")
