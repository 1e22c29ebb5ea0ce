"""Is a model usable here? Looked at without loading it: files, tokenizer, context, architecture."""
import contextlib
import copy
import io
import struct

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from data import CLOSE, render_prompt
from ipo import Policy
from model import (
    context_length,
    empty_model,
    eos_ids,
    load_config,
    load_tokenizer,
    weight_files,
)
from support.errors import InputError
from support.files import read_json
from support.hub import WEIGHTS, is_hub_name, model_folder
from support.kv_cache import check_sampling
from support.lora import plain_name
from support.model_check import (
    FLASH,
    PLAIN_WAY,
    SERVE_IT,
    blocks_of,
    check_policy,
    refused_if_it_fails,
    remove_dropout,
    stored_tensors,
)
from support.server import ServerSampler

INDEX = "model.safetensors.index.json"
SMALL_VOCABULARY = 512
SMALL_WIDTH = 256  # of the feed-forward layers
LARGEST_TRIAL = 200_000_000  # parameters, of 4 bytes each, that are made to try an architecture
HUB_PATIENCE = 4  # seconds
TRIED_PROMPTS = 3  # of a file, at each end: letters and tokens do not go quite together


class ModelFacts:
    """What the other checks need of a model that could be opened; None where it could not."""

    def __init__(self, path):
        self.path = path
        self.tokenizer = None
        self.eos = None
        self.context = None

    @property
    def usable(self):
        """Whether prompts can be rendered for it."""
        return self.tokenizer is not None and self.context is not None


def check_model(path, name, findings, samples=False, trainings=()):
    """Report all that is wrong with a model: `path` is a directory or a name on the hub.

    name: of the variable, as in "MODEL=..."; samples: whether it is sampled in this project's own
    processes; trainings: flags (attn, no_share) of the stages that train it. Returns ModelFacts.
    """
    facts = ModelFacts(path)
    if not _reported(_look_for_folder, facts, name=name, findings=findings):
        return facts
    whole = [
        _reported(_look_at_config, facts, name=name, findings=findings),
        _reported(_look_at_tokenizer, facts, name=name, findings=findings),
    ]
    if samples or trainings:  # else a server alone has its weights
        trained = bool(trainings)
        whole.append(_reported(_look_at_weights, facts, trained, name=name, findings=findings))
    if not all(whole):
        return facts
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if samples:
            _reported(_try_sampling, facts, name=name, findings=findings)
        for flags in trainings:
            _reported(_try_training, facts, flags, name=name, findings=findings)
    return facts


def warn_if_it_does_not_reason(facts, name, findings):
    """Warn of a model whose reasoning nothing would find."""
    if CLOSE not in facts.tokenizer.get_vocab():
        findings.warning(f"{name}: its tokenizer has no token {CLOSE}. A model that does not write "
                         "its reasoning between <think> and </think> gives no pairs.")


def _reported(look, facts, *arguments, name, findings):
    """Whether a check found nothing; a strange file may fail in any way."""
    try:
        look(facts, *arguments)
    except InputError as error:
        findings.problem(f"{name}: {str(error).removeprefix(f'{facts.path}: ')}")
        return False
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        findings.problem(f"{name}: {reason}. Is it the directory of a causal language model?")
        return False
    return True


