#!/usr/bin/env bash
# Tülu 3 8B: supervised fine-tuning, DPO, reward model, PPO with verifiable rewards.
#
#     BENCH=benchmarks bash recipes/tulu3_8b.sh             all stages; what is finished is not done again
#     BENCH=benchmarks bash recipes/tulu3_8b.sh sft dpo     these
#
# Sources: T3 is arXiv 2411.15124; OI is allenai/open-instruct at e6c3044, tulu3.md its docs/tulu3.md; OI-old the same
# repository at 3dd7a07, as Tülu 3 was released.

STAGES=(clean sft dpo reward_model rlvr)
OPTIONAL=(kl candidates pairs)
PRESET=tulu3
RULE=tulu3
source "$(dirname "$0")/run.sh"

SFT_DATA=allenai/tulu-3-sft-mixture                         # tulu3.md:49; 939,344 rows
PAIRS_DATA=allenai/llama-3.1-tulu-3-8b-preference-mixture    # tulu3.md:155; 271,409 pairs
RL_DATA=allenai/RLVR-GSM-MATH-IF-Mixed-Constraints           # tulu3.md:315; 29,946 prompts

clean() {  # T3 section 3.2
    clean_rows "$SFT_DATA" "$PAIRS_DATA" "$RL_DATA"
}

sft() {
    local flags=(
        --model "${BASE:-meta-llama/Llama-3.1-8B}"  # tulu3.md:32
        --chat_template tulu                        # T3 section 4.3
        --data "$(cleaned "$SFT_DATA")"             # all of it
        --max_length 4096                           # tulu3.md:35, T3 table 11
        --batch_size 128                            # tulu3.md:37-38, on 64 GPUs; T3 table 11
        --lr 5e-6                                   # tulu3.md:39, T3 table 11
        --lr_schedule linear                        # tulu3.md:40
        --warmup_ratio 0.03                         # tulu3.md:41
        --weight_decay 0                            # tulu3.md:42
        --epochs 2                                  # tulu3.md:43
        --max_grad_norm 0.1                         # stands for the summed loss (T3 section 4.3.2) clipped at 1
        --adam_eps 1e-9                             # the same: docs/sft.md, "A summed loss"
        --seed 123                                  # tulu3.md:53; the best single run of T3 table 14
        --out "$RUNS/sft"
    )
    run sft "${flags[@]}"
    measure sft "$RUNS/sft/model"
}

dpo() {
    local flags=(
        --model "$RUNS/sft/model"
        --data "${PAIRS:-$(cleaned "$PAIRS_DATA")}"
        --length_normalize                          # tulu3.md:158, dpo_norm
        --beta 5                                    # tulu3.md:159, T3 table 18
        --max_length 2048                           # tulu3.md:140
        --batch_size 128                            # tulu3.md:142-143, T3 table 18
        --lr 5e-7                                   # tulu3.md:144
        --lr_schedule linear                        # tulu3.md:145
        --warmup_ratio 0.1                          # tulu3.md:146
        --weight_decay 0                            # tulu3.md:147
        --epochs 1                                  # tulu3.md:148
        --max_grad_norm 1                           # OI-old, configs/ds_configs: "auto", which is 1
        --out "$RUNS/dpo"
    )
    run dpo "${flags[@]}"
    measure dpo "$RUNS/dpo/model"
}

reward_model() {
    local flags=(
        --model "$RUNS/sft/model"
        --data "${PAIRS:-$(cleaned "$PAIRS_DATA")}" # tulu3.md:286
        --eval_data "${RM_EVAL:-allenai/ultrafeedback_binarized_cleaned@test_prefs}"  # tulu3.md:288-289
        --max_length 2048                           # tulu3.md:296
        --batch_size 256                            # tulu3.md:293-295, T3 table 36
        --lr 3e-6                                   # tulu3.md:292
        --lr_schedule linear                        # T3 table 36
        --warmup_ratio 0                            # T3 table 36
        --epochs 1                                  # tulu3.md:298
        --adam_eps 1e-5                             # OI-old reward_modeling.py:86
        --weight_decay 0.01                         # PyTorch's default (OI-old reward_modeling.py:308); here: matrices
        --max_grad_norm 1                           # OI-old, as above
        --out "$RUNS/reward_model"
    )
    run reward_model "${flags[@]}"
}

rlvr() {
    local flags=(
        --model "$RUNS/dpo/model"
        --value_model "$RUNS/reward_model/model"    # T3 section 6
        --data "$(cleaned "$RL_DATA")"
        --max_length 4096                           # tulu3.md:320-321: prompt and answer up to 2048 each
        --max_new_tokens 2048                       # tulu3.md:321
        --temperature 1                             # tulu3.md:326
        --batch_size 224                            # tulu3.md:334, :336: 7 x 32; T3 table 21
        --group_size 1                              # T3 table 21
        --passes 4                                  # T3 table 21
        --minibatches 1                             # T3 table 21
        --lr 3e-7                                   # tulu3.md:328, T3 table 21
        --value_lr 3e-7                             # T3 table 21
        --lr_schedule linear                        # T3 table 21
        --warmup_ratio 0                            # T3 table 21
        --kl_beta 0.05                              # tulu3.md:338
        --gamma 1                                   # T3 table 21
        --gae_lambda 0.95                           # T3 table 21
        --clip_low 0.2                              # T3 table 21
        --clip_high 0.2                             # T3 table 21
        --value_clip 0.2                            # T3 table 21
        --value_coef 0.1                            # T3 table 21
        --reward_scale 10                           # T3 section 6
        --no_eos_score -10                          # tulu3.md:330
        --tis_cap 0                                 # there was none
        --weight_decay 0.01                         # PyTorch's default; here: matrices only
        --max_grad_norm 1                           # T3 table 21
        --epochs 334                                # tulu3.md:329: a schedule of 10,000,000 completions
        --stop_step 447                             # T3 table 21: 100,000 of them were sampled
        --save_every 100                            # tulu3.md:343
        --keep 0                                    # an early checkpoint was released: choose on development data
        --seed 3                                    # tulu3.md:341
        --out "$RUNS/rlvr"
    )
    run ppo_rlvr "${flags[@]}"
    measure rlvr "$RUNS/rlvr/checkpoints/step_${RLVR_STEP:-447}/model"
}

kl() {  # how far from the first of these
    drift "$RUNS/sft/model" "$RUNS/dpo" "$RUNS/rlvr"
}

# Pairs of your own, as T3 section 5.2 made them: four answers to a prompt, one of them the SFT model's, are rated, and
# the best stands against a random lower one. Afterwards: PAIRS=runs/tulu3_8b/pairs.jsonl bash recipes/tulu3_8b.sh dpo
# T3 drew the other three from 22 models, and GPT-4o rated four aspects of each; here one mark of your judge.
candidates() {
    read -ra others <<< "${OTHERS:?are three other models, in quotes}"
    local flags=(
        --model "$RUNS/sft/model" "${others[@]}"    # T3 section 5.2
        --data "${PROMPTS:?are the prompts: a data source}"
        --n 1                                       # T3 section 5.2
        --verifier general-quality                  # asks $JUDGE_MODEL at $JUDGE_URL: docs/rewards.md
        --out "$RUNS/candidates.jsonl"
    )
    run generate "${flags[@]}"
}

pairs() {
    local flags=(
        --data "$RUNS/candidates.jsonl"
        --rule tulu                                 # T3 section 5.2
        --out "$RUNS/pairs.jsonl"
    )
    run curate pairs "${flags[@]}"
}

go "$@"
