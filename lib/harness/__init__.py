# SPDX-License-Identifier: GPL-2.0-only
"""pytest's side of the suite: the plugins that conftest.py lists, and what they share."""
