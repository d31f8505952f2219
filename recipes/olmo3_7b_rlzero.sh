#!/usr/bin/env bash
# OLMo 3 7B RL-Zero: GRPO on the base model, with one kind of prompts each.
#
#     BENCH=benchmarks bash recipes/olmo3_7b_rlzero.sh                        mathematics
#     BENCH=benchmarks bash recipes/olmo3_7b_rlzero.sh clean code             or code, instructions, general
#
# Sources: O3 is arXiv 2512.13961. Shell scripts are 7b_rlzero_*.sh in scripts/train/olmo3/ of allenai/open-instruct at
# e6c3044, named by their last word (math.sh, code.sh, instruction_following.sh, general.sh).

STAGES=(clean tries filter mathematics)
OPTIONAL=(kl code instructions general)
PRESET=olmo3
RULE=olmo3
source "$(dirname "$0")/run.sh"
export JUDGE_MODEL=${JUDGE_MODEL:-Qwen/Qwen3-32B}            # general.sh:63; at $JUDGE_URL
BASE=${BASE:-allenai/Olmo-3-1025-7B}                         # math.sh:4

MATH_DATA=allenai/Dolci-RLZero-Math-7B                       # math.sh:5; 13,314 prompts
CODE_DATA=allenai/Dolci-RLZero-Code-7B                       # code.sh:4
IF_DATA=allenai/Dolci-RLZero-IF-7B                           # instruction_following.sh:4
GENERAL_DATA=allenai/Dolci-RLZero-General-7B                 # O3

clean() {  # O3 section 4.2.1
    clean_rows "$MATH_DATA" "$CODE_DATA" "$IF_DATA" "$GENERAL_DATA"
}

tries() {  # what the base model solves
    local flags=(
        --model "$BASE"
        --chat_template recipes/chat_templates/olmo3_rlzero.jinja  # math.sh:54
        --data "$(cleaned "$MATH_DATA")"
        --n 8                                       # O3 section 6.1
        --temperature 1                             # O3 section 6.1
        --top_p 1                                   # O3 section 6.1
        --max_length 18432                          # as in RL
        --max_new_tokens 16384                      # as in RL
        --out "$RUNS/tries.jsonl"
    )
    run generate "${flags[@]}"
}

filter() {
    local flags=(
        --data "$RUNS/tries.jsonl"
        --drop_solved                               # O3 section 6.1: 8 of 8
        --out "$RUNS/prompts.jsonl"
    )
    run curate prompts "${flags[@]}"
}

# Measured at temperature 1: O3 section 6.1.
rl=(  # of all
    --model "$BASE"
    --max_length 18432                              # math.sh:50-51: prompt up to 2048, and answer
    --max_new_tokens 16384                          # math.sh:51
    --temperature 1                                 # math.sh:56
    --batch_size 32                                 # math.sh:41, O3 table 49
    --group_size 8                                  # math.sh:40
    --minibatches 1                                 # math.sh:42
    --lr 1e-6                                       # math.sh:43
    --lr_schedule constant                          # math.sh:62
    --kl_beta 0                                     # math.sh:37
    --clip_low 0.2                                  # O3 table 49
    --clip_high 0.272                               # O3 table 49
    --tis_cap 2                                     # O3 table 49
    --max_grad_norm 0.1                             # stands for rewards x 10 clipped at 1: docs/grpo.md, "Rewards x 10"
    --adam_eps 1e-9                                 # the same
    --steps 2000                                    # O3 table 49; math.sh:57 plans 3,000, the others 40,000
    --seed 1                                        # math.sh:64
)

mathematics() {
    local flags=(
        --chat_template recipes/chat_templates/olmo3_rlzero.jinja  # math.sh:54
        --data "$RUNS/prompts.jsonl"
        --active_sampling 8                         # math.sh:39; 8 rounds at most is this project's bound
        --solved 0.875                              # math.sh:38
        --epochs 10                                 # enough for the steps; a constant schedule has no length
        --save_every 100                            # math.sh:66
        --out "$RUNS/mathematics"
    )
    run grpo "${rl[@]}" "${flags[@]}"
    measure mathematics "$RUNS/mathematics/model" --temperature 1 --top_p 1
}

code() {
    local flags=(
        --chat_template recipes/chat_templates/olmo3_rlzero_code.jinja  # code.sh:51
        --data "$(cleaned "$CODE_DATA")"
        --verifier code_share                       # code.sh:59: the share of tests passed, from 0
        --active_sampling 1                         # code.sh does not ask for more
        --epochs 20                                 # enough for the steps; a constant schedule has no length
        --save_every 50                             # code.sh:64
        --out "$RUNS/code"
    )
    run grpo "${rl[@]}" "${flags[@]}"
    measure code "$RUNS/code/model" --temperature 1 --top_p 1
}

instructions() {
    local flags=(
        --chat_template recipes/chat_templates/olmo3_rlzero.jinja  # instruction_following.sh:51
        --data "$(cleaned "$IF_DATA")"
        --active_sampling 1                         # instruction_following.sh does not ask for more
        --epochs 20                                 # enough for the steps; a constant schedule has no length
        --save_every 50                             # instruction_following.sh:63
        --out "$RUNS/instructions"
    )
    run grpo "${rl[@]}" "${flags[@]}"
    measure instructions "$RUNS/instructions/model" --temperature 1 --top_p 1
}

general() {
    local flags=(
        --chat_template recipes/chat_templates/olmo3_think.jinja  # general.sh:54
        --data "$(cleaned "$GENERAL_DATA")"
        --stop_strings "</answer>"                  # general.sh:55
        --active_sampling 1                         # general.sh does not ask for more
        --epochs 20                                 # enough for the steps; a constant schedule has no length
        --save_every 50                             # general.sh:71
        --out "$RUNS/general"
    )
    run grpo "${rl[@]}" "${flags[@]}"
    measure general "$RUNS/general/model" --temperature 1 --top_p 1
}

kl() {  # how far from the first of these
    drift "$BASE" "$RUNS/mathematics" --chat_template recipes/chat_templates/olmo3_rlzero.jinja \
        --max_length 18432 --max_new_tokens 16384   # as in RL
}

go "$@"
