#!/usr/bin/env bash
# Intervened Preference Optimization, end to end. `bash run.sh --help` explains commands and variables.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'HELP'
usage: [VARIABLE=value ...] bash run.sh [command]

  (none)      the whole method on the tiny model, into runs/toy; a second run skips what is finished
  stages      print the command of every stage, to run them one by one
  test        the tests (further words go to pytest)
  figures     after a run: the safety dynamics behind the method, into the same report
  baselines   SFT, DPO, GRPO and IPO at five learning rates each, up to an hour
              (QUICK=1: less of all, 12 minutes), into the same report

variable            default                            what it is
MODEL               toy/model                          model directory or hub name
PROMPTS             toy/prompts/train_harmful.jsonl    harmful prompts to learn from
BENIGN              toy/prompts/train_benign.jsonl     benign prompts against over-refusal
EVAL                seven sets of the toy world        sets to evaluate on, NAME=KIND:FILE ...
                                                       (KIND: harmful, benign or task)
SETS                                                   published sets, as in jbb,xstest,math500, which
                                                       `python -m benchmarks.fetch` has fetched
TRIGGERS            prompts/triggers.txt               pool of safety triggers, one a line
SAMPLES             one for each trigger               rollouts of a harmful prompt
INTERVENTIONS       1                                  rounds of intervention (the paper's N)
LIMIT               0                                  use only the first of PROMPTS; 0 = all
JUDGE               rules                              rules (toy world), local:PATH (a chat model in
                                                       this process) or https://HOST/v1
JUDGE_MODEL                                            the endpoint's model
JUDGE_ARGS                                             more flags, as in --max-cost 20 --judge-price-in 2.5
EVAL_JUDGE          JUDGE                              judge of the evaluation; its key is in
EVAL_JUDGE_MODEL    JUDGE_MODEL                        EVAL_JUDGE_API_KEY
EVAL_JUDGE_ARGS     JUDGE_ARGS, if the same judge
EVAL_ARGS                                              more flags for evaluation
SERVER                                                 sample the base model here, http://HOST:PORT/v1
NPROC               1                                  processes (GPUs) to train on
TOKENS              320; 8192 with your model          longest completion
BATCH               128; 16                            rows sampled together
LR                  9e-5; 1e-6                         learning rate of stage 1
LR2                 LR                                 learning rate of stage 2
EPOCHS              1                                  passes over the pairs in each stage
TRAIN_ARGS          --checkpoint-activations           more flags for training (toy: none)
SEED                0                                  of every random choice
RUN                 runs/toy                           where everything is written
ACCEPT_CODE_CHANGE                                     1: keep what was made before the code was
                                                       edited; the configs record it
PYTHON              python3                            where it lacks a package, .venv is made and used
CONTINUATIONS       32                                 figures: continuations of each prefix
VALID               three sets of the toy world        baselines: sets to choose learning rates by,
                                                       NAME=KIND:FILE ... as in EVAL
METHODS, LRS, SEEDS, GRPO_EPOCHS, WORKERS              baselines: see python -m studies.baselines run --help
                                                       (LR, LR2, SEED, INTERVENTIONS, SERVER, NPROC
                                                       and EVAL_ARGS have no effect on these)
QUICK                                                  1: one seed, three rates, 60 prompts a set and
                                                       one epoch of GRPO
BASELINES           runs/baselines                     baselines: where they are written

Full size, the same code path (docs/full-size.md):

  MODEL=deepseek-ai/DeepSeek-R1-Distill-Llama-8B PROMPTS=data-sets/star1.jsonl \
  BENIGN=data-sets/star-benign-915.jsonl SETS=jbb,strongreject,xstest NPROC=8 \
  JUDGE=https://api.openai.com/v1 JUDGE_MODEL=gpt-4o RUN=runs/ds8b bash run.sh
HELP
}

command=${1:-all}
case $command in
    all|stages|test|figures|baselines) ;;
    -h|--help|help) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac

