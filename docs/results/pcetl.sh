#!/usr/bin/env bash
# What pcetl.jsonl lacks of NLVR2's part, around its base, and of latencies.
#
#   docs/results/pcetl.sh base OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh rates OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh nlvr2 OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh faster_heads OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh latency OUT [FLAG of tools.study_latency ...]
#
# `rates` tries the rates of NLVR2 (python -m docs.results.pcetl ARCHIVE chooses of them), `nlvr2`
# does the cells that ARCHIVE (pcetl.jsonl) lacks, those that are compared most closely first, and
# `faster_heads` those of heads at a higher rate. They tune what `base` has trained in OUT, or
# --base=BASE, a workdir or a parameter file. No second training comes to the same parameters, and
# an archive is not continued around others: keep the first (tools.export_weights). `latency` times
# the networks of all tasks (or TASKS), a process for each; what else uses the GPU is to hold
# OUT/latency.lock meanwhile (flock OUT/latency.lock COMMAND). With --workers, processes share a GPU
# well only where NVIDIA's multi-process service runs (nvidia-cuda-mps-control -d).
set -euo pipefail
what=${1:?base, rates, nlvr2, faster_heads or latency} out=$(realpath -m "${2:?a folder}")
archive=$(realpath -m "${ARCHIVE:-$(dirname "$0")/pcetl.jsonl}")
shift 2
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
known() { "$python" -c "from docs.results import pcetl; print($1)"; }
of_nlvr2() { known "','.join('\"%s\"' % cell for cell in $1().cells if cell.startswith('nlvr2'))"; }
base=$out/runs/$(known "pcetl.base_of('nlvr2').key")
mkdir -p "$out"
# No texts are read here; the folder must be there all the same.
compare=("$python" -m tools.compare_stages --archive="$archive" --out="$out" --texts="$out")

case $what in
    base)
        exec "${compare[@]}" docs.results.pcetl --train_bases --cells="nlvr2: full" --seeds=1 \
            --devices=0 "$@"
        ;;
    rates)
        cells=$(of_nlvr2 pcetl.rates)
        exec "${compare[@]}" docs.results.pcetl:rates --base="$base" --cells="$cells" --seeds=2 "$@"
        ;;
    nlvr2)
        # What is only tested again needs runs that no later session has.
        first='nlvr2: adapter,"nlvr2: adapter, int8",nlvr2: full,"nlvr2: full, int8",nlvr2: DAS 4'
        first+=',"nlvr2: DAS 4, int8",nlvr2: scaled_parallel,nlvr2: DAS 12%,nlvr2: DAS 25%'
        first+=',nlvr2: random 4,nlvr2: similarity 4,nlvr2: DAS 2'
        cells=$(of_nlvr2 pcetl.study)
        exec "${compare[@]}" docs.results.pcetl --base="$base" --cells="$cells" --first="$first" \
            --seeds=6 "$@"
        ;;
    faster_heads)
        exec "${compare[@]}" docs.results.pcetl:faster_heads --base="$base" --seeds=2 "$@"
        ;;
    latency)
        export XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 XLA_PYTHON_CLIENT_PREALLOCATE=false
        processes=() failed=0
        trap 'kill "${processes[@]}"' INT TERM
        for task in ${TASKS:-vqa nlvr2 retrieval}; do
            "$python" -m tools.study_latency docs.results.pcetl --archive="$archive" --tasks=$task \
                --lock="$out/latency.lock" "$@" &
            processes+=($!)
        done
        for process in "${processes[@]}"; do wait "$process" || failed=$?; done
        exit "$failed"
        ;;
    *)
        echo "write base, rates, nlvr2, faster_heads or latency, not '$what'" >&2
        exit 64
        ;;
esac
