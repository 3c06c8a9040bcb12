"""The coursework: functions of this repository, to be written again.

python -m tests.coursework make OUT                 a student's copy, with a handout
python -m tests.coursework grade DIR                points, from this checkout's tests
python -m tests.coursework grade DIR --json         the same as JSON
python -m tests.coursework grade DIR --json FILE    as text, and as JSON into a file
"""

import argparse
import sys
from pathlib import Path

from tests.coursework.exercises import SECONDS
from tests.coursework.grade import as_json, as_text, grade, write_json
from tests.coursework.handout import make


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.coursework", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a student's copy")
    making.add_argument("out", type=Path, metavar="OUT")
    grading = commands.add_parser("grade", help="grade a student's copy")
    grading.add_argument("directory", type=Path, metavar="DIR")
    grading.add_argument(
        "--json", type=Path, nargs="?", const=Path("-"), metavar="FILE",
        help="print JSON or, with FILE, write it there beside the text that is printed",
    )  # fmt: skip
    grading.add_argument("--seconds", type=float, default=SECONDS, help="for each exercise")
    flags = parser.parse_args()
    if flags.command == "make":
        try:
            make(flags.out)
        except FileExistsError as error:
            parser.error(str(error))
        print(f"{flags.out}: begin with {flags.out / 'handout' / 'README.md'}")
        return
    if not flags.directory.is_dir():
        parser.error(f"{flags.directory} is no directory: give the one that make wrote")
    if flags.json and not flags.json.parent.is_dir():
        parser.error(f"--json {flags.json}: there is no directory {flags.json.parent}")
    if flags.json and flags.json.is_dir():
        parser.error(f"--json {flags.json}: that is a directory; give a file in it")
    grades = grade(flags.directory, flags.seconds)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may have few letters
    print(as_json(grades) if flags.json == Path("-") else as_text(grades), flush=True)
    if flags.json not in (None, Path("-")):
        try:
            write_json(grades, flags.json)
        except OSError as error:
            sys.exit(f"error: --json {flags.json}: {error.strerror}")


if __name__ == "__main__":
    main()
