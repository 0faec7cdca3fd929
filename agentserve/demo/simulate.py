"""What the two tools print for the commands that the demo model uses, without running anything.

Training traces are made with it, so that they hold what the real tools print. It is no shell and no sandbox:
it knows the few command forms of the tasks, and everything else is answered as an unknown command.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
}
_NAME = r"[\w.-]+"


def simulate(files: Mapping[str, bytes], name: str, arguments: Mapping[str, Any]) -> str:
    """Return what tool `name` prints (standard error where it fails), its last newline included.

    `files` is the working directory, name to content. A command outside the known forms gives an error text,
    as a tool would; nothing is raised.
    """
    if name == "python" and isinstance(arguments.get("code"), str):
        return _python(arguments["code"])
    if name == "shell" and isinstance(arguments.get("command"), str):
        return _shell(files, arguments["command"])
    return f"unknown tool or arguments: {name}\n"


def _python(code: str) -> str:
    match = re.fullmatch(r"print\((.*)\)", code.strip())
    try:
        if match is None:
            raise SyntaxError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the code is a model's; `1if` is its doing, not ours
            body = ast.parse(match[1], mode="eval").body
        return f"{_evaluate(body)}\n"
    except ZeroDivisionError:
        return "ZeroDivisionError: integer modulo by zero\n"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "SyntaxError: invalid syntax\n"


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    raise SyntaxError


def _shell(files: Mapping[str, bytes], command: str) -> str:
    for pattern, action in _FORMS:
        match = re.fullmatch(pattern, command.strip())
        if match is not None:
            file = match.groupdict().get("file")
            if file is not None and file not in files:
                return f"{command.split()[0]}: {file}: No such file or directory\n"
            return action(files, match)
    return f"bash: {command}: command not found\n"


def _text(files: Mapping[str, bytes], match: re.Match[str]) -> str:
    return files[match["file"]].decode()


def _lines(files: Mapping[str, bytes], match: re.Match[str]) -> list[str]:
    return _text(files, match).splitlines(keepends=True)


def _matching(files: Mapping[str, bytes], match: re.Match[str]) -> list[str]:
    return [line for line in _lines(files, match) if match["word"] in line]


_Action = Callable[[Mapping[str, bytes], re.Match[str]], str]
_FORMS: list[tuple[str, _Action]] = [
    (rf"wc -l < (?P<file>{_NAME})", lambda f, m: f"{_text(f, m).count(chr(10))}\n"),
    (rf"wc -w < (?P<file>{_NAME})", lambda f, m: f"{len(_text(f, m).split())}\n"),
    (rf"wc -c < (?P<file>{_NAME})", lambda f, m: f"{len(f[m['file']])}\n"),
    (rf"grep -c (?P<word>\w+) (?P<file>{_NAME})", lambda f, m: f"{len(_matching(f, m))}\n"),
    (rf"grep (?P<word>\w+) (?P<file>{_NAME})", lambda f, m: "".join(_matching(f, m))),
    (
        rf"sed -n (?P<n>[1-9]\d*)p (?P<file>{_NAME})",
        lambda f, m: "".join(_lines(f, m)[int(m["n"]) - 1 : int(m["n"])]),
    ),
    (rf"head -n? ?(?P<n>\d+) (?P<file>{_NAME})", lambda f, m: "".join(_lines(f, m)[: int(m["n"])])),
    (rf"cat (?P<file>{_NAME})", _text),
    (r"ls \| wc -l", lambda f, m: f"{len(f)}\n"),
    (r"ls", lambda f, m: "".join(f"{name}\n" for name in sorted(f))),
]
