"""Useful tokens per second of the built-in sampler against transformers' own, on long-tailed lengths. By hand:

    python tests/bench_sample.py                        # 16 rows, log-normal lengths
    python tests/bench_sample.py --continuations 6      # six continuations of every prefix

Both sides run the same random Llama greedily in float32 and end each row at a length drawn beforehand (log-normal),
by forcing the end-of-sequence token there; their outputs are compared token by token. `generate` gets batches of
`--rows` requests sorted by prompt length, as static batching does, and goes on until the longest row of each ends.
Continuous batching gets all requests at once and as many rows as it likes.
"""
import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor  # noqa: E402

import model as lm_code  # noqa: E402

EOS = 1


def make(requests, continuations, median, spread, longest):
    """A random model, requests and the length at which each must end."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1, pad_token_id=0)).eval()
    model.lm_head.weight.data[EOS] = 0  # logit 0 is never the largest, so no row ends by itself
    prefixes = [torch.randint(3, 8192, (int(n),)).tolist() for n in torch.randint(20, 120, (requests,))]
    asked = [lm_code.Request(f"{i}.{k}", p) for i, p in enumerate(prefixes) for k in range(continuations)]
    lengths = (torch.randn(len(asked)) * spread).exp() * median
    return model, asked, {r.id: int(n) for r, n in zip(asked, lengths.clamp(2, longest))}


def ours(model, asked, lengths, rows):
    """{id: ids} by `model.sample`; the uniform numbers of a request carry its length."""
    real = lm_code.request_uniforms, lm_code.next_token

    def next_token(logits, temperature, top_p, uniforms):
        logits[:, EOS] = -torch.inf
        return torch.where(uniforms > 1, EOS, logits.argmax(-1))
    lm_code.request_uniforms = lambda seed, id, n: (torch.arange(n) == lengths[id] - 1) * 2.0
    lm_code.next_token = next_token
    out = {c.id: c.ids for c in lm_code.sample(model, asked, eos={EOS}, max_new_tokens=max(lengths.values()),
                                               batch_size=rows)}
    lm_code.request_uniforms, lm_code.next_token = real
    return out


def theirs(model, asked, lengths, rows):
    """{id: ids} by `generate`, in static batches."""
    class EndAtLength(LogitsProcessor):
        def __init__(self, start, ends):
            self.start, self.ends = start, torch.tensor(ends)

        def __call__(self, input_ids, scores):
            ends = self.ends == input_ids.shape[1] - self.start + 1
            scores[:, EOS] = torch.where(ends, torch.inf, -torch.inf)
            return scores
    out, asked = {}, sorted(asked, key=lambda r: (len(r.prefix), r.prefix, r.id))
    for i in range(0, len(asked), rows):
        batch = asked[i:i + rows]
        width, ends = max(len(r.prefix) for r in batch), [lengths[r.id] for r in batch]
        ids = torch.tensor([[0] * (width - len(r.prefix)) + r.prefix for r in batch])
        mask = torch.tensor([[0] * (width - len(r.prefix)) + [1] * len(r.prefix) for r in batch])
        got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(ends), eos_token_id=EOS,
                             pad_token_id=0, logits_processor=[EndAtLength(width, ends)])
        out |= {r.id: row[width:width + n].tolist() for r, row, n in zip(batch, got, ends)}
    return out


def continuous(model, asked, lengths, rows):
    """{id: ids} by transformers' continuous batching. It has no batch size: it takes as many rows as its cache holds."""
    from transformers import GenerationConfig
    config, out = GenerationConfig(do_sample=False, eos_token_id=EOS, pad_token_id=0, max_new_tokens=max(lengths.values())), {}
    with model.continuous_batching_context_manager(config) as manager:
        for r in asked:  # the last token of a row is the forced end, which is not asked for here
            manager.add_request(r.prefix, request_id=r.id, max_new_tokens=max(1, lengths[r.id] - 1), eos_token_id=EOS)
        while len(out) < len(asked):
            result = manager.get_result(timeout=60)
            if result is None:
                raise SystemExit("continuous batching gave no result for a minute")
            if result.is_finished():
                out[result.request_id] = (list(result.generated_tokens) + [EOS])[-lengths[result.request_id]:]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64, help="different prefixes")
    parser.add_argument("--continuations", type=int, default=1, help="requests for each prefix")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--median", type=float, default=60, help="median length in tokens")
    parser.add_argument("--spread", type=float, default=1.0, help="sigma of the log-normal lengths")
    parser.add_argument("--longest", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, asked, lengths = make(args.requests, args.continuations, args.median, args.spread, args.longest)
    useful, results = sum(lengths.values()), {}
    print(f"{len(asked)} requests, {useful} useful tokens, lengths: mean {useful / len(asked):.0f}, "
          f"max {max(lengths.values())}")
    print(f"{'method':10} {'s':>7} {'CPU s':>7} {'tokens/s':>9} {'a CPU s':>8}")
    cpu = {}
    for name, run in (("generate", theirs), ("continuous", continuous), ("sample", ours)):
        wall, start = time.monotonic(), time.process_time()
        results[name] = run(model, asked, lengths, args.rows)
        wall, cpu[name] = time.monotonic() - wall, time.process_time() - start
        print(f"{name:10} {wall:7.1f} {cpu[name]:7.1f} {useful / wall:9.0f} {useful / cpu[name]:8.0f}", flush=True)
    for name in ("generate", "continuous"):
        same = sum(results[name][r.id] == results["sample"][r.id] for r in asked)
        print(f"sample against {name}: {cpu[name] / cpu['sample']:.2f}x useful tokens a second of processor time; "
              f"{same} of {len(asked)} outputs identical")


if __name__ == "__main__":
    main()
