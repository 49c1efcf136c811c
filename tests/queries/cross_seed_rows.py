"""What stage select leaves in the lake, with invented numbers: seeds whose role one head holds, or none."""

from __future__ import annotations

from pathlib import Path

from lakebed.lake import Lake, Unit
from lakebed.lake.datasets import CROSS_SEED, CROSS_SEED_UPDATES
from lakebed.lake.names import spec_id

PARAMETERS = {"probe": "probe", "rank": [4]}
STEPS = (0, 50, 100)
# Separation of (layer, head) at STEPS, by seed, and the share of events it wins at the end.
SEEDS = {
    1: {(0, 0): ((0.0, 0.1, 0.2), 0.2), (1, 0): ((0.1, 1.0, 2.1), 0.9), (1, 1): ((0.0, 0.3, 0.5), 0.6)},
    2: {(0, 0): ((0.0, -0.1, -0.2), 0.1), (1, 0): ((0.0, 0.1, 0.0), 0.1), (1, 1): ((0.2, 0.9, 1.2), 0.8)},
    3: {(0, 0): ((0.0, 0.0, 0.4), 0.3), (1, 0): ((0.0, 2.0, 1.0), 0.7), (1, 1): ((0.0, 0.0, 0.1), 0.2)},
}
# Sums over the recorded steps, of the head that grew most.
TERMS = {"adam_historical_momentum": 0.6, "adam_current_gradient": 0.3, "weight_decay": -0.1, "raw_sgd": 0.05}


def run_name(seed: int) -> str:
    return f"made_seed_{seed:04d}"


def growth(seed: int, of: tuple[int, int], window: tuple[int, int] = (50, 100)) -> float:
    at = dict(zip(STEPS, SEEDS[seed][of][0], strict=True))
    return at[window[1]] - at[window[0]]


def ordered(seed: int) -> list[tuple[int, int]]:
    return sorted(SEEDS[seed], key=lambda of: (-growth(seed, of), of))


def write_seed(
    lake: Lake, seed: int, parameters: dict = PARAMETERS, probe_sha: str = "same", updates: bool = True
) -> None:
    """The run of one seed."""
    spec, run = spec_id(parameters), run_name(seed)
    heads = ordered(seed)
    with lake.unit(Unit("probe", run, f"probe-{probe_sha}", (), {"probe": "probe"})) as writer:
        writer.rows(
            "probes",
            [{"probe": "probe", "sha256": probe_sha, "source": "symbolic_kv", "splits": ["validation_iid"]}],
        )
    with lake.unit(Unit(CROSS_SEED, run, f"{CROSS_SEED}-{spec}", STEPS, parameters)) as writer:
        writer.rows(
            "cross_seed_candidates",
            [_candidate(spec, seed, of, place) for place, of in enumerate(heads, 1)],
        )
        writer.rows(
            "cross_seed_scans",
            [
                {
                    "spec": spec,
                    "layer": of[0],
                    "head": of[1],
                    "step": step,
                    "separation": value,
                    "max_margin": value - 1,
                    "win_rate": SEEDS[seed][of][1] * step / 100,
                    "answer_margin": step / 50,
                    "answer_accuracy": step / 100,
                    "singular_value": 1 + value,
                }
                for of in heads
                for step, value in zip(STEPS, SEEDS[seed][of][0], strict=True)
            ],
        )
    if updates:
        _write_updates(lake, spec, seed, heads[0])


def _candidate(spec: str, seed: int, of: tuple[int, int], place: int) -> dict:
    separations, wins = SEEDS[seed][of]
    return {
        "spec": spec,
        "layer": of[0],
        "head": of[1],
        "head_label": f"L{of[0]}H{of[1]}",
        "seed": seed,
        "place": place,
        "label": {1: "winner", 2: "runner_up", 3: "bottom"}[place],
        "stage": "embedding" if of[0] == 0 else "layer_0_post_mlp",
        "window_start_step": 50,
        "window_end_step": 100,
        "growth": growth(seed, of),
        "win_rate_growth": wins / 2,
        "end_step": 100,
        "separation": separations[-1],
        "win_rate": wins,
        "answer_margin": 2.0,
        "answer_accuracy": 1.0,
        "chance_win_rate": 0.125,
        "num_events": 40,
    }


def _write_updates(lake: Lake, spec: str, seed: int, of: tuple[int, int]) -> None:
    parameters = {"scan": spec, "steps": "60:64"}
    unit = Unit(CROSS_SEED_UPDATES, run_name(seed), f"{CROSS_SEED_UPDATES}-{spec}", (60, 64), parameters)
    with lake.unit(unit) as writer:
        writer.rows(
            "cross_seed_updates",
            [
                {
                    "spec": spec,
                    "layer": of[0],
                    "head": of[1],
                    "adam_spec": spec_id(parameters),
                    "start_step": 60,
                    "end_step": 64,
                    "component": component,
                    "sum_delta": seed * delta,
                    "sum_actual_delta": seed * 1.0,
                    "sum_first_order_delta": seed * 0.8,
                    "mean_cosine": 0.1,
                }
                for component, delta in TERMS.items()
            ],
        )


def make_cross_seed_lake(path: Path) -> Lake:
    """Runs of seeds 1, 2 and 3."""
    lake = Lake.open_or_create(path)
    for seed in SEEDS:
        write_seed(lake, seed)
    return lake
