#!/usr/bin/env bash
# Tülu 3.1 8B: GRPO with verifiable rewards, in place of Tülu 3's PPO. It starts from Tülu 3's DPO model.
#
#     BENCH=benchmarks bash recipes/tulu31_8b.sh
#
# Sources: tulu3.md is docs/tulu3.md of allenai/open-instruct at e6c3044; grpo_vllm its grpo_vllm_thread_ray_gtrl.py at
# 745bf58, which tulu3.md runs.

STAGES=(clean rlvr)
OPTIONAL=(kl)
PRESET=tulu3
RULE=tulu3
source "$(dirname "$0")/run.sh"

DPO_MODEL=${DPO_MODEL:-allenai/Llama-3.1-Tulu-3-8B-DPO}      # tulu3.md:517; or runs/tulu3_8b/dpo/model
RL_DATA=allenai/RLVR-GSM-MATH-IF-Mixed-Constraints           # tulu3.md:510; 29,946 prompts

clean() {
    clean_rows "$RL_DATA"
}

rlvr() {
    local flags=(
        --model "$DPO_MODEL"
        --data "$(cleaned "$RL_DATA")"
        --max_length 4096                           # tulu3.md:515-516: prompt and answer up to 2048 each
        --max_new_tokens 2048                       # tulu3.md:516
        --temperature 1                             # tulu3.md:520
        --batch_size 48                             # tulu3.md:549: 12 x 4
        --group_size 16                             # tulu3.md:478
        --minibatches 2                             # tulu3.md:479, half-m
        --passes 1                                  # tulu3.md:528
        --lr 5e-7                                   # tulu3.md:476
        --lr_schedule constant                      # tulu3.md:530
        --kl_beta 0.01                              # tulu3.md:477, k3 in the loss (tulu3.md:480)
        --clip_low 0.2                              # grpo_vllm:257
        --clip_high 0.2                             # grpo_vllm:257
        --normalize_std                             # grpo_vllm:1233-1237
        --active_sampling 0                         # grpo_vllm keeps all groups
        --tis_cap 0                                 # there was none
        --no_eos_score 0                            # tulu3.md:523
        --weight_decay 0.01                         # PyTorch's default (grpo_vllm:690); here: matrices only
        --max_grad_norm 1                           # grpo_vllm:416
        --epochs 4                                  # enough for the steps; a constant schedule has no length
        --steps 1920                                # the released step; tulu3.md:522 plans 13,020
        --save_every 40                             # tulu3.md:534
        --keep 0                                    # choose on development data
        --seed 1                                    # tulu3.md:532
        --out "$RUNS/rlvr"
    )
    run grpo "${flags[@]}"
    measure rlvr "$RUNS/rlvr/model"
}

kl() {  # how far from the first of these
    drift "$DPO_MODEL" "$RUNS/rlvr"
}

go "$@"
