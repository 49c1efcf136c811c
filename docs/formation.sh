#!/usr/bin/env bash
# The guide's reproduction sequence on the formation run, in one file.
#
#   bash docs/formation.sh formation.lake out          6,000 recorded steps: hours of training on two cores, about 60 GB
#   LAST=64 bash docs/formation.sh quick.lake quick    a quick look at every command
#
# Give it again after an interruption: what stands is not made again. Steps scale with LAST; the head that forms is L2H1,
# and the one whose write it reads L1H2 (seed 7). See docs/guide.md for what to read in each report.
set -euo pipefail

LAKE=${1:-formation.lake}
OUT=${2:-formation-report}
LAST=${LAST:-6000}
RUN=formation
CONFIG=${CONFIG:-formation}
THREADS=${THREADS:-$(nproc)}

EVERY=$((LAST / 24 > 0 ? LAST / 24 : 1))
CHECKPOINTS=0:$LAST:$EVERY,last
# The formation of L2H1 in the reference run lies between steps 750 and 3500 of 6000.
FROM=$((LAST / 8)) TO=$((LAST * 7 / 12))
FORMATION=$FROM:$TO
STEPS=$FROM:$((FROM + (LAST / 24 < 256 ? LAST / 24 : 256)))

lake=(--lake "$LAKE" --run "$RUN")
head=(--head-layer 2 --head 1)
roles=(--score-query-role prediction --support-key-role support_value --distractor-key-role value_distractors)
pairs=(--pair-type support_value --max-pairs-per-type 64 --min-pairs-per-type 16)

report() { # NAME STEPS OPTIONS…: extract what it lacks, then ask it
  local name=$1 steps=$2
  shift 2
  echo "== $name ($steps)" >&2
  lakebed extract --for "$name" "${lake[@]}" --steps "$steps" "$@" --threads "$THREADS" >/dev/null
  lakebed query "$name" "${lake[@]}" --steps "$steps" "$@" --out "$OUT/$name" --overwrite >/dev/null
}

lakebed train "$CONFIG" "${lake[@]}" --num-steps "$LAST" --threads "$THREADS" >/dev/null
lakebed probe build "${lake[@]}" >/dev/null
lakebed probe build "${lake[@]}" --probe train-probe --split train >/dev/null

# Which mechanism?
report attention-geometry-trace "$CHECKPOINTS" --top-k-plot-heads 12
report path-logit-decomposition "$CHECKPOINTS" --ablation-top-k 8 --top-k-plot-components 16

# Where does it form, and does it become meaningful?
report weight-svd-trace "$CHECKPOINTS" --max-singular-values 16 --top-vector-ranks 16
report weight-svd-patterns "$CHECKPOINTS" --max-vector-rank 16 --markdown-top-k 24
report contextual-key-separability "$CHECKPOINTS" "${head[@]}" --context-stage layer_1_post_mlp --context-role prediction \
  --group-by query_key --projection-rank 8 --split validation_iid --window-start "$FROM" --window-end "$TO" \
  --include-full-residual
report bilinear-qk-match-separation "$CHECKPOINTS" "${head[@]}" --context-stage layer_1_post_mlp \
  --score-query-role prediction --support-role support_value --distractor-role value_distractors --rank 8 \
  --group-by query_key --split validation_iid --window-start "$FROM" --window-end "$TO"

# Which updates grew it?
report bilinear-qk-rank-update-attribution "$FORMATION:$EVERY" "${head[@]}" --rank 4 --rank 8 \
  --context-stage layer_1_post_mlp "${roles[@]}" --record-side clean --pair-type support_value --pair-type distractor \
  --split validation_iid --decompose module_blocks --decompose attention_heads --decompose attention_projections \
  --decompose mlp_neurons --top-k-groups 40
report optimizer-update-trace "1:$LAST" --top-k-parameters 40
stepwise=("${head[@]}" --rank 8 --context-stage layer_1_post_mlp "${roles[@]}" --record-side clean
  --route-pair-type support_value --route-pair-source-type support_value --max-route-pairs-per-type 64
  --min-route-pairs-per-type 16)
report bilinear-qk-rank-actual-batch-attribution "$STEPS" "${stepwise[@]}"
report bilinear-qk-rank-adam-state-attribution "$STEPS" "${stepwise[@]}"
report ov-write-progress-report "$FORMATION:$EVERY" --head L0H0 --head L0H1 --head L0H2 --head L0H3 --head L1H2 \
  --head L2H1 "${roles[@]}" --record-side clean "${pairs[@]}" --top-k-correlations 32

# What is it for? The causal side, at six checkpoints of the formation.
LATE=$FROM:$TO:$((EVERY * 2))
report value-code-transfer-rescue "$LATE" --source-stage layer_1_post_mlp --target-stage layer_2_post_mlp \
  --source-position-role support_value --target-position-role prediction --group-by answer_value --split validation_iid \
  --max-records 256 --basis-rank 16 --control shuffled_answer_value --control wrong_support_value \
  --control random_subspace --fit-fraction 0.75
report geometry-subspace-intervention "$LATE" --stage layer_2_post_mlp --subspace embedding_value_identity --rank 16 \
  --operation remove --position-role prediction --query-mode single_query
report answer-scalar-residual-diagnosis "$LATE" "${pairs[@]}"
report route-to-margin-closure "$LATE" --route-pair-type __all__ "${pairs[@]}" \
  --route label=L2H1_qk_query,stage=layer_1_post_mlp,subspace=head_qk_query,rank=8,head_layer=2,head=1,position_role=query_key \
  --route label=L1H2_ov_output,stage=layer_1_post_attn,subspace=head_ov_output,rank=8,head_layer=1,head=2,position_role=prediction \
  --route label=full_layer1,stage=layer_1_post_mlp,subspace=full_residual,position_role=prediction
report output-route-closure "$LATE" "${pairs[@]}" --switch-bucket all
report output-component-causal-validation "$LATE" "${pairs[@]}" --component L2H1 --component L1H2 --component L2MLP
report output-mediated-causal-decomposition "$LATE" "${pairs[@]}" --source-component L1H2 \
  --downstream-component L2H1 --downstream-component L2MLP
report residual-state-rescue "$LATE" "${pairs[@]}" --source-component L1H2 --patch-stage layer_1_post_attn \
  --patch-stage layer_1_post_mlp --patch-stage layer_2_post_attn
report component-output-rescue "$LATE" "${pairs[@]}" --source-component L1H2 --patch-component L1MLP \
  --patch-group L2H1,L2MLP
echo "every report is under $OUT; begin with $OUT/path-logit-decomposition" >&2
