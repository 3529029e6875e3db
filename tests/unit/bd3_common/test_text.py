"""Text from outside: no control characters on a terminal, no passwords in files."""

from __future__ import annotations

import io
import json
import logging

import pytest
from pydantic import BaseModel, Field, ValidationError

from bd3_common import logs
from bd3_common.errors import ConfigError, user_line
from bd3_common.text import counted, has_token, is_secret, json_line, printable, redacted, secret_in, show

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\x00\udcff"


def test_control_characters_are_written_as_escapes() -> None:
    assert printable(f"a{ESCAPES}") == r"a\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\x0d\x00\udcff"
    assert printable("Über\n\tناز\u200cنین", keep="\n\t") == "Über\n\tناز\u200cنین"
    out = io.StringIO()
    show(f"two\n\tlines{ESCAPES}", out)
    assert out.getvalue() == "two\n\tlines" + printable(ESCAPES) + "\n"


def test_json_stays_json() -> None:
    value = {"text": f"é{ESCAPES}‖", "n": [1.5, None]}
    line = json_line(value)
    assert json.loads(line) == value
    assert "é" in line
    assert printable(line) == line


def test_errors_and_messages_show_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert user_line(ConfigError(f"a\n{ESCAPES}")) == "a " + printable(ESCAPES.replace("\r", " "))
    line = user_line(FileNotFoundError(2, "No such file", f"/x{ESCAPES}"))
    assert line is not None
    assert printable(line) == line
    logs.to_console()
    logging.getLogger("pretrain.test").warning("%s and https://me:hunter2@host/x", ESCAPES)
    assert capsys.readouterr().err == f"WARNING: {printable(ESCAPES)} and https://***@host/x\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/a", "https://***@host/a"),
        ("s3://k:s@b/x, then ftp://u:p@h", "s3://***@b/x, then ftp://***@h"),
        ("https://h/x?X-Amz-Signature=ab12&part=1", "https://h/x?X-Amz-Signature=***&part=1"),
        ("https://h/x?sv=1&sig=a%2Fb#c", "https://h/x?sv=1&sig=***#c"),
        ("https://ghp_x@h/", "https://***@h/"),
        ("https://h/x?next=https://g/?token=abc", "https://h/x?next=https://g/?token=***"),
        ("memory://copy: a:b@c s3://bucket/key git://git@h/x", "memory://copy: a:b@c s3://bucket/key git://git@h/x"),
    ],
)
def test_passwords_of_urls_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert has_token(text) == (shown != text)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "0" * 100_000,
        "a-" * 50_000,
        "://" + "a" * 100_000,
        "x://" + "a:" * 50_000,
        "x://h/?" + "key" * 33_000,
        "x://h/" + "?key" * 25_000,
        "x://h/" + "?a=" * 33_000,
        "a=" * 50_000,
        "a='" * 33_000,
        "bearer " * 13_000 + " " * 33_000,
        "sk-" * 33_000,
    ],
    ids=lambda text: text[:8],
)
def test_long_texts_are_looked_through_at_once(text: str) -> None:
    """None of them holds a secret. An expression that went back to earlier characters would take many minutes."""
    assert redacted(text) == text
    assert not has_token(text)
    assert not is_secret("NAME", text)
    assert secret_in(text) is None


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("SLURM_JWT", "x", True),
        ("BD3_S3_SECRET_KEY", "hunter2", True),
        ("WANDB_APIKEY", "x", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/x", True),
        ("NCCL_DEBUG", "hf_" + "Ab1" * 10, True),
        ("SLURM_JOB_NAME", "eyJhbGciOi", True),
        ("NCCL_NET", "0123456789abcdef0123456789abcdef", True),
        ("NCCL_NET", "abcdefghabcdefghabcdefghabcdefgh_1", True),
        ("NCCL_NET", "abcdefghabcdefghabcdefghabcdefgh", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", False),
        ("PATH", "/nix/store/0123456789abcdef0123456789abcdef-x/bin:/bin", False),
        ("MASTER_ADDR", "node-1", False),
        ("HF_TOKEN", "", False),
        ("FOO", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", True),
        ("FOO", "/alrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEYS", False),
    ],
)
def test_variables_that_look_like_secrets(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("export HF_TOKEN=abc", "HF_TOKEN"),
        ("export HF_TOKEN=$(cat ~/.token)", None),
        ('export A=1 WANDB_API_KEY="x y"', "WANDB_API_KEY"),
        ("huggingface-cli login --token hf_" + "Ab1" * 10, "--token"),
        ("huggingface-cli login hf_" + "Ab1" * 10, "a token"),
        ("module load cuda/12.1 hf_fineweb_edu_sample_10BT", None),
        ("wandb login " + "0123456789abcdef" * 2 + "01234567", "a token"),
        ("setenv WANDB_API_KEY abc", "WANDB_API_KEY"),
        ("tool --api-key abcDEF123456789", "--api-key"),
        ("curl -u me:hunter2pass https://x/y", "-u"),
        ("export WANDB_API_KEY=$'abcdef0123'", "WANDB_API_KEY"),
        ('export HF_TOKEN="${X}abc"', "HF_TOKEN"),
        ("tool wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "a token"),
        ("export HF_TOKEN=$TOKEN HF_TOKEN_PATH=${HOME}/token", None),
        ("tool --api-key-file /home/me/key --tokens 1000000 --key $KEY", None),
        ("git checkout " + "0123456789abcdef" * 2 + "01234567", None),
        ("apptainer pull docker://x/y@sha256:" + "0123456789abcdef" * 4, None),
        ("module load 'a", None),
    ],
)
def test_secrets_in_lines_of_the_shell(line: str, name: str | None) -> None:
    assert secret_in(line) == name


def test_a_value_that_pydantic_refuses_is_one_line() -> None:
    class Options(BaseModel):
        batch: int = Field(gt=0)

    with pytest.raises(ValidationError) as caught:
        Options(batch=-1)
    assert user_line(caught.value) == "batch=-1: Input should be greater than 0"


def test_numbers_with_their_nouns() -> None:
    assert [counted(n, "row") for n in range(3)] == ["0 rows", "1 row", "2 rows"]
    assert counted(1, "pass", "passes") == "1 pass"
    assert counted(2, "pass", "passes") == "2 passes"
