"""cross-seed: does the same role form in every seed, and in the same head? (definitions: part 3, H)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ..lake.errors import MissingData, UnknownName
from ..lake.steps import StepSyntax, select_steps
from .chart import Grid, Trajectory
from .markdown import number, percent
from .report import InvalidOption, Report, ReportFailed, RowFile, TextTable
from .results import Results

if TYPE_CHECKING:
    from ..lake import Lake
    from ..lake.datasets import Need


class CrossSeed(Report):
    """Does the same role form in every seed, and does its address move?

    Reads what `lakebed pipeline cross-seed` selected: in every seed's run the head whose QK separation of support and
    distractors grew most over the window, on the stage it reads.
    """

    run: str | None = Field(
        None, description="run of a seed that names the scan; needed if the lake has several scans"
    )
    steps: str | None = Field(
        None, description="scanned steps of the trajectories, as 500 or 250:5500:250; default all"
    )
    runs: tuple[str, ...] = Field(
        (), description="run of a seed to compare; default all of the scan; may be given several times"
    )
    spec: str | None = Field(
        None, description="scan to compare, as table cross_seed_candidates has it; default the only one"
    )
    formed_at: float = Field(
        0.5, ge=0, lt=1, description="the role has formed where a head wins more than this share of events"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "candidate_rows": RowFile("cross_seed_candidate_rows", "candidate_rows", "candidate_csv"),
        "seed_rows": RowFile("cross_seed_rows", "seed_rows", "seed_csv"),
        "address_rows": RowFile("cross_seed_address_rows", "address_rows"),
        "update_rows": RowFile("cross_seed_update_rows", "update_rows"),
    }
    tables = (
        TextTable(
            "seed_rows",
            "Every seed",
            {
                "seed": "seed",
                "holder": "holder",
                "stage": "holder_stage",
                "wins": "win_rate",
                "chance": "chance_win_rate",
                "formed by step": "formed_step",
                "formed heads": "formed_heads",
                "grew most": "winner",
                "growth": "growth",
                "share of growth": "share_of_growth",
                "runner-up": "runner_up",
                "its growth": "runner_up_growth",
                "answers right": "answer_accuracy",
            },
            about="The holder wins the largest share of events at the last scanned step. Growth is a "
            "separation at the window's last scanned step minus that at its first; its share is of all heads "
            "whose separation grew.",
        ),
        TextTable(
            "update_summary",
            "Which term of the updates grew the chosen heads",
            {
                "seed": "seed",
                "head": "head_label",
                "from step": "start_step",
                "to step": "end_step",
                "Σ actual change": "actual",
                "momentum": "momentum",
                "current gradient": "current_gradient",
                "weight decay": "weight_decay",
                "raw SGD": "raw_sgd",
            },
            about="Shares are of the first-order sum: momentum, current gradient and decay add up to 1. "
            "Arithmetic, not a counterfactual.",
        ),
    )
    charts = (
        Grid(
            "growth",
            "growth_cells",
            "Which head grew in which seed",
            about="growth of the QK separation over the window, each head on the stage it is scanned on",
            value_title="growth",
        ),
        Grid(
            "win_rate",
            "win_cells",
            "Which head holds the role at the end",
            about="share of events whose support it scores above every distractor, at the last scanned step",
            value_title="win rate",
            domain=(0, 1),
        ),
        Trajectory(
            "trajectory",
            "trajectory",
            "When the holder of each seed came to match",
            series="series",
            panel="panel",
            panel_titles={
                "separation": "support − distractors",
                "win rate": "win rate",
                "answer margin": "answer margin (logits)",
            },
        ),
    )
    how_to_read = (
        "Heads of a layer start alike but for their random weights: which of them takes the role is an "
        "accident of the seed, and that the address moves within a layer is what one expects. That it stays "
        "would need an explanation.",
        "The holder is the head that wins most events at the last scanned step, an event being won when its "
        "best support scores above every distractor. The role has formed where it wins more than --formed-at "
        "of them. Chance is the share of supports among an event's keys.",
        "The winner is the head whose separation grew most over the window, and the one that stage adam "
        "attributes. Where it is not the holder, the role formed outside the window: move --window-start and "
        "--window-end.",
        "Scores are cut to the first singular directions of the same checkpoint's W_QK, and scales differ "
        "between heads: compare win rates across heads, growth within one.",
        "All seeds share the benchmark and the probe; initialization and batch order differ.",
    )
    next_queries = (
        (
            "The answer as one statement:",
            "SELECT seed, arg_max(head_label, growth) AS winner, max(growth) AS growth, arg_max(win_rate, "
            "growth) AS win_rate FROM cross_seed_candidates GROUP BY spec, seed ORDER BY spec, seed",
        ),
        (
            "In how many seeds each head won, and what it grew on average where it did not:",
            "SELECT layer, head, count(*) FILTER (place = 1) AS won, count(*) AS seeds, avg(growth) FILTER "
            "(place > 1) AS growth_elsewhere FROM cross_seed_candidates GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (12, 1)
    in_demo: ClassVar[bool] = False
    example: ClassVar[str] = "lakebed query cross-seed --lake seeds.lake --out cross-seed"

    @model_validator(mode="after")
    def _has_steps(self) -> CrossSeed:
        try:
            found = self.steps is None or select_steps(self.steps, [])
        except StepSyntax as error:
            raise ValueError(str(error)) from error
        if not found:
            raise ValueError(f"--steps {self.steps}: name them, as 500 or 250:5500:250")
        return self

    def needs(self) -> tuple[Need, ...]:
        """Nothing of one run: `subject` finds the runs."""
        return ()

    def subject(self, lake: Lake) -> str:
        """The first of the runs that are compared."""
        return self.chosen(lake)[1][0]

    def about(self, results: Results) -> str:
        """How many runs."""
        return f"{len(results.parameters['chosen_runs'])} runs"

    def chosen(self, lake: Lake) -> tuple[str, list[str]]:
        """(spec, runs by seed) of the scan that is compared. Raises MissingData, UnknownName or InvalidOption."""
        rows = lake.session.execute(
            "SELECT spec, run FROM cross_seed_candidates WHERE place = 1 ORDER BY spec, seed, run",
            tables={"cross_seed_candidates"},
        ).fetchall()
        if not rows:
            raise MissingData(
                f"cross-seed: no seeds were scanned and selected in {lake.uri}. Run: lakebed pipeline "
                f"cross-seed --lake {lake.uri} --base-config CONFIG --seed 11 --seed 13 …"
            )
        for run in (*self.runs, *([self.run] if self.run else [])):
            if run not in {of for _, of in rows}:
                held = ", ".join(sorted({of for _, of in rows}))
                raise UnknownName(
                    f"cross-seed: no candidates of run {run!r} in {lake.uri}; there are those of {held}"
                )
        wanted = [self.run] if self.run else list(self.runs)
        specs = sorted({spec for spec, run in rows if not wanted or run in wanted})
        spec = self.spec or specs[0]
        if self.spec is None and len(specs) > 1:
            raise InvalidOption(
                f"cross-seed: which --spec? {lake.uri} holds scans {', '.join(specs)}: see table specs"
            )
        runs = [run for of, run in rows if of == spec and (not self.runs or run in self.runs)]
        if not runs:
            raise UnknownName(f"cross-seed: no scan {spec!r} in {lake.uri}; there are {', '.join(specs)}")
        return spec, runs

    def require(self, lake: Lake, run: str) -> None:
        """All seeds must have been asked the same questions: one probe, one scan."""
        spec, runs = self.chosen(lake)
        absent = [of for of in self.runs if of not in runs]
        if absent:
            raise UnknownName(f"cross-seed: run {absent[0]!r} has no scan {spec}; it is of {', '.join(runs)}")
        probes = lake.session.execute(
            "SELECT p.sha256, list(p.run ORDER BY p.run) FROM probes AS p JOIN specs AS s ON s.run = p.run AND "
            "s.spec = $spec WHERE list_contains($runs, p.run) AND p.probe = (s.parameters::JSON->>'$.probe') "
            "GROUP BY p.sha256 ORDER BY ALL",
            {"spec": spec, "runs": runs},
            tables={"probes", "specs"},
        ).fetchall()
        if len(probes) > 1:
            raise ReportFailed(
                f"cross-seed: runs {probes[0][1][0]} and {probes[1][1][0]} were scanned on different probes: "
                "their events differ, and so would their numbers; compare seeds of one benchmark, with --runs"
            )

    def lake_parameters(self, lake: Lake) -> dict[str, Any]:
        """The runs and the scan, for SQL."""
        spec, runs = self.chosen(lake)
        return {"chosen_spec": spec, "chosen_runs": runs}

    def check(self, results: Results) -> None:
        """Steps of the trajectories must have been scanned."""
        absent = results.rows(
            "SELECT unnest($wanted) AS step EXCEPT SELECT step FROM trajectory ORDER BY step",
            wanted=results.steps,
        )
        if absent:
            raise ReportFailed(f"cross-seed: step {absent[0]['step']} was not scanned")

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """What was compared, and the answer in numbers."""
        return {
            "runs": results.parameters["chosen_runs"],
            "spec": results.parameters["chosen_spec"],
            "role_formed_seeds": results.value("SELECT count(*) FROM seed_rows WHERE formed"),
            "num_seeds": results.value("SELECT count(*) FROM seed_rows"),
            "addresses": results.rows("FROM address_rows"),
        }

    def findings(self, results: Results) -> list[str]:
        """Whether the role repeats, whether its address moves, whether the window saw it, and by which terms it grew."""
        ""
        seeds = results.rows("FROM seed_rows")
        lines = (_role(self, seeds), _address(seeds), _growth(seeds), _terms(results))
        return [line for line in lines if line]

    def warnings(self, results: Results) -> list[str]:
        """That a single seed answers nothing, and that a winner may be one by chance."""
        lines = []
        if len(results.rows("FROM seed_rows")) < 2:
            lines.append("One seed was scanned: whether a role repeats takes at least two.")
        stages = results.value("SELECT count(DISTINCT stage) FROM candidate_rows")
        layers = results.value("SELECT count(DISTINCT layer) FROM candidate_rows")
        if layers > 1 and stages == 1:
            lines.append(
                "All heads were scanned on one stage: heads of other layers are scored on an input they never see."
            )
        return lines


def _role(report: CrossSeed, seeds: list[dict[str, Any]]) -> str:
    formed = sum(row["formed"] for row in seeds)
    where = "every seed" if formed == len(seeds) else ("some seeds" if formed else "no seed")
    rates = sorted(row["win_rate"] for row in seeds)
    return (
        f"**The role forms in {where}: {formed} of {len(seeds)}.** At the last scanned step the best head "
        f"scores a support above every distractor in {_range(rates)} of {seeds[0]['num_events']:,} events; chance is "
        f"{percent(seeds[0]['chance_win_rate'])}, and formed is above {percent(report.formed_at)}."
    )


def _range(values: list[float]) -> str:
    """Percentages from the least to the largest, or the one there is."""
    return " to ".join(dict.fromkeys(percent(of) for of in (min(values), max(values))))


def _address(seeds: list[dict[str, Any]]) -> str:
    formed = [row for row in seeds if row["formed"]]
    if len(formed) < 2:
        return ""
    layers = sorted({row["holder_layer"] for row in formed})
    if len({row["holder"] for row in formed}) == 1:
        return f"**Its address stays: {formed[0]['holder']} in all {len(formed)} seeds where it forms.**"
    over = f"within layer {layers[0]}" if len(layers) == 1 else f"over layers {', '.join(map(str, layers))}"
    where = "; ".join(f"{row['holder']} in seed {row['seed']}" for row in formed)
    return f"**Its address moves {over}**: {where}."


def _growth(seeds: list[dict[str, Any]]) -> str:
    """Who grew over the window, and whether that is who holds the role."""
    grown = "; ".join(
        f"seed {row['seed']} {row['winner']} {number(row['growth'], 3)}"
        + (f" before {row['runner_up']} {number(row['runner_up_growth'], 3)}" if row["runner_up"] else "")
        for row in seeds
    )
    apart = [str(row["seed"]) for row in seeds if row["formed"] and not row["winner_holds"]]
    also = (
        f" In seed {', '.join(apart)} that is not the head that holds the role: it formed outside the window."
        if apart
        else ""
    )
    return f"Over the window separation grew most in: {grown}.{also}"


def _terms(results: Results) -> str:
    rows = results.rows(
        "SELECT s.* FROM update_summary AS s JOIN seed_rows AS w ON w.seed = s.seed AND w.winner = "
        "s.head_label ORDER BY ALL"
    )
    if not rows:
        return ""
    told = "; ".join(
        f"seed {row['seed']} ({row['head_label']}, steps {row['start_step']} to {row['end_step']}) momentum "
        f"{percent(row['momentum'])}, current gradient {percent(row['current_gradient'])}"
        for row in rows
    )
    return f"Of the first-order change of the winner's separation: {told}. Arithmetic, not a counterfactual."
