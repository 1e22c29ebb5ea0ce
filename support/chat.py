"""A conversation with a model in the terminal; the reasoning can be changed where it stands.

What model.py and data.py know comes in as functions, see `Chat`.
"""
import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import threading
import unicodedata
from pathlib import Path

import torch

from support.code_hash import ROOT
from support.errors import InputError
from support.files import refuse_half_characters
from support.flags import refuse_below
from support.fused_head import output_logits
from support.kv_cache import make_slots

TAGS = ("<think>", "</think>")  # OPEN and CLOSE in data.py
DIM, BRIGHT = "\033[2m", "\033[0m"
HELP = """\
Each question starts anew: the model does not see the ones before it.
  Ctrl-C      stop the answer
  /N TEXT     put TEXT in the place of sentence N of the last reasoning, and let the model go on
  /N          the same with a random trigger (--trigger)
  / TEXT, /   the same in the place of the last sentence, finished or not
  /help       this text
  Ctrl-D      end"""
# Where a sentence begins: a plain rule. The stages' own (intervene.py) knows abbreviations, code
# and maths too.
SENTENCE = re.compile(r"""
    (?P<line> \A | \n) \s* (?=\S)                 # at the beginning, and on every line
  | (?<!\d) [.!?…]+ ["'”’)*_]* [ \t]+ (?=\S)      # after a full stop, but that of "1. Weigh it"
  | [。！？]+ ["'”’」』）]* (?=[^\s"'”’」』）。！？])  # after which Chinese writes no space
""", re.VERBOSE)
# They turn the direction of text, so that it reads other than it is.
TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def chat_flags(argv=None):
    """The command line of `python model.py chat`: (model, trigger, keywords of LocalSampler)."""
    parser = argparse.ArgumentParser(prog="model.py", description="Talk to a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal, and change its reasoning where it stands.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, help="model: directory or hub name")
    p.add_argument("--trigger", default=str(ROOT / "prompts" / "triggers.txt"),
                   help="file of triggers, a sentence a line, or one trigger as text "
                        "(default: prompts/triggers.txt)")
    p.add_argument("--temperature", type=float, default=0.6, help="(default: 0.6)")
    p.add_argument("--top-p", type=float, default=0.95, help="(default: 0.95)")
    p.add_argument("--max-new-tokens", type=int, default=8192, help="(default: 8192)")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    flags = vars(parser.parse_args(argv))
    refuse_below(1, flags, "max_new_tokens")
    del flags["command"]
    return flags.pop("model"), flags.pop("trigger"), flags


class Chat:
    """Questions, answers and the last answer's tokens.

    sampler: a `model.LocalSampler`. render_prompt, split_reasoning, token_index and decode are
    data.py's, next_token and request_uniforms are model.py's.
    """

    def __init__(self, sampler, triggers, *, render_prompt, split_reasoning, token_index, decode,
                 next_token, request_uniforms):
        self.sampler = sampler
        self.model = sampler.load()
        self.triggers = triggers
        self.render_prompt = render_prompt
        self.split_reasoning = split_reasoning
        self.token_index = token_index
        self.decode = decode
        self.next_token = next_token
        self.request_uniforms = request_uniforms
        self.random = random.Random(sampler.options["seed"])
        self.answers = 0  # so far: each draws its own numbers
        self.slots = {}   # kept from one answer to the next
        self.prompt = []  # ids of the last question
        self.ids = []     # and of its answer

    def ask(self, question):
        """Answer a question. Raises InputError for one that fills the context."""
        refuse_half_characters(question, "your question")
        prompt = self.render_prompt(self.sampler.tokenizer, question)
        self.refuse_full(prompt)
        self.prompt = prompt
        self.ids = []
        self.write(0)

    def put_in(self, number, text):
        """Put a text, or a random trigger, in the place of a sentence of the reasoning; go on.

        number: of the sentence, from 1; None is the last one. The text takes over the white space
        around it, as in intervene.py. Raises InputError where there is no such sentence.
        """
        parts = self.split()
        starts = sentence_starts(parts.reasoning)
        if number is None:
            number = len(starts)
        if not 1 <= number <= len(starts):
            raise InputError(f"No sentence {number}: the last reasoning has {len(starts)}.")
        text = text or self.random.choice(self.triggers)
        refuse_half_characters(text, "your text")
        start = starts[number - 1]
        head = parts.reasoning[:start]
        cut = len(head.rstrip(" \t"))  # a token begins with the space before its word
        tail = ""
        if number < len(starts):
            replaced = parts.reasoning[start:starts[number]]
            tail = replaced[len(replaced.rstrip()):].rstrip(" \t")  # its ends of lines
        tokenizer = self.sampler.tokenizer
        before = parts.opening + parts.reasoning[:cut]
        h = self.token_index(tokenizer, self.ids, len(before))
        # Where a token straddles the cut, its lost characters are written again.
        lost = before[len(self.decode(tokenizer, self.ids[:h])):]
        new_ids = tokenizer.encode(lost + head[cut:] + text + tail, add_special_tokens=False)
        self.refuse_full(self.prompt + self.ids[:h] + new_ids)
        self.ids = self.ids[:h] + new_ids
        self.write(start)

    def refuse_full(self, prefix):
        """Raise InputError where the context leaves no room for another token."""
        if len(prefix) >= self.sampler.context:
            raise InputError(f"{len(prefix)} tokens leave no room in the model's context of "
                             f"{self.sampler.context}. Make it shorter.")

    def write(self, start):
        """Let the model go on, and print the reasoning from a character on, and the response."""
        page = Page(start)
        try:
            with noticing_interrupts() as pressed:
                for token in self.tokens():
                    self.ids.append(token)
                    page.show(self.split(unfinished=True))
                    if pressed.is_set():
                        break
            page.show(self.split())
            if pressed.is_set():
                page.note("stopped; /N TEXT or / TEXT changes the reasoning, /help says more")
            elif self.ids[-1] not in self.sampler.eos:
                page.note("at the limit of --max-new-tokens, or of the context")
        finally:
            page.end()

    @torch.no_grad()
    def tokens(self):
        """Yield the ids that the model adds to the answer, as they are chosen."""
        prefix = self.prompt + self.ids
        limit = min(self.sampler.max_new_tokens, self.sampler.context - len(prefix))
        settings = self.sampler.options
        uniforms = self.request_uniforms(settings["seed"], f"chat {self.answers}", limit)
        self.answers += 1
        slots = make_slots(self.model, 1, len(prefix) + limit, self.slots)
        hidden = slots.fill([0], [prefix])  # (1, H)
        for i in range(limit):
            logits = output_logits(self.model, hidden)  # (1, V)
            if not logits.isfinite().all():
                raise InputError(f"{self.model.name_or_path}: its logits are not finite. "
                                 "Are its weights damaged, or did its training diverge?")
            uniform = uniforms[i:i + 1].to(logits.device)
            chosen = self.next_token(logits, settings["temperature"], settings["top_p"], uniform)
            token = chosen.item()
            yield token
            if token in self.sampler.eos:
                return
            hidden = slots.step([token])

    def split(self, unfinished=False):
        """The answer taken apart; `unfinished`: without an end that the next token may change."""
        text = self.decode(self.sampler.tokenizer, self.ids, self.sampler.eos)
        if unfinished:
            text = without_open_end(text)
        return self.split_reasoning(text)


def without_open_end(text):
    """A text without half a character, and without what may become a tag, at its end.

    >>> without_open_end("Is it?</thi"), without_open_end("a < b")
    ('Is it?', 'a < b')
    """
    text = text.rstrip("\ufffd")
    longest = max(map(len, TAGS))
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(tag.startswith(end) and tag != end for tag in TAGS):
            return text[:-length]
    return text


def sentence_starts(reasoning):
    r"""Where the sentences of a reasoning begin: positions of their first characters.

    Whether one begins at a character is decided by the text up to it, so more text changes nothing.

    >>> text = "Hm. Is 3.5 ok?\n1. Weigh it."
    >>> [text[i:] for i in sentence_starts(text)]
    ['Hm. Is 3.5 ok?\n1. Weigh it.', 'Is 3.5 ok?\n1. Weigh it.', '1. Weigh it.']
    """
    starts = []
    for match in SENTENCE.finditer(reasoning):
        start = match.end()
        # After a full stop a lower-case letter continues the sentence.
        if match["line"] is not None or not reasoning[start].islower():
            starts.append(start)
    return starts


class Page:
    """Prints an answer as it grows: numbered reasoning, dim on a terminal, and the response."""

    def __init__(self, start):
        self.colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.reasoning = start  # how many of its characters have been printed
        self.response = 0
        self.column = 0         # 0 at the beginning of a line
        self.part = None        # which of the two was printed last

    def show(self, parts):
        """Print what is new in an answer taken apart."""
        starts = sentence_starts(parts.reasoning)
        shown = self.reasoning
        for number, start in enumerate(starts, 1):
            if start >= shown:
                self.print("reasoning", parts.reasoning[shown:start] + f"[{number}] ")
                shown = start
        # The last sentence, without blanks that may belong to a next one.
        end = len(parts.reasoning.rstrip())
        if shown < end:
            self.print("reasoning", parts.reasoning[shown:end])
        self.reasoning = max(shown, end)
        self.print("response", parts.response[self.response:])
        self.response = len(parts.response)

    def print(self, part, text):
        """Print more text of a part; each part begins with its name, on a line of its own."""
        if not text:
            return
        if part != self.part:
            self.new_line()
            self.part = part
            self.write(f"{part}:\n")
        self.write(printable(text), dim=part == "reasoning")

    def note(self, text):
        """Print a remark about the answer, on a line of its own."""
        self.new_line()
        self.write(f"({text})", dim=True)

    def end(self):
        """End the answer with an empty line."""
        self.new_line()
        self.write("\n")

    def new_line(self):
        if self.column:
            self.write("\n")

    def write(self, text, dim=False):
        if not text:
            return
        self.column = len(text) - text.rfind("\n") - 1
        if dim and self.colours:
            text = DIM + text + BRIGHT
        sys.stdout.write(text)
        sys.stdout.flush()


def printable(text):
    r"""A text without characters that command a terminal, or that turn the direction of text.

    >>> printable("red: \x1b[31m\r\x07 \u202eevil\n")
    'red: [31m evil\n'
    """
    kept = []
    for character in text:
        control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        if not control and unicodedata.bidirectional(character) not in TURNS:
            kept.append(character)
    return "".join(kept)


@contextlib.contextmanager
def noticing_interrupts():
    """Let Ctrl-C set an event, so that a token's computation is never torn."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def read_triggers(spec, load_triggers):
    """The triggers of --trigger: those of a file (`data.load_triggers`), or the text itself."""
    if Path(spec).is_file():
        return load_triggers(spec)
    if not spec.strip() or spec.endswith(".txt"):
        raise InputError(f"--trigger {spec}: neither a file nor a sentence.")
    return [spec.strip()]


def obey(chat, line):
    """Do what one line says: a question, or a command of HELP. Errors are printed."""
    command = re.fullmatch(r"/(\d{0,9})(?:\s+(.*))?", line)
    try:
        if line == "/help":
            print(HELP)
        elif command:
            number = int(command[1]) if command[1] else None
            chat.put_in(number, command[2])
        elif line:
            chat.ask(line)
    except InputError as error:
        print(f"error: {error}", flush=True)


def talk(chat):
    """Read lines until the end of the input, and obey each."""
    prompt = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (it gives `input` a history and the arrow keys)
        print(HELP)
        prompt = "> "
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # At the prompt Ctrl-C clears the line.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            try:
                line = input(prompt)
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                return
            obey(chat, line.strip())
    finally:
        signal.signal(signal.SIGINT, before)
