"""Tiny random models of many families: each agrees with its own logits, or is refused.

The oracle is always the model's own class, with its plainest attention, on one sequence at a time.
"""
import math
import re
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel

import ipo
from data import Request, collate
from model import completion_logps, context_length, load_model, sample, save_model, token_logps
from support.errors import InputError
from support.fused_head import output_logits
from support.kv_cache import check_sampling
from support.model_check import check_model, steady_length

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = {"sliding_window": 6}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}

SERVED = {  # by all of sampling, trees and padded rows
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 4},
    "glm": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    "gemma": {},
    "phi3": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "phi3 longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "cohere": {},
    "phi": {"resid_pdrop": 0.1},
    "seed_oss": {"residual_dropout": 0.1},
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1},
    "apertus": {},
}
UNSHARED = {  # the same, but trees are refused, and why
    "mistral window": (WINDOW, "no sliding window"),
    "qwen2 window": (
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}, "no sliding window"),
    "smollm3 window": (
        {**WINDOW, "use_sliding_window": True, "num_hidden_layers": 4}, "no sliding window"),
    "phi3 window": (WINDOW, "no sliding window"),
    "gemma3_text window": (MIXED, "no sliding window"),
    "olmo3 window": (MIXED, "no sliding window"),
    "exaone4 window": ({**WINDOW, "sliding_window_pattern": 2}, "no sliding window"),
    "cohere2 window": (MIXED, "no sliding window"),
    "nemotron": ({}, r"would be \d\S* nats a token off the model's own logits"),
    "stablelm": ({}, r"would be \d\S* nats a token off the model's own logits"),
}
UNSAMPLED = {  # padded rows only: trees are refused, and the sampler for this reason
    "gemma2": (MIXED, "Gemma2ForCausalLM does not support an attention implementation"),
    "falcon_h1": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
         "mamba_n_groups": 1, "mamba_chunk_size": 8}, "layers of the kind hybrid"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
}
SETTINGS = dict(SERVED)
for family, (settings, _) in {**UNSHARED, **UNSAMPLED}.items():
    SETTINGS[family] = settings


class NoTokenizer:
    """Takes the tokenizer's place where only weights matter."""

    def save_pretrained(self, folder):
        """There is nothing to save."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (the oracle, a folder with its weights), each made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = random_family(family, tmp_path_factory.mktemp("family"))
        return made[family]
    return get


def random_family(family, folder, **more):
    """A tiny model whose vectors are random too: biases, norms, what else a class may have."""
    settings = {**TINY, **SETTINGS.get(family, {}), **more}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += torch.randn(p.shape) / 10
    model.save_pretrained(folder)
    return model, folder


def random_ids(*lengths):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(2, 60, (length,), generator=g).tolist() for length in lengths]


def some_sequences():
    """Three branches of one prefix, two of them equal, and a shorter prefix."""
    trunk, other, a, b, c = random_ids(12, 3, 5, 9, 7)
    return [(trunk, a), (other, b), (trunk, c), (trunk, a)]


@torch.no_grad()
def own_logps(model, sequences):
    """The oracle (B,): the model's own logits, one sequence at a time."""
    logps = []
    for prefix, completion in sequences:
        table = model(torch.tensor([prefix + completion])).logits[0].log_softmax(-1)
        logps.append(sum(table[len(prefix) + i - 1, t] for i, t in enumerate(completion)))
    return torch.stack(logps)


@torch.no_grad()
def policy_logps(folder, sequences, **options):
    """What training computes, (policy, (B,)), in the mode in which it trains."""
    policy, _ = ipo.load_policy(folder, CPU, 0, 1, torch.float32, **options)
    assert policy.training
    return policy, policy(**policy.rows(sequences, CPU))


def assert_own(got, model, sequences):
    """Within 1e-4 nats a token of the model's own."""
    lengths = torch.tensor([len(completion) for _, completion in sequences])
    off = (got - own_logps(model, sequences)).abs() / lengths
    assert off.max() < 1e-4


# ------------------------------------------------------------------------------------ by family

