"""`make soak`: a two-rank run killed at random moments, whatever it is doing, for hours if need be.

RSFAST_SOAK_KILLS says how often (100). Unlike the tests, which kill between steps, this also hits
start-up, validation, and the middle of a checkpoint's writing.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import environment, make_image_folder
from run_helpers import assert_same_run

KILLS = int(os.environ.get("RSFAST_SOAK_KILLS", "100"))
# Five epochs of five steps are about what a process trains before it is killed.
RUN = """-m rsfast.train --arch tiny:network --resolutions 32 24 --batch-size 3 --lr 0.01 --seed 3
    --log-every 3 --loader pil --workers 0 --checkpoint-every 2 --resume auto"""
LAUNCHER = "-m torch.distributed.run --standalone --nproc-per-node=2"


def launch(folder: Path, output: Path) -> subprocess.Popen:
    arguments = f"{LAUNCHER} {RUN} --epochs {5 * KILLS} --data {folder} --output {output}".split()
    with open(output.with_suffix(".txt"), "a") as said:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def test_any_moment(tmp_path: Path) -> None:
    folder = make_image_folder(tmp_path / "images", train=15, val=4)
    assert launch(folder, tmp_path / "whole").wait() == 0
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng, kills = random.Random(seed), 0
    while True:
        process = launch(folder, tmp_path / "killed")
        patience = rng.uniform(3, 20) if kills < KILLS else None
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.5)  # until the ranks, in sessions of their own, have met the end
            subprocess.run(["pkill", "-9", "-f", str(tmp_path / "killed")], check=False)
            kills += 1
            print(f"killed {kills} times", flush=True)
            continue
        assert code == 0, (tmp_path / "killed.txt").read_text()[-3000:]
        break
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    print(f"the same after {kills} kills")
