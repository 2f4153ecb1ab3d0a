#!/usr/bin/env bash
# NLVR2's part of pcetl.md, around a base that can be trained again.
#
#   docs/results/pcetl.sh base OUT
#   docs/results/pcetl.sh nlvr2 OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh faster_heads OUT [FLAG of tools.compare_stages ...]
#   docs/results/pcetl.sh latency OUT [FLAG of tools.study_latency ...]
#
# `base` trains what NLVR2 tunes by deterministic kernels, alone on its GPU; `nlvr2`, after it, does
# the cells that ARCHIVE (pcetl.jsonl) lacks, those that are compared most closely first, and
# `faster_heads` those of heads at a higher rate. If the base has not come to the parameters of the
# records, both refuse to go on. `latency` times the networks of all tasks (or TASKS), a process for
# each, with nothing else on the GPU. With --workers, processes share a GPU well only where NVIDIA's
# multi-process service runs (nvidia-cuda-mps-control -d).
set -euo pipefail
what=$1 out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
known() { "$python" -c "from docs.results import pcetl; print($1)"; }
base=$out/runs/$(known "pcetl.base_of('nlvr2').key")
archive=${ARCHIVE:-docs/results/pcetl.jsonl}
compare=("$python" -m tools.compare_stages --archive="$archive" --out="$out")

case $what in
    base)
        export XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0 ${XLA_FLAGS:-}"
        exec "${compare[@]}" docs.results.pcetl --train_bases --cells="nlvr2: full" --seeds=1 "$@"
        ;;
    nlvr2)
        cells=$(known "','.join('\"%s\"' % cell for cell in pcetl.study().cells if 'nlvr2' in cell)")
        first='nlvr2: adapter,nlvr2: scaled_parallel,nlvr2: DAS 4,nlvr2: DAS 12%,nlvr2: DAS 25%'
        first+=',nlvr2: random 4,nlvr2: similarity 4,nlvr2: full,nlvr2: DAS 2'
        exec "${compare[@]}" docs.results.pcetl --base="$base" --cells="$cells" --first="$first" \
            --seeds=6 "$@"
        ;;
    faster_heads)
        exec "${compare[@]}" docs.results.pcetl:faster_heads --base="$base" --seeds=2 "$@"
        ;;
    latency)
        mkdir -p "$out"
        export XLA_PYTHON_CLIENT_MEM_FRACTION=0.3
        processes=()
        for task in ${TASKS:-vqa nlvr2 retrieval}; do
            "$python" -m tools.study_latency docs.results.pcetl --archive="$archive" --tasks=$task \
                --lock="$out/latency.lock" "$@" &
            processes+=($!)
        done
        for process in "${processes[@]}"; do wait "$process"; done
        ;;
    *)
        echo "write base, nlvr2, faster_heads or latency, not '$what'" >&2
        exit 64
        ;;
esac
