# SPDX-License-Identifier: GPL-2.0-only
"""What stands around a run: results as tables and files. Nothing here knows KVM."""
