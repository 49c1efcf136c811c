"""Tables of what an update did to a scalar: between two steps, by pair, by part of the model and by term of the update.

An interval is a pair of steps, source < target; between neighbouring recorded steps the update's AdamW terms are known, over
longer ones the total alone. What was frozen (a singular basis, a readout direction) is that of the source.
"""

from __future__ import annotations

from .columns import table

# The update and what it is the sum of, and plain SGD beside it. The first equals current gradient + historical momentum +
# weight decay + residual.
UPDATE_FIELDS = (
    "actual_update",
    "raw_sgd",
    "clipped_sgd",
    "adam_current_gradient",
    "adam_historical_momentum",
    "weight_decay",
    "residual",
)
# Sums of those, whose norms do not follow from theirs.
UPDATE_SUMS = ("adam_preconditioned", "reconstructed")

_SCALAR = """
        spec | VARCHAR | 12-hex identity of scalar, pairs and record side: see view specs
        scalar | VARCHAR | name of the scalar
        scalar_head | VARCHAR | head it is about, L2H1; null for a scalar of no one head
        record_side | VARCHAR | record of the pair that is measured: clean or corrupted; null where a scalar takes both
        source_step | BIGINT | step at which the gradient is taken and the basis frozen
        target_step | BIGINT | step the weights moved to
"""
_CELL = """
        split | VARCHAR | split of the pairs, or __all__; only __all__ where there is but one
        pair_type | VARCHAR | type of the pairs, or __all__; only __all__ where there is but one
"""
_PART = """
        slice_kind | VARCHAR | parameter, head_projection or neuron; sums over parameters are the whole model, a tied one once
        slice | VARCHAR | name of the parameter, L0H1.q_proj (weight and bias; of out_proj the weight), or L0N17
        layer | INTEGER | layer from 0; null outside the layers
        head | INTEGER | head from 0; null for other parts
        neuron | INTEGER | MLP neuron from 0; null for other parts
        numel | BIGINT | entries of the part
"""

