"""The console: plain lines into a file, and on a terminal a bar that hides none of them."""

import os
import pty
import re
import subprocess
import sys

from tests.train.records.lines import TIME, without_times

SHOW = """
import sys
from pathlib import Path
from jllm.train.records.metrics import Recorder
recorder = Recorder(None, enabled=True, total_steps=4, first_step=2, steps_per_print=2)
recorder.say("going on")
for step in (2, 3, 4):
    recorder.train(dict(step=step, epoch=step / 4, loss=1 / step, lr=1e-3, grad_norm=0.5, tokens_per_second=100.0,
                        mfu=None, data_wait=0.0, memory_mib=[100], seconds=1.0))
recorder.evaluation(dict(step=4, name="held-out", eval_loss=2.0, perplexity=7.4, accuracy=0.5, eval_tokens=10,
                         seconds=1))
recorder.close()
"""


def test_plain_lines() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, timeout=60)
    assert all(re.match(TIME, line) for line in done.stdout.splitlines())
    lines = without_times(done.stdout)
    assert lines[0] == "going on"
    assert [line.split("  ")[:2] for line in lines[1:3]] == [["step 2/4", "loss 0.5000"], ["step 4/4", "loss 0.2500"]]
    assert lines[3].startswith("evaluation on held-out after step 4/4  loss 2.0000")
    assert "\x1b" not in done.stdout


def test_a_terminal_has_a_bar_and_the_same_lines() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", SHOW], stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    for part in ("going on", "step 2/4  loss 0.5000", "step 4/4  loss 0.2500", "evaluation on held-out", "4/4", "━"):
        assert part in text
