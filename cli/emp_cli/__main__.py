"""``python -m emp_cli``."""

from emp_cli import main

main()
