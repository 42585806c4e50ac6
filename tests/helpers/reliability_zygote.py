"""Forks a process for every run: it has imported everything, but JAX has not started.

    python -m tests.helpers.reliability_zygote MODULE

Requests are lines of JSON on standard input: one with arguments forks a process that calls the
module's `main` with them, one with `wait` waits for such a process; the answer is a number.
"""

import importlib
import json
import os
import signal
import sys
import traceback
import warnings


def serve(module):
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["environment"])
        # A shell that starts the tests in the background has Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.simplefilter("error")
        status = status_of(module.main, request["arguments"])
        sys.stdout.flush()
        os._exit(status)


def status_of(main, arguments):
    """What a process of its own would exit with."""
    try:
        return main(arguments) or 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, flush=True)
            return 1
        return stop.code or 0
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]))
