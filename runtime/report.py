"""report.html: a run as one page to open in any browser, without a network. It is no part of the
method.

    python rewards.py --report runs/zero      writes it for any run, also for one that goes on

It has the curves of metrics.jsonl, the tables of result.json and config.json, and the groups of
rollouts.jsonl to be read: what the policy wrote, what it earned, and its tokens' log-probs.

What a policy wrote is hostile text. It goes into the page as JSON without any "<", comes out by
textContent alone, and the page's Content-Security-Policy allows its own script, and no address.

Read next: report.html, the page itself.
"""

import hashlib
import json
import math
import struct
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from runtime import parallel
from runtime.run import UserError, write_file

PAGE = Path(__file__).with_suffix(".html")
JUDGING = 30.0  # seconds for the verdicts that a run has not kept: a program has to be run for its
MOST_TOKENS = 2_500_000  # of outputs on a page: about 23 MB
FEWEST_UPDATES = 12  # where all groups of so many don't fit, each has fewer groups
HIGHEST = 2**15 - 1  # thousandths that a log-prob may have
UNKNOWN = -(2**15)  # one that is not a number

# is_right(checker, gold answer, text, whether it ended by itself); None where no rule can tell. For
# what was written before runs kept their own verdicts.
Verdict = Callable[[str, str, str, bool], bool | None]


def write_report(out: Path, is_right: Verdict, reflective: str, reflective_zh: str) -> Path | None:
    """Write out/report.html from what is in the run's directory so far. reflective: words, as
    alternatives of a regular expression. Raises UserError on a line that can't be read."""
    if not parallel.is_main():
        return None
    vocabulary: dict[str, int] = {}
    judge = hurried(is_right, JUDGING)
    groups, left_out = read_groups(out / "rollouts.jsonl", judge, vocabulary, MOST_TOKENS)
    content = dict(
        name=out.resolve().name, written=time.strftime("%Y-%m-%d %H:%M"),
        config=read_json(out / "config.json"), result=read_json(out / "result.json"),
        phases=read_curves(out / "metrics.jsonl"), groups=groups, left_out=left_out,
        vocabulary=list(vocabulary), reflective=[reflective, reflective_zh],
    )  # fmt: skip
    write_file(out / "report.html", page(content).encode())
    return out / "report.html"


def page(content: dict) -> str:
    """The template with these data in it."""
    template = PAGE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    allowed = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # ASCII: no U+2028, no half of a surrogate pair. Without "<" nothing ends the element that it
    # is in, or begins a comment.
    data = json.dumps(plain(content), separators=(",", ":"), allow_nan=False)
    before, after = template.replace("HASH", allowed, 1).split("DATA", 1)
    return before + data.replace("<", "\\u003c") + after


def plain(value: Any) -> Any:
    """What JSON can't hold as text: an eps of inf is one."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """What a file holds, or None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path}: {error}; delete that file, or mend it") from None


