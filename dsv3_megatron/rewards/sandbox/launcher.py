"""The other side of the sandbox: an empty interpreter (`python -I -S -B launcher.py JOB PIPE PARENT`) that confines
itself, runs the program and says through the pipe how it ended.

The job is a JSON file outside the folder that the program may see: program, seconds, memory_bytes, file_bytes,
readable, work (folder), nonce. A line that begins with the nonce says that the program ran to its end: leaving early
(os._exit, sys.exit) cannot write it.
"""

import contextlib
import json
import os
import sys
import types


def main():
    job_file, pipe, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(job_file) as file:
        job = json.load(file)
    nonce = job["nonce"]
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import confine

    sys.path.pop(0)

    def tell(ended, detail=""):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        word = nonce if ended in ("finished", "unsupported", "ready") else "-"
        os.write(pipe, json.dumps([word, ended, detail[:1000]]).encode() + b"\n")

    try:
        confine.die_with(parent)
        confine.drop_privileges()
        confine.restrict_files(job["readable"], [job["work"], "/dev/null"])
        confine.limit_resources(job["seconds"], job["memory_bytes"], job["file_bytes"])
        confine.restrict_calls()
    except (confine.Unsupported, OSError) as error:
        tell("unsupported", str(error))
        os._exit(1)
    tell("ready")
    sys.argv = ["program"]
    sys.path = [place for place in sys.path if place]
    for name in ("confine", "syscalls"):
        sys.modules.pop(name, None)
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    try:
        exec(compile(job.pop("program"), "<program>", "exec"), module.__dict__)
    except SystemExit as stop:
        tell("exited", str(stop.code))
    except MemoryError:
        tell("memory", "MemoryError")
    except BaseException as error:
        tell("raised", _line(error))
    else:
        tell("finished")
    os._exit(0)  # whatever threads it left


def _line(error):
    try:
        text = str(error)
    except Exception:
        text = ""
    place = ""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<program>":
            place = f" (line {step.tb_lineno})"
        step = step.tb_next
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


if __name__ == "__main__":
    main()
