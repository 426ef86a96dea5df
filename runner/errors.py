# SPDX-License-Identifier: GPL-2.0-only
"""What ends a run under another kernel before it began."""

CANNOT_TEST = 125  # the exit status that says so, as git bisect run takes it


class CannotTest(Exception):
    """The kernel cannot be tested as asked; the text is one line that says why, and what to do."""
