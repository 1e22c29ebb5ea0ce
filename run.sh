#!/usr/bin/env bash
# Intervened Preference Optimization, end to end. `bash run.sh --help` explains commands and variables.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'HELP'
usage: [VARIABLE=value ...] bash run.sh [command]

  (none)      the whole method on the tiny model, into runs/toy; a second run skips what is finished
  check       look at everything that the run needs, and start nothing
  plan        what the run will take, stage by stage: GPUs, tokens, hours, memory, judge calls, dollars
              (plan --measure: first measure this machine's speed, in about a minute)
  stages      print the command of every stage, to run them one by one
  test        the tests (further words go to pytest)
  figures     after a run: the safety dynamics behind the method, into the same report
  leaderboard every method of studies/methods at several learning rates, up to two hours
              (QUICK=1: a part of it, 12 minutes), into the same report

variable            default                            what it is

DOMAIN              safety                             what is learned: a file of domains/, which gives
                                                       the defaults below that name files of toy/
                                                       (arithmetic: sums in columns, into runs/arithmetic)
MODEL               toy/model                          model directory or hub name
PROMPTS             toy/prompts/train_harmful.jsonl    harmful prompts to learn from
BENIGN              toy/prompts/train_benign.jsonl     benign prompts against over-refusal; empty:
                                                       no stage 2
EVAL                seven sets of the toy world        sets to evaluate on, NAME=KIND:FILE ...
                                                       (KIND: harmful, benign or task)
SETS                                                   published sets, as in jbb,xstest,math500, which
                                                       `python -m benchmarks.fetch` has fetched
TRIGGERS            prompts/triggers.txt               pool of safety triggers, one a line
LIMIT               0                                  use only the first so many of each file; 0 = all
RUN                 runs/toy                           where everything is written

SAMPLES             one for each trigger               rollouts of a harmful prompt
INTERVENTIONS       1                                  rounds of intervention (the paper's N)
TOKENS              320; 8192 with your model          longest completion
LR                  9e-5; 1e-6 (with LORA 1e-4)        learning rate of stage 1
LR2                 LR                                 learning rate of stage 2
EPOCHS              1                                  passes over the pairs in each stage
LORA                0                                  train adapters of this rank; 0: all weights
TRAIN_ARGS          --checkpoint-activations           more flags for training (toy: none)
SEED                0                                  of every random choice

JUDGE               rules                              rules (toy world), https://HOST/v1, serve:MODEL
                                                       (started here) or local:PATH (in this process),
                                                       chat or guard model: docs/judges.md;
                                                       python:MODULE, a class of your own
JUDGE_MODEL                                            the endpoint's model
CUE_JUDGE           JUDGE                              judge that finds the cues: URL or local:PATH
CUE_JUDGE_MODEL                                        its model
JUDGE_ARGS                                             more flags, as in --max-cost 20 --judge-price-in 2.5
EVAL_JUDGE          JUDGE                              judge of the evaluation; its key is in
EVAL_JUDGE_MODEL    JUDGE_MODEL                        EVAL_JUDGE_API_KEY
EVAL_JUDGE_ARGS     JUDGE_ARGS, if the same judge
EVAL_ARGS                                              more flags for evaluation

NPROC               1                                  processes (GPUs) to sample and train on
LAUNCH              torchrun on this machine           what starts them, as in srun torchrun ...
BATCH               128; auto                          rows sampled together in one process
ENGINE                                                 sample from a server that is started for each
                                                       model: vllm, sglang, or a command with {model},
                                                       {port} and, if one serves all GPUs, {gpus}
SERVER                                                 sample the base model from one that is there:
                                                       http://HOST:PORT/v1, or several with commas
EVAL_SERVER                                            and the evaluated ones; {name} in it becomes
                                                       base, stage1 or stage2
IN_FLIGHT           64                                 requests in flight at each server
JUDGE_ENGINE        ENGINE or vllm                     what starts JUDGE=serve:MODEL
JUDGE_GPUS          1                                  how many GPUs it gets, the last ones
PORT                8700                               first port of the servers that are started
ENGINE_WAIT         1800                               seconds that one may take to start
PLAN_GPU, PLAN_GPUS this machine's                     plan: another GPU, as in H100, and how many

ACCEPT_CODE_CHANGE                                     1: keep what was made before the code was
                                                       edited; the configs record it
PYTHON              python3                            where it lacks a package, .venv is made and used
CONTINUATIONS       32                                 figures: continuations of each prefix
VALID               three sets of the toy world        leaderboard: sets to choose learning rates by,
                                                       NAME=KIND:FILE ... as in EVAL
METHODS, LRS, SEEDS, GRPO_EPOCHS, WORKERS              leaderboard: see python -m studies.leaderboard --help
                                                       (LR, LR2, SEED, INTERVENTIONS, SETS, SERVER,
                                                       EVAL_SERVER, EVAL_ARGS have no effect on it)
AGAIN                                                  leaderboard: methods whose models are made again
INSTRUCTION         prompts/instruction.txt            leaderboard: asks to think of safety first
TEACHER             toy/prompts/train_teacher.jsonl    leaderboard: safe traces of another model
LIMIT_SETS          60                                 leaderboard: prompts of each set, picked by the
                                                       hash of their ids; 0 = all (as with your model)
QUICK                                                  1: one seed and, without LRS, one rate: to go on from
LEADERBOARD         runs/leaderboard                   leaderboard: where it is written (other domains:
                                                       RUN-leaderboard)
ALSO                                                   1: bash run.sh makes the leaderboard as well
                                                       (default of DOMAIN=arithmetic)

Keys are read from the environment and written nowhere: JUDGE_API_KEY (or OPENAI_API_KEY), CUE_JUDGE_API_KEY,
EVAL_JUDGE_API_KEY, SERVER_API_KEY. IPO_DATA is the folder of published sets (data-sets).

Full size, the same code path (docs/full-size.md), without any API:

  MODEL=deepseek-ai/DeepSeek-R1-Distill-Llama-8B PROMPTS=data-sets/star1.jsonl \
  BENIGN=data-sets/star-benign-915.jsonl SETS=jbb,strongreject,xstest NPROC=8 ENGINE=vllm \
  JUDGE=serve:Qwen/Qwen3Guard-Gen-4B RUN=runs/ds8b bash run.sh
HELP
}

command=${1:-all}
case $command in
    all|check|plan|stages|test|figures|leaderboard) ;;
    -h|--help|help) usage; exit ;;
    *) usage >&2; echo "error: $command: no such command" >&2; exit 2 ;;
