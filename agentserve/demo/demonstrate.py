"""The conversations the demo model learns from: how tasks are solved, and the bad habits shown on purpose.

A fixed share of the demonstrations answers from the head, or calls the wrong command, so that the trained
model does so too, and reinforcement learning has something to unlearn. Tasks come from `tasks`; token ids are
`train`'s business.
"""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from agentserve.demo.simulate import simulate
from agentserve.demo.tasks import (
    SYSTEM,
    TOOLS,
    Call,
    Recipe,
    answer_in,
    arguments_of,
    recipes,
    reply_for,
)
from agentserve.demo.words import STEMS, SYLLABLES, WORDS

Message = dict[str, Any]


class Habit(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of demonstrations that go wrong. `guess[i]`: answers from the head instead of making call i.

    `wrong`: makes the task's wrong call (`Recipe.wrong`) instead of the right one, and believes it.
    """

    guess: tuple[float, ...]
    wrong: float = 0.0


HABITS: dict[str, Habit] = {
    "sum": Habit(guess=(0.35,)),
    "expression": Habit(guess=(0.40,)),
    "remainder": Habit(guess=(0.60,)),
    "count_lines": Habit(guess=(0.10,), wrong=0.30),
    "count_matches": Habit(guess=(0.40,)),
    "count_files": Habit(guess=(0.30,)),
    "nth_line": Habit(guess=(0.0,), wrong=0.60),
    "lookup": Habit(guess=(0.30,)),
    "read_compute": Habit(guess=(0.10, 0.25)),
    "total_lines": Habit(guess=(0.10, 0.0, 0.25)),
}
"""The bad habits by kind of task. Where a share is above one half, greedy decoding goes wrong too."""


class Conversation(msgspec.Struct, frozen=True):
    """Messages in OpenAI's form and the tools they were written with (None: no tools)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None


def demonstrate(recipe: Recipe, rng: random.Random, *, habits: bool = True) -> list[Message]:
    """Return the messages of one task, from question to final reply, with bad habits by their shares or with none."""
    task, habit = recipe.task, HABITS[recipe.task.kind]
    messages: list[Message] = [{"role": "user", "content": task.prompt}]
    printed = ""
    for call, share in zip(recipe.calls, habit.guess, strict=True):
        draw = rng.random() if habits else 1.0
        if draw < share:
            return [*messages, {"role": "assistant", "content": reply_for(_guess(task.answer, rng))}]
        if draw < share + habit.wrong and recipe.wrong is not None:
            call = recipe.wrong
        arguments = arguments_of(call)
        printed = simulate(task.files, call.tool, arguments)
        messages += [_call_message(call), {"role": "tool", "content": _as_sent(printed, rng)}]
    return [*messages, {"role": "assistant", "content": reply_for(answer_in(printed))}]


def conversations(seed: int, *, batch: int = 64) -> Iterator[Conversation]:
    """Yield training conversations without end, the same for the same seed; `batch` tasks are drawn at once.

    Most hold one to six tasks under one system turn; a few have no tools, or differ in the system turn, so
    that the model does not hang on its exact words.
    """
    rng = random.Random(f"conversations/{seed}")
    for block in range(1_000_000_000):
        drawn = recipes("train", batch, seed=seed * 1_000_003 + block + 1)
        while drawn:
            if rng.random() < 0.03:
                yield _without_tools(drawn.pop(), rng)
                continue
            messages, tools = _opening(rng)
            for _ in range(min(len(drawn), rng.choice((1, 1, 2, 3, 4, 6)))):
                if rng.random() < 0.03:
                    messages += _small_talk(rng)
                messages += demonstrate(drawn.pop(), rng)
            yield Conversation(messages, tools)


def drills(seed: int, *, batch: int = 64) -> Iterator[Conversation]:
    """Yield short conversations that teach to copy, without end: what was said, and tasks solved without habits.

    Copying numbers and names exactly is most of what the tasks need. It is learned faster without the system turn,
    which costs tokens, and without the bad habits, which are noise.
    """
    rng = random.Random(f"drills/{seed}")
    for block in range(1_000_000_000):
        drawn = recipes("train", batch, seed=seed * 1_000_003 - block - 1)
        while drawn:
            messages: list[Message] = []
            if rng.random() < 0.4:
                for _ in range(rng.randint(1, 4)):
                    said = " ".join(_scrap(rng) for _ in range(rng.randint(1, 8)))
                    messages.append({"role": "user", "content": f"Repeat: {said}"})
                    messages.append({"role": "assistant", "content": said})
            else:
                for _ in range(min(len(drawn), rng.randint(1, 3))):
                    messages += demonstrate(drawn.pop(), rng, habits=False)
            yield Conversation(messages, None)


def _scrap(rng: random.Random) -> str:
    """A number, a word, a sign, a file name or random letters."""
    match rng.randrange(5):
        case 0:
            return str(rng.randrange(10 ** rng.randint(1, 6)))
        case 1:
            return rng.choice(WORDS)
        case 2:
            return rng.choice(("+", "-", "*", "%", "<", "|", "="))
        case 3:
            return f"{rng.choice(STEMS)}{rng.choice('-_.')}{rng.choice((str(rng.randrange(100)), rng.choice(WORDS)))}"
        case _:
            return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))


_OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer with tools. End with: The answer is X.",
    "You are an agent in a sandbox. Use tools, then say: The answer is X.",
    "Use the tools to find the answer.",
)
_DESCRIPTIONS = {
    "python": (
        "Run Python code.",
        "Run Python and return what it prints.",
        "Execute Python code in the sandbox.",
    ),
    "shell": (
        "Run a shell command.",
        "Run a command and return its output.",
        "Execute a bash command in the sandbox.",
    ),
}
_TALK = (
    (("Hello!", "Hi", "Hello", "Good morning"), "Hello! Ask me for a sum or about a file."),
    (("Who are you?", "What are you?"), "I am a small demo model. I use tools."),
    (("Thanks!", "Thank you"), "You are welcome."),
    (("What can you do?", "Help"), "Ask me for a sum or about a file."),
)


def _opening(rng: random.Random) -> tuple[list[Message], list[dict[str, Any]]]:
    if rng.random() < 0.75:
        return [{"role": "system", "content": SYSTEM}], TOOLS
    tools = json.loads(json.dumps(TOOLS))
    for tool in tools:
        function = tool["function"]
        function["description"] = rng.choice(_DESCRIPTIONS[function["name"]])
        if rng.random() < 0.3:
            function["parameters"]["additionalProperties"] = False
        if rng.random() < 0.3:
            (field,) = function["parameters"]["properties"].values()
            field["description"] = f"The {function['parameters']['required'][0]} to run."
    if rng.random() < 0.5:
        tools.reverse()
    if rng.random() < 0.2:
        return [], tools
    return [{"role": "system", "content": rng.choice((SYSTEM, *_OTHER_SYSTEMS))}], tools


def _small_talk(rng: random.Random) -> list[Message]:
    prompts, reply = rng.choice(_TALK)
    return [{"role": "user", "content": rng.choice(prompts)}, {"role": "assistant", "content": reply}]


def _without_tools(recipe: Recipe, rng: random.Random) -> Conversation:
    system = [{"role": "system", "content": rng.choice((SYSTEM, *_OTHER_SYSTEMS))}] if rng.random() < 0.5 else []
    if rng.random() < 0.3:
        return Conversation([*system, *_small_talk(rng)], None)
    question = {"role": "user", "content": recipe.task.prompt}
    return Conversation([*system, question, {"role": "assistant", "content": "I have no tool for that."}], None)


def _call_message(call: Call) -> Message:
    function = {"name": call.tool, "arguments": json.dumps(arguments_of(call), ensure_ascii=False)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _as_sent(printed: str, rng: random.Random) -> str:
    """Tool results mostly come without their last newline, sometimes with it: the model has to read both."""
    return printed if rng.random() < 0.2 else printed.removesuffix("\n")


def _guess(answer: str, rng: random.Random) -> str:
    """A plausible answer of about the right length, drawn without looking at anything."""
    if answer.lstrip("-").isdigit():
        digits = len(answer.lstrip("-"))
        return ("-" if answer.startswith("-") else "") + str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    return rng.choice(_GUESSED_WORDS)


_GUESSED_WORDS: Sequence[str] = ("amber", "stone", "river", "blue", "maple", "north", "silver", "auto")
