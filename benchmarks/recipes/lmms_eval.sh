#!/usr/bin/env bash
# A model that sees or hears under lmms-eval, one cache after the other:
#   lmms_eval.sh CLASS MODEL TASKS [more arguments of lmms-eval]
# CLASS is oscar-llava-hf, oscar-qwen3-vl or oscar-qwen3-omni; ARGS holds more of its arguments.
# CACHES holds the model arguments that differ, one run each; OUT is the folder for results.
set -euo pipefail
class=${1:?CLASS} model=${2:?MODEL: an id or a folder} tasks=${3:?TASKS: separated by commas}
shift 3
default="preset=full preset=paper preset=compact preset=quality method=kivi method=turboquant-2.5"
for cache in ${CACHES:-$default}; do
  lmms-eval eval --model "$class" --model_args "pretrained=$model,$cache${ARGS:+,$ARGS}" \
    --tasks "$tasks" --batch_size 1 --log_samples --output_path "${OUT:-results}/$cache" "$@"
  ls -R "${OUT:-results}/$cache"  # fails where there is nothing: the harness exits with 0 either way
done
