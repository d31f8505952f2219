#!/usr/bin/env bash
# OLMo 3 32B Think: two runs of supervised fine-tuning, their average, DPO on pairs of a strong and a weak model, GRPO.
#
#     BENCH=benchmarks JUDGE_URL=http://HOST:8000/v1 bash recipes/olmo3_32b_think.sh       several machines: README.md
#
# Sources: O3 is arXiv 2512.13961. Shell scripts are those in scripts/train/olmo3/ of allenai/open-instruct at e6c3044;
# CORE is src/scripts/train/sft/Olmo-3-7B-SFT.py of allenai/OLMo-core at fa6c501.

STAGES=(clean sft_1e-4 sft_5e-5 average dpo rl)
OPTIONAL=(kl)
PRESET=olmo3
RULE=olmo3
source "$(dirname "$0")/run.sh"
export JUDGE_MODEL=${JUDGE_MODEL:-Qwen/Qwen3-32B}            # 32b_think_rl.sh:65; at $JUDGE_URL

SFT_DATA=allenai/Dolci-Think-SFT-32B                         # O3; 2,253,916 rows
PAIRS_DATA=allenai/Dolci-Think-DPO-32B                       # O3
RL_DATA=allenai/Dolci-Think-RL-32B                           # O3; 104,869 prompts

clean() {  # O3 section 4.2.1
    clean_rows "$SFT_DATA" "$PAIRS_DATA" "$RL_DATA"
}

sft=(  # of both runs
    --model "${BASE:-allenai/Olmo-3-1125-32B}"      # O3
    --chat_template recipes/chat_templates/olmo3_think_sft.jinja  # docs/olmo3.md of open-instruct
    --data "$(cleaned "$SFT_DATA")"
    --max_length 32768                              # 32b_think_sft.sh:17
    --batch_tokens 4194304                          # 32b_think_sft.sh:20
    --lr_schedule linear                            # CORE:361
    --warmup_ratio 0.03                             # CORE:362
    --adam_betas 0.9 0.95                           # CORE:355
    --weight_decay 0                                # CORE:354
    --max_grad_norm 1                               # CORE:365
    --epochs 2                                      # 32b_think_sft.sh:15
    --activation_checkpointing                      # no number of the recipe: rows of 32,768 tokens need it
    --seed 33333                                    # CORE:260
)

sft_1e-4() {
    run sft "${sft[@]}" --lr 1e-4 --out "$RUNS/sft_1e-4"     # 32b_think_sft.sh:9
    measure sft_1e-4 "$RUNS/sft_1e-4/model" --sample_tp 4
}

sft_5e-5() {
    run sft "${sft[@]}" --lr 5e-5 --out "$RUNS/sft_5e-5"     # 32b_think_sft.sh:3, O3 table 47
    measure sft_5e-5 "$RUNS/sft_5e-5/model" --sample_tp 4
}

average() {  # 32b_think_dpo.sh:3, O3 table 47
    run merge --models "$RUNS/sft_1e-4/model" "$RUNS/sft_5e-5/model" --out "$RUNS/sft"
}

dpo() {
    local flags=(
        --model "$RUNS/sft"
        --data "$(cleaned "$PAIRS_DATA"):200000"    # 32b_think_dpo.sh:36
        --length_normalize                          # O3 table 48
        --beta 5                                    # O3 table 48
        --max_length 8192                           # 32b_think_dpo.sh:39
        --batch_size 128                            # 32b_think_dpo.sh:4, :41: 128 GPUs; O3 table 48
        --lr 7e-8                                   # 32b_think_dpo.sh:5, which also tries 8e-8 and 9e-8; O3 table 48
        --lr_schedule linear                        # 32b_think_dpo.sh:43
        --warmup_ratio 0.1                          # O3 table 48
        --weight_decay 0                            # 32b_think_dpo.sh:44
        --epochs 1                                  # O3 table 48
        --max_grad_norm 1                           # "auto" in configs/ds_configs, which is 1
        --activation_checkpointing                  # 32b_think_dpo.sh:46
        --seed 42                                   # 32b_think_dpo.sh:50
        --out "$RUNS/dpo"
    )
    measure sft "$RUNS/sft" --sample_tp 4           # the average: is it better than both?
    run dpo "${flags[@]}"
    measure dpo "$RUNS/dpo/model" --sample_tp 4
}

rl() {
    local flags=(
        --model "$RUNS/dpo/model"
        --chat_template recipes/chat_templates/olmo3_think.jinja  # 32b_think_rl.sh:44, olmo_thinker
        --data "$(cleaned "$RL_DATA")"              # not filtered by its own pass rates: O3 section 4.4.2
        --max_length 34816                          # 32b_think_rl.sh:40-41: prompt up to 2048, and answer
        --max_new_tokens 32768                      # 32b_think_rl.sh:41
        --temperature 1                             # 32b_think_rl.sh:47
        --batch_size 128                            # O3 table 49; 32b_think_rl.sh:29 has 64
        --group_size 8                              # 32b_think_rl.sh:28
        --minibatches 1                             # 32b_think_rl.sh:30
        --passes 1                                  # 32b_think_rl.sh:31
        --lr 2e-6                                   # 32b_think_rl.sh:32
        --lr_schedule constant                      # 32b_think_rl.sh:56
        --kl_beta 0                                 # 32b_think_rl.sh:27
        --clip_low 0.2                              # O3 table 49
        --clip_high 0.272                           # O3 table 49
        --tis_cap 2                                 # O3 table 49
        --active_sampling 8                         # 32b_think_rl.sh:74; 8 rounds at most is this project's bound
        --max_grad_norm 0.1                         # stands for rewards x 10 clipped at 1: docs/grpo.md, "Rewards x 10"
        --adam_eps 1e-9                             # the same
        --epochs 10                                 # enough for the steps; a constant schedule has no length
        --steps "${STEPS:-750}"                     # O3 table 49; 2,300 are Olmo 3.1
        --save_every 25                             # 32b_think_rl.sh:60
        --sample_tp 4                               # no number of the recipe: 4 cards share one copy to sample from
        --seed 1                                    # 32b_think_rl.sh:58
        --out "$RUNS/rl"
    )
    run grpo "${flags[@]}"
    measure rl "$RUNS/rl/model" --sample_tp 4
}

kl() {  # how far from the first of these
    drift "$RUNS/sft" "$RUNS/dpo" "$RUNS/rl" --chat_template recipes/chat_templates/olmo3_think.jinja \
        --max_length 34816 --max_new_tokens 32768 --sample_tp 4  # as in RL
}

go "$@"
