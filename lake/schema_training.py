"""Tables of runs, their training and their weights."""

from __future__ import annotations

from .columns import table

TABLES = (
    table(
        "extractions",
        "unit",
        "one row per finished unit of work: its receipt. What no receipt names does not exist for any reader",
        """
        unit | VARCHAR | name of the unit, unique within the run
        dataset | VARCHAR | what was made
        spec | VARCHAR | 12-hex identity of the dataset's parameters; empty when it has none
        parameters | VARCHAR | the parameters, canonical JSON
        version | INTEGER | code version of the dataset
        inputs | VARCHAR | canonical JSON of what the unit was made from (hashes of checkpoint, probe, trace)
        content_hash | VARCHAR | SHA-256 of dataset, version, parameters and inputs
        steps | BIGINT[] | the steps the unit covers, ascending
        files | STRUCT(path VARCHAR, bytes BIGINT, crc32c BIGINT)[] | Parquet files and Zarr chunks, paths from the lake's root
        tensors | STRUCT(quantity VARCHAR, first_row BIGINT, steps BIGINT[], names VARCHAR[])[] | rows of the step axis that the unit filled: row first_row + i holds steps[i]
        rows | BIGINT | table rows written
        bytes | BIGINT | bytes of all files
        seconds | DOUBLE | wall time of the unit, s
        created_at | VARCHAR | UTC time of the commit, ISO 8601
        """,
    ),
    table(
        "runs",
        "run",
        "one row per run: what was trained or imported, and how its trace is to be replayed",
        """
        source | VARCHAR | train, trace, record or import
        adapter | VARCHAR | model family that knows the layers and heads; null for a model no adapter describes
        config | VARCHAR | training configuration, JSON; null when recorded from a foreign loop
        config_hash | VARCHAR | SHA-256 of the configuration
        seed | BIGINT | random seed; null when unknown
        store | VARCHAR | exact (gradients and anchors), full (weights and moments at every step) or checkpoints
        anchor_every | BIGINT | steps between stored weights and moments of an exact trace
        optimizer | VARCHAR | optimizer class and its replay settings, JSON; null for imported runs
        parent_run | VARCHAR | run this one continues; null for a run from initialization
        parent_step | BIGINT | step of the parent run at which this one starts
        historical_replay | VARCHAR | exact, or why the batch order after the start is not the parent's
        torch_version | VARCHAR | PyTorch that ran the training steps
        machine | VARCHAR | processor type and torch threads; replay is bit-exact on the same type
        created_at | VARCHAR | UTC, ISO 8601
        """,
    ),
    table(
        "steps",
        "step",
        "one row per step whose weights can be had: stored, or replayed from the trace",
        """
        step | BIGINT | number of optimizer steps taken
        state | VARCHAR | stored (weights are in the lake) or replayed (computed from the anchor before it and the gradients)
        has_moments | BOOLEAN | whether exp_avg and exp_avg_sq of this step can be had
        source_uri | VARCHAR | file it was imported from; null for a traced step
        sha256 | VARCHAR | identity of the state: of the imported file, or of the chain of everything recorded up to this step
        learning_rate | DOUBLE | learning rate last used (of the first parameter group); null when unknown
        optimizer_steps | VARCHAR | the optimizer's own step counter by parameter, JSON ("*" for those not named); null without moments
        loop_state | VARCHAR | what the training loop needs to go on after this step, JSON; null when it was not logged
        rng_state | BLOB | state of torch's CPU generator after this step; null when equal to the row before, or unknown
        metrics | VARCHAR | metrics stored with an imported checkpoint, JSON
        """,
    ),
    table(
        "parameters",
        "parameter",
        "one row per parameter tensor; a tied tensor is one row under its first name",
        """
        parameter | VARCHAR | name in the model's state dict
        position | INTEGER | order in the model, from 0
        shape | BIGINT[] | shape
        numel | BIGINT | number of elements
        dtype | VARCHAR | dtype while training; the lake stores float32
        module | VARCHAR | module block: token_embedding, position_embedding, L0.ln_1, L0.attention, L0.mlp, final_norm; null without an adapter
        layer | INTEGER | layer from 0; null outside the layers
        kind | VARCHAR | q_proj, k_proj, v_proj (or qkv_proj, all three in one), out_proj, fc_in, fc_out, layer_norm, embedding; null without an adapter
        is_bias | BOOLEAN | whether it is an additive bias; null without an adapter
        transformer_lens_name | VARCHAR | the same tensor in TransformerLens; null if it has none
        tied_to | VARCHAR[] | other state-dict names of the same tensor
        optimizer_group | INTEGER | index of the optimizer's parameter group; null if it is not trained
        """,
    ),
    table(
        "slices",
        "slice_kind slice parameter row_start column_start",
        "one row per part of a parameter that belongs to a module block, projection, head or neuron",
        """
        slice_kind | VARCHAR | module, projection, head_projection, head or neuron
        slice | VARCHAR | label: L0.attention, L0.q_proj, L0H1.q_proj, L0H1.qkvo, L0N17
        parameter | VARCHAR | parameter it is cut from
        layer | INTEGER | layer from 0; null outside the layers
        head | INTEGER | head from 0; null for other parts
        neuron | INTEGER | MLP neuron from 0; null for other parts
        row_start | BIGINT | first row (of a bias: first element)
        row_stop | BIGINT | one past the last row
        column_start | BIGINT | first column; null for one-dimensional parameters
        column_stop | BIGINT | one past the last column; null for one-dimensional parameters
        """,
    ),
    table(
        "examples",
        "split sample_id",
        "one row per training or evaluation example of a built-in task",
        """
        split | VARCHAR | split of the benchmark
        sample_id | VARCHAR | id within the run
        position | BIGINT | index within the split
        tokens | VARCHAR[] | the token stream
        query_keys | VARCHAR[] | queried key of each query event, in stream order
        answer_values | VARCHAR[] | answer of each query event, in stream order
        """,
    ),
    table(
        "training_steps",
        "step",
        "one row per recorded step t: the move from the weights of t-1 to those of t; the loss is that of t-1 on batch t",
        """
        step | BIGINT | step t reached by this move
        loss | DOUBLE | training loss, nats per token; null if the loop did not log it
        token_accuracy | DOUBLE | share of next tokens predicted; null if not logged
        learning_rate | DOUBLE | learning rate of the first parameter group
        pre_clip_grad_norm | DOUBLE | L2 norm of the raw gradient over all parameters, accumulated in float64
        grad_clip_norm | DOUBLE | clipping threshold the loop logged; null if unknown
        clip_coefficient | DOUBLE | float32 factor that took the raw gradient to the one the optimizer saw; null if no single factor did, and then table gradients holds what the optimizer saw
        batch_size | BIGINT | examples in the batch; null if not logged
        query_event_count | BIGINT | query events in the batch; null if not logged
        nonfinite_gradient_entries | BIGINT | entries that are NaN or infinite in the raw gradient or in what the optimizer saw
        optimizer_groups | VARCHAR | hyperparameters of every parameter group, JSON; null when equal to the row before
        seconds | DOUBLE | wall time since the step before, s
        """,
    ),
    table(
        "training_batches",
        "step",
        "one row per recorded step whose loop logged its examples",
        """
        step | BIGINT | step t reached with this batch
        split | VARCHAR | split the examples come from
        sample_ids | VARCHAR[] | example ids in batch order
        """,
    ),
    table(
        "parameter_updates",
        "step parameter",
        "one row per recorded step and parameter: norms, products and cosines, float64 sums over float32 tensors. "
        "The terms split AdamW's update; that is arithmetic, not a counterfactual",
        """
        step | BIGINT | step t reached by this move
        parameter | VARCHAR | parameter name
        numel | BIGINT | number of elements
        has_gradient | BOOLEAN | false when the optimizer skipped the parameter in this step
        optimizer_step | BIGINT | the optimizer's own counter for this parameter after the step
        nonfinite_gradient_entries | BIGINT | entries that are NaN or infinite in its raw gradient or in what the optimizer saw
        weight_l2_before | DOUBLE | L2 norm of the weights at t-1
        weight_l2 | DOUBLE | L2 norm of the weights at t
        gradient_l2 | DOUBLE | L2 norm of the raw gradient
        gradient_max_abs | DOUBLE | largest absolute entry of the raw gradient
        clipped_gradient_l2 | DOUBLE | L2 norm of the gradient the optimizer saw
        delta_l2 | DOUBLE | L2 norm of the update, weights(t) - weights(t-1)
        delta_max_abs | DOUBLE | largest absolute entry of the update
        exp_avg_l2 | DOUBLE | L2 norm of the first moment after the step
        exp_avg_sq_l2 | DOUBLE | L2 norm of the second-moment tensor after the step
        update_dot_negative_gradient | DOUBLE | <update, -raw gradient>: first-order loss reduction of the step
        update_dot_negative_clipped_gradient | DOUBLE | <update, -clipped gradient>
        update_dot_weight | DOUBLE | <update, weights(t-1)>
        gradient_dot_weight | DOUBLE | <raw gradient, weights(t-1)>
        gradient_dot_exp_avg_before | DOUBLE | <clipped gradient, first moment at t-1>
        update_gradient_cosine | DOUBLE | cosine of the update and the negative raw gradient; null when either is zero
        update_weight_cosine | DOUBLE | cosine of the update and weights(t-1); null when either is zero
        gradient_momentum_cosine | DOUBLE | cosine of the gradient and the first moment at t-1; null when either is zero
        update_momentum_cosine | DOUBLE | cosine of the update and the negative first moment at t; null when either is zero
        current_gradient_l2 | DOUBLE | L2 norm of the update's current-gradient term
        momentum_l2 | DOUBLE | L2 norm of the update's carried-momentum term
        weight_decay_l2 | DOUBLE | L2 norm of the update's decay term
        raw_sgd_l2 | DOUBLE | L2 norm of -lr * raw gradient
        clipped_sgd_l2 | DOUBLE | L2 norm of -lr * clipped gradient
        residual_l2 | DOUBLE | L2 norm of update minus the sum of its terms (float32 rounding of the weights)
        current_gradient_dot_update | DOUBLE | <current-gradient term, update>
        momentum_dot_update | DOUBLE | <carried-momentum term, update>
        weight_decay_dot_update | DOUBLE | <decay term, update>
        residual_dot_update | DOUBLE | <residual, update>; the four products sum to delta_l2 squared
        """,
    ),
    table(
        "evaluations",
        "step split metric",
        "one row per evaluated step, split and metric",
        """
        step | BIGINT | step whose weights were evaluated
        split | VARCHAR | split of the benchmark
        metric | VARCHAR | loss, token_accuracy, answer_accuracy, q, r, w, ...; a slice is metric[axis=value]
        value | DOUBLE | its value
        """,
    ),
    table(
        "singular_values",
        "step matrix layer head rank",
        "one row per singular value of a weight matrix or head product, raw stored weights, float64 SVD; a head product has "
        "at most head-width ranks",
        """
        step | BIGINT | step
        matrix | VARCHAR | W_Q, W_K, W_V, W_O, W_QK, W_OV, W_in or W_out
        layer | INTEGER | layer from 0
        head | INTEGER | head from 0; null for W_in and W_out
        matrix_rows | BIGINT | rows of the matrix
        matrix_columns | BIGINT | columns of the matrix
        rank | INTEGER | 1 for the largest
        singular_value | DOUBLE | singular value
        """,
    ),
)
