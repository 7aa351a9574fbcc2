"""The quality campaign for paths: DiPaCo's published orderings, on text whose entropy is known.

    python -m benchmarks.quality [--seeds 5] [--lora-seeds 3] [--write]   the whole, resumed where it stopped
    python -m benchmarks.quality --short                                   the largest effects in a few minutes

Results of single arms are kept below build/quality, so that an interrupted campaign goes on; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.quality.arms import ABLATION, FULL, LORA_ARMS, SHORT, Arm
from benchmarks.quality.campaign import Job, base_settings, prepare, result
from benchmarks.quality.checks import SHORT_CHECKS, Results, measure
from benchmarks.quality.codecs import CODEC_ARMS

CACHE = Path("build/quality")


def jobs(*, seeds: int, lora_seeds: int, codec_seeds: int) -> Iterator[Job]:
    """All of the campaign, seed by seed, so that something is known of everything early."""
    for seed in range(max(seeds, lora_seeds, codec_seeds)):
        named: dict[str, Arm] = {}
        if seed < seeds:
            named |= {**FULL, **ABLATION}
        if seed < codec_seeds:
            named |= CODEC_ARMS
        if seed < lora_seeds:
            named |= LORA_ARMS
        yield from (Job(name, arm, seed) for name, arm in named.items())


def kept(folder: Path) -> Results:
    """What is in the cache."""
    todo = jobs(seeds=10, lora_seeds=10, codec_seeds=10)
    files = {(job.name, job.seed): job.file(folder) for job in todo}
    return {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}


def run_all(todo: Sequence[Job], folder: Path, *, processes: int) -> Results:
    """Run what is not there yet; results by arm and seed."""
    torch.set_num_threads(1)
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.starmap(prepare, [(settings, folder) for settings in {base_settings(job) for job in todo}], 1)
        for number, known in enumerate(pool.imap_unordered(partial(result, folder=folder), todo), 1):
            found[known["arm"], known["seed"]] = known
            print(
                f"{number}/{len(todo)} {known['arm']} seed {known['seed']}: {known['loss']:.4f}", flush=True
            )
        pool.close()  # else they are killed, and what they hold is said to leak
        pool.join()
    return found


def short(folder: Path, processes: int) -> int:
    """The largest effects; exit status 1 when a sign is wrong."""
    todo = [Job(name, arm, seed) for seed in range(2) for name, arm in SHORT.items()]
    results = run_all(todo, folder, processes=processes)
    wrong = 0
    for check in SHORT_CHECKS:
        measured = measure(check, results)
        assert measured is not None
        wrong += not measured.has_expected_sign
        print(f"{'ok   ' if measured.has_expected_sign else 'WRONG'} {measured.mean:+.4f}  {check.claim}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="the largest effects only")
    parser.add_argument("--write", action="store_true", help="replace docs/results/dipaco.md")
    parser.add_argument("--seeds", type=int, default=5, help="of kind full (default: 5)")
    parser.add_argument("--lora-seeds", type=int, default=5, help="of kind lora (default: 5)")
    parser.add_argument("--codec-seeds", type=int, default=3, help="of the table of codecs (default: 3)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="arms at once (default: all cores)"
    )
    parser.add_argument("--page-only", action="store_true", help="run nothing: a page of what was kept")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"where results are kept (default: {CACHE})"
    )
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(arguments.cache, ignore_errors=True)
    if arguments.short:
        return short(arguments.cache, arguments.processes)
    from benchmarks.quality.page import write_page

    load_before = os.getloadavg()[0]
    todo = jobs(seeds=arguments.seeds, lora_seeds=arguments.lora_seeds, codec_seeds=arguments.codec_seeds)
    if not arguments.page_only:
        run_all(list(todo), arguments.cache, processes=arguments.processes)
    results = kept(arguments.cache)
    page = write_page(results, arguments.cache, load_before=load_before)
    if arguments.write:
        (Path(__file__).parents[2] / "docs" / "results" / "dipaco.md").write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
