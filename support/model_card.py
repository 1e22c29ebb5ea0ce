"""The model card: README.md in the folder of a trained model, which can be uploaded as it is.

It is written from the records that stand beside the folder (NAME.config.json) and beside the files
that it was trained on. It names files without their folders and judges without their addresses.
"""
import json
import re
from pathlib import Path

from support.files import read_json, read_text, write_text
from support.hub import is_hub_name
from support.record import fingerprint
from support.stages import sidecar

# Between these `evaluate.py report` puts its table; all other text stays as it is found.
BEGIN = "<!-- evaluation: begin. `evaluate.py report` writes what is between these two lines. -->"
END = "<!-- evaluation: end -->"

PAPER = "[arXiv 2509.24393](https://arxiv.org/abs/2509.24393)"
PREFERENCES = "ipo.py train"
METHODS = {  # by the program that trained the model
    PREFERENCES: "Intervened Preference Optimization (IPO, not *Identity* Preference "
                 f"Optimization; {PAPER})",
    "studies/sft.py": f"supervised fine-tuning, a baseline of {PAPER}",
    "studies/grpo.py": f"GRPO with a safety judge as reward, a baseline of {PAPER}",
}
# Settings that are words. Of all others numbers and switches are shown, because text may be a path.
WORDS = ("dtype", "save_dtype", "score_from", "attn", "reward")


# -------------------------------------------------------------------------------------- the card

def write_card(out):
    """Write `out/README.md` for a model that was just trained, unless there is one.

    out: its folder, whose config stands beside it.
    """
    path = Path(out) / "README.md"
    if not path.exists():
        write_text(path, model_card(Path(out)))


def model_card(out):
    """The text of the card of a trained model."""
    config = read_json(sidecar(out, "config"), "flags", "inputs")
    flags = config["flags"]
    made_by = config.get("made by", "")
    method = METHODS.get(made_by, "a program of this project")
    base, stages = base_model(flags["model"])
    lines = front_matter(flags["model"], base, made_by)
    lines += ["", f"# {escape(out.name)}", ""]
    lines.append(f"Trained from {escape(model_name(base))} with {method}.")
    if made_by == PREFERENCES:
        lines.append(stage_sentence(flags, stages + 1))
    lines += ["", "Safety training makes harmful text less likely. It does not rule it out.", ""]
    lines += ["## Training", "", "Data, with the first 16 hex digits of the SHA-256:", ""]
    lines += data_lines(config)
    lines += ["", "| setting | value |", "|---|---|"]
    for name, value in shown_settings(flags).items():
        lines.append(f"| {escape(name)} | {escape(value)} |")
    lines += ["", code_sentence(config, made_by), ""]
    lines += ["## Evaluation", "", BEGIN, "", "Not evaluated yet.", "", END]
    return "\n".join(lines) + "\n"


def base_model(model):
    """(the model that `model` was made from in the end, stages of IPO in between)."""
    stages = 0
    while sidecar(model, "config").exists():
        config = read_json(sidecar(model, "config"), "flags")
        if "model" not in config["flags"]:
            break  # a record of something else
        if config.get("made by") == PREFERENCES:
            stages += 1
        model = config["flags"]["model"]
    return model, stages


def front_matter(model, base, made_by):
    """The lines of metadata that the hub reads."""
    lines = ["---"]
    if is_hub_name(base):
        lines.append(f"base_model: {json.dumps(str(base))}")
    else:
        lines.append("# base_model: NAME/ON-THE-HUB of the model that training started from")
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    if made_by == PREFERENCES:
        lines.append("- intervened-preference-optimization")
    lines += ["- safety", "- reasoning"]
    license_name = stated_license(Path(model) / "README.md")
    if license_name:
        lines.append(f"license: {license_name}  # as the card of the base model says")
    else:
        lines.append("# license: that of the base model")
    lines.append("---")
    return lines


def stated_license(card):
    """The license that the front matter of a card names; None where there is no such card."""
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    metadata = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if not metadata:
        return None
    stated = re.search(r"^license: *[\"']?([\w.-]+)", metadata[1], re.MULTILINE)
    return stated[1] if stated else None


def stage_sentence(flags, stage):
    """What one stage of preference training started from and was compared with."""
    start = escape(model_name(flags["model"]))
    reference = escape(model_name(flags.get("reference") or flags["model"]))
    text = f"This is stage {stage}: it started from {start}, with {reference} as the reference."
    if flags.get("score_from") == "prompt":
        text += " Whole trajectories were scored, which is an ablation of the paper."
    return text


def data_lines(config):
    """A list of the files that the model was trained on, and how each was made."""
    lines = []
    models = (config["flags"]["model"], config["flags"].get("reference"))
    for path, hashed in config["inputs"].items():
        if path not in models:
            lines.append(f"- {escape(Path(path).name)} (`{hashed}`){how_made(path)}")
    if config["flags"].get("judge"):
        lines.append(f"- judge: {escape(judge_name(config['flags']))}")
    return lines


