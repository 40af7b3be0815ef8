"""Servers that sample."""

from typing import Literal

from pydantic import Field

from stepcredit.section import Names, Place, Section


class ServerOptions(Section):
    urls: Names = []  # addresses of running servers, such as http://127.0.0.1:8000
    launch: bool = False  # start one on this machine, for as long as the run lasts
    python: Place | None = None  # interpreter of the environment with the server's engine; None: that of the run
    port: int = Field(0, ge=0, lt=65536)  # of the one started; 0: a free one
    args: Names = []  # further arguments of the one started
    memory: float | None = Field(
        None, gt=0, lt=1
    )  # share of its GPU for the one started; None: what the trainer leaves
    sleep: Literal["auto", "off", "1", "2"] = "auto"  # its memory is free during an update; auto: on the trainer's GPU
    transfer: Literal["auto", "folder", "nccl", "gloo"] = "auto"  # of weights: from GPU to GPU, by files, or by network
    folder: Place | None = None  # where weights are written for servers that see it; None: in this machine's memory
    timeout_s: float = Field(600.0, gt=0)  # of a request
    patience_s: float = Field(300.0, gt=0)  # how long requests are tried again
    tolerance: float | None = Field(None, gt=0)  # mean log-probability difference that ends a run; None: by the type
