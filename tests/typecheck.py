"""The run-time type checker of the tests: every annotated function of moejax, but not the constructors of records.

A record's constructor also runs when a tree is rebuilt with other leaves (specs, None, float0), where its field
annotations do not hold: records are checked where functions take and return them.
"""

import beartype


def functions_only(function, *args, **kwargs):
    """`beartype.beartype`, but for constructors."""
    return function if function.__name__ == "__init__" else beartype.beartype(function, *args, **kwargs)
