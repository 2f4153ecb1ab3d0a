#!/usr/bin/env bash
# Pretraining on compressed images against whole ones, for compression.md.
#
#   docs/results/compression.sh costs OBJECTIVE OUT        (alone on its GPU)
#   docs/results/compression.sh errors OBJECTIVE OUT [--config.KEY=VALUE ...]
#   docs/results/compression.sh recipe OBJECTIVE OUT [FLAG of tools.compare ...]
#   docs/results/compression.sh compare OBJECTIVE OUT [FLAG of tools.compare ...]
#   docs/results/compression.sh photographs OBJECTIVE OUT [FLAG of tools.compare ...]
#   docs/results/compression.sh untrained OBJECTIVE OUT [--config.KEY=VALUE ...]
#
# OBJECTIVE: moco_v3, simclr or dino, fine-tuned to name shapes; or flm, beside ar, fine-tuned for
# VQA and NLVR2. `costs` measures what an update of each bucket costs; `errors`, after it, trains a
# pilot of whole images, measures the gradient error of every bucket along it, and derives
# compression/OBJECTIVE/schedule.json; with ALONG=ARM along a run of that arm, into a folder of its
# own, whose schedule no arm uses. `recipe` searches what whole images (or the arm ARMS) learn
# fastest by. `compare` trains whole images for the whole budget and for shares of it, and at those
# shares the arms (or ARMS); `compare flm` needs the costs of ar as well. Cells that
# compression/OBJECTIVE/cells.jsonl.gz holds are not trained again. `photographs` is the same on
# those of the data pack, ../shared/data. `untrained` scores and fine-tunes the tower of whole images
# after one update that changes nothing, with two seeds: what a score is to be above. BUDGET, in
# seconds, and BATCHES (of an error) replace those below. Runs and comparisons go on where they were
# stopped; measurements start again.
set -euo pipefail
what=$1 objective=$2 out=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/../.."
config=docs/results/compression.py:$objective
folder=docs/results/compression/$objective
python=${PYTHON:-python}
shared=("compile_cache=$out/programs")
# Scenes are made once for all runs; photographs, few and of no identity that could name a file, are
# kept in memory.
[[ $what == photographs ]] || shared+=("data.cache_dir=$out/data" "data.cache_workers=$(nproc)")
declare -A updates=([classification:scenes]=500 [vqa:scenes]=800 [nlvr2:scenes]=2000) # of fine-tuning
known() { "$python" -c "from docs.results import compression as c; print($1)"; }