TABLES = (
    table(
        "scalar_changes",
        "spec source_step target_step pair_id quantity",
        "one row per interval, pair and quantity of a scalar: what it was, and what it became with the source's basis",
        f"""
        {_SCALAR}
        split | VARCHAR | split of the pair
        pair_type | VARCHAR | type of the pair
        pair_id | VARCHAR | causal patch pair, see table pairs
        quantity | VARCHAR | value (what is differentiated), or what goes with it: support_score_mean, max_margin, ...
        source_value | DOUBLE | at the source step
        target_value | DOUBLE | at the target step, with what was frozen at the source
        weight | DOUBLE | weight of the pair in the mean of its cell
        """,
    ),
    table(
        "scalar_bases",
        "spec source_step target_step",
        "one row per interval of a scalar that has a singular basis: the spectrum it was cut from",
        """
        spec | VARCHAR | 12-hex identity of the scalar
        source_step | BIGINT | step whose weights have the basis
        target_step | BIGINT | step the weights moved to
        singular_values | DOUBLE[] | every singular value, largest first
        """,
    ),
    table(
        "attribution_slices",
        "spec source_step target_step split pair_type point slice_kind slice",
        "one row per interval, cell of pairs and part of the model: gradient of the cell's mean scalar, times the update and each "
        "term of it. That is arithmetic, not a counterfactual; view attributions has a row per term",
        f"""
        {_SCALAR}
        {_CELL}
        num_pairs | BIGINT | pairs of the cell
        point | VARCHAR | where the gradient is taken: source (first order), or path (mean over the straight path, complete)
        {_PART}
        gradient_squared | DOUBLE | sum of squares of the gradient there; 0 where nothing reaches
        actual_update | DOUBLE | gradient · (target weights - source weights)
        raw_sgd | DOUBLE | gradient · (-lr · raw gradient of the batch); null where no step was recorded
        clipped_sgd | DOUBLE | gradient · (-lr · clipped gradient)
        adam_current_gradient | DOUBLE | gradient · the current gradient's part of the AdamW update
        adam_historical_momentum | DOUBLE | gradient · the carried momentum's part
        weight_decay | DOUBLE | gradient · the decay's part
        residual | DOUBLE | gradient · what float32 rounding left over: actual_update less the three before
        """,
    ),
    table(
        "score_changes",
        "spec source_step target_step pair_id key_role key_position",
        "one row per interval, pair and key of a role: one head's score and attention at both ends, and what the score's change is "
        "the sum of, over sqrt(d_head). q and k have their biases, x is the LayerNorm of the head's input, 0 the source. "
        "That is arithmetic, not a counterfactual",
        """
        spec | VARCHAR | 12-hex identity of head, roles, pairs and record side: see view specs
        scalar_head | VARCHAR | head, L2H1
        record_side | VARCHAR | record of the pair that is scored: clean or corrupted
        source_step | BIGINT | step before
        target_step | BIGINT | step after
        split | VARCHAR | split of the pair
        pair_type | VARCHAR | type of the pair
        pair_id | VARCHAR | causal patch pair, see table pairs
        key_role | VARCHAR | role of the key: the support's or the distractors'
        role_position_index | INTEGER | which of the role's keys up to the query, from 0
        query_position | INTEGER | position that attends
        key_position | INTEGER | position of the key, at most the query's
        source_attention | DOUBLE | probability at the source
        target_attention | DOUBLE | probability at the target
        softmax_first_order_attention_delta | DOUBLE | a (ds - sum over keys of a ds), a the attention of the source, ds the changes of the scores
        source_score | DOUBLE | q0 k0
        target_score | DOUBLE | q k
        q_vector_delta_source_key | DOUBLE | dq k0: what the query's change does
        source_query_k_vector_delta | DOUBLE | q0 dk: what the key's change does
        q_input_source_key | DOUBLE | (W_Q0 dx) k0
        q_weight_source_key | DOUBLE | (dW_Q x0) k0
        q_bias_source_key | DOUBLE | db_Q k0
        q_weight_input_cross_source_key | DOUBLE | (dW_Q dx) k0
        source_query_k_input | DOUBLE | q0 (W_K0 dx)
        source_query_k_weight | DOUBLE | q0 (dW_K x0)
        source_query_k_bias | DOUBLE | q0 db_K
        source_query_k_weight_input_cross | DOUBLE | q0 (dW_K dx)
        qk_vector_cross | DOUBLE | dq dk
        q_delta_reconstruction_error | DOUBLE | largest entry of |sum of the four parts of dq - dq|: what float32 rounded
        k_delta_reconstruction_error | DOUBLE | largest entry of |sum of the four parts of dk - dk|
        score_reconstruction_error | DOUBLE | sum of the nine parts - (target_score - source_score)
        """,
    ),
    table(
        "update_slices",
        "source_step target_step slice_kind slice",
        "one row per interval and part of the model: squared norms of the update and of each term of it",
        f"""
        source_step | BIGINT | step before
        target_step | BIGINT | step after
        {_PART}
        actual_update_squared | DOUBLE | sum of squares of target weights - source weights
        raw_sgd_squared | DOUBLE | of -lr · raw gradient; null where no step was recorded
        clipped_sgd_squared | DOUBLE | of -lr · clipped gradient
        adam_current_gradient_squared | DOUBLE | of the current gradient's part of the AdamW update
        adam_historical_momentum_squared | DOUBLE | of the carried momentum's part
        weight_decay_squared | DOUBLE | of the decay's part
        residual_squared | DOUBLE | of what float32 rounding left over
        adam_preconditioned_squared | DOUBLE | of current gradient + momentum
        reconstructed_squared | DOUBLE | of current gradient + momentum + decay
        """,
    ),
    table(
        "data_group_losses",
        "spec source_step target_step data_group",
        "one row per interval and group of pairs: the language-model loss of the group's records at the source",
        """
        spec | VARCHAR | 12-hex identity of pairs, groups, record side and scalars
        source_step | BIGINT | step whose loss it is
        target_step | BIGINT | step the weights moved to
        data_group | VARCHAR | field=value|field=value, or __all__
        data_group_values | VARCHAR | the values by field, JSON
        loss_side | VARCHAR | records: clean, corrupted or both
        loss | DOUBLE | mean next-token cross-entropy over all targets of the records, nats
        num_pairs | BIGINT | pairs of the group
        num_records | BIGINT | their records, a record as often as pairs have it
        num_tokens | BIGINT | targets of the records
        """,
    ),
    table(
        "gradient_products",
        "spec source_step target_step data_group factor parameter",
        "one row per interval, group of pairs, factor and parameter: the gradient of the group's loss, times the factor; both at "
        "the source. Sums over parameters are the whole model, a tied one once",
        """
        spec | VARCHAR | 12-hex identity of pairs, groups, record side and scalars
        source_step | BIGINT | step at which the gradients are taken
        target_step | BIGINT | step the weights moved to
        data_group | VARCHAR | field=value|field=value, or __all__
        factor | VARCHAR | loss (the gradient itself: its square), update (target - source weights), or the spec of a scalar's attributions: the gradient of its mean
        parameter | VARCHAR | parameter
        product | DOUBLE | sum over its entries
        """,
    ),
    table(
        "scalars",
        "spec step pair_id quantity",
        "one row per step, pair and quantity of a scalar whose gradient is in table scalar_gradients",
        """
        spec | VARCHAR | 12-hex identity of scalar, pairs and record side: see view specs
        scalar | VARCHAR | name of the scalar
        scalar_head | VARCHAR | head it is about, L2H1; null for a scalar of no one head
        record_side | VARCHAR | record of the pair that is measured: clean or corrupted; null where a scalar takes both
        step | BIGINT | step
        split | VARCHAR | split of the pair
        pair_type | VARCHAR | type of the pair
        pair_id | VARCHAR | causal patch pair, see table pairs
        quantity | VARCHAR | value (what is differentiated), or what goes with it
        value | DOUBLE | its value, with the basis of this step
        weight | DOUBLE | weight of the pair in the mean
        """,
    ),
)

VIEWS = {
    "attributions": (
        "one row per interval, cell, part of the model and term: attribution_slices, unpivoted. actual_update is the sum of "
        "adam_current_gradient, adam_historical_momentum, weight_decay and residual; raw_sgd and clipped_sgd stand beside it",
        "UNPIVOT (SELECT run, spec, scalar, scalar_head, record_side, source_step, target_step, split, pair_type, num_pairs, "
        f"point, slice_kind, slice, layer, head, neuron, numel, {', '.join(UPDATE_FIELDS)} FROM attribution_slices) "
        f"ON {', '.join(UPDATE_FIELDS)} INTO NAME term VALUE value",
    ),
}
