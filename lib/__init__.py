# SPDX-License-Identifier: GPL-2.0-only
"""A ``kvm_util``-style library: build VMs through KVM's ioctls, run guest code in them, and check what KVM tracked."""
