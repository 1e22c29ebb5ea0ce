"""Long traces and many pairs in little memory: compact token ids, and a few records at a time."""
from array import array
from itertools import islice

from support.errors import InputError
from support.files import stream_jsonl
from support.progress import progress_bar


def token_array(ids):
    """Token ids as an array, 4 bytes each (in a list 36); empty where this is no list of ids.

    >>> token_array([7, 8]), token_array("7, 8")
    (array('i', [7, 8]), array('i'))
    """
    try:
        return array("i", ids)
    except (TypeError, OverflowError):
        return array("i")


def compact_record(record, token_fields, other_fields, place):
    """Some fields of a record alone, token ids as arrays; InputError for one that is missing."""
    kept = {}
    for field in token_fields:
        kept[field] = token_array(record.get(field))
        if not kept[field]:
            raise InputError(
                f"{place}: {field} must be a non-empty list of token ids. "
                "Make the file with `intervene.py pairs` or `intervene.py benign`."
            )
    for field in other_fields:
        if field not in record:
            raise InputError(f"{place}: no {field}. Make the file with `intervene.py pairs`.")
        kept[field] = record[field]
    return kept


class RecordFile:
    """The records of a JSON-lines file, read one at a time; its length is its number of lines."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        return stream_jsonl(self.path)

    def __len__(self):
        with open(self.path, "rb") as file:
            return sum(1 for _ in file)


def chunks_with_steps(traces, steps, size):
    """Yield lists of `size` traces, each with {trace id: steps} of its traces.

    traces, steps: iterables of records in the same order. Raises InputError for another order.
    """
    traces = iter(progress_bar(traces, desc="judging", unit="traces"))
    steps = iter(steps)
    while chunk := list(islice(traces, size)):
        steps_of = {record["id"]: record["steps"] for record in islice(steps, len(chunk))}
        for trace in chunk:
            if trace["id"] not in steps_of:
                raise InputError(
                    f"{trace['id']}: its steps are missing or in another place than the trace. "
                    "Make the steps again, from these traces."
                )
        yield chunk, steps_of
