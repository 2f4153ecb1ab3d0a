#!/usr/bin/env bash
# Which share of MLM's time does FLM need for MLM's score, on hard scenes? One setting of
# flm_time_to_quality.md.
#
#   docs/results/flm_time_to_quality.sh SIZE IMAGES OUT [FLAG of tools.compare ...]
#
# SIZE: tiny or mini, see vlp_jax/models/sizes.py. IMAGES: 20000, each seen 50 times and more by the
# whole budget, or 500000, of which none is seen more than a few times. OUT: folder of the cells and
# tables of all settings, and of what they share. Cells that cells/SIZE_IMAGES.jsonl.gz holds are not
# trained again; on another kind of machine, give another --archive. The command stops after
# --max_seconds and goes on when it is given again.
#
# With --workers, models this small share a GPU well only where NVIDIA's multi-process service runs
# (nvidia-cuda-mps-control -d): without it their kernels take turns. Costs are measured before, by a
# process alone.
#
# Rates are compared by the validation accuracy of the first of TASKS at the whole budget: see
# flm_time_to_quality.md for what the loss of a quarter of it chose.
set -euo pipefail
size=$1 images=$2 out=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/../.."

batch=256
declare -A updates=([vqa:scenes]=800 [nlvr2:scenes]=2000)
case $size in  # seconds for some 4,000 updates of FLM; with rates beyond the best of all objectives
    tiny) seconds=20 rates=5e-4,1e-3,2e-3,4e-3,8e-3 ;;
    mini) seconds=42 rates=2.5e-4,5e-4,1e-3,2e-3,4e-3 ;;
    *) echo "no setting of size '$size'; take tiny or mini" >&2; exit 64 ;;
esac

tasks=${TASKS:-vqa nlvr2}
tune_metric=${tasks%% *}:scenes/val/accuracy
configs=() own=() finetunes=() metrics=heldout/gap_loss:show
for objective in ${OBJECTIVES:-flm mlm15 mlm40 ar prefix_lm}; do
    configs+=("configs/scenes.py:$objective,$size,$images")
    case $objective in
        mlm*) own+=("--baseline=scenes:$objective,$size,$images") ;;
        flm_bandit) ;;  # learns from the evaluator that is dropped below
        # Figures of FLM alone have no part in a table of all objectives.
        flm*) own+=("--set=scenes:$objective,$size,$images/evals.reconstruction=None") ;;
    esac
done
for task in $tasks; do
    finetunes+=("--finetune=configs/transfer/$task.py:scenes")
    task=$task:scenes
    # Nor have maps of single answers.
    [[ $task != vqa:* ]] || finetunes+=("--set_finetune=$task/evals.explain=None")
    finetunes+=("--set_finetune=$task/total_steps=${updates[$task]}")
    metrics+=,$task/test/accuracy,$task/test/accuracy_text_only:show
    metrics+=,$task/test/accuracy_image_shuffled:show,$task/val/accuracy:show
done
shared=(
    data.num_edges=2 "data.cache_dir=$out/data" "data.cache_workers=$(nproc)"
    "compile_cache=$out/programs"
)

exec "${PYTHON:-python}" -m tools.compare "${configs[@]}" --budget_seconds="${BUDGET:-$seconds}" \
    --seeds=3 --rates=$rates "${own[@]}" \
    "${finetunes[@]}" --tune_metric="$tune_metric" --metric="$metrics" \
    "${shared[@]/#/--set=}" --set=data.batch_size=$batch --set=data.window_batches=64 \
    "${shared[@]/#/--set_finetune=}" --set_finetune=evals.val.every_percent=100.0 \
    --set_finetune=checkpoint.every_percent=100.0 \
    --archive="docs/results/cells/${size}_$images.jsonl.gz" --out="$out/${size}_$images" "$@"
