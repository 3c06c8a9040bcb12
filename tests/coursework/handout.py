"""The student's copy of the repository, and its handout: a page for each exercise, made from the
source (signature, docstring, equations), its tests (their names are claims) and exercises.py."""

import ast
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from tests.coursework import splice
from tests.coursework.exercises import EXERCISES, Exercise

ROOT = Path(__file__).parent.parent.parent
# Of the checkout, where models, runs and grades may lie as well.
COPIED = ("*.py", "*.md", "LICENSE", "pyproject.toml", ".gitignore", "bench", "data", "kernels",
          "runtime", "tests")  # fmt: skip
# Of its tests: the others need the bodies, or give them away.
COPIED_TESTS = ("conftest.py", "coursework")
GRADER = ("__main__.py", "grade.py", "handout.py", "mistakes.py", "runner.py", "splice.py")
EQUATION = re.compile(r"# *((?:R1|V3|DeepSeekMath|DAPO|Dr\. GRPO)\b.*)")


def make(out: Path) -> None:
    """Raises FileExistsError where OUT has something in it already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty: give a directory that is new")

    def left_out(directory: str, names: list[str]) -> set[str]:
        place = Path(directory)
        wanted = {ROOT: COPIED, ROOT / "tests": COPIED_TESTS}.get(place, ("*",))
        kept = {name for name in names if any(fnmatch(name, pattern) for pattern in wanted)}
        dropped = {"__pycache__", *(GRADER if place.name == "coursework" else ())}
        return {n for n in names if n not in kept or n in dropped or place / n == out.resolve()}

    shutil.copytree(ROOT, out, ignore=left_out, dirs_exist_ok=True)
    for file in dict.fromkeys(exercise.file for exercise in EXERCISES):
        (out / file).write_text(blanked(file))
    write_handout(out / "handout")


def blanked(file: str) -> str:
    """The file without the bodies of its exercises."""
    notes = {}
    for exercise in EXERCISES:
        if exercise.file == file:
            page = f"handout/{exercise.page}"
            note = f"Exercise {exercise.number} ({page}). {exercise.shapes}"
            error = f"exercise {exercise.number}: {exercise.title}"
            notes |= {name: (wrapped(note), error) for name in exercise.functions}
    return splice.blank((ROOT / file).read_text(), notes)


def wrapped(text: str, width: int = 90) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def write_handout(directory: Path) -> None:
    directory.mkdir()
    (directory / "README.md").write_text(index())
    for exercise in EXERCISES:
        (directory / exercise.page).write_text(page(exercise))


def where(exercise: Exercise) -> str:
    return f"`{exercise.file}`: {', '.join(f'`{name}`' for name in exercise.functions)}"


def index() -> str:
    rows = [
        f"| {e.number} | [{e.title}]({e.page}) | {where(e)} | {e.paper} | {e.points} |"
        for e in EXERCISES
    ]
    total = sum(exercise.points for exercise in EXERCISES)
    return "\n".join([
        "# Coursework", "",
        "Each exercise is a function of this repository whose body is missing. They can be done"
        " in any order: the tests of one need no other. Read the file's docstring first.",
        "", "| | exercise | where | paper | points |", "|---|---|---|---|---|", *rows,
        f"| | | | | {total} |", "",
        "```bash", 'pip install -e ".[test]"',
        "python -m pytest -m exercise_3    # one exercise",
        "python -m pytest                  # all",
        "```", "",
        "**How it is graded.** The instructor's tests, which are those in `tests/coursework`, run"
        " on the instructor's files with only your body of the exercise in them, and with the"
        " functions, imports and constants that you added to the same file and that it uses. Keep"
        " names and arguments as they are; new files and changes elsewhere are not read. A file"
        " that is no Python costs all exercises in that file, and no other. An exercise has all its"
        " points or none, 10 seconds, and 1 GB beyond what torch takes. No GPU is needed.", "",
    ])  # fmt: skip


def equations(exercise: Exercise) -> list[str]:
    """Those that stand in the bodies, as comments."""
    text = (ROOT / exercise.file).read_text()
    bodies = "\n".join(splice.body(text, name) for name in exercise.functions)
    return EQUATION.findall(bodies)


def claims(exercise: Exercise) -> list[str]:
    tree = ast.parse(Path(__file__).with_name(exercise.tests).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [n.removeprefix("test_").replace("_", " ") for n in names if n.startswith("test_")]


def page(exercise: Exercise) -> str:
    text = (ROOT / exercise.file).read_text()
    signatures = []
    for name in exercise.functions:
        docstring = ast.get_docstring(splice.find(splice.tree_of(text), name))
        quoted = [f'"""{docstring}"""'.replace("\n", "\n    ")] if docstring else []
        owner = [f"# of {name.rpartition('.')[0]}"] if "." in name else []
        lines = [*owner, "\n    ".join([splice.signature(text, name), *quoted])]
        signatures.append("\n".join(line.rstrip() for line in "\n".join(lines).splitlines()))
    points = f"{exercise.points} points"
    return "\n".join([
        f"# Exercise {exercise.number}: {exercise.title} ({points})", "",
        f"{where(exercise)}. In the paper: {exercise.paper}.", "",
        exercise.text.strip(), "",
        "```", exercise.equation.strip("\n"), "```", "",
        *([f"As the source has it: {'; '.join(f'`{line}`' for line in equations(exercise))}.", ""]
          if equations(exercise) else []),
        f"**Shapes.** {exercise.shapes} The letters are those at the top of `model.py`.", "",
        "```python", "\n\n".join(signatures), "```", "",
        "**What everyone gets wrong**", "", *[f"- {hint}" for hint in exercise.hints], "",
        f"**How it is graded.** `python -m pytest -m exercise_{exercise.number}` runs the tests."
        " Each is a claim; all must hold:", "",
        *[f"- {claim}" for claim in claims(exercise)], "",
    ])  # fmt: skip
