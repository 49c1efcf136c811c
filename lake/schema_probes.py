"""Tables of probes, and of what a forward pass over a probe computes.

A probe is a set of token records with query events; `event` numbers the events of a probe from 0. Facts of a forward
pass are keyed by probe, step and event. What was computed in float32 is stored as FLOAT.
"""

from __future__ import annotations

from .columns import table

TABLES = (
    table(
        "stages",
        "stage",
        "one row per residual stage of the model, in forward order",
        """
        stage | VARCHAR | embedding, layer_0_post_attn, layer_0_post_mlp, ..., final_norm (after the final LayerNorm)
        position | INTEGER | order in the forward pass, from 0
        layer | INTEGER | layer that writes it; null for embedding and final_norm
        layer_norm_eps | DOUBLE | epsilon of the LayerNorm that makes the stage; null where none does, or when unknown
        """,
    ),
    table(
        "probes",
        "probe",
        "one row per probe: a fixed set of records on which steps are compared",
        """
        probe | VARCHAR | name, unique within the run
        source | VARCHAR | symbolic_kv (sampled from the benchmark), jsonl (imported), or corrupted (made from the pairs of another)
        parent_probe | VARCHAR | probe whose pairs these corrupted records belong to; null for others
        sha256 | VARCHAR | identity of the records
        num_examples | BIGINT | records
        num_events | BIGINT | query events
        splits | VARCHAR[] | splits, in record order
        vocabulary | VARCHAR[] | text of each token id; null when unknown
        key_tokens | INTEGER[] | ids of key tokens, in vocabulary order; null when the task has none
        value_tokens | INTEGER[] | ids of value tokens, in vocabulary order; null when the task has none
        max_pairs_per_type | BIGINT | corrupted records kept per pair type and split; null without pairs
        metadata | VARCHAR | how it was made, JSON
        """,
    ),
    table(
        "probe_examples",
        "probe example",
        "one row per record of a probe",
        """
        probe | VARCHAR | probe
        example | INTEGER | index of the record in the probe, from 0
        sample_id | VARCHAR | id of the record
        split | VARCHAR | split
        tokens | INTEGER[] | token ids of the whole record
        record | VARCHAR | the record as the task made it, JSON; null for an imported one
        """,
    ),
    table(
        "events",
        "probe event",
        "one row per query event: a position at which the model is asked, and what is right",
        """
        probe | VARCHAR | probe
        event | INTEGER | index of the event in the probe, from 0, in record order
        example | INTEGER | record it belongs to
        sample_id | VARCHAR | id of the record
        split | VARCHAR | split
        query_index | INTEGER | index of the event within its record
        prediction_position | INTEGER | position whose logits answer
        answer_token | INTEGER | id of the right token
        answer | VARCHAR | its text
        competitors | INTEGER[] | ids of the wrong tokens it competes with, ascending; the answer is not among them
        """,
    ),
    table(
        "positions",
        "probe event kind role position",
        "one row per event, role and position: where each part of the question stands",
        """
        probe | VARCHAR | probe
        event | INTEGER | event
        kind | VARCHAR | role (named positions, also after the prediction), or partition (each position up to the prediction, once)
        role | VARCHAR | role, or part of the partition
        position | INTEGER | token position in the record, from 0
        token | INTEGER | token id there
        text | VARCHAR | its text
        """,
    ),
    table(
        "pairs",
        "probe clean_event pair_type",
        "one row per event and pair type: a causal patch pair, or why there is none",
        """
        probe | VARCHAR | probe of the clean records
        clean_event | INTEGER | event of the clean record (the record itself, unchanged)
        pair_type | VARCHAR | query_key, support_value, recency or distractor
        split | VARCHAR | split
        pair_id | VARCHAR | id; null if there is no pair
        corrupted_event | INTEGER | event in probe NAME.corrupted; null beyond max_pairs_per_type, or if there is no pair
        source_sample_id | VARCHAR | id of the clean record
        source_query_index | INTEGER | query index in it
        clean_answer_value | VARCHAR | answer of the clean record
        corrupted_answer_value | VARCHAR | answer of the corrupted record
        clean_transfer_token | VARCHAR | what the change takes from: the answers, or the two distractor values
        corrupted_transfer_token | VARCHAR | what it gives
        mutation | VARCHAR | what was changed, JSON
        skip_reason | VARCHAR | why there is no pair; null if there is one
        """,
    ),
    table(
        "activation_rows",
        "probe layout row",
        "one row per stored position: what a row of quantity activations is",
        """
        probe | VARCHAR | probe
        layout | VARCHAR | roles (positions that have a role in some event), or all
        row | BIGINT | row of the array
        example | INTEGER | record
        position | INTEGER | token position in it
        """,
    ),
    table(
        "readouts",
        "probe step event stage",
        "one row per event and stage: the logits at the prediction position if the stage were the last. Competitors are the event's",
        """
        probe | VARCHAR | probe
        step | BIGINT | step
        event | INTEGER | event
        stage | VARCHAR | residual stage, read by the final LayerNorm and the unembedding; logits is the model's own output
        answer_logit | FLOAT | logit of the answer
        best_wrong_token | INTEGER | competitor with the largest logit
        best_wrong_logit | FLOAT | its logit
        value_margin | FLOAT | answer_logit - best_wrong_logit
        best_token | INTEGER | token with the largest logit in the whole vocabulary
        answer_log_prob | FLOAT | log softmax of the answer over the whole vocabulary, nats
        correct | BOOLEAN | whether best_token is the answer
        """,
    ),
    table(
        "attention_patterns",
        "probe step event layer head query_role",
        "one row per event and head: attention from one query position; view attention has a row per key position",
        """
        probe | VARCHAR | probe
        step | BIGINT | step
        event | INTEGER | event
        layer | INTEGER | layer from 0
        head | INTEGER | head from 0
        query_role | VARCHAR | role of the query position
        query_position | INTEGER | query position
        scores | FLOAT[] | scaled scores q·k/√d_head before softmax, key positions 0 to query_position
        probabilities | FLOAT[] | their softmax
        """,
    ),
    table(
        "head_writes",
        "probe step event layer head query_role role",
        "one row per event, head and role: what the head writes into the residual stream at the query position, read by the raw "
        "unembedding; role write is what it does write, any other what it would write if it attended to that role alone",
        """
        probe | VARCHAR | probe
        step | BIGINT | step
        event | INTEGER | event
        layer | INTEGER | layer from 0
        head | INTEGER | head from 0
        query_role | VARCHAR | role of the query position
        role | VARCHAR | write, or a role: the mean over its positions up to the query position
        answer_logit | FLOAT | write · unembedding of the answer; value bias in, output bias out, no LayerNorm
        best_wrong_token | INTEGER | competitor this write favours most
        best_wrong_logit | FLOAT | write · its unembedding
        value_margin | FLOAT | answer_logit - best_wrong_logit
        margin_dla | FLOAT | write · gradient of the model's value margin with respect to the last residual stage, LayerNorm differentiated
        margin_dla_frozen | FLOAT | the same with the LayerNorm's scale frozen
        """,
    ),
    table(
        "component_logits",
        "probe step event component",
        "one row per event and additive part of the last residual stage: its direct contribution to the value margin. "
        "margin_dla sums to nearly 0 over components (LayerNorm is scale-invariant), margin_dla_frozen to the margin",
        """
        probe | VARCHAR | probe
        step | BIGINT | step
        event | INTEGER | event
        component | VARCHAR | embedding, L0H1, L0.attention_bias, L0MLP or final_norm_bias
        component_type | VARCHAR | embedding, attention_head, attention_bias, mlp_block or final_norm_bias
        layer | INTEGER | layer from 0; null outside the layers
        head | INTEGER | head from 0; null for other components
        margin_dla | FLOAT | part · gradient of the value margin, LayerNorm differentiated
        margin_dla_frozen | FLOAT | part's share of the value margin, LayerNorm's scale frozen
        """,
    ),
    table(
        "qk_coordinates",
        "probe step example position layer head stage layernorm_mode",
        "one row per position: its coordinates on the singular directions of a head's W_QK, so that the score truncated at rank r is "
        "list_sum over the first r of singular value · query · key, over √d_head",
        """
        probe | VARCHAR | probe
        step | BIGINT | step
        example | INTEGER | record
        position | INTEGER | token position in it
        layer | INTEGER | layer of the head, from 0
        head | INTEGER | head from 0
        stage | VARCHAR | residual stage that is read
        layernorm_mode | VARCHAR | head_ln1 (through the head's own LayerNorm) or none
        query | FLOAT[] | coordinates on the left (query-side) directions, one per rank
        key | FLOAT[] | coordinates on the right (key-side) directions, one per rank
        query_bias | FLOAT | (W_Q y)·b_K + b_Q·b_K
        key_bias | FLOAT | b_Q·(W_K y); the full score is (Σ σ·query·key + query_bias + key_bias) / √d_head
        """,
    ),
)
