"""Batch scripts, filled in from the ``*.sbatch`` templates beside this file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bd3_common.errors import UserError
from bd3_common.text import first_hidden

TEMPLATES = Path(__file__).parent
BEGIN, END = "# ---- edit from here", "# ---- to here"


def template(name: str) -> str:
    """The template ``<name>.sbatch``."""
    return (TEMPLATES / f"{name}.sbatch").read_text("utf-8")


def fill(text: str, directives: Mapping[str, str | int | None], lines: Sequence[str]) -> str:
    """Fill in a template.

    Args:
        directives: options of sbatch without dashes; None drops an option, an empty text is an option without value.
            Options that the template lacks come after its last one.
        lines: shell lines for the part between :data:`BEGIN` and :data:`END`.

    Raises:
        UserError: a directive or a line has a line end or another control character.
        ValueError: the template has no such part.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the template has no lines '{BEGIN}' and '{END}'")
    for name, value in directives.items():
        _check_line(f"{name}={value}")
    for line in lines:
        _check_line(line)
    left, out, last = dict(directives), [], 0
    before, _, rest = text.partition(BEGIN)
    for line in before.splitlines():
        name = re.match(r"##?SBATCH --([\w-]+)", line)
        if name is None:
            out.append(line)
            continue
        if name[1] in left:
            value = left.pop(name[1])
            if value is not None:
                out.append(_directive(name[1], value))
                last = len(out)
        elif not line.startswith("##"):
            out.append(line)
            last = len(out)
    out[last:last] = [_directive(name, value) for name, value in left.items() if value is not None]
    after = rest.partition(END)[2].partition("\n")[2]
    return "\n".join([*out, BEGIN, *lines, END, after])


def _check_line(line: str) -> None:
    if found := first_hidden(line, keep="\t"):
        raise UserError(f"{line}: has {found}, which would change the lines of the job's script; leave it out")


def _directive(name: str, value: str | int) -> str:
    text = str(value)
    if re.search(r"[\s\"'\\#]", text):  # sbatch splits at spaces, takes quotes and backslashes, and # as a comment
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return f"#SBATCH --{name}" + ("" if text == "" else f"={text}")
