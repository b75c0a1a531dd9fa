"""`python -m anymask.check.worker DEVICE THREADS`: reads jobs, a line of JSON a unit, writes a tally for each."""

from __future__ import annotations

import faulthandler
import json
import os
import sys

import torch

from anymask.check.jobs import Job, execute


def main(device: str, threads: int) -> None:
    """Run what standard input asks for until it ends, or until the GPU context is lost."""
    faulthandler.enable()
    # what kernels print goes to the log, and not between the tallies
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device if ":" in device else "cuda:0")
        # the yardstick, eager torch, sums in fp32
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for line in sys.stdin:
        for found in json.loads(line):
            tally = execute(Job.from_json(found), device)
            answers.write(json.dumps(tally.to_json()) + "\n")
            answers.flush()
            if tally.broken:
                return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
