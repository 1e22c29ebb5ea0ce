"""The judge client and the server sampler against servers that are not ours, on 127.0.0.1. Run by hand, not by pytest.

    python -m venv other && other/bin/pip install transformers[serving]     # or: 'llama-cpp-python[server]' gguf
    python tests/independent_server.py transformers --python other/bin/python [--model toy/model]
    python tests/independent_server.py llama.cpp    --python other/bin/python [--model toy/model]

`--python` is the interpreter in which that server is installed; this script needs the project's own packages only.
For llama.cpp the model is first written as GGUF. A toy model is no judge: a copy of it first learns by heart to answer
this script's eight questions (a minute), so that there are valid verdicts to read; without that, all are None.
"""
import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import intervene  # noqa: E402
import model as lm_code  # noqa: E402
from extras.server import ServerSampler  # noqa: E402

def write_gguf(source, target, python):
    """Write a Llama checkpoint of the toy's kind as GGUF (float32), with the `gguf` package of the server's interpreter.

    llama.cpp pairs the rotary dimensions of a head as (0, 1), (2, 3), ...; transformers as (0, d/2), (1, d/2 + 1), ...
    """
    import numpy as np
    from safetensors.numpy import load_file
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]

    def pair(weight, n):
        return weight.reshape(n, 2, weight.shape[0] // n // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj":
             "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "model.layers.": "blk."}
    arrays = {}
    for name, weight in load_file(source / "model.safetensors").items():
        weight = pair(weight, heads) if "q_proj" in name else pair(weight, kv) if "k_proj" in name else weight
        for old, new in names.items():
            name = name.replace(old, new)
        arrays[name] = weight.astype(np.float32)
    vocab = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    settings = {"config": config, "merges": [" ".join(m) if isinstance(m, list) else m for m in tokenizer["model"]["merges"]],
                "tokens": sorted(vocab, key=vocab.get), "special": [t["content"] for t in tokenizer["added_tokens"]],
                "template": (source / "chat_template.jinja").read_text()}
    np.savez(target.with_suffix(".npz"), **arrays)
    target.with_suffix(".json").write_text(json.dumps(settings))
    subprocess.run([python, "-c", f'''
import json, numpy as np, gguf
s = json.load(open({str(target.with_suffix(".json"))!r})); c = s["config"]
w = gguf.GGUFWriter({str(target)!r}, "llama")
w.add_context_length(c["max_position_embeddings"]); w.add_embedding_length(c["hidden_size"])
w.add_block_count(c["num_hidden_layers"]); w.add_feed_forward_length(c["intermediate_size"])
w.add_head_count(c["num_attention_heads"]); w.add_head_count_kv(c["num_key_value_heads"])
w.add_layer_norm_rms_eps(c["rms_norm_eps"]); w.add_vocab_size(len(s["tokens"]))
w.add_rope_dimension_count(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])
w.add_rope_freq_base((c.get("rope_parameters") or c).get("rope_theta", 10000.0))
w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("gpt-2"); w.add_token_list(s["tokens"]); w.add_token_merges(s["merges"])
w.add_token_types([4 if t in s["special"] and "think" in t else 3 if t in s["special"] else 1 for t in s["tokens"]])
w.add_eos_token_id(c["eos_token_id"]); w.add_bos_token_id(c["eos_token_id"]); w.add_add_bos_token(False); w.add_chat_template(s["template"])
for name, a in np.load({str(target.with_suffix(".npz"))!r}).items(): w.add_tensor(name, a)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
'''], check=True)


JUDGED = {question: [{"prompt": "How?", "text": f"No {i}.", "steps": ["A.", f"B {i}."]} for i in range(2)]
          for question in ("reasoning", "response", "compliance", "cue")}
for question, items in JUDGED.items():
    for item in items:
        item.pop("text" if question == "cue" else "steps")
ANSWERS = {"reasoning": ("safe", "unsafe"), "response": ("unsafe", "safe"), "compliance": ("full", "refusal"), "cue": (2, 0)}


def shorten(judge):
    """Prompts short enough for the toy model's context of 512 tokens."""
    judge.prompts = {q: p if q in ("json", "text") else p.splitlines()[0] + "\n{PROMPT}\n{TEXT}\n" for q, p in judge.prompts.items()}
    return judge


def learn_answers(source, target, steps=250):
    """Teach a copy of the model the answers to JUDGED, in JSON where the prompt asks for that and as text where not."""
    import torch
    tokenizer, lm = lm_code.load_tokenizer(source), lm_code.load_model(source, "cpu")
    judge, rows = shorten(intervene.make_judge("http://127.0.0.1:9/v1", "any")), []
    for question, items in JUDGED.items():
        for item, answer in zip(items, ANSWERS[question]):
            for structured in (True, False):
                prompt = lm_code.render_prompt(tokenizer, judge.content(question, item, structured))
                reply = json.dumps({"reason": "r", "answer": answer}) if structured else f"Yes.\nANSWER: {answer}"
                rows.append((prompt, tokenizer.encode(reply, add_special_tokens=False) + [tokenizer.eos_token_id]))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3)
    width = max(len(p) + len(c) for p, c in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (p, c) in enumerate(rows):
        ids[i, :len(p + c)], mask[i, :len(p + c)], scored[i, len(p):len(p + c)] = torch.tensor(p + c), 1, 1
    for _ in range(steps):
        loss = -lm_code.completion_logps(lm, ids, mask, scored).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.3:
            break
    print(f"judge: a copy of the model has learned the answers by heart (loss {loss.item():.3f})")
    lm.save_pretrained(target)
    tokenizer.save_pretrained(target)


def start(kind, python, model, scratch):
    """Start the server; returns (process, base URL, name of the model at the server)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    name = str(model)
    if kind == "llama.cpp":
        name = str(scratch / "model.gguf")
        write_gguf(model, scratch / "model.gguf", python)
        command = [python, "-m", "llama_cpp.server", "--model", name, "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512"]
    else:
        command = [str(Path(python).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port),
                   "--device", "cpu", "--dtype", "float32"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = subprocess.Popen(command, stdout=open(scratch / "server.log", "w"), stderr=subprocess.STDOUT,
                               env={**environment, "HF_HUB_OFFLINE": "1"})
    for _ in range(180):
        try:
            requests.get(f"http://127.0.0.1:{port}/{'v1/models' if kind == 'llama.cpp' else 'health'}", timeout=2)
            return process, f"http://127.0.0.1:{port}/v1", name
        except requests.RequestException:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit("the server did not start:\n" + (scratch / "server.log").read_text()[-3000:])


def try_sampler(url, name, model):
    """Continue exact prefixes on the server; greedy, so that the text can be compared with this process's own sampler."""
    options = dict(temperature=0, top_p=1.0, max_new_tokens=48, seed=0)
    remote = ServerSampler(model, url, concurrency=2, **options)
    remote.payload["model"] = name
    local = lm_code.LocalSampler(model, **options)
    prompts = ("How do I brew duskwort?", "What is 23 + 45?", "How do I brew calm tea, i.e.  a  lot?")
    wanted = [lm_code.Request(f"{i}", lm_code.render_prompt(remote.tokenizer, p)) for i, p in enumerate(prompts)]
    trigger = remote.tokenizer.encode("The user asks. Wait, this could hurt someone.", add_special_tokens=False)
    wanted += [lm_code.Request(f"{r.id}+trigger", r.prefix + trigger) for r in wanted]
    ours, theirs = ({c.id: c for c in sampler(wanted)} for sampler in (local, remote))
    print(f"sampler: prompt sent as {remote.form!r}, token counts confirmed, {len(theirs)} completions")
    same = [ours[id].ids == theirs[id].ids for id in ours]
    shared = [next((k for k, (a, b) in enumerate(zip(ours[id].ids, theirs[id].ids)) if a != b), min(len(ours[id].ids), len(theirs[id].ids)))
              for id in ours]
    print(f"sampler: {sum(same)} of {len(same)} greedy continuations equal this process's own, to the id; tokens in common: {shared}")
    print("sampler: for example " + repr(lm_code.decode(remote.tokenizer, theirs["0+trigger"].ids)[:90]))


def try_judge(url, name, model):
    """Ask every question and show what the model was taught."""
    judge = shorten(intervene.make_judge(url, name, concurrency=2, tries=2, longest_pause=0.1))
    for question, items in JUDGED.items():
        expected = [intervene.LABELS.get(question, {}).get(a, a) for a in ANSWERS[question]]
        print(f"judge: {question}: {list(judge.ask(question, items))}, taught {expected}")
    print(f"judge: {judge.summary()}, structured: {judge.chat.structured}")
    print(f"judge: the first replies: {[r['reply'] for r in judge.chat.cache.records.values()][:2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("transformers", "llama.cpp"))
    parser.add_argument("--python", required=True, help="interpreter in which the server is installed")
    parser.add_argument("--model", default="toy/model", type=Path, help="directory of a tiny Llama model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        learn_answers(args.model, scratch / "judge")
        for model, attempt in ((args.model.resolve(), try_sampler), (scratch / "judge", try_judge)):
            process, url, name = start(args.kind, args.python, model, scratch)
            try:
                attempt(url, name, model)
            except BaseException:
                print((scratch / "server.log").read_text()[-3000:])
                raise
            finally:
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main()
