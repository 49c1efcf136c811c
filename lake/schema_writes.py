"""Tables of dataset write_conditions: what every head does at the query of a causal patch pair, and what it would write.

The conditions are substitutions at readout: nothing downstream is run again, so attention and answers are the model's own.
"""

from __future__ import annotations

from .columns import table

_PAIR = """
        spec | VARCHAR | 12-hex identity of roles, pairs and record side: see view specs
        record_side | VARCHAR | record of the pair that is measured: clean or corrupted
        step | BIGINT | step
        split | VARCHAR | split of the pair
        pair_type | VARCHAR | type of the pair
        pair_id | VARCHAR | causal patch pair, see table pairs
"""
_HEAD = """
        layer | INTEGER | layer from 0
        head | INTEGER | head from 0
"""

TABLES = (
    table(
        "write_answers",
        "spec step pair_id",
        "one row per step and pair: what the model answers at the prediction position of the measured record",
        f"""
        {_PAIR}
        shuffled_pair_id | VARCHAR | pair whose values stand at the support where they are shuffled: the one before it of its type in scan order, the last for the first
        query_position | INTEGER | position the heads attend from
        answer_token | INTEGER | id of the right token
        answer_logit | FLOAT | its logit
        best_wrong_token | INTEGER | competitor with the largest logit
        best_wrong_logit | FLOAT | its logit
        competitor_logits | FLOAT[] | logit of every competitor, in the order of the event's competitors
        answer_log_prob | FLOAT | log softmax of the answer over the whole vocabulary, nats
        best_token | INTEGER | token with the largest logit in the whole vocabulary
        correct | BOOLEAN | whether best_token is the answer
        """,
    ),
    table(
        "write_attention",
        "spec step pair_id layer head",
        "one row per step, pair and head: its scores and attention at the query, over support and distractor keys up to it",
        f"""
        {_PAIR}
        {_HEAD}
        support_score | FLOAT | mean over the support of q·k/√d_head before the softmax, biases in
        distractor_score | FLOAT | the same over the distractors
        support_attention | FLOAT | mean over the support of the attention to it
        distractor_attention | FLOAT | the same over the distractors
        support_mass | FLOAT | sum over the support of the attention to it
        distractor_mass | FLOAT | the same over the distractors
        """,
    ),
    table(
        "write_conditions",
        "spec step pair_id layer head condition",
        "one row per step, pair, head and condition: what the head writes at the query, or would write, read by the unembedding; "
        "value bias in, output bias out, no LayerNorm where not said",
        f"""
        {_PAIR}
        {_HEAD}
        condition | VARCHAR | (real or correct_support)_attention_(real or shuffled)_values: attention as it is, or on the support alone; values at the support as they are, or the mean one of the pair before
        ov_map_value_margin | FLOAT | W_O · mean value vector of the support, read by the unembedding: answer less its best competitor, whatever is attended to
        head_value_margin_dla | FLOAT | write, read by the unembedding: answer less the competitor this write favours most
        head_best_wrong_token | INTEGER | that competitor
        head_answer_logit_dla | FLOAT | write · unembedding of the answer
        head_margin_dla | FLOAT | write · gradient of the model's value margin with respect to the last residual stage, LayerNorm differentiated
        """,
    ),
)
