"""The root of all errors that a person, rather than a programmer, can mend, and what is none."""

PREEMPTED_STATUS = 75  # of a program that wants to be started again: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """Got, expected, what to do: the message is one line, and programs print it without a trace."""


class Preempted(Exception):
    """A run was told to stop and did, after saving a checkpoint: `step`. It can be resumed."""

    def __init__(self, step: int):
        super().__init__(f"preempted: saved step {step}; the same command goes on from there")
        self.step = step
