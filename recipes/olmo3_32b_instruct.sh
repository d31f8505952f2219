#!/usr/bin/env bash
# OLMo 3 32B Instruct: supervised fine-tuning that starts from Think's, DPO, GRPO.
#
#     BENCH=benchmarks JUDGE_URL=http://HOST:8000/v1 bash recipes/olmo3_32b_instruct.sh    several machines: README.md
#
# Needs stage average of olmo3_32b_think.sh. Sources: as there. Pairs of your own: as in olmo3_7b_instruct.sh.

STAGES=(clean sft dpo rl)
OPTIONAL=(kl)
PRESET=olmo3
RULE=olmo3
source "$(dirname "$0")/run.sh"
export JUDGE_MODEL=${JUDGE_MODEL:-Qwen/Qwen3-32B}            # 32b_instruct_rl.sh:63; at $JUDGE_URL

SFT_DATA=allenai/Dolci-Instruct-SFT                          # O3; 2,152,112 rows
PAIRS_DATA=allenai/Dolci-Instruct-DPO                        # O3; the amounts of 7B (32b_instruct_dpo.sh:11-22)
RL_DATA=allenai/Dolci-Instruct-RL                            # O3; 171,950 prompts

clean() {  # O3 section 4.2.1
    clean_rows "$SFT_DATA" "$PAIRS_DATA" "$RL_DATA"
}

sft() {
    local flags=(
        --model "${THINK_SFT:-runs/olmo3_32b_think/sft}"  # 32b_instruct_sft.sh:6
        --chat_template recipes/chat_templates/olmo3_instruct.jinja  # docs/olmo3.md of open-instruct
        --data "$(cleaned "$SFT_DATA")"
        --max_length 32768                          # 32b_instruct_sft.sh:15
        --batch_tokens 4194304                      # 32b_instruct_sft.sh:18
        --lr 8e-5                                   # 32b_instruct_sft.sh:7, O3 table 47
        --lr_schedule linear                        # CORE:361
        --warmup_ratio 0.03                         # CORE:362
        --adam_betas 0.9 0.95                       # CORE:355
        --weight_decay 0                            # CORE:354
        --max_grad_norm 1                           # CORE:365
        --epochs 2                                  # 32b_instruct_sft.sh:13
        --activation_checkpointing                  # no number of the recipe: rows of 32,768 tokens need it
        --seed 33333                                # 32b_instruct_sft.sh:9
        --out "$RUNS/sft"
    )
    run sft "${flags[@]}"
    measure sft "$RUNS/sft/model" --sample_tp 4
}

dpo() {
    local flags=(
        --model "$RUNS/sft/model"
        --data "${PAIRS:-$(cleaned "$PAIRS_DATA")}"
        --length_normalize                          # O3 table 48
        --beta 5                                    # O3 table 48
        --max_length 8192                           # 32b_instruct_dpo.sh:45
        --batch_size 128                            # 32b_instruct_dpo.sh:8, :47: 64 GPUs x 2; O3 table 48
        --lr 1e-6                                   # 32b_instruct_dpo.sh:9, O3 table 48
        --lr_schedule linear                        # 32b_instruct_dpo.sh:50
        --warmup_ratio 0.1                          # O3 table 48
        --weight_decay 0                            # 32b_instruct_dpo.sh:51
        --epochs 1                                  # O3 table 48
        --max_grad_norm 1                           # "auto" in configs/ds_configs, which is 1
        --activation_checkpointing                  # 32b_instruct_dpo.sh:53
        --out "$RUNS/dpo"
    )
    run dpo "${flags[@]}"
    measure dpo "$RUNS/dpo/model" --sample_tp 4
}

rl() {
    local flags=(
        --model "$RUNS/dpo/model"
        --data "$(cleaned "$RL_DATA")"
        --max_length 18432                          # 32b_instruct_rl.sh:36-37: prompt up to 2048, and answer
        --max_new_tokens 16384                      # 32b_instruct_rl.sh:37
        --temperature 1                             # 32b_instruct_rl.sh:43
        --batch_size 64                             # 32b_instruct_rl.sh:26, O3 table 49
        --group_size 8                              # 32b_instruct_rl.sh:25
        --minibatches 1                             # 32b_instruct_rl.sh:27
        --passes 1                                  # 32b_instruct_rl.sh:28
        --lr 2e-6                                   # 32b_instruct_rl.sh:29
        --lr_schedule constant                      # 32b_instruct_rl.sh:53
        --kl_beta 0                                 # 32b_instruct_rl.sh:24
        --clip_low 0.2                              # O3 table 49
        --clip_high 0.272                           # O3 table 49
        --tis_cap 2                                 # O3 table 49
        --active_sampling 8                         # 32b_instruct_rl.sh:75; 8 rounds at most is this project's bound
        --max_grad_norm 0.1                         # stands for rewards x 10 clipped at 1: docs/grpo.md, "Rewards x 10"
        --adam_eps 1e-9                             # the same
        --epochs 1                                  # how many steps were taken is not published: choose from them
        --save_every 50                             # 32b_instruct_rl.sh:57
        --keep 0                                    # to choose from
        --sample_tp 4                               # no number of the recipe: 4 cards share one copy to sample from
        --seed 543210                               # 32b_instruct_rl.sh:55
        --out "$RUNS/rl"
    )
    run grpo "${flags[@]}"
    measure rl "$RUNS/rl/model" --sample_tp 4
}

kl() {  # how far from the first of these
    drift "$RUNS/sft/model" "$RUNS/dpo" "$RUNS/rl" --max_length 18432 --max_new_tokens 16384 --sample_tp 4  # as in RL
}

go "$@"
