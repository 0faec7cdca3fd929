"""How the demo looks: turns in the terminal, the progress of the run, and the plot. Nothing here computes
anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from agentserve.sdk import AgentResult, ToolCall, ToolRecord, TurnRecord

if TYPE_CHECKING:
    from rollout.train.loop import Evaluation, StepReport

MAX_SHOWN = 160


def services(console: Console, server: str, sandbox: str, seconds: float) -> None:
    """Where the two services listen."""
    console.print(
        Panel(
            f"engine   {server}\nsandbox  {sandbox}  (bubblewrap, no network)",
            title=f"two services on this machine, up in {seconds:.1f} s",
            title_align="left",
            expand=False,
        )
    )


def task(console: Console, number: int, prompt: str, files: Mapping[str, bytes]) -> None:
    """The question that an agent is given."""
    console.print()
    console.rule(f"[bold]Task {number}[/]", align="left")
    listed = ", ".join(f"{name} ({len(data)} bytes)" for name, data in files.items()) or "none"
    console.print(f"[bold]user[/]       {escape(prompt)}", highlight=False)
    console.print(f"[dim]files      {escape(listed)}[/]", highlight=False)


def tool_call(console: Console, call: ToolCall) -> None:
    """A tool call as the model wrote it."""
    console.print(f"[cyan]call[/]       {call.name} {escape(_short(call.arguments))}", highlight=False)


def tool_result(console: Console, record: ToolRecord) -> None:
    """What the tool gave back."""
    color = "green" if record.status == "ok" else "yellow"
    text = escape(_short(record.text))
    console.print(
        f"[{color}]{record.status:10}[/] {text} [dim]({1000 * record.duration_s:.0f} ms in the sandbox)[/]",
        highlight=False,
    )


def turn(console: Console, record: TurnRecord) -> None:
    """What a turn cost, and how much of its prompt the cache had."""
    console.print(
        f"[dim]turn {record.turn}     {record.prompt} tokens: {record.cached} cached + {record.computed} computed,[/] "
        f"[magenta]{record.hit_rate:.0%} hit[/][dim]; {record.completion} sampled in {record.total_ms:.0f} ms[/]",
        highlight=False,
    )


def answer(console: Console, result: AgentResult[Any], right: bool) -> None:
    """The final reply, and whether it is right."""
    mark = "[green]right[/]" if right else "[red]wrong[/]"
    console.print(f"[bold]assistant[/]  {escape(_short(result.text))}  {mark}", highlight=False)


class RunDisplay:
    """The RL run: a progress bar and one line a step."""

    def __init__(self, console: Console, steps: int):
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.bar = self.progress.add_task("RL", total=steps)

    def __enter__(self) -> RunDisplay:
        self.console.print()
        self.console.rule("[bold]Reinforcement learning[/]", align="left")
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def phase(self, text: str) -> None:
        """What happens now."""
        self.progress.update(self.bar, description=text)

    def evaluated(self, when: str, evaluation: Evaluation) -> None:
        """How much of the held-out tasks the policy solves."""
        self.console.print(
            f"held-out  [bold]{evaluation.mean:.1%}[/] of {len(evaluation.rewards)} tasks solved {when}",
            highlight=False,
        )
        self.phase("training")

    def step(self, report: StepReport) -> None:
        """One line for a step that is done."""
        metrics = report.metrics
        self.progress.update(self.bar, advance=1, description="training")
        self.console.print(
            f"step {report.step:3}  [bold]reward {metrics.reward:.3f}[/]  {metrics.tokens:5} tokens  "
            f"logprob gap {metrics.gap_mean:.0e} (max {metrics.gap_max:.0e})  "
            f"[dim]{report.rollout_s:.1f} + {report.train_s:.1f} s[/]",
            highlight=False,
        )


def summary(
    console: Console,
    before: Evaluation,
    after: Evaluation,
    reports: Sequence[StepReport],
    plot: Path,
    seconds: float,
) -> None:
    """What came of it all."""
    trained = [report.metrics for report in reports if report.metrics.tokens]
    tokens = sum(metrics.tokens for metrics in trained)
    gap = sum(metrics.gap_mean * metrics.tokens for metrics in trained) / max(tokens, 1)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("held-out tasks solved", f"[bold]{before.mean:.1%} → {after.mean:.1%}[/]")
    table.add_row("trained on", f"{tokens} sampled tokens in {len(reports)} steps")
    largest = max((metrics.gap_max for metrics in trained), default=0.0)
    table.add_row("logprob gap, trainer to engine", f"mean {gap:.1e}, largest {largest:.1e} (float32)")
    table.add_row("plot", str(plot))
    rollouts, training = (sum(getattr(report, part) for report in reports) for part in ("rollout_s", "train_s"))
    published = sum(report.publish_s for report in reports)
    table.add_row(
        "time", f"{seconds:.0f} s: rollouts {rollouts:.0f}, training {training:.0f}, publishing {published:.1f}"
    )
    console.print()
    console.print(table, highlight=False)


def plot(
    path: Path, before: Evaluation, after: Evaluation, reports: Sequence[StepReport], kinds: Sequence[str]
) -> Path:
    """Draw the reward by step and the held-out tasks by kind to a PNG file; `kinds[i]` is that of held-out task i."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2), layout="constrained")
    steps = [report.step for report in reports]
    left.plot(steps, [report.metrics.reward for report in reports], marker="o", label="training tasks, mean reward")
    left.axhline(before.mean, color="tab:red", linestyle="--", label=f"held-out before: {before.mean:.0%}")
    left.axhline(after.mean, color="tab:green", linestyle="--", label=f"held-out after: {after.mean:.0%}")
    left.set(xlabel="RL step", ylabel="share of tasks solved", ylim=(0, 1), title="Reward")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc="best")
    left.grid(alpha=0.3)
    names = sorted(set(kinds))
    for offset, color, evaluation, label in ((0.2, "tab:red", before, "before"), (-0.2, "tab:green", after, "after")):
        shares = [_share(evaluation, kinds, name) for name in names]
        right.barh([row + offset for row in range(len(names))], shares, height=0.38, color=color, label=label)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="share of tasks solved", xlim=(0, 1), title="Held-out tasks by kind")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    right.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _share(evaluation: Evaluation, kinds: Sequence[str], name: str) -> float:
    rewards = [
        reward for group, kind in zip(evaluation.groups, kinds, strict=True) if kind == name for reward in group.rewards
    ]
    return sum(rewards) / len(rewards) if rewards else 0.0


def _short(text: str) -> str:
    line = text.replace("\n", " ⏎ ")
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 1] + "…"
