"""The command line as its user types it, mistakes included."""

import subprocess
import sys

import msgspec
import pytest

from agentserve.config import EngineConfig, ServerConfig


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentserve", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )


def test_every_config_field_is_a_flag_with_its_default():
    text = run("serve", "--help").stdout
    for config in (EngineConfig, ServerConfig):
        for field in msgspec.structs.fields(config):
            flag = "MODEL_DIR" if field.name == "model_dir" else "--" + field.name.replace("_", "-")
            assert flag in text
    assert "[default: 65536]" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["serve"], "MODEL_DIR"),
        (["serve", "demo", "--pagesize", "3"], "--page-size"),
        (["serve", "demo", "--page-size", "0"], "page_size must be at least 1, got 0"),
        (["serve", "demo", "--page-size", "x"], "'--page-size'"),
        (["serve", "demo", "--port", "70000"], "port must be in [0, 65535], got 70000"),
        (["serve", "/no/such/model"], "no model directory at /no/such/model"),
        (["serve", "demo", "--dtype", "int3"], "bfloat16"),
        (["srve"], "serve"),
    ],
)
def test_mistakes_end_with_status_2_and_say_what_would_be_right(args, message):
    result = run(*args)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_sandbox_is_the_sandbox_service():
    assert "--memory-mb" in run("sandbox", "--help").stdout


def test_version_names_what_it_runs_on():
    assert "torch" in run("version").stdout


def test_check_template_says_what_holds():
    result = run("check-template", "demo")
    assert result.returncode == 0
    assert "every rendering continues the one before" in result.stdout
    missing = run("check-template", "/no/such/model")
    assert missing.returncode == 2
    assert "no model directory" in missing.stderr


def test_check_template_shows_the_first_difference(tmp_path):
    from agentserve.demo import MODEL_DIR

    for file in MODEL_DIR.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    # a template that says how many messages there are writes its beginning anew each time
    changed = "{{ messages | length }} messages\n" + (MODEL_DIR / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(changed)
    result = run("check-template", str(tmp_path))
    assert result.returncode == 1
    assert "first difference at character 0" in result.stdout
