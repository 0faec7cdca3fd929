"""The demo's tasks: seeded questions that tools answer, their files, the tools' schemas, the score.

Training tasks and held-out tasks never meet: a hash of a task's values decides to which side it belongs. How
the model was shown to solve them is in `demonstrate`; nothing here runs a tool or a model.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from agentserve.demo.words import CONFIG_STEMS, MATCHES, NUMBER_KEYS, STEMS, SYLLABLES, WORD_KEYS, WORDS

SYSTEM = "You answer questions with tools. End with: The answer is X."
"""The system prompt that the demo model was trained with."""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }
    for name, description, argument in (
        ("python", "Run Python code.", "code"),
        ("shell", "Run a shell command.", "command"),
    )
]
"""OpenAI tool schemas of exactly two tools: `python {code}` and `shell {command}`."""

Split = Literal["train", "held_out"]


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question. `files` (name to bytes) lie in the sandbox's working directory, and nothing else does."""

    id: str
    prompt: str
    answer: str
    files: dict[str, bytes]
    kind: str


class Call(msgspec.Struct, frozen=True):
    """A tool call: `argument` is the code or the command."""

    tool: Literal["python", "shell"]
    argument: str


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A task with the calls that solve it, in order; the last one prints the answer (after `=`, if any)."""

    task: Task
    calls: tuple[Call, ...]
    wrong: Call | None = None
    """A call that looks right and is not (it counts words for lines, say): the material of a bad habit."""


def _word(rng: random.Random) -> str:
    """A common word, or (one in three) a made-up one: copying must not hang on a word list."""
    return rng.choice(WORDS) if rng.random() < 2 / 3 else "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))


def _file_name(rng: random.Random, stems: Sequence[str], endings: Sequence[str]) -> str:
    stem = rng.choice(stems)
    if rng.random() < 0.3:
        stem += f"{rng.choice(['', '-', '_'])}{rng.choice([str(rng.randint(1, 99)), _word(rng)])}"
    return f"{stem}.{rng.choice(endings)}"


def _text_file(rng: random.Random) -> str:
    return _file_name(rng, STEMS, ("txt", "md", "csv", "log"))


def _join(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _text_lines(rng: random.Random, count: int) -> list[str]:
    return [" ".join(_word(rng) for _ in range(rng.randint(1, 3))) for _ in range(count)]


def _number(rng: random.Random, digits: int) -> int:
    """A number of one to `digits` digits, each length as likely as the others."""
    length = rng.randint(1, digits)
    return rng.randint(10 ** (length - 1) + (length == 1), 10**length - 1)


# ---------------------------------------------------------------- kinds: prompt, files, calls, wrong call

_Draft = tuple[str, dict[str, bytes], tuple[Call, ...], Call | None]


def _ask(rng: random.Random, expression: str) -> str:
    return rng.choice(("What is {}?", "Compute {}.", "Calculate {}.", "How much is {}?")).format(expression)


def _sum(rng: random.Random) -> _Draft:
    expression = f"{_number(rng, 5)} {rng.choice('+-')} {_number(rng, 5)}"
    return _ask(rng, expression), {}, (Call("python", f"print({expression})"),), None


def _expression(rng: random.Random) -> _Draft:
    expression = f"{_number(rng, 4)} * {_number(rng, 3)} {rng.choice('+-')} {_number(rng, 4)}"
    return _ask(rng, expression), {}, (Call("python", f"print({expression})"),), None


def _remainder(rng: random.Random) -> _Draft:
    a, b = rng.randint(100, 99999), rng.randint(3, 99)
    prompt = f"What is the remainder of {a} divided by {b}?"
    return prompt, {}, (Call("python", f"print({a} % {b})"),), None


def _count_lines(rng: random.Random) -> _Draft:
    file = _text_file(rng)
    lines = _text_lines(rng, rng.randint(2, 60))
    prompt = rng.choice(("How many lines are in {}?", "Count the lines of {}.", "How many lines does {} have?"))
    call, wrong = Call("shell", f"wc -l < {file}"), Call("shell", f"wc -w < {file}")
    return prompt.format(file), {file: _join(lines)}, (call,), wrong


def _count_matches(rng: random.Random) -> _Draft:
    file = _text_file(rng)
    levels = rng.choices(MATCHES, k=rng.randint(5, 40))
    word = rng.choice(levels)  # one that is there: grep -c exits with 1 when it counts none
    lines = [f"{level} {_word(rng)}" for level in levels]
    prompt = f"How many lines of {file} contain {word}?"
    return prompt, {file: _join(lines)}, (Call("shell", f"grep -c {word} {file}"),), None


def _count_files(rng: random.Random) -> _Draft:
    names = {_text_file(rng) for _ in range(rng.randint(2, 30))}
    prompt = rng.choice(("How many files are here?", "How many files are in this directory?", "Count the files here."))
    return prompt, dict.fromkeys(sorted(names), b""), (Call("shell", "ls | wc -l"),), None


def _nth_line(rng: random.Random) -> _Draft:
    file, count = _text_file(rng), rng.randint(3, 30)
    n = rng.randint(2, count)
    prompt = rng.choice(("What is line {} of {}?", "Show line {} of {}.", "What does line {} of {} say?"))
    lines = [_word(rng) for _ in range(count)]
    call, wrong = Call("shell", f"sed -n {n}p {file}"), Call("shell", f"head -n 1 {file}")
    return prompt.format(n, file), {file: _join(lines)}, (call,), wrong


def _config(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A file of `key=value` lines; no key occurs in another line, so that grep finds one."""
    keys = rng.sample(NUMBER_KEYS + WORD_KEYS, rng.randint(3, 8))
    values = {k: str(_number(rng, 4)) if k in NUMBER_KEYS else rng.choice(WORDS) for k in keys}
    return _file_name(rng, CONFIG_STEMS, ("conf", "ini", "cfg", "env")), values


