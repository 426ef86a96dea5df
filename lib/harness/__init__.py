# SPDX-License-Identifier: GPL-2.0-only
"""The pytest side of the suite: the plugins that conftest.py lists, and what they share."""
