# SPDX-License-Identifier: GPL-2.0-only
"""KVM's dirty tracking: log modes, what they report, workloads, and the judges. It knows nothing of pytest."""
