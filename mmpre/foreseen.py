"""Problems that are foreseen end a command with a few lines; others are bugs, and keep their traceback."""

import os
import select
import sys
from collections.abc import Callable


def foreseen(work: Callable[[], int | None]) -> None:
    """Do some work; a problem that we foresee is told in a few lines, and the process ends with its exit code."""
    code = None
    try:
        code = work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mmpre: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError as e:
        if not _nobody_reads():
            print(f"mmpre: {told(e)}", file=sys.stderr)
            sys.exit(2)
    except MemoryError as e:
        print(f"mmpre: there is not enough memory ({told(e)}); use smaller numbers", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, RuntimeError, ImportError) as e:
        if _is_a_bug(e):
            raise
        print(f"mmpre: {told(e)}", file=sys.stderr)
        sys.exit(2)
    if code:
        sys.exit(code)


def _nobody_reads() -> bool:
    """Whether who read what is printed, such as `head`, has gone; nothing more is written then."""
    out, watched = sys.stdout.fileno(), select.poll()
    watched.register(out, 0)
    if not any(event & select.POLLERR for _, event in watched.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True


def _is_a_bug(e: BaseException) -> bool:
    """Errors of ours say what was wanted; a bare one from deep inside a library keeps its traceback."""
    kinds = (ValueError, OSError, RuntimeError, ImportError)
    if type(e) not in kinds:  # a class of our own, or a specific OSError
        return isinstance(e, RuntimeError) and type(e).__module__.split(".")[0] in ("builtins", "torch")
    frame = e.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    return not module.startswith(("mmpre", "__mp_main__", "importlib"))


def told(e: object) -> str:
    """A text without what could speak to the terminal."""
    text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(e))
    return text or repr(e)
