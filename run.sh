#!/usr/bin/env bash
# Intervened Preference Optimization, end to end:
#
#   bash run.sh                 everything on the embedded model, a few minutes on two CPU cores
#   bash run.sh test            the tests
#   bash run.sh figures         after it: continuation safety ratio, mined triggers, every figure of the paper, in the report
#   bash run.sh baselines       SFT, DPO and GRPO beside IPO, about an hour (QUICK=1: 10 minutes; METHODS, LRS, SEEDS)
#
# A second run skips the stages that are finished. Full size, same code path (see README.md):
#
#   MODEL=deepseek-ai/DeepSeek-R1-Distill-Llama-8B PROMPTS=STAR-1.json BENIGN=benign.json EVAL="jbb=harmful:jbb.csv" \
#   JUDGE=https://api.openai.com/v1 JUDGE_MODEL=gpt-4o NPROC=8 RUN=runs/ds8b bash run.sh
set -euo pipefail
cd "$(dirname "$0")"
if [[ " test figures baselines " != *" ${1:-test} "* ]]; then
    echo "usage: [VARIABLE=value ...] bash run.sh [test|figures|baselines]   (variables: see the top of this file)" >&2; exit 2
fi

MODEL=${MODEL:-toy/model}                               # directory or hub name
PROMPTS=${PROMPTS:-toy/prompts/train_harmful.jsonl}     # harmful prompts to learn from
BENIGN=${BENIGN:-toy/prompts/train_benign.jsonl}        # benign prompts for the over-refusal stage
SETS=${SETS:-}                                          # published sets to evaluate on, by name: jbb,strongreject,xstest,math500
EVAL=${EVAL-direct=harmful:toy/prompts/eval_direct.jsonl jailbreak=harmful:toy/prompts/eval_jailbreak.jsonl
    benign=benign:toy/prompts/eval_benign.jsonl addition=task:toy/prompts/eval_sums.jsonl}
