"""Runs of the command line by several processes, without torchrun and without the seconds that imports take.

python tests/ranks.py < JOBS.json > EXIT CODES.json

A job is `{"words": [...], "size": N, "log": FILE, "signal": NAME, "ranks": [...], "when": PATH}`: N processes run the
command, each writing to FILE.RANK; as soon as PATH exists the signal goes to these ranks. A job ends when all processes
have, or 20 s after the first that did; what still runs then is killed, and its exit code is -9.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

PATIENCE_S = 20


def child(job: dict, rank: int, port: int) -> None:
    out = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    if job["size"] > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["size"], "LOCAL_WORLD_SIZE": job["size"]}
        os.environ |= {name: str(value) for name, value in own.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 3
    try:
        from stepcredit.cli.main import main as stepcredit

        code = stepcredit(job["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(job: dict) -> list[int]:
    port, pids = free_port(), []
    for rank in range(job["size"]):
        pid = os.fork()
        if not pid:
            child(job, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    sent, ended = "signal" not in job, 0.0
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
                ended = ended or time.monotonic()
        if not sent and Path(job["when"]).exists():
            for rank in job["ranks"]:
                os.kill(pids[rank], getattr(signal, job["signal"]))
            sent = True
        if ended and time.monotonic() - ended > PATIENCE_S:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(len(pids))]


if __name__ == "__main__":
    import torch  # not above: worker processes of reward functions would import it anew

    import stepcredit.run.trainer  # noqa: F401
    from stepcredit.policy.loading import load_policy

    torch.set_num_threads(1)  # a process that forks may have no other threads
    load_policy("embedded", "cpu")
    print(json.dumps([run(job) for job in json.load(sys.stdin)]))
