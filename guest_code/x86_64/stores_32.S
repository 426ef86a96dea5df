# SPDX-License-Identifier: GPL-2.0-only
#
# Stores to addresses that the host lists, once for each time that it resumes the vCPU; in 32-bit protected mode, paged or not.

	.include "guest.inc"

# The vCPU's block (%edi): the number of addresses, and the addresses, of 32 bits each
	.code32
	.globl guest_main
guest_main:
	mov (%edi), %ecx
	mov %edi, %esi
next:
	add $4, %esi
	mov (%esi), %eax
	mov %ecx, (%eax)
	dec %ecx
	jnz next
	ucall UCALL_SYNC
	jmp guest_main
