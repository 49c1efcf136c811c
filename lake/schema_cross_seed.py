"""Tables of `lakebed pipeline cross-seed`: what each head of each seed's run came to, and which updates grew the chosen ones."""

from __future__ import annotations

from .columns import table

_HEAD = """
        spec | VARCHAR | 12-hex identity of the scan (roles, rank, stages, probe, splits, steps, window): see view specs
        layer | INTEGER | layer from 0
        head | INTEGER | head from 0
"""

TABLES = (
    table(
        "cross_seed_candidates",
        "spec layer head",
        "one row per scanned head of a seed's run: the growth of its QK separation over the window, and its place among the heads",
        f"""
        {_HEAD}
        head_label | VARCHAR | L2H1
        seed | BIGINT | training seed of the run
        place | INTEGER | 1 for the head whose separation grew most over the window; ties go to the lower layer, then head
        label | VARCHAR | winner, runner_up, median or bottom; null for the others
        stage | VARCHAR | residual stage the head was scored on
        window_start_step | BIGINT | first scanned step of the window
        window_end_step | BIGINT | last scanned step of the window
        growth | DOUBLE | separation at the window's last step minus that at its first
        win_rate_growth | DOUBLE | the same of the win rate
        growth_vs_singular_value | DOUBLE | correlation of separation and largest singular value of W_QK over the window; null if one is constant
        growth_vs_answer_margin | DOUBLE | correlation of separation and answer margin over the window; null if one is constant
        end_step | BIGINT | last scanned step
        separation | DOUBLE | separation there: mean score of the support minus mean score of the distractors
        win_rate | DOUBLE | share of events there whose best support scores above every distractor
        answer_margin | DOUBLE | mean answer margin there, logits
        answer_accuracy | DOUBLE | share of events answered rightly there
        chance_win_rate | DOUBLE | win rate of a head that scores at random: share of supports among an event's keys
        num_events | BIGINT | events scored at a step
        """,
    ),
    table(
        "cross_seed_scans",
        "spec layer head step",
        "one row per scanned head and step: how well it scores the support above the distractors",
        f"""
        {_HEAD}
        step | BIGINT | step
        separation | DOUBLE | mean score of the support minus mean score of the distractors
        max_margin | DOUBLE | mean score of the support minus largest score of a distractor
        win_rate | DOUBLE | share of events whose best support scores above every distractor
        answer_margin | DOUBLE | mean answer margin, logits
        answer_accuracy | DOUBLE | share of events answered rightly
        singular_value | DOUBLE | largest singular value of the head's W_QK
        """,
    ),
    table(
        "cross_seed_updates",
        "spec layer head adam_spec component",
        "one row per chosen head and term of AdamW's updates: what the term did to its separation over the recorded steps. "
        "That is arithmetic, not a counterfactual",
        f"""
        {_HEAD}
        adam_spec | VARCHAR | 12-hex identity of the recorded steps and pairs: see view specs
        start_step | BIGINT | first recorded step
        end_step | BIGINT | last recorded step
        component | VARCHAR | term of the update, or what plain SGD at the same learning rate would have done
        sum_delta | DOUBLE | sum over the steps of gradient of the separation times the term
        sum_actual_delta | DOUBLE | sum of the changes measured at both ends of each step, in the basis of its start
        sum_first_order_delta | DOUBLE | sum of gradient of the separation times the whole update
        mean_cosine | DOUBLE | mean cosine of the term and the gradient; null where one is always zero
        """,
    ),
)
