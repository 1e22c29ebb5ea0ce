"""What a finished run left in its folder, read back as plain data for the report."""
from support.files import digest, read_json, read_jsonl
from support.stages import sidecar


def read_run(run, folders, harmful_sets, examples):
    """Everything in a run's folder and in those of its evaluations that the report shows.

    folders: {model: folder}, the first before training and the last after it. harmful_sets: names
    of the sets to show traces of. examples: how many pairs, and traces of each set, to show.

    Returns {"title", "funnels", "configs", "evaluation_configs", "logs", "pairs",
    "prompts_with_pairs", "before_after": {set: examples}, "fragments"}.
    """
    pairs = read_pairs(run)
    models = list(folders)
    shown = dict.fromkeys([models[0], models[-1]])  # one, if there is only one
    before_after = {}
    for name in harmful_sets:
        before_after[name] = read_examples([folders[model] for model in shown], name, examples)
    config_paths = sorted(run.glob("*.config.json"), key=written_at)
    evaluation_paths = [sidecar(folder, "config") for folder in folders.values()]
    funnel_paths = sorted(run.rglob("*.funnel.json"), key=written_at)
    fragments = []
    for path in sorted(run.glob("fragments/*.html")):
        fragments.append(path.read_text(encoding="utf-8"))
    return {
        "title": run.name,
        "funnels": read_json_files(funnel_paths),
        "configs": read_json_files(config_paths),
        "evaluation_configs": read_json_files(evaluation_paths),
        "logs": read_training_logs(run),
        "pairs": pairs[:examples],
        "prompts_with_pairs": len({pair["prompt_id"] for pair in pairs}),
        "before_after": before_after,
        "fragments": fragments,
    }


def read_json_files(paths):
    """The contents of those JSON files that are there."""
    contents = []
    for path in paths:
        if path.exists():
            contents.append(read_json(path))
    return contents


def written_at(path):
    """When a file was last written, in seconds."""
    return path.stat().st_mtime


def read_pairs(run):
    """The pairs of a run in a fixed, arbitrary order, so that the first are not the prettiest."""
    path = run / "pairs.jsonl"
    if not path.exists():
        return []
    return sorted(read_jsonl(path), key=lambda pair: digest(pair["id"]))


def read_training_logs(run):
    """What training with preferences logged: {stage: [line]}."""
    logs = {}
    for path in sorted(run.glob("*/metrics.jsonl")):
        log = read_jsonl(path)
        if log and "loss/preference" in log[0]:
            logs[path.parent.name] = log
    return logs


def read_examples(folders, name, count):
    """Traces of one set with their steps and verdicts, as each of several evaluations found them.

    Returns a list of examples; each is a list with one record for each folder, or None where that
    model has no trace of this id. Empty where the set was not run on all models.
    """
    evaluations = []
    for folder in folders:
        if not (folder / f"{name}.verdicts.jsonl").exists():
            return []
        evaluations.append(read_judged_traces(folder, name))
    examples = []
    # As arbitrary as the order of the pairs.
    for trace_id in sorted(evaluations[0], key=digest)[:count]:
        examples.append([traces.get(trace_id) for traces in evaluations])
    return examples


def read_judged_traces(folder, name):
    """The traces of a set by id, each in one record with its steps and verdict."""
    records = {}
    for part in ("traces", "steps", "verdicts"):
        for record in read_jsonl(folder / f"{name}.{part}.jsonl"):
            records.setdefault(record["id"], {}).update(record)
    return records