@contextlib.contextmanager
def quiet():
    """Without what libraries say while a model that is never used is made."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def check_context(facts, max_new_tokens, prompts, findings):
    """Report files whose prompts all leave no room for the longest completion.

    prompts: {(variable, file): prompts}. A few that are too long are dropped in the run: of these
    there is a warning only.
    """
    room = facts.context - max_new_tokens
    longest = {}  # file: tokens of its longest prompt
    too_long = []  # files without any prompt that fits
    for (name, path), loaded in prompts.items():
        if not loaded:
            continue
        by_length = sorted(loaded, key=lambda prompt: len(prompt["prompt"]))
        longest[path] = max(_lengths(facts.tokenizer, by_length[-TRIED_PROMPTS:]))
        if min(_lengths(facts.tokenizer, by_length[:TRIED_PROMPTS])) > room:
            too_long.append(f"{name} ({path})")
    limit = (f"TOKENS={max_new_tokens}: the model reads at most {facts.context} tokens, prompt and "
             "completion together")
    if too_long:
        others = f" and of {len(too_long) - 1} more files" if len(too_long) > 1 else ""
        fitting = max(1, facts.context - max(longest.values()))
        findings.problem(f"{limit}, so every prompt of {too_long[0]}{others} would be dropped. "
                         f"TOKENS={fitting} leaves room for all.")
    elif max(longest.values(), default=0) > room:
        path = max(longest, key=longest.get)
        findings.warning(f"{limit}, and the longest prompt of {path} has {longest[path]}. "
                         "Such prompts are dropped and counted.")


def _lengths(tokenizer, prompts):
    return [len(render_prompt(tokenizer, prompt["prompt"])) for prompt in prompts]


def server_sampler(url, facts, http):
    """A sampler of a few tokens, from a server that holds a model; http: see Endpoint."""
    return ServerSampler(
        facts.path,
        url,
        facts.tokenizer,
        facts.eos,
        facts.context,
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=4,
        seed=0,
        concurrency=1,
        **http,
    )


# ------------------------------------------------------------------------------------- its files

def _look_for_folder(facts):
    model_folder(facts.path, weights=False)


def _look_at_config(facts):
    load_config(facts.path)
    facts.context = context_length(facts.path)


def _look_at_tokenizer(facts):
    with quiet():
        tokenizer = load_tokenizer(facts.path)
    facts.eos = eos_ids(facts.path, tokenizer)
    if None in facts.eos:
        raise InputError("neither generation_config.json nor the tokenizer names an "
                         "end-of-sequence token, so no completion would end. Add eos_token_id.")
    ids = render_prompt(tokenizer, "Hello.")
    rows = load_config(facts.path).get_text_config().vocab_size
    if max(ids) >= rows:
        raise InputError(f"its chat template gives token {max(ids)}, but the model knows {rows} "
                         "tokens. Its tokenizer belongs to another model.")
    facts.tokenizer = tokenizer


def _look_at_weights(facts, is_trained):
    """Raise InputError where files are missing, cut short, or of another architecture."""
    folder = model_folder(facts.path, weights=False)
    missing = _missing_files(folder)
    if missing and is_hub_name(facts.path):
        _look_at_hub(facts.path, missing)
        return
    model_folder(facts.path)  # no weights at all, or weights of another kind
    if missing:
        named = f", which {INDEX} names" if (folder / INDEX).is_file() else ""
        raise InputError(f"{folder / missing[0]} is missing{named}. Copy or download it again.")
    shapes = {}
    for file in weight_files(facts.path):
        shapes.update(_stored_shapes(file))
    if is_trained:  # in sampling transformers may rename weights, in training nothing does
        _compare_shapes(facts.path, shapes)


def _missing_files(folder):
    """Names of weight files that are not in a folder."""
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX, "weight_map")["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    return [name for name in names if not (folder / name).is_file()]


def _look_at_hub(model, missing):
    """Raise InputError where the hub cannot give weights that are not there yet."""
    from huggingface_hub import HfApi

    try:
        held = HfApi().model_info(str(model), timeout=HUB_PATIENCE).siblings
    except Exception as error:  # requests, httpx, the hub's own: whichever its client uses
        if "Timeout" in type(error).__name__:
            return  # a slow hub, for which the run waits longer
        raise InputError(f"its weights are not on this machine, and the hub does not give them "
                         f"({type(error).__name__}).") from None
    names = {file.rfilename for file in held}
    absent = [name for name in missing if name not in names]
    if absent:
        raise InputError(f"the hub holds no {absent[0]} of it. "
                         f"Weights must be safetensors ({WEIGHTS}).")


def _stored_shapes(file):
    """{name: shape} of a safetensors file; InputError for one that is cut short or damaged."""
    try:
        with safe_open(file, "pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    except (SafetensorError, struct.error) as error:
        raise InputError(f"{file}: cut short or damaged ({error}). "
                         "Copy or download it again.") from None


def _compare_shapes(path, shapes):
    """Raise InputError where training would not find the weights that it needs."""
    with quiet():
        model = empty_model(path)
    for name, tensor in stored_tensors(model).items():
        name = plain_name(name)
        if name not in shapes:
            raise InputError(f"the safetensors files lack {name}.")
        if list(shapes[name]) != list(tensor.shape):
            raise InputError(f"its config.json asks for {name} of shape {list(tensor.shape)}, the "
                             f"safetensors files hold {list(shapes[name])}. "
                             "One of them is another model's.")


# ------------------------------------------------------------------------------- its architecture

def _try_sampling(facts):
    """Raise InputError for an architecture that sampling would get wrong."""
    model = small_model(facts.path, "sdpa", "sampling", SERVE_IT)
    if model is not None:
        check_sampling(model.eval())


def _try_training(facts, flags):
    """Raise InputError for an architecture that training would get wrong."""
    attention = getattr(flags, "attn", "sdpa")
    if attention == FLASH:  # runs on a GPU only
        return
    model = small_model(facts.path, attention, f"--attn {attention}", PLAIN_WAY)
    if model is not None:
        blocks_of(model)
        share = not getattr(flags, "no_share", False)
        check_policy(Policy(model, share).train(), torch.device("cpu"))


def small_model(path, attention, use, remedy):
    """A model of the same architecture with random weights, small enough to be tried on the CPU.

    It has one layer of each kind, two at least, few words, and narrow feed-forward layers. None
    where even that is large. use and remedy are those of `refused_if_it_fails`.
    """
    config = copy.deepcopy(load_config(path))
    remove_dropout(config)
    _shrink(config.get_text_config())
    make = AutoModelForCausalLM.from_config
    settings = {"dtype": torch.float32, "attn_implementation": attention}
    with refused_if_it_fails(path, use, remedy):
        with torch.device("meta"):
            empty = make(copy.deepcopy(config), **settings)
        if sum(p.numel() for p in empty.parameters()) > LARGEST_TRIAL:
            return None
        return make(config, **settings)


def _shrink(config):
    """Make a config describe a small model of the same kinds of layers."""
    layers = config.num_hidden_layers
    # Settings that differ from layer to layer are lists: kinds of layers are different columns.
    per_layer = {}
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == layers:
            per_layer[name] = value
    first_of_kind = {}
    for i in range(layers):
        kind = str([values[i] for values in per_layer.values()])
        first_of_kind.setdefault(kind, i)
    kept = sorted(first_of_kind.values())
    if len(kept) == 1 and layers > 1:
        kept.append(1)
    for name, values in per_layer.items():
        setattr(config, name, [values[i] for i in kept])
    config.num_hidden_layers = len(kept)
    config.vocab_size = min(config.vocab_size, SMALL_VOCABULARY)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, None)  # they need not be among the few words
    if getattr(config, "intermediate_size", 0):
        config.intermediate_size = min(config.intermediate_size, SMALL_WIDTH)
