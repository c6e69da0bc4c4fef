"""The one error that is meant for the user: every refusal of bad input is an `InputError`."""


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence that says what is wrong, where, and what to do about it. Callers show it as it is;
    anything else that escapes is a bug and keeps its traceback.
    """
