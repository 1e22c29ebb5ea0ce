"""Where training moved the model (Figure 7): KL(model || reference) of the next token along the reference's own traces.

    python intervene.py kl --model runs/my/stage2 --reference M --traces ... --steps ... --verdicts ... --out runs/my/kl.jsonl

Both models are in memory, because the KL of whole distributions needs both at each token (two of 8B in bfloat16 take
32 GB); logits exist for a chunk of tokens at a time. Run it once for each trained model (IPO, DPO, SFT) and lay the
curves over each other. Records and summaries: see `extras/dynamics.py`.
"""
import numpy as np
import torch

import data
import model as lm_code
from extras.csr import step_starts
from extras.estimates import SPAN, means, show
from extras.mining import unsafe_in_turn


@torch.no_grad()
def token_kl(model, reference, input_ids, attention_mask, completion_mask, chunk=0):
    """KL(model || reference) of the distribution that predicts each completion token: float32 (N,), nats, row by row.

    The arguments are a batch of `data.collate`, (B, T) each; N is the number of completion tokens. Temperature 1.
    """
    scored, models = completion_mask[:, 1:].bool(), (model, reference)  # the token at t is predicted from t - 1
    hidden = [m.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
              .last_hidden_state[:, :-1][scored] for m in models]  # 2 x (N, H)
    heads = [m.get_output_embeddings() for m in models]
    chunk = chunk or max(1, lm_code.head_chunk(input_ids.device.type, len(heads[0].weight))[0] // 2)
    kl = []
    for parts in zip(*(h.split(chunk) for h in hidden)):
        p, q = (head(h).float().log_softmax(-1) for head, h in zip(heads, parts))  # (chunk, V)
        kl.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kl)


def profile(values, anchors, offsets, prompts):
    """Estimates of the mean over traces at each offset from each trace's anchor.

    values: list of lists, one a trace; anchors: index of offset 0 in each.

    >>> [e["value"] for e in profile([[1, 2, 3], [5, 6]], [1, 0], [-1, 0, 1, 2], "ab")]
    [1.0, 3.5, 4.5, None]
    """
    table = np.full((len(values), len(offsets)), np.nan)
    for row, v, anchor in zip(table, values, anchors):
        for k, offset in enumerate(offsets):
            if 0 <= anchor + offset < len(v):
                row[k] = v[anchor + offset]
    return means(table, prompts)


def run_kl(args):
    """Stage `kl`, on unsafe traces with a cue. Records: {"id", "prompt_id", "cue_token", "cue_end", "reasoning_end", "kl":
    [nats at each token of the trace]}. The summary: `by_offset`: {"offsets": tokens from where the cue begins, "kl":
    [estimates]}; `by_token`: [estimates] from the first token of the trace on; `peak_offset`, `peak_token`: where these
    are highest; `regions`: estimates of the mean before the cue, in it, in the rest of the reasoning, in the response."""
    tokenizer, verdicts = lm_code.load_tokenizer(args.reference), data.read_jsonl(args.verdicts)
    cues, steps = {v["id"]: v["cue"] for v in verdicts}, {s["id"]: s["steps"] for s in data.read_jsonl(args.steps)}
    traces = unsafe_in_turn([t for t in data.read_jsonl(args.traces) if cues[t["id"]]], verdicts, args.limit)
    if not traces:
        raise SystemExit(f"{args.verdicts}: no complete unsafe trace with a cue to follow.")
    device, out = lm_code.pick_device(args.device), data.Appender(args.out)
    dtype = lm_code.pick_dtype(args.dtype, device)
    models = [lm_code.load_model(path, device, dtype) for path in (args.model, args.reference)]
    for a in range(0, len(traces), args.batch_size):
        part = traces[a:a + args.batch_size]
        if all(t["id"] in out.done for t in part):
            continue
        kl = token_kl(*models, **data.collate([(t["prompt_ids"], t["ids"]) for t in part], device))
        for t, values in zip(part, kl.split([len(t["ids"]) for t in part])):
            starts, cue = step_starts(tokenizer, t, steps[t["id"]]), cues[t["id"]]
            out.write({"id": t["id"], "prompt_id": t["prompt_id"], "cue_token": starts[cue - 1], "cue_end": starts[cue],
                       "reasoning_end": starts[-1], "kl": [round(x, 6) for x in values.tolist()]})
    out.close()
    rows = [out.done[t["id"]] for t in traces]
    data.write_json(data.beside(args.out, "summary"), summary := summarise(rows))
    for name, e in summary["regions"].items():
        print(f"  mean KL, {name}: {show(e)}")
    return {"traces": len(rows), "tokens": sum(len(r["kl"]) for r in rows)}, {}


def summarise(rows):
    """The summary of `run_kl` from its records."""
    values, prompts, offsets = [r["kl"] for r in rows], [r["prompt_id"] for r in rows], list(range(-SPAN, SPAN + 1))
    by_offset = profile(values, [r["cue_token"] for r in rows], offsets, prompts)
    by_token = profile(values, [0] * len(rows), range(max(map(len, values))), prompts)
    highest = lambda curve: max(range(len(curve)), key=lambda k: curve[k]["value"] or 0)
    names = ("before the cue", "cue", "rest of the reasoning", "response")
    cuts = [[0, r["cue_token"], r["cue_end"], r["reasoning_end"], len(r["kl"])] for r in rows]
    table = [[np.mean(v[a:b]) if a < b else np.nan for a, b in zip(c, c[1:])] for v, c in zip(values, cuts)]
    return {"by_offset": {"offsets": offsets, "kl": by_offset}, "by_token": by_token, "peak_token": highest(by_token),
            "peak_offset": offsets[highest(by_offset)], "regions": dict(zip(names, means(table, prompts)))}


def kl_flags(p):
    p.add_argument("--model", required=True, help="trained model: directory or hub name")
    p.add_argument("--reference", required=True, help="model that it was trained from, which wrote the traces")
    p.add_argument("--limit", type=int, default=200, help="traces to follow; 0 = all")
    p.add_argument("--batch-size", type=int, default=8, help="traces in a forward pass")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="dtype of both models")


STAGES = {"kl": (run_kl, "where training moved the model: KL per token along base traces (Figure 7)",
                 ("traces", "steps", "verdicts"), kl_flags)}
