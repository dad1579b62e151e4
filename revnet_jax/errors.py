"""The root of all errors that a person, rather than a programmer, can mend."""


class UserError(Exception):
    """Got, expected, what to do: the message is one line, and programs print it without a trace."""
