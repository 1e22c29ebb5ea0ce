"""Where training moved the model (Figure 7): KL to the reference along its own traces.

    python -m studies.kl --model runs/my/stage2 --reference M \\
        --traces ... --steps ... --verdicts ... --out runs/my/kl.jsonl

Both models are in memory, because the KL of whole distributions needs both at each token (two of 8B
in bfloat16 take 32 GB); logits exist for a chunk of tokens at a time. Run it once for each trained
model (IPO, DPO, SFT) and compare the curves; `studies.figures` draws them together.
"""
import numpy as np
import torch

from data import Appender, collate
from intervene import recorded_flags
from model import load_model, load_tokenizer, pick_device, pick_dtype
from studies.common import (
    SPAN,
    cues_by_trace,
    prompt_ids_of,
    step_starts,
    steps_by_trace,
    study_parser,
    unsafe_traces_in_turn,
)
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json
from support.fused_head import chunk_sizes, output_logits
from support.model_check import check_model, in_float32
from support.report import TOO_FEW
from support.stages import run_stage, sidecar
from support.statistics import UNBOUNDED, column_estimates, format_estimate

REGIONS = ("before the cue", "cue", "rest of the reasoning", "response")


# ------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def token_kl(model, reference, input_ids, attention_mask, completion_mask, chunk=0):
    """KL(model || reference) of the distribution that predicts each completion token.

    input_ids, attention_mask, completion_mask: a batch of `data.collate`, (B, T) each. Returns
    float32 (N,), nats, for the N completion tokens, row by row. Temperature 1.
    """
    scored = completion_mask[:, 1:].bool()  # the token at t is predicted from position t - 1
    hidden = hidden_states(model, input_ids, attention_mask)[scored]  # (N, H)
    reference_hidden = hidden_states(reference, input_ids, attention_mask)[scored]
    if not chunk:
        vocabulary = len(model.get_output_embeddings().weight)
        most, _ = chunk_sizes(input_ids.device.type, vocabulary)
        chunk = max(1, most // 2)  # the logits of two models exist at once
    kl = []
    for states, reference_states in zip(hidden.split(chunk), reference_hidden.split(chunk)):
        p = output_logits(model, states).float().log_softmax(-1)  # (chunk, V)
        q = output_logits(reference, reference_states).float().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kl)


def check_padded(model):
    """Raise InputError for a model whose numbers on padded rows would not be its own."""
    def logps_of(sequences):
        rows = collate(sequences, model.device)
        ids = rows["input_ids"]
        hidden = hidden_states(model, ids, rows["attention_mask"])
        logps = output_logits(model, hidden).float().log_softmax(-1)  # (B, T - 1, V)
        at_target = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)    # (B, T - 1)
        unscored = rows["completion_mask"][:, 1:] == 0
        return at_target.masked_fill(unscored, 0).sum(1)

    with in_float32(model):
        check_model(model, {"a padded row": logps_of}, "compare models of another class")


def hidden_states(model, input_ids, attention_mask):
    """The last layer's states at all positions but the last, (B, T - 1, H)."""
    decoder = model.get_decoder()
    output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state[:, :-1]


def measure_kl(path, traces, steps, cues, tokenizer, model, reference, batch_size, device):
    """Append the KL record of each trace to `path`; picks up where it left off.

    steps: {trace id: steps}; cues: {trace id: number of the cue step}. Record: {"id", "prompt_id",
    "cue_token", "cue_end", "reasoning_end": tokens of the trace, "kl": nats at each of its tokens}.
    """
    records = Appender(path)
    for first in range(0, len(traces), batch_size):
        part = traces[first:first + batch_size]
        if all(trace["id"] in records.done for trace in part):
            continue
        batch = collate([(trace["prompt_ids"], trace["ids"]) for trace in part], device)
        kl = token_kl(model, reference, **batch)
        for trace, values in zip(part, kl.split([len(trace["ids"]) for trace in part])):
            starts = step_starts(tokenizer, trace, steps[trace["id"]])
            cue = cues[trace["id"]]
            records.write({
                "id": trace["id"],
                "prompt_id": trace["prompt_id"],
                "cue_token": starts[cue - 1],
                "cue_end": starts[cue],
                "reasoning_end": starts[-1],
                "kl": [round(x, 6) for x in values.tolist()],
            })
    records.close()
    return records.read([trace["id"] for trace in traces])


# ----------------------------------------------------------------------------------- summarising

