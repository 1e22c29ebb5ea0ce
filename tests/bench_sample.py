"""Useful tokens per second of our sampler against transformers', on long-tailed lengths. By hand:

    python tests/bench_sample.py                        # 16 rows, log-normal lengths
    python tests/bench_sample.py --continuations 6      # six continuations of every prefix

All sides run the same random Llama greedily in float32 and end each row at a length drawn
beforehand (log-normal), by forcing the end-of-sequence token there. Outputs are compared token
by token. `generate` gets batches of `--rows` requests sorted by prompt length, as static batching
does, and runs until the longest row of each ends. Continuous batching gets all requests at once and
as many rows as it likes.
"""
import argparse
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from transformers import GenerationConfig, LlamaConfig  # noqa: E402
from transformers import LlamaForCausalLM, LogitsProcessor  # noqa: E402

from model import Request, sample  # noqa: E402

EOS = 1


def make_model():
    """A random Llama of a few million parameters that never ends a row by itself."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        pad_token_id=0,
    )).eval()
    model.lm_head.weight.data[EOS] = 0  # logit 0 is never the largest
    return model


def make_requests(prefixes, continuations, median, spread, longest):
    """(requests, {id: the length at which it must end})."""
    requests = []
    for i, n in enumerate(torch.randint(20, 120, (prefixes,)).tolist()):
        prefix = torch.randint(3, 8192, (n,)).tolist()
        for k in range(continuations):
            requests.append(Request(f"{i}.{k}", prefix))
    drawn = (torch.randn(len(requests)) * spread).exp() * median
    drawn = drawn.clamp(2, longest).int().tolist()
    lengths = {r.id: n for r, n in zip(requests, drawn)}
    return requests, lengths


def by_sample(model, requests, lengths, rows):
    """{id: ids} by `model.sample`; the uniform numbers of a request carry its length."""
    def request_uniforms(seed, request_id, n):
        return (torch.arange(n) == lengths[request_id] - 1) * 2.0

    def next_token(logits, temperature, top_p, uniforms):
        logits[:, EOS] = -torch.inf
        return torch.where(uniforms > 1, EOS, logits.argmax(-1))

    longest = max(lengths.values())
    with patch("model.request_uniforms", request_uniforms), patch("model.next_token", next_token):
        done = sample(model, requests, eos={EOS}, max_new_tokens=longest, batch_size=rows)
        return {c.id: c.ids for c in done}


class EndAtLength(LogitsProcessor):
    """Forces EOS where a row of a static batch has its length, and forbids it elsewhere."""

    def __init__(self, width, lengths):
        self.width = width
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores):
        ends = self.lengths == input_ids.shape[1] - self.width + 1
        scores[:, EOS] = torch.where(ends, torch.inf, -torch.inf)
        return scores


def by_generate(model, requests, lengths, rows):
    """{id: ids} by `generate`, in static batches."""
    out = {}
    requests = sorted(requests, key=lambda r: (len(r.prefix), r.prefix, r.id))
    for i in range(0, len(requests), rows):
        batch = requests[i:i + rows]
        width = max(len(r.prefix) for r in batch)
        ends = [lengths[r.id] for r in batch]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, r in enumerate(batch):  # left-padded
            ids[row, width - len(r.prefix):] = torch.tensor(r.prefix)
            mask[row, width - len(r.prefix):] = 1
        got = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(ends),
            eos_token_id=EOS,
            pad_token_id=0,
            logits_processor=[EndAtLength(width, ends)],
        )
        for r, row, n in zip(batch, got, ends):
            out[r.id] = row[width:width + n].tolist()
    return out


def by_continuous_batching(model, requests, lengths, rows):
    """{id: ids} by transformers' continuous batching, which has no number of rows."""
    out = {}
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
        max_new_tokens=max(lengths.values()),
    )
    with model.continuous_batching_context_manager(config) as manager:
        for r in requests:
            n = max(1, lengths[r.id] - 1)  # the last token of a row is the forced end, added below
            manager.add_request(r.prefix, request_id=r.id, max_new_tokens=n, eos_token_id=EOS)
        while len(out) < len(requests):
            result = manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError("continuous batching gave no result for a minute")
            if result.is_finished():
                ids = list(result.generated_tokens) + [EOS]
                out[result.request_id] = ids[-lengths[result.request_id]:]
    return out


METHODS = {"generate": by_generate, "continuous": by_continuous_batching, "sample": by_sample}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64, help="different prefixes")
    parser.add_argument("--continuations", type=int, default=1, help="requests for each prefix")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--median", type=float, default=60, help="median length in tokens")
    parser.add_argument("--spread", type=float, default=1.0, help="sigma of the log-normal lengths")
    parser.add_argument("--longest", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    requests, lengths = make_requests(
        args.requests, args.continuations, args.median, args.spread, args.longest)
    useful = sum(lengths.values())
    print(f"{len(requests)} requests, {useful} useful tokens, lengths: "
          f"mean {useful / len(requests):.0f}, max {max(lengths.values())}")
    print(f"{'method':10} {'s':>7} {'CPU s':>7} {'tokens/s':>9} {'a CPU s':>8}")
    outputs = {}
    cpu = {}
    for name, method in METHODS.items():
        wall_start = time.monotonic()
        cpu_start = time.process_time()
        outputs[name] = method(model, requests, lengths, args.rows)
        wall = time.monotonic() - wall_start
        cpu[name] = time.process_time() - cpu_start
        print(f"{name:10} {wall:7.1f} {cpu[name]:7.1f} {useful / wall:9.0f} "
              f"{useful / cpu[name]:8.0f}", flush=True)
    for name in ("generate", "continuous"):
        same = sum(outputs[name][r.id] == outputs["sample"][r.id] for r in requests)
        print(f"sample against {name}: {cpu[name] / cpu['sample']:.2f}x useful tokens a second "
              f"of processor time; {same} of {len(requests)} outputs identical")


if __name__ == "__main__":
    main()
