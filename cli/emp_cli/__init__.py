"""The command line of emp-llm: ``emp-llm COMMAND …`` or ``python -m emp_cli COMMAND …``.

tables           tables and totals that fit 80 columns
streams          stdin, stdout and stderr where one is closed, full or not read
console          progress, errors, exit status, JSON: what every command does with the terminal
arguments        arguments and options that several commands share
option_parsing   options as the library takes them; contradictions are wrong usage
inspect_view     what `inspect` and `report` print
compare_view     what `compare` prints
structures_view  what `shrink` and `inspect --structures` print
pictures         the page and the figures that both write on request
compare          emp-llm compare
diff             emp-llm diff
eval             emp-llm eval
generate         emp-llm generate
inspect          emp-llm inspect
push             emp-llm push
prune            emp-llm prune, which can push what it wrote
report           emp-llm report
shrink           emp-llm shrink
pack             emp-llm pack
unpack           emp-llm unpack
verify           emp-llm verify
app              the commands, put together
usage            runs the app; wrong usage is one short message
"""

import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    from emp_cli.streams import open_streams

    open_streams()
    from emp_cli.usage import run

    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def _terminate(number: int, _frame: FrameType | None) -> None:
    """End by an exception, so that ``with`` statements clear up unfinished files."""
    sys.exit(128 + number)
