"""The emulator's exceptions: a fault of the kernel, or a feature of Gluon that is not modelled."""

# Kinds of fault.
DEADLOCK = "deadlock"
WRONG_PHASE = "wrong phase"  # a wait that passed on a phase older than that of the data
OVER_ARRIVAL = "over-arrival"
UNDER_ARRIVAL = "under-arrival"
BYTE_COUNT = "byte miscount"
UNWRITTEN = "read of never-written shared memory"
NOT_AWAITED = "access without a wait"  # reads of another's write, or of a result, without synchronisation
IN_USE = "write to memory in use"
IN_FLIGHT = "operations in flight at the end"
NOT_FENCED = "missing fence"
OUT_OF_BOUNDS = "out of bounds"
RACE = "race in global memory"  # between programs, or between partitions without synchronisation
ILLEGAL = "illegal operation"  # what the hardware or the compiler would reject
ERROR = "error"  # an exception of the kernel's own code


class Fault(AssertionError):
    """A broken rule (`kind`), and where: program, partition, barrier ("" if none), step."""

    def __init__(self, kind: str, message: str, partition: str, step: int, barrier: str = "", program: tuple = ()):
        self.message = message
        self.kind, self.partition, self.step, self.barrier, self.program = kind, partition, step, barrier, program
        where = f"program {program}, {partition}, step {step}" + (f", barrier {barrier}" if barrier else "")
        super().__init__(f"{kind} ({where}): {message}")


class UnsupportedByEmulator(NotImplementedError):
    """The kernel uses a feature of Gluon that is not modelled."""
