#!/usr/bin/env bash
# What pcetl.jsonl lacks of the study (docs/results/pcetl.py), around one base.
#
#   docs/results/pcetl.sh base OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh rates OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh study OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh faster_heads OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh latency OUT [FLAG of tools.study_latency ...]
#
# `rates` tries rates (python -m docs.results.pcetl ARCHIVE chooses of them), `study` does the cells
# that ARCHIVE (pcetl.jsonl) lacks, those that are tested again and the longest first, both of TASKS
# (vqa nlvr2 retrieval), and `faster_heads` those of NLVR2's heads at a higher rate. They tune what
# `base` has trained in OUT, or --base=BASE, a workdir or a parameter file. No second training comes
# to the same parameters, and an archive is not continued around others: keep the first
# (tools.export_weights). `latency` times the networks of TASKS, a process for each (those of the
# first base: tools.study_latency docs.results.pcetl:first_base); what else uses the GPU is to hold
# OUT/latency.lock meanwhile (flock OUT/latency.lock COMMAND). With --workers, processes share a GPU
# well only where NVIDIA's multi-process service runs (nvidia-cuda-mps-control -d).
set -euo pipefail
what=${1:?base, rates, study, faster_heads or latency} out=$(realpath -m "${2:?a folder}")
archive=$(realpath -m "${ARCHIVE:-$(dirname "$0")/pcetl.jsonl}")
shift 2
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} tasks=${TASKS:-vqa nlvr2 retrieval}
told() { "$python" -c "from docs.results import pcetl; print($1)"; }
# all_of STUDY: its cells of the tasks; cells WAY ...: those of these ways.
all_of() {
    told "','.join(f'\"{name}\"' for name, (task, _) in pcetl.$1().cells.items()
        if task in '$tasks'.split())"
}
cells() {
    local task way found=()
    for task in $tasks; do for way in "$@"; do found+=("\"$task: $way\""); done; done
    (IFS=, && echo "${found[*]}")
}
base=$out/runs/$(told "pcetl.third().base.key")
mkdir -p "$out"
# No texts are read here; the folder must be there all the same.
compare=("$python" -m tools.compare_stages --archive="$archive" --out="$out" --texts="$out")

case $what in
    base)
        exec "${compare[@]}" docs.results.pcetl --train_bases --cells="nlvr2: full" --seeds=1 \
            --devices=0 "$@"
        ;;
    rates)
        exec "${compare[@]}" docs.results.pcetl:rates --base="$base" --cells="$(all_of rates)" \
            --seeds=2 "$@"
        ;;
    study)
        # What is only tested again needs runs that no later session has.
        first=$(cells full "full, int8" adapter "adapter, int8" "DAS 4" "DAS 4, int8" \
            "pruned 17%" "pruned 33%")
        exec "${compare[@]}" docs.results.pcetl --base="$base" --cells="$(all_of study)" \
            --first="$first" --seeds=6 "$@"
        ;;
    faster_heads)
        exec "${compare[@]}" docs.results.pcetl:faster_heads --base="$base" --seeds=2 "$@"
        ;;
    latency)
        export XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 XLA_PYTHON_CLIENT_PREALLOCATE=false
        processes=() failed=0
        trap 'kill "${processes[@]}"' INT TERM
        for task in $tasks; do
            "$python" -m tools.study_latency docs.results.pcetl --archive="$archive" --tasks=$task \
                --lock="$out/latency.lock" "$@" &
            processes+=($!)
        done
        for process in "${processes[@]}"; do wait "$process" || failed=$?; done
        exit "$failed"
        ;;
    *)
        echo "write base, rates, study, faster_heads or latency, not '$what'" >&2
        exit 64
        ;;
esac
