"""Tables of value codes that were taken out of the residual stream, and of what was put in their place."""

from __future__ import annotations

from .columns import table

TABLES = (
    table(
        "value_code_runs",
        "probe spec step event eval_kind",
        "one row per query event and run: the logits at its prediction with its value code as it is, taken away, or replaced. The "
        "clean run is there for every event, the others for those that judge the map (eval), all of a record's at once",
        """
        probe | VARCHAR | probe
        spec | VARCHAR | 12-hex identity of ends, rank, controls and events: see view specs
        step | BIGINT | step
        event | INTEGER | event
        eval_kind | VARCHAR | clean, target_subspace_removed, or what was put in its place: oracle_actual_projected (the code itself), true_transfer, a control, context_only, source_plus_context, ...
        source_event | INTEGER | event whose source was transferred; null where none was
        coordinates | DOUBLE[] | what was put along the directions of the target basis; null where nothing was
        answer_logit | FLOAT | logit of the answer
        competitor_logits | FLOAT[] | logits of the event's competitors, in the order of events.competitors
        answer_log_prob | FLOAT | log softmax of the answer over the whole vocabulary, nats
        best_token | INTEGER | token with the largest logit in the whole vocabulary
        """,
    ),
    table(
        "value_code_bases",
        "probe spec step basis_role",
        "one row per basis of a transfer of value codes, fitted on the events that fit: top directions of the centred token means",
        """
        probe | VARCHAR | probe
        spec | VARCHAR | 12-hex identity of ends, rank, controls and events: see view specs
        step | BIGINT | step
        basis_role | VARCHAR | source_value_identity, target_value_identity, source_key_identity_control, random_source_control or prediction_context_identity
        basis_rank | INTEGER | directions
        stage | VARCHAR | residual stage of the vectors
        position_role | VARCHAR | role whose positions were averaged
        group_by | VARCHAR | token that groups them; random_subspace for random directions
        ambient_dim | INTEGER | d_model
        num_vectors | BIGINT | vectors; null for random directions, as all that follows but the directions
        tokens | INTEGER[] | tokens that group them, ascending
        identity_centered_rank | INTEGER | numerical rank of the centred token means
        identity_singular_values | DOUBLE[] | their singular values, one per direction
        all_vector_centered_rank | INTEGER | numerical rank of all centred vectors
        all_vector_singular_values | DOUBLE[] | their singular values, as many
        directions | DOUBLE[][] | the basis: unit vectors of the residual stream
        """,
    ),
)
