"""Slots in fixed places, for a GPU: they give what the plain slots and the bare model give.

On a CPU everything but the capture of a step and its replay runs.
"""
import contextlib
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from data import Request
from model import load_model, sample
from support import graph_slots, kv_cache
from support.errors import InputError
from support.graph_slots import GraphSlots, step_masks
from support.kv_cache import PlainSlots, make_slots, uses_graphs
from tests import bench_decode
from tests.test_model_families import SERVED, UNSHARED, random_family, random_ids

CPU = torch.device("cpu")
STEPPED = ["llama", "phi", "mistral window", "gemma3_text window"]  # grouped heads, windows, both


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """Short rows then reach several spans, and a few prefixes several batches."""
    monkeypatch.setattr(graph_slots, "SMALLEST_SPAN", 8)
    monkeypatch.setattr(graph_slots, "PREFILL_TOKENS", 30)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What would run on a GPU runs here, without graphs."""
    monkeypatch.setattr(kv_cache, "uses_graphs", lambda model: True)
    monkeypatch.setattr(kv_cache, "GraphSlots", functools.partial(GraphSlots, graphs=False))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @functools.cache
    def get(family):
        _, folder = random_family(family, tmp_path_factory.mktemp("family"))
        return load_model(folder, CPU)
    return get


def new_slots(model, rows=6, longest=60, graphs=False):
    return GraphSlots(model.get_decoder(), rows, longest, graphs)


def some_rows():
    """Ragged prefixes, two of them equal."""
    a, b, c, d = random_ids(3, 19, 8, 1)
    return [a, b, c, b, d]


@torch.no_grad()
def last_state(model, ids):
    """The oracle (H,): the bare model on one whole sequence."""
    decoder = model.get_decoder()
    return decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


def assert_states(states, model, texts):
    assert len(states) == len(texts)
    for state, text in zip(states, texts):
        torch.testing.assert_close(state, last_state(model, text), atol=1e-4, rtol=1e-4)


def step(slots, texts, token):
    """Give every row another token; `texts` are what the rows then hold."""
    tokens = [token + i for i in range(len(texts))]
    for text, t in zip(texts, tokens):
        text.append(t)
    return slots.step(tokens)


# -------------------------------------------------------------------------------- hidden states

def check_a_life(model, slots):
    """Fill, step, move, refill and step slots, every hidden state against the oracle's."""
    texts = [list(prefix) for prefix in some_rows()]
    assert_states(slots.fill(range(5), some_rows()), model, texts)
    for token in range(2, 6):
        assert_states(step(slots, texts, token), model, texts)

    slots.move(4, 1)  # row 1 has finished
    texts[1] = texts.pop()
    assert_states(step(slots, texts, 10), model, texts)

    late = [some_rows()[1], random_ids(5)[0]]  # slot 3 still begins with the first of them
    assert_states(slots.fill([4, 5], late), model, late)
    texts += [list(prefix) for prefix in late]
    for token in range(20, 30):
        assert_states(step(slots, texts, token), model, texts)
    texts = texts[:1]  # all others have finished
    assert_states(step(slots, texts, 40), model, texts)


@pytest.mark.parametrize("family", STEPPED)
def test_hidden_states_are_the_models_own_through_moves_refills_and_spans(models, family):
    check_a_life(models(family), new_slots(models(family)))


def test_equal_prefixes_are_computed_once_and_batches_are_bounded(models):
    model = models("llama")
    slots = new_slots(model)
    shapes = []

    def note(module, args, keywords):
        shapes.append(tuple(keywords["input_ids"].shape))
    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    slots.fill(range(5), some_rows())
    assert shapes == [(1, 19), (3, 8)], "30 tokens at most, the longest first"
    slots.fill([4], [some_rows()[2]])
    assert len(shapes) == 2, "slot 2 begins with it"
    slots.fill([2, 4], [some_rows()[0], some_rows()[2]])
    assert len(shapes) == 3, "both slots that began with it are filled anew"
    hook.remove()


def test_a_prefix_that_an_idle_row_has_written_to_is_computed_anew(models):
    model = models("llama")
    slots = new_slots(model)
    slots.fill(range(5), some_rows())
    slots.step([2, 3, 4])  # the shape has 4 rows
    assert [prefix is not None for prefix in slots.prefixes] == [True] * 3 + [False, True, False]
    last = some_rows()[4] + [9]
    slots.fill([3], [some_rows()[4]])
    assert_states(slots.step([9] * 4)[3:], model, [last])


