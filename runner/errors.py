# SPDX-License-Identifier: GPL-2.0-only
"""The error that ends a run in another kernel before its first test."""

CANNOT_TEST = 125  # the exit status for it, by which git bisect run skips a commit


class CannotTest(Exception):
    """What all of this folder raises where a kernel cannot be tested; the text is one line with the reason and a remedy."""
