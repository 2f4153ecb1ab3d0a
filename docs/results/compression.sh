#!/usr/bin/env bash
# Accelerated against uncompressed pretraining by invariance, for compression.md.
#
#   docs/results/compression.sh errors OBJECTIVE OUT       (alone on its GPU, for costs are measured)
#   docs/results/compression.sh compare OBJECTIVE OUT [FLAG of tools.compare ...]
#
# OBJECTIVE: moco_v3, simclr or dino. `errors` trains a pilot of whole images, measures the gradient
# error of every bucket along it, and writes compression/OBJECTIVE. `compare` trains with the schedule
# derived there and with others at shares of the time; cells that compression/OBJECTIVE/cells.jsonl.gz
# holds are not trained again. Both go on where they were stopped.
set -euo pipefail
what=$1 objective=$2 out=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/../.."
config=docs/results/compression.py:$objective
folder=docs/results/compression/$objective
python=${PYTHON:-python}
shared=("data.cache_dir=$out/data" "data.cache_workers=$(nproc)" "compile_cache=$out/programs")

case $what in
    errors)
        buckets=$("$python" -c 'from docs.results.compression import BUCKETS; print(BUCKETS)')
        "$python" -m vlp_jax.main --config="$config" --workdir="$out/pilot_$objective" \
            --config.checkpoint.every_percent=25.0 --config.checkpoint.keep_latest=9 \
            "${shared[@]/#/--config.}"
        exec "$python" -m tools.gradient_error --config="$config" --workdir="$out/pilot_$objective" \
            --config.compression.schedule=staged --config.compression.buckets="$buckets" \
            --batches=48 --out="$folder" "${shared[@]/#/--config.}" "$@"
        ;;
    compare)
        configs=()
        for arm in whole ${ARMS:-derived derived20 p4@64k64 p4@64k128 p8@64 reversed random}; do
            configs+=("$config,$arm")
        done
        labels=shape,colour,size,texture,count
        exec "$python" -m tools.compare "${configs[@]}" --baseline="compression:$objective,whole" \
            --budget_seconds="${BUDGET:-40}" --fractions=1,1/2.5,1/4 --seeds=2 --rates=x0.5,x1,x2 \
            --metric="$(printf 'neighbours/%s/knn_accuracy,' ${labels//,/ })linear_probe/shape/accuracy" \
            "${shared[@]/#/--set=}" --archive="$folder/cells.jsonl.gz" --out="$out/$objective" "$@"
        ;;
    *) echo "write errors or compare, not '$what'" >&2; exit 64 ;;
esac
