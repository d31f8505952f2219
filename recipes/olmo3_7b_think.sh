#!/usr/bin/env bash
# OLMo 3 7B Think: supervised fine-tuning on thoughts, DPO on pairs of a strong and a weak model, GRPO.
#
#     BENCH=benchmarks JUDGE_URL=http://HOST:8000/v1 bash recipes/olmo3_7b_think.sh
#
# Sources: O3 is arXiv 2512.13961. Shell scripts are those in scripts/train/olmo3/ of allenai/open-instruct at e6c3044;
# CORE is src/scripts/train/sft/Olmo-3-7B-SFT.py of allenai/OLMo-core at fa6c501.

STAGES=(clean sft dpo tries filter rl)
OPTIONAL=(kl answers pairs)
PRESET=olmo3
RULE=olmo3
source "$(dirname "$0")/run.sh"
export JUDGE_MODEL=${JUDGE_MODEL:-Qwen/Qwen3-32B}            # 7b_think_rl_no_pipeline.sh:59; at $JUDGE_URL

SFT_DATA=allenai/Dolci-Think-SFT-7B                          # O3; 2,268,468 rows
PAIRS_DATA=allenai/Dolci-Think-DPO-7B                        # O3
RL_DATA=allenai/Dolci-Think-RL-7B                            # 7b_think_rl_no_pipeline.sh:29; 104,869 prompts

clean() {  # O3 section 4.2.1
    clean_rows "$SFT_DATA" "$PAIRS_DATA" "$RL_DATA"
}

sft() {
    local flags=(
        --model "${BASE:-allenai/Olmo-3-1025-7B}"   # O3
        --chat_template recipes/chat_templates/olmo3_think_sft.jinja  # 32B's; 7B had its name and maker in the prompt
        --data "$(cleaned "$SFT_DATA")"
        --max_length 32768                          # 7b_think_sft.sh:16
        --batch_tokens 1048576                      # 7b_think_sft.sh:19
        --lr 5e-5                                   # 7b_think_sft.sh:8, O3 table 47
        --lr_schedule linear                        # CORE:361
        --warmup_ratio 0.03                         # CORE:362
        --adam_betas 0.9 0.95                       # CORE:355
        --weight_decay 0                            # CORE:354
        --max_grad_norm 1                           # CORE:365
        --epochs 2                                  # 7b_think_sft.sh:14
        --activation_checkpointing                  # no number of the recipe: rows of 32,768 tokens need it
        --seed 33333                                # CORE:260
        --out "$RUNS/sft"
    )
    run sft "${flags[@]}"
    measure sft "$RUNS/sft/model"
}

dpo() {
    local flags=(
        --model "$RUNS/sft/model"
        --chat_template recipes/chat_templates/olmo3_think.jinja  # 7b_think_dpo.sh:34, olmo_thinker
        --data "${PAIRS:-$(cleaned "$PAIRS_DATA"):150000}"  # 7b_think_dpo.sh:40
        --length_normalize                          # O3 table 48
        --beta 5                                    # O3 table 48
        --max_length 16384                          # 7b_think_dpo.sh:26
        --batch_size 128                            # 7b_think_dpo.sh:12, :28: 32 GPUs x 4; O3 table 48
        --lr 8e-8                                   # 7b_think_dpo.sh:29, O3 table 48
        --lr_schedule linear                        # 7b_think_dpo.sh:30
        --warmup_ratio 0.1                          # O3 table 48
        --weight_decay 0                            # 7b_think_dpo.sh:31
        --epochs 1                                  # O3 table 48
        --max_grad_norm 1                           # "auto" in configs/ds_configs, which is 1
        --activation_checkpointing                  # 7b_think_dpo.sh:33
        --out "$RUNS/dpo"
    )
    run dpo "${flags[@]}"
    measure dpo "$RUNS/dpo/model"
}

