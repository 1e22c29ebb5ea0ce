"""Tests of split_steps: every expectation is written by hand with "|" where a step must end."""
import json
import pathlib
import random
import re
import time

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from intervene import DEFAULT_TRIGGERS, make_judge, split_steps
from tests import measure_steps

# Not part of the repository.
STAR = pathlib.Path(__file__).resolve().parents[2] / "shared/data/STAR-1.json"
NO_STAR = "STAR-1.json is not beside the project"

EXPECTED = {
    "terminators": ["One.| Two!| Three?| Four…| Five?!| Six...| Seven"],
    "closers": [
        'He said "no."| Then left.',
        "(It is so.)| Next.",
        "**Bold.**| Plain.",
        "“Curly.”| Next.",
        "*Is it?*| Yes",
        "_So._| It is",
        "[See this.]| Then",
        "«Oui.»| Then",
        "'Stop!'| Then",
    ],
    "openers of the next step": [
        'One.| "Two."| (Three.)| **Four.**| [Five]',
        "One.| $x$ is two.| `x` is.| \\(x\\)",
    ],
    "blanks belong to the next step": ["One.|  Two.|\tThree.| \t Four.|\u00a0Five.|\u3000Six"],
    "newlines belong to the previous step": [
        "One.\n|Two\n\n|Three\r\n|Four.\r\n\r\n\r\n|Five",
        "One.  \n|Two  \n \n\t\n|  Three",
        "One\r|Two",
        "a:\n|    b\n|c",
    ],
    "blanks at the ends of the text": [
        "  One.| Two.  ",
        "\n\n One.| Two\n \n ",
        "One.\n\n",
        "One! ",
        "。\n",
    ],
    "only blanks": [" ", "\n", " \n\n ", "\r\n\r\n", "\u3000\t"],
    "numbers and names": [
        "It is 3.14 or .5 or 1,000.5 kg",
        "Use v2.0.1 of foo.bar.py or main.c now",
        "See https://a.b/c.d?e=F!g and x.Y",
        "It is 3.14.| See a.b/c.d.| Use v2.0.| Is it x.py?| Yes",
    ],
    "abbreviations": [
        "Mr. A, Mrs. B, Ms. C, Dr. D and Prof. E met Jr. F",
        "See Fig. 2, Eq. (3), eq. 4, Sec. 5 and No. 6",
        "In St. Louis, cf. Smith et al. (2020), e.g. Bob, i.e. Robert vs. Alice, approx. 5 "
        "and viz. Carl",
        "(E.g. Bob) or (i.e. Eve) and Roe v. Wade, p. 5, Vol. 2",
        "On Jan. 5 we met Sgt. Pepper",
        "Is it?| No.| Bob did.| No. 5 did.",
        "It took 5 ms.| Then.| We met on 5 Jan.| He left.",
        "Climbing mtvs.| Bob",
        "Room 4A.| Bob",
        "He is Mr...| Then",
    ],
    "ambiguous abbreviations end a step before a common opener only": [
        "The U.S. Government of the U.S.| The end",
        "At 5 p.m. Eastern or 6 a.m.| But no",
        "Apple Inc. Chairman of X Inc.| He",
        "King Jr. Boulevard of Bob Sr.| Then",
        "the Ph.D. Thesis for my Ph.D.| I did",
        "Roe v. Wade with speed v.| Now",
    ],
    "etc. ends a step unless the sentence goes on": [
        "Use a, b, etc. and c, etc.), etc., d",
        "a, b, etc.| Bob left.| (A etc.)| So",
    ],
    "initials": [
        "J. K. Rowling, J.K. Rowling and George W. Bush met I. A. Richards",
        "The answer is C.| Let me check B.| Since",
    ],
    "list markers": [
        "1. One.| Two.\n|12) Three\n|2.1. Four",
        "a) One\n|(b). Two\n|(iv) Three\n|c. Four\n|ii. Five",
        "- One.| Two\n|* Three\n|  + Four",
        "- 1. One\n|> 2. Two\n|## 3. Three\n|**4.** Four\n|  5. Five",
        "One.| 2. Two.| 3. Three",
        "1.\n|One",
        "I have 5.| 6 is more",
    ],
    "lower case goes on": [
        "ok... wait",
        "ok. wait… so? yes! no",
        "'Stop!' he said",
        '"Really?" she asked.| He: "Yes." (so.)| No.',
        "Done. élan",
    ],
    "spaced dots": ["One . . . two . . .| Three", "One !| Two"],
    "CJK": [
        "第一。|第二！|第三？|ok",
        "他说：“停！”|然后走了。|「好。」|再见。",
        "（真的？）。|好。\n|下",
        "真的吗？”，他说",
        "一。| 二。　\n\n|三！！|四",
        '"一。"|二',
        "一。|\u3000二",
        "真的?！|他",
        "好！！，他",
    ],
    "fenced code": [
        "Do.| See:\n|```python\nx = 1. Y\n\nif x! Z:\n    pass\n```\n\n|Then.| Go",
        "```\na. B\n```",
        "Like ```py\na. B\n```  \n|Go",
        "```\na. B\n\nc? D\n",
        "```\na. B",
        "````\n```\na. B\n```\n````\n|Go.| On",
        "- x:\r\n|  ```\r\n  a. B\r\n  ```\r\n|c",
        "> x\n|> ```\n> a. B\n> ```\n|Go.| On",
        '```py title="x y"\na. B\n```\n|Go',
        "```\na. B\n`````\n|Go.| On",
        "Write ``` first.\n|Then.| Go",
        "a``` b.| C\n|D",
    ],
    "inline code": [
        "Run `a. B` now.| Then ``c`d. E`` and ```f. G```.| So",
        "One ` alone.| Two",
        "One ` alone.\n|Two ` alone.| Three",
        "`a\\`.| B",
        "`a``b. C`.| D",
        "A \\` b.| C `",
    ],
    "inline maths": [
        "So $x = 1. Y$ and $\\$5. Z$.| Then",
        "So \\(x = 1. Y\n= 2. Z\\).| Then",
        "$a$.| $b$.| C",
        "If \\\\(a.| B\\).| C",
    ],
    "display maths": [
        "So\n|$$\nx = 1. Y\n\\\\[2pt] z\n$$\n|Then",
        "So \\[x = 1. Y\n= 2\\].| Then",
        "\\[\na \\\\[2pt]\nb. C\n\\]\n|D",
        "$$a. B$$.| C",
    ],
    "prices and unclosed maths": [
        "It is $5 and $6.| Next is $7.| Then",
        "It is $5.| Next is $6.| Then $x. Y$.| So",
        "From $5-$6.| Then $7.| So",
        "A \\$5.| B \\$6.| C",
        "A $ alone.| Then $.| So",
        "A $ b.| C$ d",
        "It was $5.| It is up (+$1) now",
        "A $x alone.| Then\n|y$ alone.| So",
        "A $$x alone.| Then\n\n|B $$y alone.| So",
        "A \\(x alone.| Then \\(y. Z\\).| So",
        "A \\[x alone.| Then\n|so.| So",
        "A \\[x alone.| Then\n\n|B\\].| So",
        "A \\).| So \\].| No",
    ],
}