def how_made(path):
    """Who judged the records of a file, and how many there are, where that stands beside it."""
    text = ""
    config_path = sidecar(path, "config")
    if config_path.exists():
        flags = read_json(config_path, "flags")["flags"]
        if flags.get("judge"):
            text += f"; judge: {escape(judge_name(flags))}"
    funnel_path = sidecar(path, "funnel")
    if funnel_path.exists():
        counts = read_json(funnel_path, "counts")["counts"]
        numbers = [f"{number} {escape(name)}" for name, number in counts.items()]
        text += f"; {' → '.join(numbers)}"
    return text


def judge_name(flags):
    """The name of the judge in some flags, without the address of a server or a folder.

    >>> judge_name({"judge": "https://host/v1", "judge_model": "gpt-4o"})
    'gpt-4o'
    >>> judge_name({"judge": "local:/home/me/guard"}), judge_name({"judge": "rules"})
    ('guard', 'rules')
    """
    if flags.get("judge_model"):
        return model_name(flags["judge_model"])
    kind, _, path = flags["judge"].partition(":")
    if kind == "local":
        return model_name(path)
    return kind


def without_folders(judge):
    """The name of one judge, or of two, as records have it, but for the folders of their models.

    >>> without_folders("/home/me/guard:qwen3guard + Qwen/Qwen3-8B:0123")
    'guard:qwen3guard + Qwen/Qwen3-8B:0123'
    """
    names = []
    for name in judge.split(" + "):
        model, colon, hashed = name.rpartition(":")
        names.append(model_name(model) + colon + hashed)
    return " + ".join(names)


def model_name(model):
    """How a model is called in a card: its name on the hub, or that of its folder alone.

    >>> model_name("Qwen/Qwen3-0.6B"), model_name("/home/me/runs/stage1")
    ('Qwen/Qwen3-0.6B', 'stage1')
    """
    if is_hub_name(model):
        return str(model)
    return Path(model).name


def shown_settings(flags):
    """The settings of a training that are numbers, switches, or one of a few words."""
    shown = {}
    for name, value in flags.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or value is True or (name in WORDS and value):
            shown[name] = "yes" if value is True else str(value)
    return shown


def code_sentence(config, made_by):
    """Which code made the model, with which versions."""
    text = f"Made by `{made_by}`"
    if config.get("commit"):
        text += f" at commit `{config['commit']}`"
    versions = [f"{name} {number}" for name, number in config.get("versions", {}).items()]
    if versions:
        text += f", with {escape(', '.join(versions))}"
    return text + "."


# ------------------------------------------------------------------------------------- the table

def fill_cards(folders, rows):
    """Put the columns of each trained model, and of the first one, into its card.

    folders: {name: folder of an evaluation}; rows: (label, text for each model in that order). A
    model is left alone if it is not the one that was evaluated, or if its card lacks the marks.
    """
    names = list(folders)
    for number, folder in enumerate(folders.values()):
        config_path = sidecar(folder, "config")
        if not config_path.exists():
            continue
        config = read_json(config_path, "flags", "inputs")
        model = config["flags"].get("model", "")
        card = Path(model) / "README.md"
        if not model or not card.is_file() or config["inputs"].get(model) != fingerprint(model):
            continue
        shown = list(dict.fromkeys([0, number]))  # one column for the base model
        cells = [["", *(names[i] for i in shown)]]
        for label, *results in rows:
            cells.append([label, *(results[i] for i in shown)])
        table = markdown_table(cells)
        if config["flags"].get("judge"):
            table += f"\n\nJudge: {escape(without_folders(config['flags']['judge']))}"
        put_in_table(card, table)


def put_in_table(card, table):
    """Put a table between the marks of a card; one without them, or not writable, stays."""
    try:
        text = read_text(card)
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        filled = f"{before}{begin}\n\n{table}\n\n{end}{after}"
        if end and filled != text:
            write_text(card, filled)
    except OSError as error:
        print(f"{card}: its table stays as it was ({error.strerror})")


def markdown_table(rows):
    """Rows of cells as a table, the first as its head.

    >>> print(markdown_table([["", "base"], ["a|b", "50%"]]))
    |  | base |
    |---|---|
    | a\\|b | 50% |
    """
    lines = [f"| {' | '.join(map(escape, row))} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def escape(text):
    r"""A text in Markdown as it is, on one line: names are other people's.

    >>> escape("my_model*\n<b>")
    'my\\_model\\* \\<b\\>'
    """
    one_line = " ".join(str(text).split())
    printable = "".join(character for character in one_line if character.isprintable())
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&])", r"\\\1", printable)
