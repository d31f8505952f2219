#!/usr/bin/env bash
# Tülu 3 70B: supervised fine-tuning, DPO, PPO with verifiable rewards. The value model starts as the 8B reward model.
#
#     BENCH=benchmarks bash recipes/tulu3_70b.sh            all stages; on several machines: recipes/README.md
#
# Sources: as in tulu3_8b.sh. T3 is arXiv 2411.15124; tulu3.md is docs/tulu3.md of allenai/open-instruct at e6c3044.

STAGES=(clean sft dpo rlvr)
OPTIONAL=(kl)
PRESET=tulu3
RULE=tulu3
source "$(dirname "$0")/run.sh"

SFT_DATA=allenai/tulu-3-sft-mixture                         # tulu3.md:112; 939,344 rows
PAIRS_DATA=allenai/llama-3.1-tulu-3-70b-preference-mixture   # tulu3.md:209; 334,302 pairs
RL_DATA=allenai/RLVR-GSM-MATH-IF-Mixed-Constraints           # tulu3.md:365; 29,946 prompts

clean() {  # T3 section 3.2
    clean_rows "$SFT_DATA" "$PAIRS_DATA" "$RL_DATA"
}

sft() {
    local flags=(
        --model "${BASE:-meta-llama/Llama-3.1-70B}" # tulu3.md:95
        --chat_template tulu                        # T3 section 4.3
        --data "$(cleaned "$SFT_DATA")"             # all of it
        --max_length 4096                           # tulu3.md:98
        --batch_size 128                            # tulu3.md:100-101, on 64 GPUs
        --lr 2e-6                                   # tulu3.md:102
        --lr_schedule linear                        # tulu3.md:103
        --warmup_ratio 0.03                         # tulu3.md:104
        --weight_decay 0                            # tulu3.md:105
        --epochs 2                                  # tulu3.md:106
        --max_grad_norm 0.1                         # stands for the summed loss (T3 section 4.3.2) clipped at 1
        --adam_eps 1e-9                             # the same: docs/sft.md, "A summed loss"
        --activation_checkpointing                  # tulu3.md:116
        --seed 456                                  # tulu3.md:118
        --out "$RUNS/sft"
    )
    run sft "${flags[@]}"
    measure sft "$RUNS/sft/model" --sample_tp 4
}

dpo() {
    local flags=(
        --model "$RUNS/sft/model"
        --data "$(cleaned "$PAIRS_DATA")"
        --length_normalize                          # tulu3.md:212, dpo_norm
        --beta 5                                    # tulu3.md:213
        --max_length 2048                           # tulu3.md:194
        --batch_size 128                            # tulu3.md:196-197, on 64 GPUs
        --lr 2e-7                                   # tulu3.md:198
        --lr_schedule linear                        # tulu3.md:199
        --warmup_ratio 0.1                          # tulu3.md:200
        --weight_decay 0                            # tulu3.md:201
        --epochs 1                                  # tulu3.md:202
        --max_grad_norm 1                           # as for 8B
        --activation_checkpointing                  # tulu3.md:208
        --out "$RUNS/dpo"
    )
    run dpo "${flags[@]}"
    measure dpo "$RUNS/dpo/model" --sample_tp 4
}

rlvr() {
    local flags=(
        --model "$RUNS/dpo/model"
        --value_model "${REWARD_MODEL:-allenai/Llama-3.1-Tulu-3-8B-RM}"  # tulu3.md:374; or that of tulu3_8b.sh
        --data "$(cleaned "$RL_DATA")"
        --max_length 4096                           # tulu3.md:370-371: prompt and answer up to 2048 each
        --max_new_tokens 2048                       # tulu3.md:371
        --temperature 1                             # tulu3.md:381
        --batch_size 640                            # tulu3.md:359: 40 x 16
        --group_size 1                              # T3 table 21
        --passes 4                                  # T3 table 21
        --minibatches 1                             # T3 table 21
        --lr 1e-7                                   # tulu3.md:383
        --value_lr 1e-7                             # tulu3.md:383
        --lr_schedule linear                        # T3 table 21
        --warmup_ratio 0.1                          # tulu3.md:376
        --kl_beta 0.07                              # tulu3.md:375; T3 section 6 prints 0.7 once
        --gamma 1                                   # T3 table 21
        --gae_lambda 0.95                           # T3 table 21
        --clip_low 0.2                              # T3 table 21
        --clip_high 0.2                             # T3 table 21
        --value_clip 0.2                            # T3 table 21
        --value_coef 0.1                            # T3 table 21
        --reward_scale 10                           # T3 section 6
        --no_eos_score -10                          # tulu3.md:385
        --tis_cap 0                                 # there was none
        --weight_decay 0.01                         # PyTorch's default; here: matrices only
        --max_grad_norm 1                           # T3 table 21
        --epochs 13.357                             # tulu3.md:384: 400,000 completions of 29,946 prompts
        --save_every 40                             # tulu3.md:398
        --keep 0                                    # choose on development data
        --sample_tp 8                               # no number of the recipe: 8 cards share one copy to sample from
        --seed 8                                    # tulu3.md:377
        --out "$RUNS/rlvr"
    )
    run ppo_rlvr "${flags[@]}"
    measure rlvr "$RUNS/rlvr/model" --sample_tp 4
}

kl() {  # how far from the first of these
    drift "$RUNS/sft/model" "$RUNS/dpo" "$RUNS/rlvr" --sample_tp 4
}

go "$@"