if [ -n "$SETS" ] && [[ "$EVAL" == *toy/* ]]; then EVAL=; fi
JUDGE=${JUDGE:-rules}                                   # `rules` (toy world) or a chat endpoint, https://HOST/v1
JUDGE_MODEL=${JUDGE_MODEL:-}                            # the endpoint's model
JUDGE_ARGS=${JUDGE_ARGS:-}                              # more flags for it, such as --max-cost 20 --judge-price-in 2.5
EVAL_JUDGE=${EVAL_JUDGE:-$JUDGE}                        # evaluates; better another one than the judge that built the data
EVAL_JUDGE_MODEL=${EVAL_JUDGE_MODEL:-$JUDGE_MODEL}
if [ "$EVAL_JUDGE" = "$JUDGE" ]; then EVAL_JUDGE_ARGS=${EVAL_JUDGE_ARGS:-$JUDGE_ARGS}; fi
EVAL_ARGS=${EVAL_ARGS:-}                                # more flags for evaluation, such as --allow-code-execution
SERVER=${SERVER:-}                                      # sample the base model from this server, http://HOST:PORT/v1
NPROC=${NPROC:-1}                                       # processes (GPUs) to train on
RUN=${RUN:-runs/toy}                                    # where everything is written
SEED=${SEED:-0}
LIMIT=${LIMIT:-0}                                       # use only the first of PROMPTS; 0 = all
TRIGGERS=${TRIGGERS:-prompts/triggers.txt}               # one a line; or a pool mined by `intervene.py mine-triggers`
SAMPLES=${SAMPLES:-$(grep -cv '^[[:space:]]*\(#\|$\)' "$TRIGGERS")}  # rollouts a harmful prompt: one for each trigger
INTERVENTIONS=${INTERVENTIONS:-1}                       # the paper's N
EPOCHS=${EPOCHS:-1}                                     # of each training stage
if [ "$MODEL" = toy/model ]; then                       # a model of a million parameters learns at another rate
    TOKENS=${TOKENS:-160} BATCH=${BATCH:-128} LR=${LR:-3e-4} LR2=${LR2:-5e-5} TRAIN_ARGS=${TRAIN_ARGS:-}
    CONTINUATIONS=${CONTINUATIONS:-128}                 # of each prefix in `figures`; the paper's 32 are few for a window of ratios
else
    if [ "$JUDGE" = rules ]; then echo "JUDGE=rules knows the toy world only; give the URL of a chat endpoint or local:PATH" >&2; exit 2; fi
    TRAIN_ARGS=${TRAIN_ARGS:---checkpoint-activations}  # more flags for training
    TOKENS=${TOKENS:-8192} BATCH=${BATCH:-16} LR=${LR:-1e-6} LR2=${LR2:-1e-6}
fi
PYTHON=${PYTHON:-python3}

# ---------------------------------------------------------------- environment: the active one if it will do, else .venv
satisfied() { "$1" - <<'EOF' 2>/dev/null
import re, sys
from importlib.metadata import version
from packaging.requirements import Requirement
wanted = [Requirement(r) for r in re.findall(r'^\s+"([^"]+)",', open("pyproject.toml").read(), re.M)]
sys.exit(not all(r.specifier.contains(version(r.name), prereleases=True) for r in wanted))
EOF
}
if satisfied "$PYTHON"; then
    :
elif [ -x .venv/bin/python ] && satisfied .venv/bin/python; then
    PYTHON=.venv/bin/python
else
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 1; }
    echo "installing into .venv (once)"
    "$PYTHON" -m venv .venv
    PYTHON=.venv/bin/python
    "$PYTHON" -m pip install --quiet -c constraints.txt -e '.[figures,test]'
fi
export TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}      # threads that spin while they wait are many times slower on a busy machine

if [ "${1:-}" = test ]; then
    exec "$PYTHON" -m pytest -q "${@:2}"
fi

# ------------------------------------------------------------------------------------------------------------ the stages
started=$SECONDS
sampling=(--max-new-tokens "$TOKENS" --batch-size "$BATCH" --seed "$SEED")
judging=(--judge "$JUDGE" ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"} $JUDGE_ARGS)
server=(${SERVER:+--server "$SERVER"})                  # holds the base model; trained models are sampled here
train=("$PYTHON" ipo.py train $TRAIN_ARGS)
if [ "$NPROC" -gt 1 ]; then train=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" ipo.py train $TRAIN_ARGS); fi

if [ "${1:-}" = baselines ]; then                       # $RUN is only looked at, for IPO with both stages
    if [ "$MODEL" = toy/model ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi  # too small to gain by more
    if [ -n "${QUICK:-}" ]; then SEEDS=${SEEDS:-0} LRS=${LRS:-1e-4 3e-4 1e-3} GRPO_EPOCHS=${GRPO_EPOCHS:-1}; fi
    evaluating=(--judge "$JUDGE" ${EVAL_JUDGE_ARGS:-} --eval-judge "$EVAL_JUDGE" ${EVAL_JUDGE_MODEL:+--eval-judge-model "$EVAL_JUDGE_MODEL"})
    exec "$PYTHON" -m extras.baselines run --model "$MODEL" --prompts "$PROMPTS" --limit "$LIMIT" --benign "$BENIGN" \
        --set $EVAL --triggers "$TRIGGERS" --sampling="--max-new-tokens $TOKENS --batch-size $BATCH" \
        --judging="${judging[*]}" --eval-judging="${evaluating[*]}" --train-args="$TRAIN_ARGS" \
        --main-job "$RUN" --out "${BASELINES:-runs/baselines}" ${METHODS:+--methods $METHODS} \
        ${SEEDS:+--seeds $SEEDS} ${LRS:+--lrs $LRS} ${GRPO_EPOCHS:+--grpo-epochs $GRPO_EPOCHS}
fi
stage() { echo "--- $1 (${SECONDS}s)"; shift; "$@"; }

if [ "${1:-}" = figures ]; then
    if [ ! -f "$RUN/report.html" ]; then echo "no finished run in $RUN: bash run.sh first" >&2; exit 2; fi
    stage "SFT on the chosen sides, for Figure 7" "$PYTHON" ipo.py sft $TRAIN_ARGS --model "$MODEL" --data "$RUN/pairs.jsonl" --lr "$LR" \
        --seed "$SEED" --out "$RUN/sft"
    stage "DPO on whole trajectories, for Figure 7" "${train[@]}" --model "$MODEL" --pairs "$RUN/pairs.jsonl" --score-from prompt --lr "$LR" \
        --seed "$SEED" --out "$RUN/dpo"
    stage "analysis" "$PYTHON" evaluate.py figures --run "$RUN" --model "$MODEL" ${server[@]+"${server[@]}"} "${sampling[@]}" "${judging[@]}" \
        --continuations "${CONTINUATIONS:-32}" --kl "IPO, stage 1=$RUN/stage1" "IPO, both stages=$RUN/stage2" "DPO=$RUN/dpo" "SFT=$RUN/sft"
    echo "finished in $((SECONDS - started)) s"; exit
fi

stage "rollouts of the base model" "$PYTHON" intervene.py rollouts --model "$MODEL" ${server[@]+"${server[@]}"} "${sampling[@]}" \
    --prompts "$PROMPTS" --limit "$LIMIT" --samples "$SAMPLES" --out "$RUN/rollouts.jsonl"
stage "sentences" "$PYTHON" intervene.py steps --traces "$RUN/rollouts.jsonl" --out "$RUN/steps.jsonl"
stage "verdicts and compliance cues" "$PYTHON" intervene.py judge "${judging[@]}" --traces "$RUN/rollouts.jsonl" \
    --steps "$RUN/steps.jsonl" --out "$RUN/verdicts.jsonl"
stage "interventions" "$PYTHON" intervene.py pairs --model "$MODEL" ${server[@]+"${server[@]}"} "${sampling[@]}" "${judging[@]}" \
    --triggers "$TRIGGERS" --max-interventions "$INTERVENTIONS" --traces "$RUN/rollouts.jsonl" \
    --steps "$RUN/steps.jsonl" --verdicts "$RUN/verdicts.jsonl" --out "$RUN/pairs.jsonl"
stage "training, stage 1: safety" "${train[@]}" --model "$MODEL" --pairs "$RUN/pairs.jsonl" --lr "$LR" \
    --epochs "$EPOCHS" --seed "$SEED" --out "$RUN/stage1"
stage "benign rollouts of the base model" "$PYTHON" intervene.py rollouts --model "$MODEL" ${server[@]+"${server[@]}"} \
    "${sampling[@]}" --prompts "$BENIGN" --samples 1 --out "$RUN/benign_base.jsonl"
stage "benign rollouts of stage 1" "$PYTHON" intervene.py rollouts --model "$RUN/stage1" "${sampling[@]}" \
    --prompts "$BENIGN" --samples 1 --out "$RUN/benign_stage1.jsonl"
stage "benign pairs" "$PYTHON" intervene.py benign --model "$RUN/stage1" "${sampling[@]}" "${judging[@]}" \
    --triggers "$TRIGGERS" --base "$RUN/benign_base.jsonl" --traces "$RUN/benign_stage1.jsonl" --out "$RUN/benign_pairs.jsonl"
stage "training, stage 2: against over-refusal" "${train[@]}" --model "$RUN/stage1" \
    --pairs "$RUN/pairs.jsonl" "$RUN/benign_pairs.jsonl" --reference "$MODEL" --lr "$LR2" --epochs "$EPOCHS" --seed "$SEED" --out "$RUN/stage2"
for model in base stage1 stage2; do
    path=$RUN/$model
    if [ $model = base ]; then path=$MODEL; fi
    stage "evaluation of $model" "$PYTHON" evaluate.py run --model "$path" "${sampling[@]}" --judge "$JUDGE" ${EVAL_JUDGE_ARGS:-} \
        --eval-judge "$EVAL_JUDGE" ${EVAL_JUDGE_MODEL:+--eval-judge-model "$EVAL_JUDGE_MODEL"} ${EVAL:+--set $EVAL} ${SETS:+--sets $SETS} $EVAL_ARGS --out "$RUN/eval/$model"
done
echo
"$PYTHON" evaluate.py report --run "$RUN" --out "$RUN/report.html" \
    --evals "base=$RUN/eval/base" "stage 1=$RUN/eval/stage1" "stage 2=$RUN/eval/stage2"
echo "finished in $((SECONDS - started)) s"