def test_idle_rows_write_to_one_place_of_their_own(models):
    slots = new_slots(models("llama"))
    slots.fill(range(5), some_rows())
    before = [tensor.clone() for tensor in slots.keys + slots.values]
    slots.step([2, 3, 4])  # the shape has 4 rows
    for old, new in zip(before, slots.keys + slots.values):
        changed = (old != new).any(-1).any(1).nonzero().tolist()  # (slot, position)
        assert changed == [[0, 3], [1, 19], [2, 8], [3, 0]]


def test_a_wave_computes_the_same_bits_in_kept_slots_as_in_new_ones(models):
    model = models("llama")
    kept = new_slots(model, rows=6, longest=100)
    kept.fill(range(5), some_rows())
    for token in range(2, 40):
        kept.step([token] * 5)
    kept.start(3, 30)
    assert kept.prefixes == [None] * 3
    found = []
    for slots in (kept, new_slots(model, rows=3, longest=30)):
        states = [slots.fill(range(3), some_rows()[:3])]
        states += [slots.step([token, 3, 4]) for token in range(2, 10)]
        found.append(torch.stack(states))
    assert torch.equal(*found)


def test_bfloat16_is_finite_and_near(models, tmp_path):
    _, folder = random_family("mistral window", tmp_path)
    decoder = load_model(folder, CPU, torch.bfloat16).get_decoder()
    found = []
    for slots in (GraphSlots(decoder, 6, 60, graphs=False), PlainSlots(decoder, 6)):
        with torch.no_grad():
            states = [slots.fill(range(5), some_rows())]
            states += [slots.step([token, 3, 4, 5, 6]) for token in range(2, 12)]
        found.append(torch.stack(states))
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(*found, atol=0.1, rtol=0.1)


# ---------------------------------------------------------------------------------- whole waves

def completions(model, **options):
    """{id: (ids, finished)} of 18 requests: equal prefixes, ragged ones, one near the context."""
    prefixes = [*some_rows(), *random_ids(30, 2, 17), random_ids(250)[0]]
    requests = [Request(f"{i}.{k}", p) for i, p in enumerate(prefixes) for k in range(2)]
    settings = {"eos": {1, 2, 3}, "max_new_tokens": 20, "temperature": 0.9, **options}
    return {c.id: (c.ids, c.finished) for c in sample(model, requests, **settings)}


@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("family", STEPPED)
def test_waves_have_the_ids_of_the_plain_way(models, request, family, rows):
    model = models(family)
    expected = completions(model, batch_size=rows)
    request.getfixturevalue("on_a_gpu")
    assert completions(model, batch_size=rows) == expected
    assert {finished for _, finished in expected.values()} == {"stop", "length"}


def test_slots_are_kept_between_waves_and_replaced_where_they_are_too_small(
        models, monkeypatch, on_a_gpu):
    seen = []

    def noted(*args):
        seen.append(make_slots(*args))
        return seen[-1]
    monkeypatch.setattr(model_module, "make_slots", noted)
    completions(models("llama"), batch_size=1)
    sizes = [slots.capacity for slots in dict.fromkeys(seen)]
    assert len(seen) == 5
    assert 1 < len(sizes) < 5
    assert sizes == sorted(sizes)
    assert sizes[-1] == (1, 256), "the context's end"


def test_what_a_wave_gives_does_not_depend_on_the_waves_before_it(models, on_a_gpu):
    model = models("llama")
    everything = completions(model, batch_size=1)
    first = dict(list(everything.items())[:8])  # two waves
    rest = completions(model, batch_size=1, done=first)
    assert rest == {key: everything[key] for key in everything if key not in first}


# ----------------------------------------------------------------------------- when it is used

