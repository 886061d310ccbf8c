"""A process that times one rival: reads a case a line from standard input, answers with a JSON object a line. With 0
seconds it only compiles for the case."""

from __future__ import annotations

import json
import os
import sys
import traceback

from benchmarks import rivals
from benchmarks.measure import measure
from benchmarks.workloads import Case


def main() -> None:
    device, name = sys.argv[1:3]
    # Libraries that print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        rival = rivals.load(device, name)
    except ImportError as error:
        print(json.dumps({"unavailable": str(error)}), file=answers)
        return
    for line in sys.stdin:
        request = json.loads(line)
        case = Case(**request["case"])
        try:
            refusal = rival.supports(case)
            if refusal:
                answer = {"skipped": refusal}
            elif request["seconds"] == 0:
                rival.compile(case)
                answer = {}
            else:
                answer = measure(rival, case, request["seconds"])
        except Exception as error:  # a rival's failure is a result
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        rival.release()
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
