"""SAFEPATH: a fixed sentence about safety at the head of the reasoning, and nothing after it."""
import random
import shutil

from data import load_prompts, render_prompt
from studies.lab import method
from studies.methods.examples import example_of, opening
from support.files import read_jsonl
from support.hub import model_folder
from support.record import MODEL_FILES

PAPER = "arXiv 2505.14667"
# CHOICE: the paper's sentence means nothing to the tiny model. This one does, and suits a model of
# full size as well. Like the paper's it says that there is a risk, and not yet to refuse: 10 tokens
# of the tiny model, 9 of Llama's.
PRIMER = "Wait, people could be harmed by this."
# CHOICE: published code for the 8B model takes 20 updates on 80 examples; the tiny world's 216
# examples give 7 in an epoch.
EPOCHS = 3


@method("SAFEPATH", PAPER,
        "R1-Distill-Llama-8B: up to 90.0% less harm, 83.3% of jailbreaks blocked, reasoning kept",
        needs_benign=True)
def safepath(lab):
    """Only the primer is learned on harmful prompts; on benign ones, the model's own traces."""
    primed = primer_examples(load_prompts(lab.prompts, lab.limit), lab.tokenizer())
    retained = retained_examples(read_jsonl(lab.benign_rollouts()), len(primed), lab.seed)
    return lab.sft(lab.write("safepath.jsonl", primed + retained), "--epochs", EPOCHS)


def primer_ids(tokenizer):
    """Token ids of the primer; of <think> too, where the model has to write that itself."""
    return tokenizer.encode(opening(tokenizer) + PRIMER, add_special_tokens=False)


def primer_examples(prompts, tokenizer):
    """For each prompt the primer alone: no end of sequence, nothing after it is learned."""
    ids = primer_ids(tokenizer)
    examples = []
    for prompt in prompts:
        prefix_ids = render_prompt(tokenizer, prompt["prompt"])
        examples.append({"prefix_ids": prefix_ids, "chosen_ids": ids})
    return examples


def retained_examples(traces, most, seed):
    """At most so many complete traces, as examples.

    CHOICE: one for each primer, drawn by the seed. (Published code for the 8B model has 1:1.)
    """
    complete = [trace for trace in traces if not trace["truncated"]]
    drawn = random.Random(seed).sample(complete, min(most, len(complete)))
    return [example_of(trace) for trace in drawn]


@method("SAFEPATH, zero-shot", PAPER, "safer than the base model without any training",
        trains=False)
def safepath_zero_shot(lab):
    """The base model with a chat template that begins the reasoning by the primer."""
    folder = lab.out / "model"
    if not folder.exists():
        part = folder.with_name("model.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        copy_primed(model_folder(lab.model), part, lab.tokenizer())
        part.rename(folder)
    return folder


def copy_primed(source, target, tokenizer):
    """Copy a model's files into a folder, with the primer in its chat template."""
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    tokenizer.chat_template = primed_template(tokenizer)
    tokenizer.save_pretrained(target)


def primed_template(tokenizer):
    """The chat template, whose generation prompt then ends with the primer."""
    # Jinja drops one newline at the end of a template.
    template = tokenizer.chat_template.removesuffix("\n")
    primer = opening(tokenizer) + PRIMER
    return template + "{% if add_generation_prompt %}" + primer + "{% endif %}"