def kl_profile(values, anchors, offsets, prompts):
    """Estimates of the mean over traces at each offset from each trace's anchor.

    values: a list for each trace; anchors: the index of offset 0 in each.

    >>> profile = kl_profile([[1, 2, 3], [5, 6]], [1, 0], [-1, 0, 1, 2], "ab")
    >>> [estimate["value"] for estimate in profile]
    [1.0, 3.5, 4.5, None]
    """
    table = np.full((len(values), len(offsets)), np.nan)  # (traces, offsets)
    for cells, along, anchor in zip(table, values, anchors):
        for column, offset in enumerate(offsets):
            index = anchor + offset
            if 0 <= index < len(along):
                cells[column] = along[index]
    return column_estimates(table, prompts, invented=UNBOUNDED)


def index_of_highest(estimates, least):
    """The index of the highest estimate, of those from at least so many traces.

    >>> few = {"value": 0.9, "n": 1}
    >>> index_of_highest([{"value": 0.1, "n": 9}, {"value": 0.3, "n": 9}, few], least=9)
    1
    """
    values = []
    for estimate in estimates:
        enough = estimate["n"] >= least
        values.append(estimate["value"] if enough else 0)
    return values.index(max(values))


def region_means(record):
    """Mean KL of a trace in each of REGIONS; nan in one without a token."""
    kl = record["kl"]
    bounds = [0, record["cue_token"], record["cue_end"], record["reasoning_end"], len(kl)]
    means = []
    for start, end in zip(bounds, bounds[1:]):
        means.append(np.mean(kl[start:end]) if start < end else np.nan)
    return means


def summarise_kl(records):
    """The summary of the study.

    `by_offset`: {"offsets": tokens from where the cue begins, "kl": estimates}; `by_token`:
    estimates from the first token of the trace on, as far as TOO_FEW traces reach (all, if there
    are fewer); `peak_token`, `peak_offset`: where these are highest; `regions`: estimates of the
    mean in each of REGIONS.
    """
    values = [record["kl"] for record in records]
    enough = min(TOO_FEW, len(values))
    prompts = prompt_ids_of(records)
    cue_tokens = [record["cue_token"] for record in records]
    offsets = list(range(-SPAN, SPAN + 1))
    by_offset = kl_profile(values, cue_tokens, offsets, prompts)
    reached = sorted(map(len, values), reverse=True)[enough - 1]
    by_token = kl_profile(values, [0] * len(records), range(reached), prompts)
    table = [region_means(record) for record in records]  # (traces, regions)
    regions = column_estimates(table, prompts, invented=UNBOUNDED)
    return {
        "by_offset": {"offsets": offsets, "kl": by_offset},
        "by_token": by_token,
        "peak_token": index_of_highest(by_token, enough),
        "peak_offset": offsets[index_of_highest(by_offset, enough)],
        "regions": dict(zip(REGIONS, regions)),
    }


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = study_parser(
        "kl",
        "Where training moved the model: KL per token along base traces (Figure 7).",
        ("traces", "steps", "verdicts"),
    )
    parser.add_argument("--model", required=True, help="trained model: directory or hub name")
    parser.add_argument("--reference", required=True,
                        help="model that it was trained from, which wrote the traces")
    parser.add_argument("--limit", type=int, default=200, help="traces to follow; 0 = all")
    parser.add_argument("--batch-size", type=int, default=8, help="traces in a forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="dtype of both models")
    return parser


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)

    def work():
        tokenizer = load_tokenizer(args.reference)
        verdicts = read_jsonl(args.verdicts)
        cues = cues_by_trace(verdicts)
        steps = steps_by_trace(read_jsonl(args.steps))
        with_cue = [trace for trace in read_jsonl(args.traces) if cues[trace["id"]]]
        traces = unsafe_traces_in_turn(with_cue, verdicts, args.limit)
        if not traces:
            raise InputError(f"{args.verdicts}: no complete unsafe trace with a cue to follow.")
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        model = load_model(args.model, device, dtype, to_sample=False)
        reference = load_model(args.reference, device, dtype, to_sample=False)
        for each in (model, reference):
            check_padded(each)
        records = measure_kl(
            args.out, traces, steps, cues, tokenizer, model, reference, args.batch_size, device)
        summary = summarise_kl(records)
        write_json(sidecar(args.out, "summary"), summary)
        for name, estimate in summary["regions"].items():
            print(f"  mean KL, {name}: {format_estimate(estimate)}")
        counts = {
            "traces": len(records),
            "tokens": sum(len(record["kl"]) for record in records),
        }
        return counts, {}

    inputs = [args.model, args.reference, args.traces, args.steps, args.verdicts]
    run_stage(__file__, args.out, recorded_flags(args), inputs, work)


if __name__ == "__main__":
    exit_cleanly(main)