CASES = [
    pytest.param(text, id=f"{name}-{i}")
    for name in EXPECTED
    for i, text in enumerate(EXPECTED[name])
]


@pytest.mark.parametrize("marked", CASES)
def test_expected_steps(marked):
    assert split_steps(marked.replace("|", "")) == marked.split("|")


def test_empty_text_has_no_steps():
    assert split_steps("") == []


def test_longest_opener_is_recognised():
    # The scan captures at most 15 characters of the next word; a longer opener could never match.
    assert split_steps("The U.S. Alternatively, go") == ["The U.S.", " Alternatively, go"]


# ---- properties ----

ALPHABET = [
    *" \t\n\r`$()[]{}\"'“”‘’«»*_-#>.!?…,;:。！？，、」』）（「\\aAbB019~",
    "\r\n",
    "  ",
    "\n\n",
    "\u0301",
    "\u200b",
    "\u200d",
    "\u00a0",
    "\u3000",
    "\x1c",
    "\x85",
    "é",
    "É",
    "中",
    "文",
    "😀",
    "👩‍🔬",
    "```",
    "```py\n",
    "\n```\n",
    "$$",
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    ". ",
    ". A",
    ".\n",
    "1. ",
    "e.g. ",
    "Dr. ",
    "U.S. ",
    "etc. ",
    "J. ",
    "The ",
    "No. ",
    " so",
]


def random_texts(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(1, 60))) for _ in range(count)]


def traces():
    rows = json.loads(STAR.read_text(encoding="utf-8"))
    return [row["response"].split("</think>")[0] for row in rows]


def cut_positions(steps):
    ends = []
    position = 0
    for step in steps[:-1]:
        position += len(step)
        ends.append(position)
    return ends


def is_cjk_cut(text, cut):
    return text[cut - 1] not in "\r\n" and text[cut] not in " \t\u00a0\u3000"


def check_properties(text):
    steps = split_steps(text)
    assert "".join(steps) == text
    assert all(step.strip() for step in steps) or len(steps) == 1
    for cut in cut_positions(steps):
        before = text[:cut]
        newline_follows = re.match(r"\s*[\r\n]", text[cut:])
        if before[-1] in "\r\n":
            assert not newline_follows, "the run of newlines goes on"
        else:
            assert not before[-1].isspace(), "the spaces before the cut belong to the next step"
            assert not newline_follows, "blanks and newlines belong to the previous step"
            stops = "。！？" if is_cjk_cut(text, cut) else ".!?…。！？"
            assert re.search(f"[{stops}][\"'”’»)\\]}}*_」』）》】]*\\Z", before)


