#!/usr/bin/env bash
# Pretraining on compressed images against whole ones, for compression.md.
#
#   docs/results/compression.sh errors OBJECTIVE OUT       (alone on its GPU, for costs are measured)
#   docs/results/compression.sh compare OBJECTIVE OUT [FLAG of tools.compare ...]
#
# OBJECTIVE: moco_v3, simclr or dino, fine-tuned to name shapes; or flm, beside ar, fine-tuned for VQA
# and NLVR2. `errors` trains a pilot of whole images, measures the gradient error of every bucket along
# it, and writes compression/OBJECTIVE; `compare flm` needs that of ar as well. `compare` trains with the
# schedule derived there and with others (ARMS, see compression.py) at shares of the time; cells that
# compression/OBJECTIVE/cells.jsonl.gz holds are not trained again. Both go on where they were stopped.
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
        buckets=$("$python" -c "from docs.results import compression
print(compression.buckets_of('$objective'))")
        "$python" -m vlp_jax.main --config="$config" --workdir="$out/pilot_$objective" \
            --config.checkpoint.every_percent=25.0 --config.checkpoint.keep_latest=9 \
            "${shared[@]/#/--config.}"
        exec "$python" -m tools.gradient_error --config="$config" --workdir="$out/pilot_$objective" \
            --config.compression.schedule=staged --config.compression.buckets="$buckets" \
            --batches=48 --out="$folder" "${shared[@]/#/--config.}" "$@"
        ;;
    compare)
        configs=("$config,whole") tasks=(image_classification)
        arms='derived derived+20 p4@64k64+20 p8@64+20 patches+20 reversed+20 random+20'
        # Patches of one view alone are dropped where `errors` has measured what that costs.
        ! grep -qs p4@64k64/whole "$folder/results.json" || arms+=' p4@64k64/whole+20'
        for arm in ${ARMS:-$arms}; do
            configs+=("$config,$arm")
        done
        rates=x0.25,x0.5,x1,x2
        labels=shape,colour,size,texture,count
        tune=linear_probe/shape/accuracy
        metric=$(printf 'neighbours/%s/knn_accuracy,' ${labels//,/ })$tune
        if [ "$objective" = flm ]; then
            configs+=("${config%flm}ar,whole" "${config%flm}ar,small_first")
            rates=x0.5,x1,x2
            tasks=(vqa nlvr2) tune=vqa:scenes/val/accuracy metric=heldout/gap_loss:show
        fi
        own=()
        for task in "${tasks[@]}"; do
            file=${task#image_}  # configs/transfer/classification.py
            own+=("--finetune=configs/transfer/$file.py:scenes"
                "--set_finetune=$file:scenes/total_steps=${UPDATES:-1000}")
            [[ $task != vqa ]] || own+=("--set_finetune=vqa:scenes/evals.explain=None")
            metric+=,$file:scenes/test/accuracy,$file:scenes/val/accuracy:show
        done
        own+=("--set_finetune=evals.val.every_percent=100.0"
            "--set_finetune=checkpoint.every_percent=100.0")
        exec "$python" -m tools.compare "${configs[@]}" --baseline="compression:$objective,whole" \
            --budget_seconds="${BUDGET:-40}" --fractions=1,1/2.5,1/4 --seeds=2 --rates=$rates \
            "${own[@]}" --metric="$metric" --tune_metric=$tune \
            "${shared[@]/#/--set=}" "${shared[@]/#/--set_finetune=}" \
            --archive="$folder/cells.jsonl.gz" --out="$out/$objective" "$@"
        ;;
    *) echo "write errors or compare, not '$what'" >&2; exit 64 ;;
esac
