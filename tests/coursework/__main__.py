"""The coursework: functions of this repository, to be written again.

python -m tests.coursework make OUT                     a student's copy, with a handout
python -m tests.coursework grade DIR [--json FILE]      points, from this checkout's tests
"""

import argparse
from pathlib import Path

from tests.coursework.grade import SECONDS, as_json, as_text, grade
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
    grading.add_argument("--json", type=Path, metavar="FILE", help="write the points there as well")
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
    grades = grade(flags.directory, flags.seconds)
    if flags.json:
        flags.json.write_text(as_json(grades))
    print(as_text(grades))


if __name__ == "__main__":
    main()