def rows(path: Path) -> Iterator[tuple[int, str]]:
    """The whole lines of a file, which may still be written to, with their numbers."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from ((n, row) for n, row in enumerate(file, 1) if row.endswith("\n"))


def broken(path: Path, number: int, error: Exception, expected: str) -> UserError:
    found = f"found no {error}" if isinstance(error, KeyError) else str(error)
    return UserError(f"{path}:{number}: {found}; expected {expected}. Delete that line")


# ---- the curves ----------------------------------------------------------------------------


def read_curves(path: Path) -> list[dict]:
    """For each phase its steps and, for each number that it logged, one value a step or null. What
    is by level has keys such as "by_level/3"."""
    phases: dict[str, dict] = {}
    for number, row in rows(path):
        try:
            line = json.loads(row)
            name, step = str(line.pop("phase")), int(line.pop("step"))
            values = dict(numbers(line))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise broken(path, number, error, "an object with a phase and a step") from None
        phase = phases.setdefault(name, dict(name=name, steps=[], series={}))
        for key in values.keys() - phase["series"].keys():
            phase["series"][key] = [None] * len(phase["steps"])
        phase["steps"].append(step)
        for key, series in phase["series"].items():
            series.append(values.get(key))
    for phase in phases.values():
        phase["series"] = dict(sorted(phase["series"].items()))
    return list(phases.values())


def numbers(line: dict, before: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a line, and in the objects in it, to six digits."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{before}{key}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield before + key, float(f"{value:.6g}")


# ---- the groups ----------------------------------------------------------------------------


def read_groups(
    path: Path, is_right: Verdict, vocabulary: dict[str, int], most: int
) -> tuple[list[dict], dict]:
    """The groups that the page has, of at most so many tokens, and how many it leaves out. Tokens
    are added to the vocabulary."""
    updates: dict[tuple, list[tuple[int, int]]] = {}  # by phase and step: (line, tokens) of each
    for number, row in rows(path):
        group = parsed(path, number, row)
        tokens = sum(len(output["tokens"]) for output in group["outputs"])
        updates.setdefault((group["phase"], group["step"]), []).append((number, tokens))
    kept = spread(list(updates.values()), most)
    wanted = {number for update in kept for number, _ in update}
    groups = []
    for number, row in rows(path):
        if number in wanted:
            group = parsed(path, number, row)
            try:
                groups.append(compact(group, is_right, vocabulary))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise broken(path, number, error, "a group of outputs") from None
    total = sum(map(len, updates.values()))
    left_out = dict(updates=len(updates) - len(kept), of_updates=len(updates),
                    groups=total - len(groups), of_groups=total)  # fmt: skip
    return groups, left_out


def parsed(path: Path, number: int, row: str) -> dict:
    try:
        group = json.loads(row)
        for name in ("phase", "step", "question", "outputs"):
            group[name]
        for output in group["outputs"]:
            output["tokens"]
    except (KeyError, TypeError, ValueError) as error:
        raise broken(path, number, error, "a group of outputs") from None
    return group


def spread(updates: list[list[tuple[int, int]]], most: int) -> list[list[tuple[int, int]]]:
    """As many evenly spaced updates as have together at most so many tokens, the first and the last
    among them: these two in any case. With fewer groups each, where few updates would fit."""
    for groups in (None, 2, 1):
        shorter, count = [update[:groups] for update in updates], len(updates)
        kept = shorter
        while sum(tokens for update in kept for _, tokens in update) > most and count > 2:
            count = max(2, int(0.98 * count))
            apart = (len(shorter) - 1) / (count - 1)
            kept = [shorter[round(i * apart)] for i in range(count)]
        if count >= min(FEWEST_UPDATES, len(updates)):
            break
    return kept


def hurried(is_right: Verdict, seconds: float) -> Callable[..., bool | None | str]:
    """The same until it has taken so long together, then no verdict."""
    left = seconds

    def judged(*output) -> bool | None | str:
        nonlocal left
        if left <= 0:
            return "not judged"
        began = time.monotonic()
        verdict = is_right(*output)
        left -= time.monotonic() - began
        return verdict

    return judged


def compact(group: dict, is_right: Verdict, vocabulary: dict[str, int]) -> dict:
    """A group as the page has it: tokens by their number, log-probs in thousandths."""
    checker, gold = group.get("checker", ""), group.get("answer", "")
    outputs = []
    for output in group["outputs"]:
        tokens, logprobs = output["tokens"], output["logprobs"]
        reference = output.get("ref_logprobs")
        if not len(tokens) == len(logprobs) == len(reference or logprobs):
            raise ValueError(f"{len(tokens)} tokens have {len(logprobs)} log-probs")
        ids = [vocabulary.setdefault(t, len(vocabulary)) for t in mended(tokens, output["text"])]
        text, finished = output["text"], bool(output["finished"])
        row = dict(reward=output["reward"], advantage=output["advantage"], finished=finished)
        known = "right" in output
        right = output["right"] if known else is_right(checker, gold, text, finished)
        row |= dict(right=right, then=known, tokens=packed_ids(ids))
        row |= dict(count=len(ids), logprobs=packed_thousandths(logprobs))
        if reference:
            pairs = zip(logprobs, reference)
            ratios = [None if x is None or r is None else x - r for x, r in pairs]
            row |= dict(ratios=packed_thousandths(ratios))
        outputs.append(row)
    asked = {key: group.get(key) for key in ("phase", "step", "question", "answer", "checker")}
    return dict(asked, level=group.get("level"), outputs=outputs)


def packed_ids(ids: list[int]) -> str:
    """Three bytes each, the lowest first, as base64: a browser reads one long string faster than
    many numbers."""
    data = bytearray(struct.pack(f"<{len(ids)}I", *ids))
    del data[3::4]
    return b64encode(data).decode()


def packed_thousandths(values: Iterable[float | None]) -> str:
    """Two bytes each, the lowest first, as base64."""
    whole = [UNKNOWN if x is None else max(-HIGHEST, min(HIGHEST, round(1000 * x))) for x in values]
    return b64encode(struct.pack(f"<{len(whole)}h", *whole)).decode()


def mended(tokens: list[str], text: str) -> list[str]:
    """Where a character is spread over several tokens, each of them alone reads U+FFFD: give what
    stands there in the text to the first of them, and nothing to the others."""
    runs = [(is_broken, list(run)) for is_broken, run in groupby(tokens, lambda t: "\ufffd" in t)]
    found, at = [], 0
    for i, (is_broken, run) in enumerate(runs):
        if is_broken:
            after = runs[i + 1][1] if i + 1 < len(runs) else []
            end = text.find("".join(after), at) if after else len(text)
            if end < 0:  # its last is the stop token, which is no part of the text
                end = text.find("".join(after[:-1]), at) if after[1:] else len(text)
            if end > at:
                run = [text[at:end], *[""] * (len(run) - 1)]
        written = "".join(run)
        at = max(at, text.find(written, at) + len(written))
        found += run
    return found