@pytest.mark.parametrize("family", [*SERVED, *UNSHARED])
def test_greedy_sampling_is_generate(models, family):
    model, folder = models(family)
    requests = [Request(str(i), ids) for i, ids in enumerate(random_ids(3, 9, 14, 9, 1))]
    requests.append(Request("branch", requests[2].prefix[:8] + [7, 9]))
    found = sample(load_model(folder, CPU), requests, eos={1}, max_new_tokens=12, temperature=0,
                   batch_size=3)
    longest = 0
    for completion in found:
        prefix = next(r.prefix for r in requests if r.id == completion.id)
        whole = model.generate(torch.tensor([prefix]), max_new_tokens=12, do_sample=False,
                               attention_mask=torch.ones(1, len(prefix)))
        assert completion.ids == whole[0, len(prefix):].tolist()
        longest = max(longest, len(completion.ids))
    assert longest > 8, "longer than the windows"


@pytest.mark.parametrize("family", SETTINGS)
def test_training_computes_the_models_own_logits_and_saves_the_model(models, tmp_path, family):
    model, folder = models(family)
    sequences = some_sequences()
    attn = "eager" if family == "gemma2" else "sdpa"
    policy, logps = policy_logps(folder, sequences, share=False, attn=attn)
    assert_own(logps, model, sequences)
    save_model(policy.lm, NoTokenizer(), tmp_path, 0, torch.float32)
    saved, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(own_logps(saved, sequences), own_logps(model, sequences))


@pytest.mark.parametrize("family", SERVED)
def test_trees_compute_the_models_own_logits(models, family):
    model, folder = models(family)
    sequences = some_sequences()
    for rank in (0, 2):
        _, logps = policy_logps(folder, sequences, lora_rank=rank)
        assert_own(logps, model, sequences)


@pytest.mark.parametrize("family", UNSHARED)
def test_classes_that_would_misread_trees_are_refused(models, family):
    model, folder = models(family)
    _, reason = UNSHARED[family]
    message = f"{type(model).__name__}.*{reason}.*train it with --no-share"
    with pytest.raises(InputError, match=message):
        ipo.load_policy(folder, CPU, 0, 1, torch.float32)


@pytest.mark.parametrize("family", UNSAMPLED)
def test_classes_that_the_sampler_would_misread_are_refused(models, family):
    _, folder = models(family)
    _, reason = UNSAMPLED[family]
    with pytest.raises(InputError, match=f"{reason}.*sample from a server instead"):
        load_model(folder, CPU)
    with pytest.raises(InputError, match="train it with --no-share"):
        ipo.load_policy(folder, CPU, 0, 1, torch.float32)


@pytest.mark.parametrize("family, settings, message", [
    ("qwen3_moe", EXPERTS, "has no place in a Qwen3MoeForCausalLM"),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "GPT2LMHeadModel: its decoder has no"),
])
def test_classes_that_training_cannot_read_are_refused(tmp_path, family, settings, message):
    random_family(family, tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        ipo.load_policy(tmp_path, CPU, 0, 1, torch.float32, share=False)


def test_a_class_without_a_longest_text_is_refused(tmp_path):
    AutoConfig.for_model("mamba").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="names no max_position_embeddings"):
        context_length(tmp_path)


# --------------------------------------------------------------------------- longrope and windows

def test_rows_that_would_change_the_angles_of_others_are_refused(models):
    model, folder = models("phi3 longrope")
    short, long, end = random_ids(5, 30, 4)
    assert steady_length(model.config) == 32
    policy, _ = policy_logps(folder, [(short, end)])
    for share in (True, False):
        policy.share = share
        for prefix in (long, long[:28]):
            rows = policy.rows([(short, end), (prefix, end)], CPU)
            if len(prefix) == 28:  # 32 tokens in all
                policy(**rows)
                continue
            with pytest.raises(InputError, match="a row of 3. tokens .* longer than 32"):
                policy(**rows)
    sampler = load_model(folder, CPU)
    with pytest.raises(InputError, match="a row of 33 tokens would .*--max-new-tokens"):
        next(sample(sampler, [Request("a", short)], eos={1}, max_new_tokens=28))
    with pytest.raises(InputError, match="a row of 34 tokens would"):
        completion_logps(sampler, **collate([(long, end)]))