case $what in
    errors)
        buckets=$(known "c.buckets_of('$objective')")
        along=${ALONG:-whole}
        pilot=$out/pilot_$objective,$along
        [[ $along == whole ]] || { folder+=/along_$along && mkdir -p "$folder"; }
        "$python" -m vlp_jax.main --config="$config,$along" --workdir="$pilot" \
            --config.checkpoint.every_percent=25.0 --config.checkpoint.keep_latest=9 \
            "${shared[@]/#/--config.}" "$@"
        exec "$python" -m tools.gradient_error --config="$config" --workdir="$pilot" \
            --config.compression.schedule=staged --config.compression.buckets="$buckets" \
            --config.compression.costs="$(known "c.costs_of('$objective')")" \
            --batches="${BATCHES:-48}" --out="$folder" "${shared[@]/#/--config.}" "$@"
        ;;
    costs)
        buckets=$(known "c.buckets_of('$objective')")
        exec "$python" -m tools.bench buckets --config="$config" --config.compression.schedule=staged \
            --config.compression.buckets="$buckets" --config.compile_cache="$out/programs" \
            --out="$folder/costs.json" "$@"
        ;;
    recipe)
        at=objectives.$objective
        axes=(schedule.peak:log:1e-4:2e-3)
        case $objective in
            simclr) axes+=("$at.temperature:0.05,0.1,0.2" "$at.augment.scale:(0.08,1.0),(0.3,1.0)") ;;
            moco_v3) axes+=("$at.temperature:0.05,0.1,0.2" "$at.augment.scale:(0.08,1.0),(0.3,1.0)"
                "$at.momentum:0.9,0.97,0.99" optim.groups.patch_projection.rate_factor:0.0,1.0) ;;
            dino) axes+=("$at.temperature:0.05,0.1,0.2" "$at.teacher_temperature:0.02,0.04"
                "$at.momentum:0.9,0.97,0.99") ;;
            *) echo "no search for '$objective'; take simclr, moco_v3 or dino" >&2; exit 64 ;;
        esac
        # Eighteen candidates for 15 s each, of which four train for 60 s; the best one for 240 s tells
        # no more, and --max_seconds may leave it out. Seconds are the device's, so that a host that
        # is late does not matter.
        exec "$python" -m tools.compare "$config,${ARMS:-whole}" --budget_seconds="${BUDGET:-240}" \
            "${axes[@]/#/--search=}" --halving=4 --trials=18 \
            --metric=linear_probe/shape/accuracy --max_input_wait=0.2 "${shared[@]/#/--set=}" \
            --archive="$folder/recipe.jsonl.gz" --out="$out/$what/$objective" "$@"
        ;;
    compare | photographs)
        suffix= archive=$folder/cells.jsonl.gz tasks=(classification:scenes)
        labels=shape,colour,size,texture,count tune=linear_probe/shape/accuracy
        shares=(--fractions=1,1/2.5,1/4 --others_until=1/2.5 --tune_fraction=1/4)
        rates=x0.5,x1,x2
        declare -A budgets=([moco_v3]=120 [simclr]=100 [dino]=120 [flm]=60)
        if [[ $what == photographs ]]; then
            suffix=,photographs archive=$folder/photographs.jsonl.gz tasks=(classification:pack)
            labels=class tune=linear_probe/class/accuracy
        fi
        metric=$(printf 'neighbours/%s/knn_accuracy,' ${labels//,/ })$tune
        baselines=("$config,whole$suffix") configs=("$config,whole$suffix")
        if [[ $objective == flm ]]; then
            configs+=("${config%flm}ar,whole" "${config%flm}ar,small_first")
            shares=(--fractions=1,1/1.5 --others_until=1/1.5 --tune_fraction=1/1.5)
            rates=x1
            tasks=(vqa:scenes nlvr2:scenes)
            tune=vqa:scenes/val/accuracy metric=heldout/gap_loss:show
        fi
        arms=${ARMS:-$(known "' '.join(c.arms_of('$objective'))")}
        for arm in $arms; do
            configs+=("$config,$arm$suffix")
        done
        own=()
        for task in "${tasks[@]}"; do
            own+=("--finetune=configs/transfer/${task%:*}.py:${task#*:}")
            [[ $what == photographs ]] || own+=("--set_finetune=$task/total_steps=${updates[$task]}")
            [[ $task != vqa:* ]] || own+=("--set_finetune=$task/evals.explain=None")
            metric+=,$task/test/accuracy,$task/val/accuracy:show
        done
        own+=("--set_finetune=evals.val.every_percent=100.0"
            "--set_finetune=checkpoint.every_percent=100.0")
        exec "$python" -m tools.compare "${configs[@]}" "${baselines[@]/#*:/--baseline=compression:}" \
            --budget_seconds="${BUDGET:-${budgets[$objective]}}" "${shares[@]}" --seeds=2 --rates=$rates \
            "${own[@]}" --metric="$metric" --tune_metric="$tune" \
            "${shared[@]/#/--set=}" "${shared[@]/#/--set_finetune=}" \
            --archive="$archive" --out="$out/$what/$objective" "$@"
        ;;
    untrained)
        for seed in 0 1; do
            tower=$out/untrained_$objective,$seed
            "$python" -m vlp_jax.main --config="$config,whole" --workdir="$tower" \
                --config.seed=$seed --config.total_steps=1 --config.schedule.peak=1e-12 \
                --config.data.batch_size=32 --config.data.sources.scenes.num_records=10000 \
                "${shared[@]/#/--config.}" "$@"
            "$python" -m vlp_jax.main --config=configs/transfer/classification.py:scenes \
                --workdir="$tower,tuned" --config.init_from="$tower" \
                --config.init_checkpoint=latest --config.seed=$seed \
                --config.total_steps="${updates[classification:scenes]}" \
                --config.evals.val.every_percent=100.0 --config.checkpoint.every_percent=100.0 \
                "${shared[@]/#/--config.}" "$@"
        done
        ;;
    *)
        echo "write errors, costs, recipe, compare, photographs or untrained, not '$what'" >&2
        exit 64
        ;;
esac
