# SPDX-License-Identifier: GPL-2.0-only
"""KVM through its ioctls: VMs, vCPUs, guest memory and guest programs. It knows nothing of pytest or of dirty tracking."""