def test_a_probe_leaves_no_trace(models):
    _, folder = models("mistral window")
    model = load_model(folder, CPU)
    state = torch.get_rng_state()
    model.train()

    def noisy(sequences):
        torch.rand(3)
        return own_logps(model, sequences)
    check_model(model, {"x": noisy}, "no")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.sliding_window == 6
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_a_probe_of_the_embedded_model_takes_a_moment():
    model = AutoModelForCausalLM.from_pretrained("toy/model").eval()
    check_sampling(model)
    started = time.process_time()
    check_sampling(model)
    assert time.process_time() - started < 0.2


# ------------------------------------------------------------------------- what a probe must find

def test_live_dropout_that_no_config_names_is_found(models, monkeypatch):
    _, folder = models("llama")
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: F.dropout(forward(self, x), 0.05, self.training))
    with pytest.raises(InputError, match="LlamaForCausalLM: training would be"):
        ipo.load_policy(folder, CPU, 0, 1, torch.float32, share=False)
    load_model(folder, CPU)


def test_buffers_that_nothing_computes_are_found(models, monkeypatch):
    _, folder = models("llama")
    initialise = LlamaPreTrainedModel._init_weights

    def forgetful(self, module):
        if "Rotary" not in type(module).__name__:
            initialise(self, module)
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", forgetful)
    with pytest.raises(InputError, match="nothing computes its buffer model.rotary_emb.inv_freq"):
        ipo.load_policy(folder, CPU, 0, 1, torch.float32)


def test_weights_that_are_not_finite_are_found(models, tmp_path):
    model, _ = models("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for load in (load_model, lambda path, device: policy_logps(path, some_sequences())):
        with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}: its logits are not"):
            load(tmp_path, CPU)


@pytest.mark.parametrize("extra, missing, message", [
    ({}, "model.norm.weight", "files lack model.norm.weight"),
    ({}, "model.layers.1.mlp.up_proj.weight", "files lack model.layers.1.mlp.up_proj.weight"),
    ({"extra": torch.zeros(1)}, None, "files should not hold extra"),
])
def test_a_model_that_lacks_a_weight_is_not_sampled_from(models, tmp_path, extra, missing, message):
    model, _ = models("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(missing, None)
    save_file({**weights, **extra}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        load_model(tmp_path, CPU)


def test_a_missing_buffer_is_named(models, tmp_path):
    model, _ = models("apertus")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.act_fn.beta"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="files lack model.layers.1.mlp.act_fn.beta"):
        ipo.load_policy(tmp_path, CPU, 0, 1, torch.float32)


# ---------------------------------------------------------------------------------- the one head

@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "phi", "gemma2", "falcon_h1"])
def test_logits_from_hidden_states_are_the_models_own(models, monkeypatch, family):
    model, _ = models(family)
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 32, generator=g, requires_grad=True)
    targets = torch.randint(60, (9,), generator=g)
    states = BaseModelOutputWithPast(last_hidden_state=hidden[None])
    monkeypatch.setattr(model.get_decoder(), "forward", lambda **keywords: states)
    logits = model(input_ids=targets[None]).logits[0]  # of these states, whatever the ids
    with torch.no_grad():
        torch.testing.assert_close(output_logits(model, hidden), logits, atol=1e-5, rtol=1e-5)
    inputs = [hidden, *model.get_output_embeddings().parameters()]
    weights = torch.randn(9, generator=g)
    for temperature in (1.0, 0.6):  # GRPO scores at the temperature at which it samples
        expected = -F.cross_entropy(logits / temperature, targets, reduction="none")
        wanted = torch.autograd.grad(expected, inputs, weights, retain_graph=True)
        got = token_logps(model, hidden, targets, chunk=4, temperature=temperature)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(got, inputs, weights), wanted):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
