"""The judge and the server sampler against servers that are not ours. Run by hand, not by pytest.

    python -m venv other
    other/bin/pip install transformers[serving]      # or: 'llama-cpp-python[server]' gguf
    python tests/independent_server.py transformers --python other/bin/python [--model toy/model]
    python tests/independent_server.py llama.cpp    --python other/bin/python [--model toy/model]

`--python` is the interpreter in which that server is installed; this script needs the project's own
packages only. The server listens on 127.0.0.1. For llama.cpp the model is first written as GGUF. A
toy model is no judge: a copy of it first learns by heart to answer this script's eight questions (a
minute), so that there are valid verdicts to read; without that, all are None.
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
from data import decode, render_prompt  # noqa: E402
from intervene import LABELS, make_judge  # noqa: E402
from model import (  # noqa: E402
    LocalSampler,
    Request,
    completion_logps,
    context_length,
    eos_ids,
    load_model,
    load_tokenizer,
)
from support.server import ServerSampler  # noqa: E402

# -------------------------------------------------------------------------------- a model as GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers.": "blk.",
}
GGUF_WRITER = """
import json, sys
import gguf, numpy

settings_path, arrays_path, target = sys.argv[1:]
settings = json.load(open(settings_path))
config = settings["config"]
rope = config.get("rope_parameters") or config
head_dim = config["hidden_size"] // config["num_attention_heads"]
writer = gguf.GGUFWriter(target, "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(len(settings["tokens"]))
writer.add_rope_dimension_count(config.get("head_dim") or head_dim)
writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(settings["tokens"])
writer.add_token_merges(settings["merges"])
writer.add_token_types(settings["types"])
writer.add_eos_token_id(config["eos_token_id"])
writer.add_bos_token_id(config["eos_token_id"])
writer.add_add_bos_token(False)
writer.add_chat_template(settings["template"])
for name, array in numpy.load(arrays_path).items():
    writer.add_tensor(name, array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's types of tokens


def write_gguf(source, target, python):
    """Write a Llama checkpoint of the toy's kind as GGUF (float32).

    The package `gguf` that does so is that of the server's interpreter.
    """
    import numpy as np

    arrays_path = target.with_suffix(".npz")
    settings_path = target.with_suffix(".json")
    np.savez(arrays_path, **gguf_arrays(source))
    settings_path.write_text(json.dumps(gguf_settings(source)))
    command = [python, "-c", GGUF_WRITER, str(settings_path), str(arrays_path), str(target)]
    subprocess.run(command, check=True)


def gguf_arrays(source):
    """The weights under llama.cpp's names, float32."""
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    arrays = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "q_proj" in name:
            weight = interleave(weight, config["num_attention_heads"])
        elif "k_proj" in name:
            weight = interleave(weight, config["num_key_value_heads"])
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        arrays[name] = weight.astype(np.float32)
    return arrays


def interleave(weight, heads):
    """Order the rotary dimensions of each head as llama.cpp does.

    It pairs them as (0, 1), (2, 3), ...; transformers as (0, d/2), (1, d/2 + 1), ...
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def gguf_settings(source):
    """What GGUF_WRITER needs beside the weights."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = dict(tokenizer["model"]["vocab"])
    special = set()
    for token in tokenizer["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        special.add(token["content"])
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = []
    for token in tokens:
        if token not in special:
            types.append(NORMAL)
        else:
            types.append(USER_DEFINED if "think" in token else CONTROL)
    merges = []
    for merge in tokenizer["model"]["merges"]:
        merges.append(" ".join(merge) if isinstance(merge, list) else merge)
    return {
        "config": json.loads((source / "config.json").read_text()),
        "tokens": tokens,
        "types": types,
        "merges": merges,
        "template": (source / "chat_template.jinja").read_text(),
    }


# ------------------------------------------------------------------- a model that answers questions

TEXTS = [{"prompt": "How?", "text": f"No {i}."} for i in range(2)]
STEPS = [{"prompt": "How?", "steps": ["A.", f"B {i}."]} for i in range(2)]
QUESTIONS = {  # question: (items, answers)
    "reasoning": (TEXTS, ("safe", "unsafe")),
    "response": (TEXTS, ("unsafe", "safe")),
    "compliance": (TEXTS, ("full", "refusal")),
    "cue": (STEPS, (2, 0)),
}


def shorten(judge):
    """Make the prompts short enough for the toy model's context of 512 tokens."""
    for name, prompt in judge.prompts.items():
        if name not in ("json", "text"):
            first_line = prompt.splitlines()[0]
            judge.prompts[name] = first_line + "\n{PROMPT}\n{TEXT}\n"
    return judge


def lessons(tokenizer):
    """(prompt ids, reply ids) of each question, for a reply in JSON and for one in plain text."""
    judge = shorten(make_judge("http://127.0.0.1:9/v1", "any"))
    for question, (items, answers) in QUESTIONS.items():
        for item, answer in zip(items, answers):
            in_json = json.dumps({"reason": "r", "answer": answer})
            in_text = f"Yes.\nANSWER: {answer}"
            for structured, reply in ((True, in_json), (False, in_text)):
                prompt = render_prompt(tokenizer, judge.content(question, item, structured))
                reply_ids = tokenizer.encode(reply, add_special_tokens=False)
                yield prompt, reply_ids + [tokenizer.eos_token_id]


def learn_answers(source, target, steps=250):
    """Teach a copy of the model the answers: JSON where the prompt asks for that, else text."""
    import torch

    tokenizer = load_tokenizer(source)
    model = load_model(source, "cpu")
    rows = list(lessons(tokenizer))
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attended = torch.zeros_like(ids)
    scored = torch.zeros_like(ids)
    for i, (prompt, reply) in enumerate(rows):
        start = len(prompt)
        end = start + len(reply)
        ids[i, :end] = torch.tensor(prompt + reply)
        attended[i, :end] = 1
        scored[i, start:end] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = -completion_logps(model, ids, attended, scored).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.3:
            break
    print(f"judge: a copy of the model has learned the answers by heart (loss {loss.item():.3f})")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


# --------------------------------------------------------------------------------------- the server

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(kind, python, model, scratch):
    """Start the server; returns (process, base URL, name of the model at the server)."""
    port = str(free_port())
    if kind == "llama.cpp":
        name = str(scratch / "model.gguf")
        write_gguf(model, scratch / "model.gguf", python)
        command = [python, "-m", "llama_cpp.server", "--model", name, "--n_ctx", "512"]
        health = "v1/models"
    else:
        name = str(model)
        transformers = str(Path(python).parent / "transformers")
        command = [transformers, "serve", "--device", "cpu", "--dtype", "float32"]
        health = "health"
    command += ["--host", "127.0.0.1", "--port", port]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for ours in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(ours, None)
    log = open(scratch / "server.log", "w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    base = f"http://127.0.0.1:{port}"
    for _ in range(180):
        try:
            requests.get(f"{base}/{health}", timeout=2)
            return process, f"{base}/v1", name
        except requests.RequestException:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    process.kill()
    raise SystemExit("the server did not start:\n" + last_lines(scratch))


def last_lines(scratch):
    return (scratch / "server.log").read_text()[-3000:]


# --------------------------------------------------------------------------------------- the trials

def try_sampler(url, name, model):
    """Continue exact prefixes on the server, greedily, to compare with this process's sampler."""
    settings = {"temperature": 0, "top_p": 1.0, "max_new_tokens": 48, "seed": 0}
    tokenizer = load_tokenizer(model)
    eos = eos_ids(model, tokenizer)
    context = context_length(model)
    remote = ServerSampler(name, url, tokenizer, eos, context, concurrency=2, **settings)
    local = LocalSampler(model, **settings)

    trigger_text = "The user asks. Wait, this could hurt someone."
    trigger = tokenizer.encode(trigger_text, add_special_tokens=False)
    prompts = (
        "How do I brew duskwort?",
        "What is 23 + 45?",
        "How do I brew calm tea, i.e.  a  lot?",
    )
    wanted = []
    for number, prompt in enumerate(prompts):
        prefix = render_prompt(tokenizer, prompt)
        wanted.append(Request(f"{number}", prefix))
        wanted.append(Request(f"{number}+trigger", prefix + trigger))
    ours = {request_id: ids for request_id, ids, _ in local(wanted)}
    theirs = {request_id: ids for request_id, ids, _ in remote(wanted)}
    print(
        f"sampler: prompt sent as {list(remote.form_of.values())}, token counts confirmed, "
        f"{len(theirs)} completions"
    )

    equal = 0
    in_common = []
    for request_id in ours:
        equal += ours[request_id] == theirs[request_id]
        shared = os.path.commonprefix([ours[request_id], theirs[request_id]])
        in_common.append(len(shared))
    print(
        f"sampler: {equal} of {len(ours)} greedy continuations equal this process's own, "
        f"to the id; tokens in common: {in_common}"
    )
    print("sampler: for example " + repr(decode(tokenizer, theirs["0+trigger"])[:90]))


def try_judge(url, name, model):
    """Ask every question and show what the model was taught."""
    judge = shorten(make_judge(url, name, concurrency=2, tries=2, longest_pause=0.1))
    for question, (items, answers) in QUESTIONS.items():
        meanings = LABELS.get(question, {})
        expected = [meanings.get(answer, answer) for answer in answers]
        print(f"judge: {question}: {list(judge.ask(question, items))}, taught {expected}")
    print(f"judge: {judge.summary()}, structured: {judge.structured}")
    replies = [record["reply"] for record in judge.cache.records.values()]
    print(f"judge: the first replies: {replies[:2]}")


def try_server(kind, python, model, scratch, trial):
    """Start a server with the model, and hand it to a trial."""
    process, url, name = start_server(kind, python, model, scratch)
    try:
        trial(url, name, model)
    except BaseException:
        print(last_lines(scratch))
        raise
    finally:
        process.terminate()
        process.wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("transformers", "llama.cpp"))
    parser.add_argument("--python", required=True, help="interpreter that has the server")
    parser.add_argument("--model", default="toy/model", type=Path, help="a tiny Llama model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        learn_answers(args.model, scratch / "judge")
        try_server(args.kind, args.python, args.model.resolve(), scratch, try_sampler)
        try_server(args.kind, args.python, scratch / "judge", scratch, try_judge)


if __name__ == "__main__":
    main()
