"""Python processes that need not import torch and transformers, which takes longer than most tests.

One process imports them, and is forked for each that is asked for: it has the arguments,
environment, folder and streams of who asked, and signals reach it. For modules that are run by
``-m``; who wants to know what an import does asks another.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]


def start(folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """The process, and an executable to be called as Python is."""
    address, launcher = folder / "python.socket", folder / "python"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forked_python", "serve", address], cwd=ROOT
    )
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {__file__} {address} "$@"\n')
    launcher.chmod(0o755)
    return server, launcher


def _ask(address: str, arguments: list[str]) -> int:
    """Have a process run, as this one: its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        while True:
            try:
                server.connect(address)
                break
            except (FileNotFoundError, ConnectionRefusedError):  # it is still importing
                time.sleep(0.05)
        asked = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(asked)
        child = int.from_bytes(server.recv(4), "big")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda caught, _: os.kill(child, caught))
        code = server.recv(1)
        return code[0] if code else 1


def _serve(address: str) -> None:
    import bench.smoke  # noqa: F401  with all that the others import
    import w2s_fast.cli  # noqa: F401

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _run(asked)
        asked.close()


def _run(asked: socket.socket) -> NoReturn:
    size, streams, *_ = socket.recv_fds(asked, 4, 3)
    text = b""
    while len(text) < int.from_bytes(size, "big"):
        text += asked.recv(1 << 16)
    arguments, environment, folder = json.loads(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked.sendall(os.getpid().to_bytes(4, "big"))
    code = 1
    try:
        option, module, *rest = arguments
        assert option == "-m", f"python {option}"
        sys.argv, sys.path[0] = [module, *rest], folder
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        asked.sendall(bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        sys.exit(_ask(sys.argv[1], sys.argv[2:]))
