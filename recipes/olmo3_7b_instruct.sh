#!/usr/bin/env bash
# OLMo 3 7B Instruct: supervised fine-tuning that starts from Think's, DPO on delta and judged pairs, GRPO.
#
#     BENCH=benchmarks JUDGE_URL=http://HOST:8000/v1 bash recipes/olmo3_7b_instruct.sh
#
# Needs stage sft of olmo3_7b_think.sh. Sources: as there.

STAGES=(clean sft dpo rl)
OPTIONAL=(kl answers pairs candidates judged)
PRESET=olmo3
RULE=olmo3
source "$(dirname "$0")/run.sh"
export JUDGE_MODEL=${JUDGE_MODEL:-Qwen/Qwen3-32B}            # 7b_instruct_rl.sh:75; at $JUDGE_URL

SFT_DATA=allenai/Dolci-Instruct-SFT                          # O3; 2,152,112 rows
PAIRS_DATA=allenai/Dolci-Instruct-DPO                        # O3; 259,922 pairs
RL_DATA=allenai/Dolci-Instruct-RL                            # O3; 171,950 prompts

clean() {  # O3 section 4.2.1
    clean_rows "$SFT_DATA" "$PAIRS_DATA" "$RL_DATA"
}

sft() {
    local flags=(
        --model "${THINK_SFT:-runs/olmo3_7b_think/sft/model}"  # 7b_instruct_sft.sh:6
        --chat_template recipes/chat_templates/olmo3_instruct.jinja  # docs/olmo3.md of open-instruct
        --data "$(cleaned "$SFT_DATA")"
        --max_length 32768                          # 7b_instruct_sft.sh:15
        --batch_tokens 1048576                      # 7b_instruct_sft.sh:18
        --lr 8e-5                                   # 7b_instruct_sft.sh:7, O3 table 47
        --lr_schedule linear                        # CORE:361
        --warmup_ratio 0.03                         # CORE:362
        --adam_betas 0.9 0.95                       # CORE:355
        --weight_decay 0                            # CORE:354
        --max_grad_norm 1                           # CORE:365
        --epochs 2                                  # 7b_instruct_sft.sh:13
        --activation_checkpointing                  # no number of the recipe: rows of 32,768 tokens need it
        --seed 543210                               # 7b_instruct_sft.sh:9
        --out "$RUNS/sft"
    )
    run sft "${flags[@]}"
    measure sft "$RUNS/sft/model"
}

dpo() {
    local flags=(
        --model "$RUNS/sft/model"
        --data "${PAIRS:-$(cleaned "$PAIRS_DATA")}" # 7b_instruct_dpo.sh:32-41
        --length_normalize                          # O3 table 48
        --beta 5                                    # O3 table 48
        --max_length 16384                          # 7b_instruct_dpo.sh:42
        --batch_size 128                            # 7b_instruct_dpo.sh:20, :44: 32 GPUs x 4; O3 table 48
        --lr 1e-6                                   # 7b_instruct_dpo.sh:4, O3 table 48
        --lr_schedule linear                        # 7b_instruct_dpo.sh:47
        --warmup_ratio 0.1                          # O3 table 48
        --weight_decay 0                            # 7b_instruct_dpo.sh:48
        --epochs 1                                  # O3 table 48
        --max_grad_norm 1                           # "auto" in configs/ds_configs, which is 1
        --activation_checkpointing                  # 7b_instruct_dpo.sh:50
        --out "$RUNS/dpo"
    )
    run dpo "${flags[@]}"
    measure dpo "$RUNS/dpo/model"
}

rl() {
    local flags=(
        --model "$RUNS/dpo/model"
        --data "$(cleaned "$RL_DATA")"
        --max_length 10240                          # 7b_instruct_rl.sh:54: prompt up to 2048, and answer
        --max_new_tokens 8192                       # 7b_instruct_rl.sh:54
        --temperature 1                             # 7b_instruct_rl.sh:59
        --batch_size 64                             # 7b_instruct_rl.sh:44, O3 table 49
        --group_size 8                              # 7b_instruct_rl.sh:43
        --minibatches 4                             # 7b_instruct_rl.sh:45
        --passes 1                                  # 7b_instruct_rl.sh:46
        --lr 1e-6                                   # 7b_instruct_rl.sh:47
        --lr_schedule constant                      # 7b_instruct_rl.sh:64
        --kl_beta 0                                 # 7b_instruct_rl.sh:42
        --clip_low 0.2                              # O3 table 49
        --clip_high 0.272                           # O3 table 49
        --tis_cap 0                                 # O3 table 49: none
        --active_sampling 8                         # 7b_instruct_rl.sh:84; 8 rounds at most is this project's bound
        --solved 0.875                              # 7b_instruct_rl.sh:85
        --stop_strings "</answer>"                  # 7b_instruct_rl.sh:57
        --max_grad_norm 0.1                         # stands for rewards x 10 clipped at 1: docs/grpo.md, "Rewards x 10"
        --adam_eps 1e-9                             # the same
        --steps 450                                 # O3 table 49
        --save_every 50                             # 7b_instruct_rl.sh:68
        --seed 1                                    # 7b_instruct_rl.sh:66
        --out "$RUNS/rl"
    )
    run grpo "${flags[@]}"  # prompts are not filtered before: O3 section 5.4
    measure rl "$RUNS/rl/model"
}

kl() {  # how far from the first of these
    drift "$RUNS/sft/model" "$RUNS/dpo" "$RUNS/rl" --max_length 10240 --max_new_tokens 8192  # as in RL
}

# Pairs of your own. By delta learning: a strong model's answers against a weak one's, without thoughts: rows of PROMPTS
# need {"chat_template_kwargs": {"enable_thinking": false}} for that. Judged: four answers to a prompt, two of them by
# weak models, the best against the worst (by GPT-4.1; here by your judge). --length_gap was for chat and several turns.
# Afterwards: cat both into one file, and PAIRS=FILE bash recipes/olmo3_7b_instruct.sh dpo
STRONG=${STRONG:-Qwen/Qwen3-32B}                             # O3 section 5.3.1
WEAK=${WEAK:-Qwen/Qwen3-0.6B}                                # O3 section 5.3.1

answers() {
    local flags=(
        --model "$STRONG" "$WEAK"
        --data "${PROMPTS:?are the prompts: a data source}"
        --n 1                                       # one pair of a prompt
        --out "$RUNS/answers.jsonl"
    )
    run generate "${flags[@]}"
}

pairs() {
    local flags=(
        --data "$RUNS/answers.jsonl"
        --rule delta                                # O3 section 5.3.1
        --strong "$STRONG"
        --weak "$WEAK"
        --length_gap 100                            # O3 section 5.3.1
        --out "$RUNS/pairs.jsonl"
    )
    run curate pairs "${flags[@]}"
}

candidates() {
    read -ra models <<< "${MODELS:?are four models, two of them weak, in quotes}"
    local flags=(
        --model "${models[@]}"                      # O3 section 5.3.1
        --data "${PROMPTS:?are the prompts: a data source}"
        --n 1                                       # O3 section 5.3.1
        --verifier general-quality                  # asks $JUDGE_MODEL at $JUDGE_URL: docs/rewards.md
        --out "$RUNS/candidates.jsonl"
    )
    run generate "${flags[@]}"
}

judged() {
    local flags=(
        --data "$RUNS/candidates.jsonl"
        --rule best_worst                           # O3 section 5.3.1
        --length_gap 100                            # O3 section 5.3.1
        --out "$RUNS/judged.jsonl"
    )
    run curate pairs "${flags[@]}"
}

go "$@"
