#!/usr/bin/env bash
# A text model under lm-evaluation-harness, one cache after the other:
#   lm_eval.sh MODEL TASKS [more arguments of lm_eval]
# CACHES holds the model arguments that differ, one run each; OUT is the folder for results.
set -euo pipefail
model=${1:?MODEL: an id or a folder} tasks=${2:?TASKS: names, separated by commas}
shift 2
default="preset=full preset=paper preset=compact preset=quality method=kivi method=turboquant-2.5"
for cache in ${CACHES:-$default}; do
  oscar-kv lm-eval run --model oscar-hf --model_args "pretrained=$model,$cache" --tasks "$tasks" \
    --batch_size 1 --log_samples --output_path "${OUT:-results}/$cache" "$@"
done