# ------------------------------------------------------------------------------------ settings
MODEL=${MODEL:-toy/model}
PROMPTS=${PROMPTS:-toy/prompts/train_harmful.jsonl}
BENIGN=${BENIGN:-toy/prompts/train_benign.jsonl}
SETS=${SETS:-}
toy_sets=
for name in direct=harmful jailbreak=harmful unseen=harmful everyday=benign remedies=benign \
    antidotes=benign sums=task; do
    toy_sets+=" $name:toy/prompts/eval_${name%=*}.jsonl"
done
if [ -n "$SETS" ]; then toy_sets=; fi
EVAL=${EVAL-$toy_sets}  # EVAL= is no set of files at all
TRIGGERS=${TRIGGERS:-prompts/triggers.txt}
SAMPLES=${SAMPLES:-$(grep -cv '^[[:space:]]*\(#\|$\)' "$TRIGGERS")}
INTERVENTIONS=${INTERVENTIONS:-1}
LIMIT=${LIMIT:-0}
JUDGE=${JUDGE:-rules}
JUDGE_MODEL=${JUDGE_MODEL:-}
JUDGE_ARGS=${JUDGE_ARGS:-}
EVAL_JUDGE=${EVAL_JUDGE:-$JUDGE}
EVAL_JUDGE_MODEL=${EVAL_JUDGE_MODEL:-$JUDGE_MODEL}
if [ "$EVAL_JUDGE" = "$JUDGE" ]; then EVAL_JUDGE_ARGS=${EVAL_JUDGE_ARGS:-$JUDGE_ARGS}; fi
EVAL_JUDGE_ARGS=${EVAL_JUDGE_ARGS:-}
EVAL_ARGS=${EVAL_ARGS:-}
SERVER=${SERVER:-}
NPROC=${NPROC:-1}
EPOCHS=${EPOCHS:-1}
CONTINUATIONS=${CONTINUATIONS:-32}
SEED=${SEED:-0}
RUN=${RUN:-runs/toy}
PYTHON=${PYTHON:-python3}
accept=${ACCEPT_CODE_CHANGE:+--accept-code-change}
if [ "$MODEL" = toy/model ]; then  # a model of a million parameters learns at other rates
    TOKENS=${TOKENS:-320} BATCH=${BATCH:-128} LR=${LR:-9e-5}
    TRAIN_ARGS=${TRAIN_ARGS:-}
    separate=
else
    if [ "$JUDGE" = rules ]; then
        echo "error: JUDGE=rules knows the toy world only; give the URL of a chat endpoint or local:PATH" >&2
        exit 2
    fi
    TOKENS=${TOKENS:-8192} BATCH=${BATCH:-16} LR=${LR:-1e-6}
    TRAIN_ARGS=${TRAIN_ARGS:---checkpoint-activations}
    separate=--separate
fi
LR2=${LR2:-$LR}

# ---------------------------------------- environment: the active one if it will do, else .venv
satisfied() {
    "$1" - <<'CHECK' 2>/dev/null
import re, sys
from importlib.metadata import version
from packaging.requirements import Requirement
listed = re.findall(r'^\s+"([^"]+)",', open("pyproject.toml").read(), re.M)
for requirement in map(Requirement, listed):
    if not requirement.specifier.contains(version(requirement.name), prereleases=True):
        sys.exit(1)
CHECK
}
environment=
for candidate in "$PYTHON" .venv/bin/python; do
    if satisfied "$candidate"; then environment=$candidate; break; fi
done
if [ -z "$environment" ]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: Python 3.10 or newer is needed" >&2
        exit 2
    fi
    echo "installing into .venv (once)"
    "$PYTHON" -m venv .venv
    environment=.venv/bin/python
    "$environment" -m pip install --quiet -c constraints.txt -e '.[figures,test]'
