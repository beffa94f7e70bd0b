"""Programs in benchmarks/, one after the other in one process, so that torch is imported once for all of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback

Reports = dict[str, tuple[int, str, str]]
"""By module: exit status, standard output, standard error."""


def together(*programs: list[str]) -> Reports:
    """Runs each as `python -m` does; what they change of this process's arguments and environment is put back."""
    reports: Reports = {}
    arguments, environment = sys.argv, dict(os.environ)
    try:
        for module, *sys.argv[1:] in programs:
            status, out, err = 0, io.StringIO(), io.StringIO()
            imported = sys.modules.pop(f"benchmarks.{module}", None)  # which `runpy` would warn of
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    runpy.run_module(f"benchmarks.{module}", run_name="__main__", alter_sys=True)
                except SystemExit as end:
                    status = int(end.code or 0)
                except Exception:
                    status = 1
                    traceback.print_exc()
            if imported is not None:
                sys.modules[f"benchmarks.{module}"] = imported
            reports[module] = status, out.getvalue(), err.getvalue()
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
    return reports


if __name__ == "__main__":
    print(json.dumps(together(*json.loads(sys.argv[1]))))