tries() {  # what the model solves before RL
    local flags=(
        --model "$RUNS/dpo/model"
        --data "$(cleaned "$RL_DATA")"
        --n 8                                       # O3 section 4.4.2
        --temperature 1                             # O3 section 4.4.2
        --top_p 1                                   # O3 section 4.4.2
        --max_length 34816                          # as in RL
        --max_new_tokens 32768                      # as in RL
        --out "$RUNS/tries.jsonl"
    )
    run generate "${flags[@]}"
}

filter() {
    local flags=(
        --data "$RUNS/tries.jsonl"
        --above -1                                  # prompts that are never solved stay
        --at_most 0.625                             # O3 section 4.4.2
        --out "$RUNS/prompts.jsonl"
    )
    run curate prompts "${flags[@]}"
}

rl() {
    local flags=(
        --model "$RUNS/dpo/model"
        --data "$RUNS/prompts.jsonl"
        --max_length 34816                          # prompt up to 2048 (7b_think_rl_no_pipeline.sh:34) and answer
        --max_new_tokens 32768                      # 7b_think_rl_no_pipeline.sh:35
        --temperature 1                             # 7b_think_rl_no_pipeline.sh:41
        --batch_size 64                             # 7b_think_rl_no_pipeline.sh:22, O3 table 49
        --group_size 8                              # 7b_think_rl_no_pipeline.sh:21
        --minibatches 1                             # 7b_think_rl_no_pipeline.sh:23
        --passes 1                                  # 7b_think_rl_no_pipeline.sh:24
        --lr 1e-6                                   # 7b_think_rl_no_pipeline.sh:25
        --lr_schedule constant                      # 7b_think_rl_no_pipeline.sh:49
        --kl_beta 0                                 # 7b_think_rl_no_pipeline.sh:20
        --clip_low 0.2                              # O3 table 49
        --clip_high 0.272                           # O3 table 49
        --tis_cap 0                                 # the released model's run had none
        --active_sampling 1                         # groups of equal rewards were left out and not replaced
        --max_grad_norm 0.1                         # stands for rewards x 10 clipped at 1: docs/grpo.md, "Rewards x 10"
        --adam_eps 1e-9                             # the same
        --epochs 2                                  # enough for the steps; a constant schedule has no length
        --steps 1400                                # O3 table 49
        --save_every 25                             # 7b_think_rl_no_pipeline.sh:53
        --seed 1                                    # 7b_think_rl_no_pipeline.sh:51
        --out "$RUNS/rl"
    )
    run grpo "${flags[@]}"
    measure rl "$RUNS/rl/model"
}

kl() {  # how far from the first of these
    drift "$RUNS/sft/model" "$RUNS/dpo" "$RUNS/rl" --chat_template recipes/chat_templates/olmo3_think.jinja \
        --max_length 34816 --max_new_tokens 32768   # as in RL
}

# Pairs of your own by delta learning (O3 section 4.3): a strong model's answers against a weak one's, without a judge.
# Afterwards: PAIRS=runs/olmo3_7b_think/pairs.jsonl bash recipes/olmo3_7b_think.sh dpo
STRONG=${STRONG:-Qwen/Qwen3-32B}                             # O3 section 4.3
WEAK=${WEAK:-Qwen/Qwen3-0.6B}                                # O3 section 4.3

answers() {
    local flags=(
        --model "$STRONG" "$WEAK"
        --data "${PROMPTS:?are the prompts: a data source}"
        --n 1                                       # one pair of a prompt
        --max_length 16384                          # as in DPO
        --max_new_tokens 14336                      # leaves 2048 for the prompt
        --out "$RUNS/answers.jsonl"
    )
    run generate "${flags[@]}"
}

pairs() {
    local flags=(
        --data "$RUNS/answers.jsonl"
        --rule delta                                # O3 section 4.3
        --strong "$STRONG"
        --weak "$WEAK"
        --out "$RUNS/pairs.jsonl"
    )
    run curate pairs "${flags[@]}"
}

go "$@"