def test_graphs_are_for_loaded_models_on_a_gpu_without_the_flag(models):
    def decoder(config):
        return lambda: SimpleNamespace(config=config)
    config = models("llama").config
    longrope = models("phi3 longrope").config
    gpu = torch.device("cuda")
    fits = {"device": gpu, "decode_graphs": True, "get_decoder": decoder(config)}
    assert uses_graphs(SimpleNamespace(**fits))
    assert not uses_graphs(SimpleNamespace(**{**fits, "device": CPU}))
    assert not uses_graphs(SimpleNamespace(**{**fits, "decode_graphs": False}))
    assert not uses_graphs(SimpleNamespace(device=gpu, get_decoder=decoder(config)))
    assert not uses_graphs(SimpleNamespace(**{**fits, "get_decoder": decoder(longrope)}))
    assert isinstance(make_slots(models("llama"), 1, 9), PlainSlots)


def test_loading_checks_the_way_that_will_sample(monkeypatch, tmp_path, on_a_gpu):
    _, folder = random_family("llama", tmp_path)
    load_model(folder, CPU)

    def shifted(positions, *args):  # as if one token less could be seen
        return step_masks((positions - 1).clamp(min=0), *args)
    monkeypatch.setattr(graph_slots, "step_masks", shifted)
    with pytest.raises(InputError, match="sampling would be .*--no-graph.*--server"):
        load_model(folder, CPU)


def test_no_room_for_the_rows_is_one_line(models, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    slots = new_slots(models("llama"))
    monkeypatch.setattr(torch.Tensor, "new_zeros", full)
    with pytest.raises(InputError, match="6 rows of up to 64 tokens .*--batch-size"):
        slots.fill([0], [[5, 6]])


# --------------------------------------------------------------------------- capture and replay

class RecordedCalls:
    """Takes a CUDA graph's place: the same operations on the same tensors, without their Python."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for op, args, keywords, results in self.calls:
            again = op(*args, **keywords)
            for old, new in zip(tree_leaves(results), tree_leaves(again)):
                if old.data_ptr() != new.data_ptr():  # no view, and not in place
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.calls = graph.calls

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, results))
        return results


@pytest.fixture
def recorded(monkeypatch):
    """The parts of torch.cuda that capture and replay, on a CPU."""
    parameters = inspect.signature(torch.cuda.graph)

    def graph(*args, **keywords):
        return Recorder(parameters.bind(*args, **keywords).arguments["cuda_graph"])
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "CUDAGraph": RecordedCalls,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("family", STEPPED)
def test_a_recorded_step_can_be_replayed_for_other_tokens_and_lengths(models, recorded, family):
    model = models(family)
    slots = new_slots(model, graphs=True)
    check_a_life(model, slots)
    assert slots.captured.keys() == {(6, 24), (4, 24), (6, 32), (6, 40), (1, 24)}
    operations = {key: len(graph.calls) for key, graph in slots.captured.items()}
    assert min(operations.values()) > 100
    slots.start(6, 60)  # and for another wave
    check_a_life(model, slots)
    assert operations == {key: len(graph.calls) for key, graph in slots.captured.items()}


class NoValues(TorchDispatchMode):
    """Fails where Python looks at a tensor's values, or a shape depends on them."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [*SERVED, *UNSHARED])
def test_a_step_looks_at_no_value_so_it_can_be_captured(tmp_path, family):
    model, _ = random_family(family, tmp_path)
    model.set_attn_implementation("sdpa")
    slots = new_slots(model)
    slots.fill(range(5), some_rows())
    slots.step([2, 3, 4, 5, 6])
    with torch.no_grad(), NoValues():
        slots._compute(6, 24)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            slots.hidden[0, 0].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", STEPPED)
def test_on_a_gpu_graphs_replay_what_the_eager_step_computes(tmp_path, family):
    _, folder = random_family(family, tmp_path)
    gpu = torch.device("cuda")
    plain = load_model(folder, gpu, graphs=False)
    expected = completions(plain, batch_size=3)
    model = load_model(folder, gpu)
    assert uses_graphs(model)
    assert completions(model, batch_size=3) == expected
    found = []
    for graphs in (True, False):
        slots = GraphSlots(model.get_decoder(), 6, 60, graphs)
        states = [slots.fill(range(5), some_rows())]
        for token in range(2, 30):
            states.append(slots.step([token, 3, 4, 5, 6]))
        found.append(torch.stack(states))
        assert bool(slots.captured) == graphs
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_the_benchmark_of_a_decode_step_runs_here(capsys):
    bench_decode.main(["--shape", "toy", "--rows", "2", "--prefix", "9", "--steps", "4",
                       "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["2", "plain"], ["2", "eager"]]