def _lookup(rng: random.Random) -> _Draft:
    file, values = _config(rng)
    key = rng.choice(list(values))
    prompt = rng.choice(("What is the {} in {}?", "Which {} is set in {}?", "Show the {} in {}."))
    files = {file: _join([f"{k}={v}" for k, v in values.items()])}
    return prompt.format(key, file), files, (Call("shell", f"grep {key} {file}"),), None


def _read_compute(rng: random.Random) -> _Draft:
    file, values = _config(rng)
    key = rng.choice(NUMBER_KEYS)
    values.setdefault(key, str(_number(rng, 4)))
    sign, name = rng.choice((("*", "times"), ("+", "plus")))
    other = _number(rng, 3)
    files = {file: _join([f"{k}={v}" for k, v in values.items()])}
    calls = (Call("shell", f"grep {key} {file}"), Call("python", f"print({values[key]} {sign} {other})"))
    return f"What is the {key} in {file} {name} {other}?", files, calls, None


def _total_lines(rng: random.Random) -> _Draft:
    first = second = _text_file(rng)
    while second == first:
        second = _text_file(rng)
    lines = {name: _text_lines(rng, rng.randint(2, 60)) for name in (first, second)}
    calls = (
        Call("shell", f"wc -l < {first}"),
        Call("shell", f"wc -l < {second}"),
        Call("python", f"print({len(lines[first])} + {len(lines[second])})"),
    )
    prompt = f"How many lines do {first} and {second} have together?"
    return prompt, {name: _join(text) for name, text in lines.items()}, calls, None


_MAKERS: dict[str, Callable[[random.Random], _Draft]] = {
    "sum": _sum,
    "expression": _expression,
    "remainder": _remainder,
    "count_lines": _count_lines,
    "count_matches": _count_matches,
    "count_files": _count_files,
    "nth_line": _nth_line,
    "lookup": _lookup,
    "read_compute": _read_compute,
    "total_lines": _total_lines,
}
KINDS: tuple[str, ...] = tuple(_MAKERS)
"""Every kind of task: the first three need `python`, the next five `shell`, the last two both."""

_HELD_OUT_SHARE = 64  # of 256 values of the hash's first byte


def recipes(split: Split, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None) -> list[Recipe]:
    """Return `count` tasks with the calls that solve them; the same arguments give the same tasks everywhere.

    Kinds take turns in random order, so that any run of `len(kinds)` tasks from a multiple of it has each
    kind once; a longer list begins with the shorter one. Raises ValueError for an unknown split or kind.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    chosen = list(KINDS if kinds is None else kinds)
    unknown = [kind for kind in chosen if kind not in _MAKERS]
    if unknown or not chosen:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}; got {unknown or 'none'}")
    order: list[str] = []
    made: list[Recipe] = []
    for index in range(count):
        rng = random.Random(f"{split}/{seed}/{index}")
        if not order:
            order = random.Random(f"{split}/{seed}/order/{index}").sample(chosen, len(chosen))
        made.append(_draw(order.pop(), split, f"{split}-{seed}-{index}", rng))
    return made


def tasks(split: Split, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None) -> list[Task]:
    """Return `count` tasks of one split, without their solutions; see `recipes` for order and errors."""
    return [recipe.task for recipe in recipes(split, count, seed=seed, kinds=kinds)]


def split_of(calls: Sequence[Call], files: dict[str, bytes]) -> Split:
    """Return the side that a task belongs to: its values decide (calls, files), not its wording or seed."""
    content = msgspec.json.encode([list(calls), sorted(files.items())])
    return "held_out" if hashlib.sha256(content).digest()[0] < _HELD_OUT_SHARE else "train"


def _draw(kind: str, split: Split, task_id: str, rng: random.Random) -> Recipe:
    from agentserve.demo.simulate import simulate

    while True:
        prompt, files, calls, wrong = _MAKERS[kind](rng)
        if split_of(calls, files) != split:
            continue
        answer = answer_in(simulate(files, calls[-1].tool, arguments_of(calls[-1])))
        task = Task(id=task_id, prompt=prompt, answer=answer, files=files, kind=kind)
        return Recipe(task=task, calls=calls, wrong=wrong)


def arguments_of(call: Call) -> dict[str, str]:
    """Return the arguments of a call as its tool takes them."""
    return {"code" if call.tool == "python" else "command": call.argument}


# ---------------------------------------------------------------- score

_ANSWER = re.compile(r"The answer is (\S+?)\.?")


def answer_in(printed: str) -> str:
    """Return the answer that a last tool result shows: the text, or what stands after `=`."""
    return printed.strip().rpartition("=")[2]


def reply_for(answer: str) -> str:
    """Return the final reply that gives `answer`, in the form the model is trained to use."""
    return f"The answer is {answer}."


def score(task: Task, reply_text: str) -> float:
    """Return 1.0 when the final reply says `The answer is X.` and X is the task's answer, else 0.0."""
    match = _ANSWER.fullmatch(reply_text.strip())
    return float(match is not None and match[1] == task.answer)


def showcase() -> list[Task]:
    """Return three held-out tasks that need several calls each: what a demonstration asks first."""
    return [
        *tasks("held_out", 1, seed=1, kinds=["read_compute"]),
        *tasks("held_out", 1, seed=2, kinds=["total_lines"]),
        *tasks("held_out", 1, seed=3, kinds=["read_compute"]),
    ]
