"""What `make demo` runs: `python -m rollout.demo [--seed 0] [--steps N] [--out DIR]`.

An engine and a sandbox service are started, three tasks are worked on turn by turn, and a short RL run makes the
model better. How it looks is `display`, what the tasks are is `agentserve.demo.tasks`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import msgspec
import torch
from rich.console import Console

from agentserve.demo import tasks as demo
from agentserve.models import load_model
from agentserve.sdk import Agent, AgentResult, AgentserveError, Client, Done, ToolCall, ToolResult, TurnDone
from agentserve.tokenizer import resolve_model_dir
from rollout import display
from rollout.coordinator import Rollout
from rollout.episode import AgentSpec
from rollout.processes import Service, ServiceFailed
from rollout.train.grpo import GRPOConfig, GRPOTrainer
from rollout.train.loop import Evaluation, StepReport, evaluate, reinforce

SHOWN_KINDS = ("total_lines", "read_compute", "lookup")
ENGINE_FLAGS = [
    *("--port", "0"),
    *("--dtype", "float32"),
    *("--threads", "1"),
    *("--kv-tokens", "32768"),
    *("--max-batch-tokens", "512"),
    *("--max-running", "64"),
    *("--log-level", "warning"),
]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides how the RL run goes; the numbers are what 2 cores do in about two minutes."""

    model: str = "demo"
    seed: int = 0
    steps: int = 8
    tasks_per_step: int = 10
    group_size: int = 8
    held_out: int = 100
    concurrency: int = 16
    max_turns: int = 6
    max_tokens: int = 64
    trainer: GRPOConfig = GRPOConfig(learning_rate=2e-4)


class Outcome(msgspec.Struct, frozen=True):
    """What the RL run did."""

    before: Evaluation
    after: Evaluation
    reports: list[StepReport]


def start_services(stack: ExitStack, model: str) -> tuple[str, str]:
    """Start the engine's server and the sandbox service; return their URLs. The stack stops them."""
    server = stack.enter_context(Service("server", ["-m", "agentserve", "serve", model, *ENGINE_FLAGS]))
    sandbox = stack.enter_context(Service("sandbox", ["-m", "sandbox", "--port", "0"]))
    return server.url, sandbox.url


def show_tasks(console: Console, client: Client, sandbox: str, settings: Settings) -> list[AgentResult]:
    """Work on three held-out tasks greedily, printing every turn as it happens."""
    results: list[AgentResult] = []
    agent = Agent(
        client,
        sandbox=sandbox,
        system=demo.SYSTEM,
        max_turns=settings.max_turns,
        max_tokens=settings.max_tokens,
        temperature=0.0,
    )
    with agent:
        for number, kind in enumerate(SHOWN_KINDS, 1):
            (task,) = demo.tasks("held_out", 1, seed=settings.seed + 1000 + number, kinds=[kind])
            display.task(console, number, task.prompt, task.files)
            for event in agent.stream(task.prompt, files=task.files, seed=settings.seed):
                match event:
                    case ToolCall():
                        display.tool_call(console, event)
                    case ToolResult():
                        display.tool_result(console, event.record)
                    case TurnDone():
                        display.turn(console, event.record)
                    case Done():
                        display.answer(console, event.result, demo.score(task, event.result.text) == 1.0)
                        results.append(event.result)
    return results


def train(client: Client, sandbox: str, settings: Settings, progress: display.RunDisplay) -> Outcome:
    """Evaluate, train and publish step by step, evaluate again."""
    spec = AgentSpec(
        system=demo.SYSTEM,
        max_turns=settings.max_turns,
        sampling={"temperature": 1.0, "max_tokens": settings.max_tokens},
    )
    rollout = Rollout(
        client.url,
        sandbox,
        spec,
        lambda task, result: demo.score(task, result.text),
        concurrency=settings.concurrency,
        group_size=settings.group_size,
        seed=settings.seed,
    )
    held_out = demo.tasks("held_out", settings.held_out, seed=settings.seed)
    questions = demo.tasks("train", settings.steps * settings.tasks_per_step, seed=settings.seed + 1)
    size = settings.tasks_per_step
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    trainer = GRPOTrainer(load_model(resolve_model_dir(settings.model)), settings.trainer)
    reports = []
    # Half the cores, so one of two: threads that wait for each other lose far more to any other busy process than a
    # second one gains, and the run is the same on every machine of that size.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    with rollout:
        progress.phase("measuring held-out tasks")
        before = evaluate(rollout, held_out, seed=settings.seed)
        progress.evaluated("before", before)
        for report in reinforce(rollout, trainer, client, batches):
            reports.append(report)
            progress.step(report)
        progress.phase("measuring held-out tasks again")
        after = evaluate(rollout, held_out, seed=settings.seed)
        progress.evaluated("after", after)
    return Outcome(before, after, reports)


def run(settings: Settings, out: Path, console: Console) -> Outcome:
    """The whole demo; returns what the RL run did."""
    started = time.monotonic()
    with ExitStack() as stack:
        with console.status("starting the engine and the sandbox service"):
            server, sandbox = start_services(stack, settings.model)
            client = stack.enter_context(Client(server))
        display.services(console, server, sandbox, time.monotonic() - started)
        show_tasks(console, client, sandbox, settings)
        with display.RunDisplay(console, settings.steps) as progress:
            outcome = train(client, sandbox, settings, progress)
    out.mkdir(parents=True, exist_ok=True)
    kinds = [task.kind for task in demo.tasks("held_out", settings.held_out, seed=settings.seed)]
    plot = display.plot(out / "reward.png", outcome.before, outcome.after, outcome.reports, kinds)
    display.summary(console, outcome.before, outcome.after, outcome.reports, plot, time.monotonic() - started)
    return outcome


def main() -> int:
    """Read the command line and run. Exit status 0 when the policy is better afterwards."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m rollout.demo", description=run.__doc__)
    parser.add_argument("--model", default=defaults.model, help="model directory, or 'demo' for the shipped one")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of tasks, sampling and training")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="RL steps")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="directory for the plot")
    options = parser.parse_args()
    if options.steps < 1 or options.seed < 0:
        parser.error("--steps must be at least 1 and --seed 0 or more")
    settings = msgspec.structs.replace(defaults, model=options.model, seed=options.seed, steps=options.steps)
    console = Console()
    # A polite kill cleans up as Ctrl-C does, and Ctrl-C also where a shell had it ignored (`… &` in a script).
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        outcome = run(settings, options.out, console)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; services are down[/]")
        return 130
    except (ServiceFailed, AgentserveError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    return 0 if outcome.after.mean > outcome.before.mean else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