fi
PYTHON=$environment
export TOKENIZERS_PARALLELISM=false
# Threads that spin while they wait are many times slower on a busy machine.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# ---------------------------------------------------------------------------------- the stages
sampling=(--max-new-tokens "$TOKENS" --batch-size "$BATCH" --seed "$SEED")
base=(--model "$MODEL" ${SERVER:+--server "$SERVER"})  # a server holds the base model only
judging=(--judge "$JUDGE" ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"} $JUDGE_ARGS)
eval_judging=(--judge "$JUDGE" $EVAL_JUDGE_ARGS --eval-judge "$EVAL_JUDGE"
    ${EVAL_JUDGE_MODEL:+--eval-judge-model "$EVAL_JUDGE_MODEL"})
intervene=("$PYTHON" intervene.py)
train=("$PYTHON")
if [ "$NPROC" -gt 1 ]; then
    train+=(-m torch.distributed.run --standalone --nproc-per-node "$NPROC")
fi
train+=(ipo.py train $TRAIN_ARGS --epochs "$EPOCHS" --seed "$SEED")
evaluate=("$PYTHON" evaluate.py run)
if [ -n "$SETS" ]; then evaluate=("$PYTHON" -m benchmarks.run --sets "$SETS"); fi

stages=()
stage() {  # a title, then a command; kept as one line, "TITLE: COMMAND"
    local title=$1
    shift
    stages+=("$title:$(printf ' %q' "$@" $accept)")
}

stage "rollouts of the base model" "${intervene[@]}" rollouts "${base[@]}" "${sampling[@]}" \
    --samples "$SAMPLES" --prompts "$PROMPTS" --limit "$LIMIT" --out "$RUN/rollouts.jsonl"
stage "sentences" "${intervene[@]}" steps --traces "$RUN/rollouts.jsonl" --out "$RUN/steps.jsonl"
stage "verdicts and compliance cues" "${intervene[@]}" judge "${judging[@]}" \
    --traces "$RUN/rollouts.jsonl" --steps "$RUN/steps.jsonl" --out "$RUN/verdicts.jsonl"
stage "interventions" "${intervene[@]}" pairs "${base[@]}" "${sampling[@]}" "${judging[@]}" \
    --triggers "$TRIGGERS" --max-interventions "$INTERVENTIONS" --traces "$RUN/rollouts.jsonl" \
    --steps "$RUN/steps.jsonl" --verdicts "$RUN/verdicts.jsonl" --out "$RUN/pairs.jsonl"
stage "training, stage 1 (safety)" "${train[@]}" --model "$MODEL" --pairs "$RUN/pairs.jsonl" \
    --lr "$LR" --out "$RUN/stage1"
stage "benign rollouts of the base model" "${intervene[@]}" rollouts "${base[@]}" \
    "${sampling[@]}" --samples 1 --prompts "$BENIGN" --out "$RUN/benign_base.jsonl"
stage "benign rollouts of stage 1" "${intervene[@]}" rollouts --model "$RUN/stage1" \
    "${sampling[@]}" --samples 1 --prompts "$BENIGN" --out "$RUN/benign_stage1.jsonl"
stage "benign pairs" "${intervene[@]}" benign --model "$RUN/stage1" "${sampling[@]}" \
    "${judging[@]}" --triggers "$TRIGGERS" --base "$RUN/benign_base.jsonl" \
    --traces "$RUN/benign_stage1.jsonl" --out "$RUN/benign_pairs.jsonl"
stage "training, stage 2 (against over-refusal)" "${train[@]}" --model "$RUN/stage1" \
    --reference "$MODEL" --pairs "$RUN/pairs.jsonl" "$RUN/benign_pairs.jsonl" --lr "$LR2" \
    --out "$RUN/stage2"
for name in base stage1 stage2; do
    model=$RUN/$name
    if [ $name = base ]; then model=$MODEL; fi
    stage "evaluation of $name" "${evaluate[@]}" --model "$model" "${sampling[@]}" \
        "${eval_judging[@]}" ${EVAL:+--set $EVAL} $EVAL_ARGS --out "$RUN/eval/$name"
done
accept= stage "report" "$PYTHON" evaluate.py report --run "$RUN" --out "$RUN/report.html" \
    --evals base="$RUN/eval/base" "stage 1=$RUN/eval/stage1" "stage 2=$RUN/eval/stage2"

# ------------------------------------------------------------------------------------ commands
case $command in
    all) exec "$PYTHON" -m launch.run --run "$RUN" $separate "${stages[@]}" ;;
    stages) printf '# %s\n' "${stages[@]}" | sed 's/: /\n/' ;;
    test) exec "$PYTHON" -m pytest -q "${@:2}" ;;
    figures)
        if [ ! -f "$RUN/report.html" ]; then
            echo "error: no finished run in $RUN: bash run.sh first" >&2
            exit 2
        fi
        stages=()  # for Figure 7 two other ways of training on the same pairs
        stage "SFT on the chosen sides" "$PYTHON" -m studies.sft $TRAIN_ARGS --model "$MODEL" \
            --data "$RUN/pairs.jsonl" --lr "$LR" --epochs "$EPOCHS" --seed "$SEED" --out "$RUN/sft"
        stage "DPO on whole trajectories" "${train[@]}" --model "$MODEL" \
            --pairs "$RUN/pairs.jsonl" --score-from prompt --lr "$LR" --out "$RUN/dpo"
        stage "analysis" "$PYTHON" -m studies.figures --run "$RUN" "${base[@]}" "${sampling[@]}" \
            "${judging[@]}" --continuations "$CONTINUATIONS" --kl "IPO, stage 1=$RUN/stage1" \
            "IPO, both stages=$RUN/stage2" "DPO=$RUN/dpo" "SFT=$RUN/sft"
        exec "$PYTHON" -m launch.run --run "$RUN" $separate "${stages[@]}" ;;
    baselines)
        if [ "$MODEL" = toy/model ]; then
            VALID=${VALID:-valid_harmful=harmful:toy/prompts/valid_harmful.jsonl
                valid_benign=benign:toy/prompts/valid_benign.jsonl
                valid_sums=task:toy/prompts/valid_sums.jsonl}
        elif [ -z "${VALID:-}" ] || [ -z "${LRS:-}" ]; then
            echo "error: the defaults of baselines suit the tiny model; give VALID=\"NAME=KIND:FILE ...\", sets to choose rates by, and LRS=\"RATE ...\"" >&2
            exit 2
        fi
        if [ -z "$EVAL" ]; then
            echo "error: baselines evaluate on files; give EVAL=\"NAME=KIND:FILE ...\" instead of SETS" >&2
            exit 2
        fi
        if [ -n "${QUICK:-}" ]; then
            SEEDS=${SEEDS:-0} LRS=${LRS:-6e-5 9e-5 1.3e-4} GRPO_EPOCHS=${GRPO_EPOCHS:-1} limit_sets=60
        fi
        folder=${BASELINES:-runs/baselines}
        stages=()
        stage "training and evaluation" "$PYTHON" -m studies.baselines run --model "$MODEL" \
            --prompts "$PROMPTS" --limit "$LIMIT" --benign "$BENIGN" --triggers "$TRIGGERS" \
            --samples "$SAMPLES" \
            --sampling="--max-new-tokens $TOKENS --batch-size $BATCH" \
            --judging="${judging[*]}" --eval-judging="${eval_judging[*]}" \
            --train-args="$TRAIN_ARGS --epochs $EPOCHS" --valid $VALID --set $EVAL --out "$folder" \
            ${METHODS:+--methods $METHODS} ${SEEDS:+--seeds $SEEDS} ${LRS:+--lrs $LRS} \
            ${GRPO_EPOCHS:+--grpo-epochs $GRPO_EPOCHS} ${WORKERS:+--workers $WORKERS} \
            ${limit_sets:+--limit-sets $limit_sets}
        accept= stage "table and figure" "$PYTHON" -m studies.frontier --run "$RUN" \
            --results "$folder/results.jsonl"
        exec "$PYTHON" -m launch.run $separate "${stages[@]}" ;;
esac