def test_properties_hold_on_random_text():
    texts = random_texts(10_000)
    for text in texts:
        check_properties(text)
    total = sum(len(split_steps(text)) for text in texts)
    assert total > 3 * len(texts), "too few boundaries to test"


def test_the_toy_worlds_traces_are_cut_into_the_sentences_that_they_were_made_of(monkeypatch, capsys):
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
    measure_steps.compare_with_toy(200, 1, DEFAULT_TRIGGERS, make_judge("rules"))
    shown = capsys.readouterr().out
    assert "steps: 200 of 200 traces" in shown
    assert shown.count("accuracy 1.000") == 2, "of cues and of verdicts"


@pytest.mark.skipif(not STAR.exists(), reason=NO_STAR)
def test_properties_hold_on_star_traces():
    counts = []
    for text in traces():
        check_properties(text)
        counts.append(len(split_steps(text)))
    assert len(counts) == 1000 and min(counts) >= 5
    assert 15 < sum(counts) / len(counts) < 17  # the opening "<think>\n" is one of them


# ---- token boundaries ----

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
INVENTED = [
    "Okay, so the pump is off. Hmm, let me think...\n\nFirst, check the valve (it sticks!). "
    "Is it open?  \n"
    '1. Open it.\n2. Wait 3.5 s, i.e. a while.\r\n\r\n**Done.** "Good." Then we stop.\n'
] * 50


def byte_level_bpe(pattern, corpus):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def moved_cuts(tokenizer, text, cuts):
    """The cuts whose prefix is tokenised differently on its own and inside `text`."""
    whole = tokenizer.encode(text).ids
    prefixes = [encoding.ids for encoding in tokenizer.encode_batch([text[:cut] for cut in cuts])]
    return [cut for cut, ids in zip(cuts, prefixes) if whole[:len(ids)] != ids]


@pytest.mark.parametrize("pattern", [QWEN2, LLAMA3], ids=["qwen2", "llama3"])
def test_cuts_fall_on_token_boundaries(pattern):
    texts = traces()[:250] if STAR.exists() else INVENTED[:1]
    tokenizer = byte_level_bpe(pattern, texts if STAR.exists() else INVENTED)
    checked = naive = 0
    for text in texts + random_texts(1500, seed=1):
        cuts = [cut for cut in cut_positions(split_steps(text)) if not is_cjk_cut(text, cut)]
        assert moved_cuts(tokenizer, text, cuts) == []
        checked += len(cuts)
    # The check itself can fail: one character later, most cuts are inside a token.
    for text in texts[:20]:
        cuts = cut_positions(split_steps(text))
        naive += len(moved_cuts(tokenizer, text, [cut + 1 for cut in cuts if text[cut] == " "]))
    assert checked > 3000 and naive > 0


# ---- cost ----

UNITS = [
    *".!?$`\n\r( *_\"'-#\\。！a1[~\x1c",
    "\\(",
    "\\[",
    "\\)",
    "$$",
    "$ ",
    "\\$",
    "$x",
    "``a ",
    "`" * 50 + "a",
    "```x\n",
    "a. ",
    "A. ",
    "A.",
    ". ",
    "\r\n",
    " \n",
    "\n ",
    "。",
    "。,",
    "。 ",
    "。\n",
    '."',
    '. "',
    "- ",
    "1.",
    "e.g. ",
    "...A ",
    "(a) ",
]
MEGABYTES = [
    "a. B " * 200_000,
    "$" + "a" * 1_000_000,
    "\\(" + "a" * 1_000_000,
    "$$" + "a\n" * 500_000,
    "```\n" + "a\n" * 500_000,
    "a." + " " * 200_000 + "A",
    "\n" + " " * 200_000 + "a.b. " * 50_000,
    "$$" + ("\n" + " " * 500) * 1000,
    "1" * 200_000 + ". A",
    "！" * 200_000 + "，",
    "".join(random.Random(2).choices(ALPHABET, k=500_000)),
]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_time_is_linear_in_repetitions(unit):
    check_time(unit * (200_000 // min(len(unit), 4)))


@pytest.mark.parametrize("text", MEGABYTES, ids=lambda text: ascii(text[:8]))
def test_time_is_linear_in_a_megabyte(text):
    check_time(text)


def check_time(text):
    start = time.process_time()  # not wall time: the machine may be busy
    steps = split_steps(text)
    assert time.process_time() - start < 2
    assert "".join(steps) == text
