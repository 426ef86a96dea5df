# SPDX-License-Identifier: GPL-2.0-only
"""pytest's side of the suite: options, the matrix, fixtures, verdicts and reports."""
