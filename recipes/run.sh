# Read by every recipe, and no recipe itself: where a recipe works, how it launches commands, and what stages share.
# shellcheck shell=bash disable=SC2154

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RUNS=${RUNS:-runs/$(basename "$0" .sh)}                              # all that the recipe makes
read -ra launch <<< "${LAUNCH:-torchrun --nproc_per_node 8}"         # starts a command on all GPUs; on one: python
read -ra python <<< "${PYTHON:-python}"                              # starts a command that needs no GPU

# NAME=FILE of every benchmark, which is $BENCH/NAME.jsonl; and of its examples, $BENCH/shots/NAME.jsonl.
benchmarks=()
shots=()
if [ -z "${BENCH:-}" ]; then
    echo "error: BENCH has to be a folder with a file NAME.jsonl for each benchmark, or none: see recipes/README.md" >&2
    exit 1
fi
if [ "$BENCH" != none ]; then
    for file in "$BENCH"/*.jsonl; do
        test -f "$file" || { echo "error: BENCH=$BENCH holds no .jsonl file" >&2; exit 1; }
        benchmarks+=("$(basename "$file" .jsonl)=$file")
    done
    if [ "$PRESET" = tulu3 ]; then  # OLMo 3 is measured without examples
        for file in "$BENCH"/shots/*.jsonl; do
            test ! -f "$file" || shots+=("$(basename "$file" .jsonl)=$file")
        done
        ((${#shots[@]} == 0)) || shots=(--shots "${shots[@]}")
    fi
fi

# go [STAGE ...]: these stages, or else all of STAGES, one after the other.
go() {
    local stage
    [ $# -gt 0 ] || set -- "${STAGES[@]}"
    for stage in "$@"; do
        if [[ " ${STAGES[*]} ${OPTIONAL[*]-} " != *" $stage "* ]]; then
            echo "error: there is no stage $stage: ${STAGES[*]} ${OPTIONAL[*]-}" >&2
            exit 1
        fi
    done
    for stage in "$@"; do
        echo "== $0 $stage"
        "$stage"
    done
}

# run NAME FLAG ...: NAME.py, or pipeline/NAME.py, whose result is not made again. $EXTRA_NAME goes behind the flags.
run() {
    local name=$1 extra=EXTRA_$1 out="" previous="" word
    shift
    read -ra extra <<< "${!extra:-}"
    set -- "$@" "${extra[@]}"
    if [ -f "$name.py" ]; then
        "${launch[@]}" "$name.py" "$@"  # goes on where it was interrupted, and does nothing if it is finished
        return
    fi
    for word in "$@"; do
        [ "$previous" != --out ] || out=$word
        previous=$word
    done
    if [ -e "$out" ]; then
        echo "$out is there already"
    elif [[ " generate evaluate kl " == *" $name "* ]]; then
        "${launch[@]}" -m "pipeline.$name" "$@"
    else
        "${python[@]}" -m "pipeline.$name" "$@"
    fi
}

# clean_rows SOURCE ...: stage clean of every recipe. Rows that hold prompts of the benchmarks are left out, by $RULE.
clean_rows() {
    if ((${#benchmarks[@]})); then
        run decontaminate --test "${benchmarks[@]}" --train "$@" --rule "$RULE" --out "$RUNS/clean"
    fi
}

# cleaned SOURCE: what clean_rows has written of it.
cleaned() {
    if ((${#benchmarks[@]})); then
        echo "$RUNS/clean/clean/$(basename "$1").jsonl"
    else
        echo "$1"
    fi
}

# measure NAME MODEL [FLAG ...]: a model on the benchmarks, by the settings of $PRESET.
measure() {
    if ((${#benchmarks[@]})); then
        run evaluate --model "$2" --data "${benchmarks[@]}" --preset "$PRESET" "${shots[@]}" "${@:3}" \
            --out "$RUNS/evaluation/$1"
    fi
}

# drift REF MODEL ... [FLAG ...]: how far runs have moved from a model, in nats, on the same hundred prompts.
drift() {
    local prompts=${KL_PROMPTS:?are about a hundred fixed prompts: SOURCE:100}
    run kl --ref "$1" --model "${@:2}" --data "$prompts" --out "$RUNS/kl"
}
