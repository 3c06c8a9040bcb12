"""Points for a student's directory, from this checkout's tests: of the student's files only the
bodies of the exercises are taken, and the functions, imports and constants that they need.

Exercise k is graded on the pristine file with the student's body of exercise k alone: a mistake in
one exercise costs no other, and they can be done in any order. What is not Python in a file costs
the exercises that live in that file. An exercise has all its points or none.

The code runs as the user who grades, in a process of its own (runner.py), which is protection
against accidents and idle tricks, not a sandbox: it could read this checkout and delete files.
Where that matters, grade in a container.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.coursework import splice
from tests.coursework.exercises import EXERCISES, Exercise
from tests.coursework.mistakes import MISTAKES, Mistake

ROOT = Path(__file__).parent.parent.parent
SECONDS = 10.0  # for the tests of one exercise
MAX_FILE = 2**20
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # what starting torch may need


@dataclass(frozen=True)
class Grade:
    exercise: int
    title: str
    points: int
    of: int
    failed: str | None  # in one line; None: nothing


def read_student(directory: Path, file: str) -> str:
    path = directory / file
    if not path.is_file():
        raise ValueError(f"{file} is missing")
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{file} has {path.stat().st_size:,} bytes; {MAX_FILE:,} are read")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no UTF-8 text") from None


def job(exercise: Exercise, spliced: splice.Spliced) -> dict:
    return dict(
        file=exercise.file, module=exercise.module, tests=exercise.tests,
        source=spliced.text, origin=spliced.origin,
    )  # fmt: skip


def run(jobs: list[dict], seconds: float = SECONDS) -> list[dict]:
    """What happened in each job (runner.py), all of them from one process."""
    if not jobs:
        return []
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.coursework.runner import"
    with tempfile.TemporaryDirectory() as empty:
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= dict(HOME=empty, TMPDIR=empty, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", f"{start} main; main()"],
            input=json.dumps([jobs, seconds]), capture_output=True, text=True, cwd=empty,
            env=environment, timeout=120 + len(jobs) * (seconds + 1),
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the grader's own process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def run_apart(jobs: list[dict], seconds: float) -> list[dict]:
    """The same, where one of the jobs may end the process that runs them: then each has its own."""
    try:
        return run(jobs, seconds)
    except RuntimeError:
        if len(jobs) == 1:
            return [dict(ended="ended the grader's process")]
        return [result for job in jobs for result in run_apart([job], seconds)]


def failures_of(mistakes: Sequence[Mistake]) -> dict[Mistake, list]:
    """Of known mistakes, which tests fail and with which numbers."""
    exercises = {exercise.number: exercise for exercise in EXERCISES}
    jobs = {}
    for mistake in mistakes:
        exercise = exercises[mistake.exercise]
        text = (ROOT / exercise.file).read_text()
        wrong = splice.edited(text, mistake.function, mistake.edits)
        jobs[mistake] = job(exercise, splice.Spliced(wrong, []))
    return {mistake: r.get("failed") for mistake, r in zip(jobs, run(list(jobs.values())))}


def explained(
    exercise: Exercise, result: dict, known: dict[Mistake, list] | None = None
) -> str | None:
    """What failed, in one line: the claim, what came of it and, where the same tests fail with the
    same numbers as with a known mistake, its hint."""
    if "ended" in result:
        return result["ended"]
    if not result["failed"]:
        return None
    name, message, _ = result["failed"][0]
    if message.startswith(f"exercise {exercise.number}:"):
        return f"not written yet ({message})"
    line = f"{len(result['failed'])} of {result['tests']} tests fail; {claim(name)}: {message}"
    for mistake, fails in (known or {}).items():
        if mistake.exercise == exercise.number and fails == result["failed"]:
            return f"{line}. Hint: {mistake.hint}"
    return line


def claim(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def graded(exercise: Exercise, failed: str | None) -> Grade:
    points = 0 if failed else exercise.points
    return Grade(exercise.number, exercise.title, points, exercise.points, failed)


def grade(directory: Path, seconds: float = SECONDS) -> list[Grade]:
    """A grade for each exercise, in order."""
    broken: dict[int, str] = {}
    jobs: dict[int, dict] = {}
    for exercise in EXERCISES:
        pristine = (ROOT / exercise.file).read_text()
        try:
            text = read_student(directory, exercise.file)
            names = exercise.functions
            jobs[exercise.number] = job(
                exercise, splice.transplant(pristine, text, names, exercise.file)
            )
        except ValueError as error:
            others = [e.number for e in EXERCISES if e.file == exercise.file]
            shared = f" (exercises in this file: {', '.join(map(str, others))})"
            broken[exercise.number] = f"{error}{shared if len(others) > 1 else ''}"
    results = dict(zip(jobs, run_apart(list(jobs.values()), seconds)))
    # A wrong value, and not code that broke or was not written, may be a known mistake.
    wrong = {n for n, result in results.items() if any(w for *_, w in result.get("failed", ()))}
    known = failures_of([mistake for mistake in MISTAKES if mistake.exercise in wrong])
    return [
        graded(e, broken.get(e.number) or explained(e, results[e.number], known)) for e in EXERCISES
    ]


def as_json(grades: list[Grade]) -> str:
    total = dict(points=sum(g.points for g in grades), of=sum(g.of for g in grades))
    rows = [asdict(grade) for grade in grades]
    return json.dumps(total | dict(exercises=rows), indent=1, ensure_ascii=False) + "\n"


def as_text(grades: list[Grade]) -> str:
    rows = [f"{g.exercise:2}  {g.points:2} of {g.of:2}  {g.title}" for g in grades]
    rows = [f"{row}\n       {g.failed}" if g.failed else row for row, g in zip(rows, grades)]
    total = f"    {sum(g.points for g in grades)} of {sum(g.of for g in grades)} points"
    return "\n".join([*rows, total])
