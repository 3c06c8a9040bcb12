"""The paper's claims at toy scale, each with a verdict: shown, not shown here, contradicted.

    python -m bench.claims                       which there are, and what has been run
    python -m bench.claims accuracy ppo          reproduce two of them: three seeds, 2 CPU cores
    python -m bench.claims all --jobs 4          all, four runs at a time with a thread each
    python -m bench.claims --table               README's table, of what is in bench/results/claims

Ctrl-C stops; the same command goes on. Runs are in runs/claims, with a log beside each; runs/zero-S
(the default run of each seed, from whose base all others start) is made where it is missing.
A claim leaves bench/results/claims/NAME: row.json, metrics.json, figure.png. How a verdict comes
about is in claim.py.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.claims import credit, growth, objective, stages
from bench.claims.claim import Claim, keep, table
from bench.claims.jobs import Job, Lab, in_order, minutes, missing, run_all
from runtime.flags import UserError, nearest

CLAIMS: list[Claim] = [*growth.CLAIMS, *objective.CLAIMS, *credit.CLAIMS, *stages.CLAIMS]
LONGEST = 15  # minutes of a claim on two cores, beyond the default runs


def jobs_of(claim: Claim, lab: Lab) -> list[Job]:
    return in_order([job for seed in lab.seeds for job in claim.runs(lab, seed).values()])


def own(jobs: Sequence[Job], lab: Lab) -> list[Job]:
    """Without the default runs, which all claims share."""
    shared = {lab.zero(seed).out for seed in lab.seeds}
    return [job for job in jobs if job.out not in shared]


def state(claim: Claim, lab: Lab) -> str:
    jobs = jobs_of(claim, lab)
    if (lab.results / claim.name / "row.json").exists():
        return "run"
    return "partly" if any(job.done for job in jobs) else "not yet"


def listing(lab: Lab, at_once: int) -> str:
    lines = []
    for claim in CLAIMS:
        took = minutes(own(jobs_of(claim, lab), lab), at_once)
        lines.append(f"{claim.name:<13}{state(claim, lab):<8}{took:>3.0f} min  {claim.states}")
    zeros = minutes([lab.zero(seed) for seed in lab.seeds], at_once)
    lines.append(f"Most start from the bases of runs/zero-0 to -2: {zeros:.0f} min, once.")
    return "\n".join(lines)


def chosen(names: Sequence[str]) -> list[Claim]:
    known = {claim.name: claim for claim in CLAIMS}
    for name in names:
        if name not in (*known, "all"):
            expected = f"expected {', '.join(known)} or all"
            raise UserError(f"no claim {name!r}{nearest(name, [*known])}; {expected}")
    return CLAIMS if "all" in names else [known[name] for name in dict.fromkeys(names)]


def reproduce(claims: Sequence[Claim], lab: Lab, at_once: int, start=None) -> list[str]:
    """Run what is missing and keep the rows; what failed."""
    jobs, failed = [], []
    for claim in claims:
        try:
            missing(mine := jobs_of(claim, lab))
            jobs += mine
        except UserError as error:
            print(f"{claim.name}: {error}", flush=True)
            failed.append(claim.name)
    jobs = in_order(jobs)
    todo = missing(jobs)
    took = minutes(todo, at_once)
    print(f"{len(todo)} of {len(jobs)} runs to make, about {took:.0f} min with {at_once} at a time"
          " on as many quiet cores", flush=True)  # fmt: skip
    failed += run_all(jobs, at_once, **({"start": start} if start else {}))
    for claim in claims:
        if all(job.done for job in jobs_of(claim, lab)):
            try:
                row = keep(claim, lab)
            except FileNotFoundError as error:  # runs of an older version
                print(f"{claim.name}: no {error.filename}; delete that run, and it is made again")
                failed.append(claim.name)
                continue
            print(f"\n{claim.states}\n  paper: {row['paper']}\n  here: {row['ours']}\n"
                  f"  {row['verdict']}: {row['reason']}", flush=True)  # fmt: skip
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.claims", description="The paper's claims at toy scale, with verdicts"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims, or all (none: list them)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--table", action="store_true", help="only print README's table")
    # Every run a few updates long, from this base, in a temporary folder: whether it runs.
    parser.add_argument("--smoke", type=Path, metavar="BASE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    lab = Lab()
    try:
        if given.jobs < 1:
            raise UserError(f"--jobs {given.jobs}: at least 1")
        if given.table:
            return print(table(CLAIMS, lab.results))
        if not given.names:
            return print(listing(lab, given.jobs))
        if given.smoke:
            place = Path(tempfile.mkdtemp(prefix="claims-"))
            lab = Lab(place / "runs", place / "results", (0,), given.smoke)
            print(f"smoke test in {place}")
        failed = reproduce(chosen(given.names), lab, given.jobs)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
