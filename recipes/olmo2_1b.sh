#!/usr/bin/env bash
# OLMo 2 1B: supervised fine-tuning, DPO, and GRPO twice: on Tülu 3's prompts, then on mathematics alone.
#
#     BENCH=benchmarks bash recipes/olmo2_1b.sh
#
# Sources: olmo2.md is docs/olmo2.md of allenai/open-instruct at e6c3044. Of RL it has a reproduction (239)
# and what was run (285), by grpo_vllm: grpo_vllm_thread_ray_gtrl.py at 745bf58.

STAGES=(clean sft dpo rlvr rlvr_math)
OPTIONAL=(kl)
PRESET=tulu3
RULE=tulu3
source "$(dirname "$0")/run.sh"

SFT_DATA=allenai/tulu-3-sft-olmo-2-mixture-0225              # olmo2.md:76
PAIRS_DATA=allenai/olmo-2-0425-1b-preference-mix             # olmo2.md:125
RL_DATA=allenai/RLVR-GSM-MATH-IF-Mixed-Constraints           # olmo2.md:247; 29,946 prompts
MATH_DATA=allenai/RLVR-MATH                                  # olmo2.md:344; 7,500 prompts

clean() {
    clean_rows "$SFT_DATA" "$PAIRS_DATA" "$RL_DATA" "$MATH_DATA"
}

sft() {
    local flags=(
        --model "${BASE:-allenai/OLMo-2-0425-1B}"   # olmo2.md:69
        --chat_template recipes/chat_templates/olmo2.jinja  # olmo2.md:74-75: Tülu's, with a BOS
        --data "$(cleaned "$SFT_DATA")"
        --max_length 4096                           # olmo2.md:77
        --batch_size 128                            # olmo2.md:78-79, on 8 GPUs
        --lr 3e-5                                   # olmo2.md:80
        --lr_schedule linear                        # olmo2.md:81
        --warmup_ratio 0.03                         # olmo2.md:82
        --weight_decay 0                            # olmo2.md:83
        --epochs 2                                  # olmo2.md:84
        --max_grad_norm 1                           # as for Tülu 3's DPO: "auto" in configs/ds_configs
        --seed 1                                    # olmo2.md:88
        --out "$RUNS/sft"
    )
    run sft "${flags[@]}"
    measure sft "$RUNS/sft/model"
}

dpo() {
    local flags=(
        --model "$RUNS/sft/model"
        --data "$(cleaned "$PAIRS_DATA")"
        --length_normalize                          # olmo2.md:130, dpo_norm
        --beta 5                                    # olmo2.md:131
        --max_length 2048                           # olmo2.md:113
        --batch_size 128                            # olmo2.md:114-115, on 8 GPUs
        --lr 2.5e-6                                 # olmo2.md:107
        --lr_schedule linear                        # olmo2.md:116
        --warmup_ratio 0.1                          # olmo2.md:117
        --weight_decay 0                            # olmo2.md:118
        --epochs 1                                  # olmo2.md:119
        --max_grad_norm 1                           # as above
        --seed 111                                  # olmo2.md:108
        --out "$RUNS/dpo"
    )
    run dpo "${flags[@]}"
    measure dpo "$RUNS/dpo/model"
}

rl=(  # of both runs
    --max_length 4096                               # olmo2.md:257, :270: prompt and answer up to 2048 each
    --max_new_tokens 2048                           # olmo2.md:270
    --temperature 1                                 # olmo2.md:274
    --batch_size 48                                 # olmo2.md:266
    --group_size 16                                 # olmo2.md:265
    --minibatches 2                                 # olmo2.md:264
    --passes 1                                      # olmo2.md:262
    --lr 5e-7                                       # olmo2.md:254
    --lr_schedule constant                          # olmo2.md:256
    --kl_beta 0.01                                  # olmo2.md:243, k3 in the loss (olmo2.md:253)
    --clip_low 0.2                                  # grpo_vllm:257
    --clip_high 0.2                                 # grpo_vllm:257
    --normalize_std                                 # grpo_vllm:1233-1237
    --active_sampling 0                             # grpo_vllm keeps all groups
    --tis_cap 0                                     # there was none
    --no_eos_score 0                                # olmo2.md:261
    --stop_strings "</answer>"                      # olmo2.md:273, in the reproduction alone
    --weight_decay 0.01                             # PyTorch's default (grpo_vllm:690); here: matrices only
    --max_grad_norm 1                               # grpo_vllm:416
    --steps 2604                                    # olmo2.md:277: 2,000,000 completions of 768 a step
    --save_every 200                                # olmo2.md:271
    --keep 0                                        # choose on development data
    --seed 1                                        # olmo2.md:272
)

rlvr() {
    run grpo --model "$RUNS/dpo/model" --data "$(cleaned "$RL_DATA")" "${rl[@]}" \
        --epochs 5 --out "$RUNS/rlvr"               # 5: enough for the steps
    measure rlvr "$RUNS/rlvr/model"
}

rlvr_math() {
    run grpo --model "$RUNS/rlvr/model" --data "$(cleaned "$MATH_DATA")" "${rl[@]}" \
        --epochs 17 --out "$RUNS/rlvr_math"         # 17: enough for the steps
    measure rlvr_math "$RUNS/rlvr_math/model"
}

kl() {  # how far from the first of these
    drift "$RUNS/sft/model" "$RUNS/dpo" "$RUNS/rlvr" "$RUNS/rlvr_math"
}

go "$@"