esac
if [ $# -gt 1 ] && [ "$command" != test ] && [ "$*" != "plan --measure" ]; then
    echo "error: ${*:2}: $command takes no such word" >&2
    exit 2
fi

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
PYTHON=${PYTHON:-python3}
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
    "$environment" -m pip install --quiet -c constraints.txt -e '.[figures,test,parallel]'
fi
PYTHON=$environment
export TOKENIZERS_PARALLELISM=false
# Threads that spin while they wait are many times slower on a busy machine.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# ------------------------------------------------------------------------------------ settings
DOMAIN=${DOMAIN:-safety}
SETS=${SETS:-}
if [ -n "$SETS" ]; then export EVAL=${EVAL-}; fi  # EVAL= is no set of files at all
defaults=$("$PYTHON" -m domains "$DOMAIN") || exit 2
eval "$defaults"  # of what is not given
BENIGN=${BENIGN:-}
if [ -z "${SAMPLES:-}" ]; then  # 1 where there is no such file, which the first check says
    SAMPLES=$(grep -cv '^[[:space:]]*\(#\|$\)' "$TRIGGERS" 2>/dev/null) || SAMPLES=1
fi
INTERVENTIONS=${INTERVENTIONS:-1}
LIMIT=${LIMIT:-0}
EPOCHS=${EPOCHS:-1}
LORA=${LORA:-0}
SEED=${SEED:-0}
CONTINUATIONS=${CONTINUATIONS:-32}
LEADERBOARD=${LEADERBOARD:-$RUN-leaderboard}  # not inside: the report counts what is there
accept=${ACCEPT_CODE_CHANGE:+--accept-code-change}
if [ "$MODEL" = toy/model ]; then
    separate=
else
    TOKENS=${TOKENS:-8192} BATCH=${BATCH:-auto}
    if [ "$LORA" = 0 ]; then LR=${LR:-1e-6}; else LR=${LR:-1e-4}; fi
    TRAIN_ARGS=${TRAIN_ARGS:---checkpoint-activations}
    separate=--separate
fi
LR2=${LR2:-$LR}
if [ "$LORA" != 0 ]; then TRAIN_ARGS+=" --lora-rank $LORA"; fi

# ---------------------------------------------------------------------------- judges and machine
JUDGE_MODEL=${JUDGE_MODEL:-}
JUDGE_ARGS=${JUDGE_ARGS:-}
CUE_JUDGE=${CUE_JUDGE:-}
CUE_JUDGE_MODEL=${CUE_JUDGE_MODEL:-}
EVAL_JUDGE=${EVAL_JUDGE:-$JUDGE}
EVAL_JUDGE_MODEL=${EVAL_JUDGE_MODEL:-}
EVAL_JUDGE_ARGS=${EVAL_JUDGE_ARGS:-}
if [ "$EVAL_JUDGE" = "$JUDGE" ]; then
    EVAL_JUDGE_MODEL=${EVAL_JUDGE_MODEL:-$JUDGE_MODEL} EVAL_JUDGE_ARGS=${EVAL_JUDGE_ARGS:-$JUDGE_ARGS}
fi
EVAL_ARGS=${EVAL_ARGS:-}
NPROC=${NPROC:-1}
LAUNCH=${LAUNCH:-}
ENGINE=${ENGINE:-}
SERVER=${SERVER:-}
EVAL_SERVER=${EVAL_SERVER:-}
IN_FLIGHT=${IN_FLIGHT:-64}
JUDGE_ENGINE=${JUDGE_ENGINE:-${ENGINE:-vllm}}
JUDGE_GPUS=${JUDGE_GPUS:-1}
PORT=${PORT:-8700}
runner=(-m launch.run $separate --port "$PORT" ${ENGINE:+--engine "$ENGINE"}
    ${ENGINE_WAIT:+--engine-wait "$ENGINE_WAIT"} ${PLAN_GPU:+--gpu "$PLAN_GPU"} ${PLAN_GPUS:+--gpus "$PLAN_GPUS"})
served=  # the model of a judge that is started here
for judge in "$JUDGE" "$EVAL_JUDGE"; do
    model=${judge#serve:}
    if [ "$model" = "$judge" ] || [ "$model" = "$served" ]; then continue; fi
    if [ -n "$served" ]; then
        echo "error: JUDGE and EVAL_JUDGE are two served models; start one yourself and give its URL" >&2
        exit 2
    fi
    served=$model
done
if [ -n "$served" ]; then
    at_once="--judge-concurrency 32"  # more than an API would take
    runner+=(--judge-engine "$JUDGE_ENGINE" --judge-gpus "$JUDGE_GPUS")
    if [ "$JUDGE" = "serve:$served" ]; then
        JUDGE={judge} JUDGE_MODEL=$served JUDGE_ARGS="$at_once $JUDGE_ARGS"
    fi
    if [ "$EVAL_JUDGE" = "serve:$served" ]; then
        EVAL_JUDGE={judge} EVAL_JUDGE_MODEL=$served EVAL_JUDGE_ARGS="$at_once $EVAL_JUDGE_ARGS"
    fi
fi

# ---------------------------------------------------------------------------------- the stages
launch=("$PYTHON")  # what starts a program on all GPUs
if [ -n "$LAUNCH" ]; then
    launch=($LAUNCH)
elif [ "$NPROC" != 1 ]; then
    launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC")
fi
sampling=(--max-new-tokens "$TOKENS" --batch-size "$BATCH" --seed "$SEED")
judging=(--judge "$JUDGE" ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"}
    ${CUE_JUDGE:+--cue-judge "$CUE_JUDGE"}
    ${CUE_JUDGE_MODEL:+--cue-judge-model "$CUE_JUDGE_MODEL"} $JUDGE_ARGS)
eval_judging=(--judge "$JUDGE" $EVAL_JUDGE_ARGS --eval-judge "$EVAL_JUDGE"
    ${EVAL_JUDGE_MODEL:+--eval-judge-model "$EVAL_JUDGE_MODEL"})
train=("${launch[@]}" ipo.py train $TRAIN_ARGS --epochs "$EPOCHS" --seed "$SEED")
evaluate=(evaluate.py run)
if [ -n "$SETS" ]; then evaluate=(-m benchmarks.run --sets "$SETS"); fi

sample_from() {  # MODEL [SERVER]: sets `start` and `sampler`, the words of a stage that samples it
    local server=${2:-}
    if [ -n "$ENGINE" ]; then server={engine}; fi
    start=("${launch[@]}")
    if [ -n "$server" ]; then start=("$PYTHON"); fi
    sampler=(--model "$1" ${server:+--server "$server" --in-flight "$IN_FLIGHT"} "${sampling[@]}")
}

stages=()
stage() {  # a title, then a command; kept as one line, "TITLE: COMMAND"
    local title=$1
    shift
    stages+=("$title:$(printf ' %q' "$@" $accept)")
}

evaluation() {  # MODEL NAME
    sample_from "$1" "${EVAL_SERVER//\{name\}/$2}"
    stage "evaluation of $2" "${start[@]}" "${evaluate[@]}" "${sampler[@]}" "${eval_judging[@]}" \
        --limit "$LIMIT" ${EVAL:+--set $EVAL} $EVAL_ARGS --out "$RUN/eval/$2"
}

# All that samples one model comes together, so that a server holds each of the three models once.
sample_from "$MODEL" "$SERVER"
stage "rollouts of the base model" "${start[@]}" intervene.py rollouts "${sampler[@]}" \
    --samples "$SAMPLES" --prompts "$PROMPTS" --limit "$LIMIT" --out "$RUN/rollouts.jsonl"
stage "sentences" "$PYTHON" intervene.py steps --traces "$RUN/rollouts.jsonl" --out "$RUN/steps.jsonl"
judge_start=("$PYTHON")
if [ "${JUDGE#local:}" != "$JUDGE" ]; then judge_start=("${launch[@]}"); fi
stage "verdicts and compliance cues" "${judge_start[@]}" intervene.py judge "${judging[@]}" \
    --traces "$RUN/rollouts.jsonl" --steps "$RUN/steps.jsonl" --out "$RUN/verdicts.jsonl"
stage "interventions" "${start[@]}" intervene.py pairs "${sampler[@]}" "${judging[@]}" \
    --triggers "$TRIGGERS" --max-interventions "$INTERVENTIONS" --traces "$RUN/rollouts.jsonl" \
    --steps "$RUN/steps.jsonl" --verdicts "$RUN/verdicts.jsonl" --out "$RUN/pairs.jsonl"
if [ -n "$BENIGN" ]; then
    stage "benign rollouts of the base model" "${start[@]}" intervene.py rollouts "${sampler[@]}" \
        --samples 1 --prompts "$BENIGN" --limit "$LIMIT" --out "$RUN/benign_base.jsonl"
fi
evaluation "$MODEL" base

stage "training, stage 1 ($DOMAIN)" "${train[@]}" --model "$MODEL" --pairs "$RUN/pairs.jsonl" \
    --lr "$LR" --out "$RUN/stage1"
sample_from "$RUN/stage1"
if [ -n "$BENIGN" ]; then
    stage "benign rollouts of stage 1" "${start[@]}" intervene.py rollouts "${sampler[@]}" \
        --samples 1 --prompts "$BENIGN" --limit "$LIMIT" --out "$RUN/benign_stage1.jsonl"
    stage "benign pairs" "${start[@]}" intervene.py benign "${sampler[@]}" "${judging[@]}" \
        --triggers "$TRIGGERS" --base "$RUN/benign_base.jsonl" \
        --traces "$RUN/benign_stage1.jsonl" --out "$RUN/benign_pairs.jsonl"
fi
evaluation "$RUN/stage1" stage1

evals=(base="$RUN/eval/base" "stage 1=$RUN/eval/stage1")
kl=("IPO, stage 1=$RUN/stage1")  # what `figures` follows
if [ -n "$BENIGN" ]; then
    stage "training, stage 2 (against over-refusal)" "${train[@]}" --model "$RUN/stage1" \
        --reference "$MODEL" --pairs "$RUN/pairs.jsonl" "$RUN/benign_pairs.jsonl" --lr "$LR2" \
        --out "$RUN/stage2"
    evaluation "$RUN/stage2" stage2
    evals+=("stage 2=$RUN/eval/stage2")
    kl+=("IPO, both stages=$RUN/stage2")
fi
accept= stage "report" "$PYTHON" evaluate.py report --run "$RUN" --out "$RUN/report.html" \
    --domain "$DOMAIN" --evals "${evals[@]}"

leaderboard() {  # adds the stages that compare methods
    if [ -z "${VALID:-}" ] || { [ "$MODEL" != toy/model ] && [ -z "${LRS:-}" ]; }; then
        echo "error: the defaults of leaderboard suit the tiny model; give VALID=\"NAME=KIND:FILE ...\", sets to choose rates by, and LRS=\"RATE ...\"" >&2
        exit 2
    fi
    if [ -z "$EVAL" ]; then
        echo "error: leaderboard evaluates on files; give EVAL=\"NAME=KIND:FILE ...\" instead of SETS" >&2
        exit 2
    fi
    if [ -n "${QUICK:-}" ]; then SEEDS=${SEEDS:-0} LRS=${LRS:-6e-5}; fi
    local apart=()  # a model that takes all GPUs: each command is started as a stage is
    if [ -n "$ENGINE" ]; then apart+=(--served="--server {engine} --in-flight $IN_FLIGHT"); fi
    if [ -n "$ENGINE$LAUNCH$served" ] || [ "$NPROC" != 1 ]; then
        apart+=(--runner="$(printf '%q ' "${runner[@]:2}")" --launch="$(printf '%q ' "${launch[@]}")")
    fi
    local judge_words eval_words
    judge_words=$(printf '%q ' "${judging[@]}")
    eval_words=$(printf '%q ' "${eval_judging[@]}")
    stage "methods side by side" "$PYTHON" -m studies.leaderboard --model "$MODEL" \
        --prompts "$PROMPTS" --limit "$LIMIT" ${BENIGN:+--benign "$BENIGN"} \
        --triggers "$TRIGGERS" ${TEACHER:+--teacher "$TEACHER"} \
        ${INSTRUCTION:+--instruction "$INSTRUCTION"} --samples "$SAMPLES" \
        --sampling="--max-new-tokens $TOKENS --batch-size $BATCH" \
        --judging="$judge_words" --eval-judging="$eval_words" \
        --train-args="$TRAIN_ARGS --epochs $EPOCHS" --valid $VALID --set $EVAL \
        ${METHODS:+--methods $METHODS} ${AGAIN:+--again $AGAIN} ${SEEDS:+--seeds $SEEDS} \
        ${LRS:+--lrs $LRS} ${GRPO_EPOCHS:+--grpo-epochs $GRPO_EPOCHS} \
        ${WORKERS:+--workers $WORKERS} ${LIMIT_SETS:+--limit-sets $LIMIT_SETS} "${apart[@]}" \
        --out "$LEADERBOARD"
    accept= stage "tables and figure" "$PYTHON" -m studies.frontier --run "$RUN" \
        --domain "$DOMAIN" --results "$LEADERBOARD/results.jsonl"
}

if [ -n "${ALSO:-}" ]; then leaderboard; fi  # of a domain that compares methods in every run

# ------------------------------------------------------------------------------------ commands
case $command in
    all) exec "$PYTHON" "${runner[@]}" --run "$RUN" "${stages[@]}" ;;
    check) exec "$PYTHON" "${runner[@]}" --run "$RUN" --check "${stages[@]}" ;;
    plan)
        if [ "${2:-}" = --measure ]; then
            "$PYTHON" "${runner[@]}" --run "$RUN" --measure "${stages[@]}"
        fi
        exec "$PYTHON" "${runner[@]}" --run "$RUN" --plan "${stages[@]}" ;;
    stages)
        if [ -n "$ENGINE$served" ]; then
            echo "{engine}, {judge}: the URL of a server that holds the stage's model, or its judge" >&2
        fi
        printf '# %s\n' "${stages[@]}" | sed 's/: /\n/' ;;
    test)
        together=()  # the tests of several files at the same time, where that is installed
        if "$PYTHON" -c "import xdist" 2>/dev/null; then
            together=(-n auto --maxprocesses 4 --dist loadfile)
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        fi
        exec "$PYTHON" -m pytest -q "${together[@]}" "${@:2}" ;;
    figures)
        if [ ! -f "$RUN/report.html" ]; then
            echo "error: no finished run in $RUN: bash run.sh first" >&2
            exit 2
        fi
        stages=()  # for Figure 7 two other ways of training on the same pairs
        stage "SFT on the chosen sides" "${launch[@]}" -m studies.sft $TRAIN_ARGS --model "$MODEL" \
            --data "$RUN/pairs.jsonl" --lr "$LR" --epochs "$EPOCHS" --seed "$SEED" --out "$RUN/sft"
        stage "DPO on whole trajectories" "${train[@]}" --model "$MODEL" \
            --pairs "$RUN/pairs.jsonl" --score-from prompt --lr "$LR" --out "$RUN/dpo"
        sample_from "$MODEL" "$SERVER"
        stage "analysis" "${start[@]}" -m studies.figures --run-folder "$RUN" --domain "$DOMAIN" \
            "${sampler[@]}" "${judging[@]}" --continuations "$CONTINUATIONS" --kl "${kl[@]}" "DPO=$RUN/dpo" "SFT=$RUN/sft"
        exec "$PYTHON" "${runner[@]}" --run "$RUN" "${stages[@]}" ;;
    leaderboard)
        stages=()
        leaderboard
        exec "$PYTHON" "${runner[@]}" "${stages[@]}" ;;
esac
