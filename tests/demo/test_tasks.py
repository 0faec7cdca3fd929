"""Tasks: the same for a seed, held-out apart from training, true to the real tools, scored strictly."""

import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from agentserve.demo.demonstrate import HABITS, conversations, demonstrate
from agentserve.demo.simulate import simulate
from agentserve.demo.tasks import (
    KINDS,
    TOOLS,
    Recipe,
    Task,
    answer_in,
    arguments_of,
    recipes,
    reply_for,
    score,
    showcase,
    split_of,
    tasks,
)


def run_really(recipe: Recipe, directory: Path) -> list[str]:
    """Run a recipe's calls with the real shell and Python, in a directory that holds the task's files."""
    for name, content in recipe.task.files.items():
        (directory / name).write_bytes(content)
    printed = []
    for call in (*recipe.calls, *([recipe.wrong] if recipe.wrong else [])):
        command = ["bash", "-c", call.argument] if call.tool == "shell" else [sys.executable, "-I", "-c", call.argument]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=30, check=True)
        printed.append(done.stdout)
    return printed


def test_the_simulation_prints_what_the_real_tools_print(tmp_path: Path) -> None:
    for recipe in recipes("held_out", 3 * len(KINDS), seed=5):
        directory = tmp_path / recipe.task.id
        directory.mkdir()
        calls = (*recipe.calls, *([recipe.wrong] if recipe.wrong else []))
        simulated = [simulate(recipe.task.files, call.tool, arguments_of(call)) for call in calls]
        assert run_really(recipe, directory) == simulated
        assert answer_in(simulated[len(recipe.calls) - 1]) == recipe.task.answer


def test_same_arguments_give_the_same_tasks_and_longer_lists_begin_with_shorter() -> None:
    assert tasks("train", 40, seed=3) == tasks("train", 40, seed=3)
    assert tasks("train", 40, seed=3)[:17] == tasks("train", 17, seed=3)
    assert tasks("train", 40, seed=3) != tasks("train", 40, seed=4)
    other_process = subprocess.run(
        [
            sys.executable,
            "-c",
            "from agentserve.demo.tasks import tasks; print(hash_of := tasks('train', 20, seed=3))",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        cwd=Path(__file__).parents[2],
    )
    assert other_process.stdout.strip() == str(tasks("train", 20, seed=3))


def test_held_out_tasks_share_no_values_with_training() -> None:
    train = recipes("train", 3000, seed=0)
    held_out = recipes("held_out", 1000, seed=0)

    def values(recipe: Recipe) -> tuple[object, ...]:
        return (recipe.calls, tuple(sorted(recipe.task.files.items())))

    assert not {values(r) for r in train} & {values(r) for r in held_out}
    assert all(split_of(r.calls, r.task.files) == "held_out" for r in held_out)
    assert all(split_of(r.calls, r.task.files) == "train" for r in train)


def test_demonstrations_use_training_tasks_only() -> None:
    for talk, _ in zip(conversations(0), range(300), strict=False):
        for message in talk.messages:
            for call in message.get("tool_calls", []):
                arguments = msgspec.json.decode(call["function"]["arguments"])
                code = arguments.get("code", "")
                recipe_calls = [r.calls for r in _HELD_OUT_ARITHMETIC]
                assert not any(code == calls[0].argument for calls in recipe_calls)


_HELD_OUT_ARITHMETIC = recipes("held_out", 300, seed=9, kinds=["sum", "expression", "remainder"])


def test_every_kind_appears_equally_often_and_a_choice_of_kinds_is_kept() -> None:
    kinds = [task.kind for task in tasks("held_out", 5 * len(KINDS))]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 5)
    assert {task.kind for task in tasks("train", 9, kinds=["sum", "lookup"])} == {"sum", "lookup"}


@pytest.mark.parametrize(("split", "kinds"), [("test", None), ("train", ["sums"]), ("train", [])])
def test_unknown_splits_and_kinds_are_refused(split: str, kinds: list[str] | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        tasks(split, 3, kinds=kinds)  # type: ignore[arg-type]


def make_task(answer: str) -> Task:
    return Task(id="t", prompt="?", answer=answer, files={}, kind="sum")


@pytest.mark.parametrize(
    ("answer", "reply", "expected"),
    [
        ("10463", "The answer is 10463.", 1.0),
        ("10463", "The answer is 10463", 1.0),
        ("10463", "  The answer is 10463.\n", 1.0),
        ("-4", "The answer is -4.", 1.0),
        ("amber", "The answer is amber.", 1.0),
        ("10463", "The answer is 1046.", 0.0),
        ("10463", "The answer is 110463.", 0.0),
        ("10463", "10463", 0.0),
        ("10463", "The answer is 10463. The answer is 5.", 0.0),
        ("10463", "The answer is 5. The answer is 10463.", 0.0),
        ("10463", "The answer is 10463 or 10464.", 0.0),
        ("10463", "", 0.0),
        (
            "10463",
            '<tool_call>\n{"name": "python", "arguments": {"code": "print(10463)"}}\n</tool_call>',
            0.0,
        ),
    ],
)
def test_score(answer: str, reply: str, expected: float) -> None:
    assert score(make_task(answer), reply) == expected


def test_the_form_of_the_reply_scores() -> None:
    for task in tasks("held_out", 50):
        assert score(task, reply_for(task.answer)) == 1.0


def test_bad_habits_are_shown_at_their_shares() -> None:
    rng = random.Random(0)
    for kind, habit in HABITS.items():
        made = recipes("train", 400, seed=2, kinds=[kind])
        right = sum(score(r.task, demonstrate(r, rng)[-1]["content"]) for r in made) / len(made)
        expected = 1.0 - habit.wrong
        for share in habit.guess:
            expected *= 1.0 - share
        # A guess is right now and then (small counts), so the share of right ones may lie a little above.
        assert expected - 0.08 < right < expected + 0.15, kind


def test_tools_are_two_with_one_string_argument_each() -> None:
    functions = [tool["function"] for tool in TOOLS]
    assert [f["name"] for f in functions] == ["python", "shell"]
    assert [f["parameters"]["required"] for f in functions] == [["code"], ["command"]]


def test_showcase_tasks_need_several_calls() -> None:
    assert [task.kind for task in showcase()] == ["read_compute", "total_lines", "read_compute"]
    assert showcase() == showcase()


def test_unknown_commands_are_answered_not_raised() -> None:
    files = {"a.txt": b"1\n"}
    assert "No such file" in simulate(files, "shell", {"command": "wc -l < b.txt"})
    assert "not found" in simulate(files, "shell", {"command": "rm -rf a.txt"})
    assert "Error" in simulate(files, "python", {"code": "print(1 % 0)"})
    assert "Error" in simulate(files, "python", {"code": "print(__import__('os'))"})
    assert "unknown" in simulate(files, "browser", {"url": "x"})
